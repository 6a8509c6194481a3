"""A run's saves as a timeline in Chrome's trace format, which https://ui.perfetto.dev and chrome://tracing open.

`TraceFile` is a sink. One process per rank, two tracks for each run in it: the training thread (wait, stage, restore)
and the writer (copy, write, wait for ranks, commit, prune); what failed or was skipped is a mark. The file is an array
that needs no end, so it is whole at every moment. Format: "Trace Event Format", complete ("X"), instant ("i") and
metadata ("M") events, times in microseconds.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

from asyncckpt import events
from asyncckpt.event_file import LineFile
from asyncckpt.events import Event

TRAINING, WRITER = 0, 1


class TraceFile:
    """A sink: `TraceFile("trace.json")` on rank 3 writes `trace-3.json`, and goes on with it after a restart.

    Every event is in the file when it is over. To see all ranks at once:
    `(echo '['; tail -qn +2 trace-*.json) > all.json`.
    path: of a local file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._stem, self._suffix = os.path.splitext(os.fspath(path))
        self._lock = threading.Lock()  # of the rest
        self._file: LineFile | None = None
        self._tracks: dict[tuple[str, int], int] = {}
        self._ends: dict[int, float] = {}
        self._written: dict[tuple[str, int], float] = {}

    def __call__(self, event: Event) -> None:
        with self._lock:
            if self._file is None:
                self._file = LineFile(f"{self._stem}-{event.rank}{self._suffix or '.json'}", b"[\n")
                self._put(event, "M", "process_name", 0, args={"name": f"rank {event.rank}"})
            self._draw(event)

    def _draw(self, event: Event) -> None:
        end = event.time_s
        match event:
            case events.Staged():
                begun = end - event.stall_s
                self._span(event, TRAINING, "wait", begun, begun + event.wait_s)
                self._span(event, TRAINING, "stage", begun + event.wait_s, end, num_bytes=event.num_bytes)
            case events.Written():
                copied = end - event.write_s
                self._span(event, WRITER, "copy", copied - event.copy_s, copied)
                self._span(event, WRITER, "write", copied, end, num_bytes=event.num_bytes, client=event.client)
                self._written[event.url, event.step] = end
            case events.Committed():
                committing = end - event.commit_s
                agreeing = self._written.pop((event.url, event.step), committing)
                self._span(event, WRITER, "wait for ranks", agreeing, committing)
                self._span(
                    event, WRITER, "commit", committing, end, num_bytes=event.num_bytes, durable_s=event.durable_s
                )
            case events.Pruned():
                self._span(event, WRITER, "prune", end - event.prune_s, end, num_files=event.num_files)
            case events.Restored():
                self._span(event, TRAINING, "restore", end - event.restore_s, end, num_bytes=event.num_bytes)
            case events.Failed():
                self._written.pop((event.url, event.step), None)
                self._mark(event, f"{event.phase} failed", error=f"{type(event.error).__name__}: {event.error}")
            case events.Delayed():
                self._mark(event, f"late in {event.phase}", ranks=event.ranks, waited_s=event.waited_s)
            case events.Skipped():
                self._mark(event, "skipped", reason=event.reason)
            case _:
                self._mark(event, type(event).__name__)

    def _span(self, event: Event, thread: int, name: str, begin: float, end: float, **args: Any) -> None:
        """Durations are of another clock than times, which may be set: spans of a track must not overlap."""
        track = self._track(event, thread)
        begin = max(begin, self._ends.get(track, begin))
        if _us(end) > _us(begin):
            self._ends[track] = end
            times = {"ts": _us(begin), "dur": _us(end) - _us(begin)}
            self._put(event, "X", name, track, **times, args={"step": event.step, **args})

    def _mark(self, event: Event, name: str, **args: Any) -> None:
        track = self._track(event, WRITER)
        self._put(event, "i", name, track, ts=_us(event.time_s), s="p", args={"step": event.step, **args})

    def _track(self, event: Event, thread: int) -> int:
        number = self._tracks.get((event.url, thread))
        if number is None:
            number = self._tracks[event.url, thread] = len(self._tracks) + 1
            self._put(event, "M", "thread_name", number, args={"name": f"{('training', 'writer')[thread]} {event.url}"})
        return number

    def _put(self, event: Event, kind: str, name: str, track: int, **members: Any) -> None:
        assert self._file is not None
        text = json.dumps({"ph": kind, "name": name, "cat": "asyncckpt", "pid": event.rank, "tid": track, **members})
        self._file.add(text.encode() + b",\n")


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
