"""Bytes from source tensors into views of a slab: now, or when asked for; the only file that knows streams and events.

Copies from devices with streams are enqueued and end with an event; all others are complete on return.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from stagers.base import StagingError

STREAM_DEVICES = ("cuda", "xpu")
_is_cpu = attrgetter("is_cpu")


class SideStreams:
    """One stream per device beside the one that trains, made when first needed."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def after_current(self, device: torch.device) -> torch.Stream:
        """The side stream of `device`, behind all work queued on its current stream so far."""
        stream = self._streams.get(device)
        if stream is None:
            # On the training thread: made elsewhere, it could be the stream that trains (a note in DefaultStager).
            stream = self._streams[device] = torch.Stream(device=device)
        stream.wait_stream(torch.accelerator.current_stream(device))
        return stream


def copy(views: Sequence[Tensor], sources: Sequence[Tensor], side: SideStreams | None = None) -> list[torch.Event]:
    """Copy `sources` as they are at this point of the program; wait for the events before reading `views`.

    Without `side`, device copies go into the current stream: work queued later finds them done, so it may change the
    sources. With `side` they run beside later work, which must not change the sources before the events.
    """
    events: list[torch.Event] = []
    try:
        for device, mine in _by_device(sources).items():
            events += _copy_from(device, [views[i] for i in mine], [sources[i] for i in mine], side)
    except BaseException:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # copies queued before the failure still write to the views
        raise
    return events


def _by_device(sources: Sequence[Tensor]) -> dict[torch.device, Sequence[int]]:
    if sources and all(map(_is_cpu, sources)):  # a tenth of what it takes to ask for and compare devices
        return {torch.device("cpu"): range(len(sources))}
    devices = {source.device for source in sources}
    if len(devices) == 1:
        return {devices.pop(): range(len(sources))}
    return {device: [i for i, source in enumerate(sources) if source.device == device] for device in devices}


def _copy_from(
    device: torch.device, views: list[Tensor], sources: list[Tensor], side: SideStreams | None
) -> list[torch.Event]:
    if device.type not in STREAM_DEVICES:
        torch._foreach_copy_(views, sources)
        return []
    if side is None:
        torch._foreach_copy_(views, sources, non_blocking=True)
        return [torch.accelerator.current_stream(device).record_event()]
    stream = side.after_current(device)
    with stream:
        torch._foreach_copy_(views, sources, non_blocking=True)
    return [stream.record_event()]


def copy_bytes(view: Tensor, source: Tensor, start: int, stop: int) -> None:
    """The bytes [start, stop) of dense CPU tensors of one layout, on this thread and without the GIL; `copy_` would
    start another team of intra-op threads."""
    ctypes.memmove(view.data_ptr() + start, source.data_ptr() + start, stop - start)


class Borrowed:
    """Copies from CPU tensors that are made by whoever waits for them.

    places: where each of `views` begins in the slab, ascending. The sources are dense, are kept alive, and must stay
    unchanged until `result` has returned.
    """

    def __init__(self, places: Sequence[int], views: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._places = places
        self._views = views
        self._sources = [source.detach() for source in sources]
        self._copied = [0] * len(sources)  # bytes, from the front
        self._lock = threading.Lock()  # a copy never runs on after `end`
        self._is_over = False
        self._is_torn = False

    def complete(self, start: int, stop: int) -> None:
        """Copy what lies in the bytes [start, stop) of the slab, if it is not there yet. StagingError: `result` was
        interrupted, so that the sources may have changed."""
        first = max(0, bisect_right(self._places, start) - 1)
        for i in range(first, bisect_left(self._places, stop)):
            with self._lock:
                self._copy(i, stop - self._places[i])
        if self._is_torn:
            raise StagingError("waiting for the copy was interrupted: it must not be used. The source is unchanged.")

    def _copy(self, i: int, stop: int) -> None:
        start, stop = self._copied[i], min(stop, self._sources[i].nbytes)
        if start < stop and not self._is_over:
            copy_bytes(self._views[i], self._sources[i], start, stop)
            self._copied[i] = stop

    def result(self) -> None:
        """All of it."""
        try:
            self.complete(0, sys.maxsize)
        except BaseException:
            self._is_torn = True
            raise

    def end(self) -> None:
        """Nothing is copied from here on: the slab may be lent again."""
        with self._lock:
            self._is_over = True
