"""Saves as Prometheus metrics, which the user's own server exports. Needs `pip install 'asyncckpt[prometheus]'`."""

from __future__ import annotations

import threading
import weakref

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from asyncckpt import events
from asyncckpt.events import Event

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_LABELS = ("url", "rank")


class _Metrics:
    """One set for a registry, which refuses a second one of the same names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"asyncckpt_{name}", text, (*_LABELS, *labels), registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"asyncckpt_{name}", text, _LABELS, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"asyncckpt_{name}_seconds", text, _LABELS, registry=registry, buckets=_SECONDS)

        self.stall = seconds("save_stall", "For how long a save held up the training thread before its copy was taken")
        self.durable = seconds("save_durable", "From the call of a save until its step was committed")
        self.write = seconds("save_write", "Writing of this rank's files")
        self.restore = seconds("restore", "Restores")
        self.commits = counter("commits", "Steps that became whole and visible")
        self.written = counter("written_bytes", "Bytes that this rank wrote")
        self.restored = counter("restored_bytes", "Bytes that this rank read in restores")
        self.failures = counter("failures", "Saves, restores and deletions that failed", "phase")
        self.skipped = counter("skipped_saves", "Saves that were due and did not happen")
        self.delays = counter("delays", "Times that ranks were late while others waited", "phase")
        self.pruned = counter("pruned_steps", "Steps that retention deleted")
        self.last_step = gauge("last_committed_step", "The step committed last")
        self.last_time = gauge("last_commit_timestamp_seconds", "When it was committed")
        self.last_bytes = gauge("last_commit_bytes", "Bytes of all ranks' files in it")


_metrics_of: weakref.WeakKeyDictionary[CollectorRegistry, _Metrics] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class PrometheusSink:
    """A sink: counters, histograms and gauges named `asyncckpt_...`, with the labels url (without credentials), rank.

    Any number of sinks and managers share the metrics of one registry.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        with _lock:
            if registry not in _metrics_of:
                _metrics_of[registry] = _Metrics(registry)
            self._metrics = _metrics_of[registry]

    def __call__(self, event: Event) -> None:
        metrics, labels = self._metrics, (event.url, str(event.rank))
        match event:
            case events.Staged():
                metrics.stall.labels(*labels).observe(event.stall_s)
            case events.Written():
                metrics.write.labels(*labels).observe(event.write_s)
                metrics.written.labels(*labels).inc(event.num_bytes)
            case events.Committed():
                metrics.commits.labels(*labels).inc()
                metrics.durable.labels(*labels).observe(event.durable_s)
                metrics.last_step.labels(*labels).set(event.step)
                metrics.last_time.labels(*labels).set(event.time_s)
                metrics.last_bytes.labels(*labels).set(event.num_bytes)
            case events.Pruned() if event.whole:
                metrics.pruned.labels(*labels).inc()
            case events.Restored():
                metrics.restore.labels(*labels).observe(event.restore_s)
                metrics.restored.labels(*labels).inc(event.num_bytes)
            case events.Failed():
                metrics.failures.labels(*labels, event.phase).inc()
            case events.Delayed():
                metrics.delays.labels(*labels, event.phase).inc()
            case events.Skipped():
                metrics.skipped.labels(*labels).inc()
