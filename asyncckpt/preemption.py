"""SIGTERM as a request to save, the seconds until SIGKILL, and whether a save fits into them.

A preempted machine gets SIGTERM and some seconds of grace. Python runs a signal handler on the main thread, between
two bytecodes: a main thread that sits in one long C call (a collective, a blocking copy) is told only afterwards.
Knows nothing of steps or storage, and talks to no rank: the manager says what to call, and has the ranks agree.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class SigtermHandler:
    """From construction to `uninstall()`, SIGTERM calls `on_signal()` on the main thread instead of ending the process.

    on_signal: must be safe inside a signal handler, so it takes no lock and does no I/O (`SyncPoint.request` is made
    for it). `received` says whether a signal has come.

    A Python handler that was there before still runs, after ours; if it exits, the process exits. The default action
    does not run, and where SIGTERM was ignored nothing but `on_signal` runs, so a handler never adds a death. A handler
    set from C is replaced: Python can neither call it nor put it back. Several instances chain, and may be uninstalled
    in any order.

    Raises ValueError outside the main thread, where Python cannot set handlers.
    """

    def __init__(self, on_signal: Callable[[], object]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                f"SIGTERM can only be handled from the main thread, and this is {threading.current_thread().name!r}; "
                "nothing was changed. Construct the manager in the main thread, or pass chkpt_on_preemption=False"
            )
        self.received = False
        self._on_signal = on_signal
        self._active = True
        self._pid = os.getpid()
        self._previous = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._handle)

    def uninstall(self) -> None:
        """Stop reacting; idempotent. The previous handler comes back if ours is the one in place.

        Otherwise (someone chained to ours, or this is not the main thread) ours stays and only passes signals on.
        """
        self._active = False
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, self._beneath())

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        direct = signal.getsignal(signum) == self._handle  # and not called by a handler that stands above ours
        previous = self._beneath()
        try:
            if self._is_ours():
                self.received = True
                self._on_signal()
        finally:
            if callable(previous):
                previous(signum, frame)
            elif direct and not self._is_ours() and previous == signal.SIG_DFL:
                # nobody wants this signal any more: without us the process would have ended
                signal.signal(signum, signal.SIG_DFL)
                signal.raise_signal(signum)

    def _is_ours(self) -> bool:
        """Whether the signal is for this manager: a forked child inherits the handler, but must die of terminate()."""
        return self._active and os.getpid() == self._pid

    def _beneath(self) -> Callable[[int, FrameType | None], object] | int | signal.Handlers:
        """The handler below ours, past instances that were uninstalled while ours stood above them."""
        handler = self._previous
        while isinstance(owner := getattr(handler, "__self__", None), SigtermHandler) and not owner._active:
            handler = owner._previous
        return signal.SIG_DFL if handler is None else handler


class GracePeriod:
    """What is left of the time from SIGTERM to SIGKILL. seconds: all of it; None if nobody knows.

    It is counted from the first SIGTERM that the main thread hears of, so a long C call at that time makes `left_s` say
    too much. (A wake-up fd would hear of it at once, but a process has only one, asyncio may take it, and a forked
    worker that is ended by SIGTERM writes to its parent's.) clock: in seconds; tests set their own.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.clock: Callable[[], float] = time.monotonic
        self._began: float | None = None

    def begin(self) -> None:
        """SIGTERM came. Later ones change nothing: whoever sends two still counts from the first."""
        if self._began is None:
            self._began = self.clock()

    @property
    def is_running(self) -> bool:
        return self._began is not None and self.seconds is not None

    def left_s(self) -> float:
        """Infinite while there was no SIGTERM, or if nobody knows; below 0 once it is over."""
        if self._began is None or self.seconds is None:
            return float("inf")
        return self._began + self.seconds - self.clock()


@dataclass(eq=False, slots=True)
class _UnderWay:
    """stage_s: seconds of work before it was queued. began: when the writer came to it."""

    num_bytes: int
    stage_s: float
    began: float | None = None


class SavePace:
    """How long a save will take, from its call to its commit, judged by the last five that were committed.

    Told by the training thread (`timed`) and by the writer thread, which runs what `timed` returns. The wait for
    earlier saves is no part of a save's own time. clock: as in GracePeriod.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.monotonic
        self._lock = threading.Lock()
        self._committed: deque[tuple[int, float]] = deque(maxlen=5)
        self._pending: list[_UnderWay] = []

    def timed(self, num_bytes: int, stage_s: float, run: Callable[[], T]) -> Callable[[], T]:
        """`run`, which ends when the save is committed. num_bytes: of this rank's tensors."""
        save = _UnderWay(num_bytes, stage_s)
        with self._lock:
            self._pending.append(save)

        def run_timed() -> T:
            save.began = self.clock()
            try:
                result = run()
                with self._lock:  # not where it failed: that says nothing of the next one
                    self._committed.append((num_bytes, self._spent_s(save)))
            finally:
                with self._lock:
                    self._pending.remove(save)
            return result

        return run_timed

    def needed_s(self, num_bytes: int | None) -> float:
        """Seconds until a save of so many bytes, asked for now, would be committed: those under way come first. 0 if
        nothing is known. num_bytes: None stands for as many as last time."""
        with self._lock:
            last = [size for size, _ in self._committed] + [save.num_bytes for save in self._pending]
            if not last:
                return 0.0
            left = [self._save_s(save.num_bytes) - self._spent_s(save) for save in self._pending]
            return sum(left) + self._save_s(last[-1] if num_bytes is None else num_bytes)

    def _save_s(self, num_bytes: int) -> float:
        """Of one save: the usual, or what one under way has taken already."""
        spent = [self._spent_s(save) for save in self._pending if save.num_bytes <= num_bytes]
        return max(self._usual_s(num_bytes), *spent, 0.0)

    def _usual_s(self, num_bytes: int) -> float:
        """As saves of this size took; by the largest of other sizes, where the part that does not grow is smallest."""
        alike = [seconds for size, seconds in self._committed if size == num_bytes]
        if alike or not self._committed:
            return median(alike or [0.0])
        size, seconds = max(self._committed)
        return seconds * num_bytes / max(size, 1)

    def _spent_s(self, save: _UnderWay) -> float:
        return save.stage_s + (0.0 if save.began is None else self.clock() - save.began)


def in_ms(seconds: float) -> int:
    """For a message between ranks; an infinite time becomes one that no save takes (30,000 years)."""
    return round(1000 * min(seconds, 1e12))


def why_too_late(rows: Sequence[Sequence[int]]) -> str:
    """Why a save cannot be committed before SIGKILL, in words, or "" if it can or nobody knows.

    rows: of each rank, the ms left and the ms needed. The earliest deadline and the slowest rank count.
    """
    left_ms, in_a_hurry = min((row[0], rank) for rank, row in enumerate(rows))
    needed_ms, slowest = max((row[1], -rank) for rank, row in enumerate(rows))
    if needed_ms <= left_ms:
        return ""
    return (
        f"SIGTERM came, the grace period ends in {max(left_ms, 0) / 1000:.1f} s (on rank {in_a_hurry}), and this save "
        f"would be committed in {needed_ms / 1000:.1f} s (on rank {-slowest}), judged by the last ones. What is in "
        "flight is finished"
    )
