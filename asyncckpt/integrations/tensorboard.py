"""Saves as scalars in TensorBoard. Needs `pip install 'asyncckpt[tensorboard]'`; calls nothing but SummaryWriter."""

from __future__ import annotations

import threading

from torch.utils.tensorboard import SummaryWriter

from asyncckpt import events
from asyncckpt.events import Event

PREFIX = "asyncckpt"


class TensorBoardSink:
    """A sink: stall, times, rates and sizes by step, and what failed or was skipped as text.

    The events of rank 0 alone, which hears of every save and every failure; others' sinks make no file.
    writer: a SummaryWriter, which stays the caller's to close, or a folder (any URL that TensorBoard knows), for which
    one is made at the first event. It is flushed after each commit and each failure.
    """

    def __init__(self, writer: SummaryWriter | str) -> None:
        self._writer = writer
        self._lock = threading.Lock()  # events come from two threads

    def __call__(self, event: Event) -> None:
        if event.rank == 0:
            with self._lock:
                self._report(event)

    def close(self) -> None:
        """Let go of the files. One that comes afterwards opens them anew."""
        if isinstance(self._writer, SummaryWriter):
            self._writer.close()

    def _report(self, event: Event) -> None:
        match event:
            case events.Staged():
                self._scalar(event, "wait_s", event.wait_s)
                self._scalar(event, "stall_s", event.stall_s)
            case events.Written():
                self._scalar(event, "write_s", event.write_s)
                self._scalar(event, "write_MB_per_s", event.num_bytes / 1e6 / max(event.write_s, 1e-9))
            case events.Committed():
                self._scalar(event, "durable_s", event.durable_s)
                self._scalar(event, "MB", event.num_bytes / 1e6)
                self._open().flush()
            case events.Restored():
                self._scalar(event, "restore_s", event.restore_s)
                self._scalar(event, "restored_MB", event.num_bytes / 1e6)
            case events.Failed():
                self._text(event, "failed", f"{event.phase}: {type(event.error).__name__}: {event.error}")
            case events.Skipped():
                self._text(event, "skipped", event.reason)
            case events.Delayed():
                self._text(event, "late", f"{event.phase}: ranks {list(event.ranks)} for {event.waited_s:.0f} s")

    def _scalar(self, event: Event, name: str, value: float) -> None:
        self._open().add_scalar(f"{PREFIX}/{name}", value, event.step, walltime=event.time_s)

    def _text(self, event: Event, name: str, text: str) -> None:
        # indented: TensorBoard reads Markdown, and an error is not
        self._open().add_text(f"{PREFIX}/{name}", f"    {text}", event.step, walltime=event.time_s)
        self._open().flush()

    def _open(self) -> SummaryWriter:
        if isinstance(self._writer, str):
            self._writer = SummaryWriter(self._writer)
        return self._writer
