"""Saves as OpenTelemetry spans and metrics. Needs `opentelemetry-api`; what exports them is the user's SDK.

A save is one span, from the call to the commit, and below it `stage` (the training thread), `copy`, `write` and
`commit` (the writer). Names and units follow the semantic conventions: seconds ("s") and bytes ("By"), `error.type`.
"""

from __future__ import annotations

import threading

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import Histogram, MeterProvider
from opentelemetry.trace import Span, Status, StatusCode, TracerProvider

from asyncckpt import events
from asyncckpt.events import Event
from asyncckpt.version import __version__

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class OpenTelemetrySink:
    """A sink. The span of a save is a child of the span that is current when it is taken, if there is one.

    tracer_provider, meter_provider: in place of the global ones.
    """

    def __init__(
        self, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer("asyncckpt", __version__, tracer_provider)
        self._meter = meter = metrics.get_meter("asyncckpt", __version__, meter_provider)
        self._stall = self._seconds("save.stall.duration", "How long a save held up the training thread")
        self._save = self._seconds("save.duration", "From the call of a save to the commit, or to its failure")
        self._restore = self._seconds("restore.duration", "Restores")
        self._written = meter.create_counter("asyncckpt.written", "By", "Bytes that this rank wrote")
        self._read = meter.create_counter("asyncckpt.restored", "By", "Bytes that this rank read in restores")
        self._failed = meter.create_counter("asyncckpt.failures", "{failure}", "What failed, by phase")
        self._skipped = meter.create_counter("asyncckpt.skipped", "{save}", "Saves that were due and did not happen")
        self._lock = threading.Lock()  # of the next
        self._saves: dict[tuple[str, int], tuple[Span, float]] = {}

    def __call__(self, event: Event) -> None:
        end = event.time_s
        match event:
            case events.Staged():
                self._stall.record(event.stall_s, _labels(event))
                span = self._begin(event, "asyncckpt.save", end - event.stall_s)
                with self._lock:
                    self._saves[event.url, event.step] = span, end - event.stall_s
                self._child(event, span, "asyncckpt.stage", end - event.stall_s, end, event.num_bytes)
            case events.Written():
                self._written.add(event.num_bytes, _labels(event))
                copied = end - event.write_s
                if (found := self._of(event)) is not None:
                    self._child(event, found[0], "asyncckpt.copy", copied - event.copy_s, copied)
                    self._child(event, found[0], "asyncckpt.write", copied, end, event.num_bytes)
            case events.Committed():
                self._save.record(event.durable_s, _labels(event))
                if (found := self._of(event, is_over=True)) is not None:
                    self._child(event, found[0], "asyncckpt.commit", end - event.commit_s, end, event.num_bytes)
                    found[0].end(_ns(end))
            case events.Restored():
                self._restore.record(event.restore_s, _labels(event))
                self._read.add(event.num_bytes, _labels(event))
                span = self._begin(event, "asyncckpt.restore", end - event.restore_s)
                span.set_attribute("asyncckpt.size", event.num_bytes)
                span.end(_ns(end))
            case events.Failed():
                self._fail(event)
            case events.Skipped():
                self._skipped.add(1, _labels(event))

    def _fail(self, event: events.Failed) -> None:
        """In the span of the save, or, where there is none (restore, prune), in one of its own without length."""
        kind = {"asyncckpt.phase": event.phase, "error.type": type(event.error).__qualname__}
        self._failed.add(1, {**_labels(event), **kind})
        found = self._of(event, is_over=True) if event.phase in ("write", "commit") else None
        if found is None:
            found = self._begin(event, f"asyncckpt.{event.phase}", event.time_s), event.time_s
        else:
            self._save.record(event.time_s - found[1], {**_labels(event), **kind})
        span = found[0]
        span.set_attributes(kind)
        span.record_exception(event.error, timestamp=_ns(event.time_s))
        span.set_status(Status(StatusCode.ERROR, str(event.error)))
        span.end(_ns(event.time_s))

    def _of(self, event: Event, *, is_over: bool = False) -> tuple[Span, float] | None:
        key = event.url, event.step
        with self._lock:
            return self._saves.pop(key, None) if is_over else self._saves.get(key)

    def _begin(self, event: Event, name: str, begin: float, parent: Context | None = None) -> Span:
        attributes = {"asyncckpt.step": event.step, **_labels(event)}
        return self._tracer.start_span(name, parent, attributes=attributes, start_time=_ns(begin))

    def _child(self, event: Event, of: Span, name: str, begin: float, end: float, num_bytes: int | None = None) -> None:
        span = self._begin(event, name, begin, trace.set_span_in_context(of))
        if num_bytes is not None:
            span.set_attribute("asyncckpt.size", num_bytes)
        span.end(_ns(end))

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._meter.create_histogram(
            f"asyncckpt.{name}", "s", text, explicit_bucket_boundaries_advisory=_SECONDS
        )


def _labels(event: Event) -> dict[str, str | int]:
    return {"asyncckpt.url": event.url, "asyncckpt.rank": event.rank}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
