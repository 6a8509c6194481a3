"""The background thread of a manager: a bounded queue, one save at a time, in order; failures kept until raised once.

A job gives back what it leaves to be done when it is over (retention); its place in the queue is free before that.

    thread     may touch                                          never
    training   acquire, submit, join, raise_failures, close       does storage I/O of a save
    writer     runs the jobs, appends failures                    runs a collective (ranks.py says why)

State changes only under the one condition, and nothing is waited for or called under it but the condition itself.
What a job does is save.py's affair.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias, TypeVar

from asyncckpt.errors import CheckpointError

T = TypeVar("T")
Rest: TypeAlias = Callable[[], None]
Job: TypeAlias = Callable[[], Rest]


class BackgroundWriter:
    """max_pending: saves taken and not yet over, the one being written among them."""

    def __init__(self, max_pending: int) -> None:
        self._max_pending = max_pending
        # Taken as itself: the condition's `__enter__` is Python, and Ctrl-C in it would leave the lock held.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._jobs: deque[Job] = deque()
        self._num_pending = 0
        self._num_resting = 0  # over, but for what they left to be done
        self._num_waiting = 0  # calls of the training thread that cannot go on
        self._holder: int | None = None  # the thread that has a place and has not submitted
        self._num_signs = 0  # of life
        self._failures: deque[BaseException] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        with self._lock:
            return f"<BackgroundWriter {self._num_pending}/{self._max_pending} pending, {len(self._failures)} failed>"

    @property
    def is_full(self) -> bool:
        with self._lock:
            return self._num_pending >= self._max_pending

    def acquire(self) -> float:
        """Wait for a place in the queue and take it; seconds waited. Give it back by `submit` or `release`."""
        started = time.perf_counter()
        with self._lock:
            self._wait_for(lambda: self._num_pending < self._max_pending)
            self._num_pending += 1
            self._holder = threading.get_ident()
        return time.perf_counter() - started

    def release(self) -> None:
        """Give back a place that was taken for a save that came to nothing."""
        with self._lock:
            self._holder = None
            self._num_pending -= 1
            self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """Queue a job in the place that `acquire` took. What it raises is raised by `raise_failures`."""
        with self._lock:
            self._holder = None
            self._jobs.append(job)
            if self._thread is None:  # daemon: a job that hangs must not keep the process from ending
                self._thread = threading.Thread(target=self._run, name="asyncckpt-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until every job is over; what they left to be done may go on. False: `timeout_s` was not enough."""
        with self._lock:
            return self._wait_for(lambda: not self._num_pending, timeout_s)

    def join(self, *, besides: int = 0) -> None:
        """Wait until nothing is pending or left to be done. besides: places that the caller itself holds."""
        with self._lock:
            self._wait_for(lambda: self._num_pending <= besides and not self._num_resting)

    def pause(self, seconds: float) -> None:
        """For a job, on its thread: leave the processor to the training loop, unless that waits for the job."""
        with self._lock:
            self._num_signs += 1
            self._changed.wait_for(lambda: self._num_waiting, seconds)

    def keep_failure(self, failure: BaseException) -> None:
        """For `raise_failures`."""
        with self._lock:
            self._failures.append(failure)

    @property
    def has_failures(self) -> bool:
        with self._lock:
            return bool(self._failures)

    def raise_failures(self) -> None:
        """Raise what failed in the background since the last call: the first failure, with notes on the others."""
        with self._lock:
            failures = list(self._failures)
            self._failures.clear()
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"Another save failed too: {other}")
            raise failures[0]

    def check_may_wait(self) -> None:
        """CheckpointError in the middle of a save on this thread, which would wait for itself."""
        with self._lock:
            if self._holder == threading.get_ident():
                raise CheckpointError(
                    "close() or join() was called in the middle of a save, by a signal handler or by the state dict. "
                    "Nothing was done, and the save goes on. Set a flag there, and close when the save has returned."
                )

    def close(self) -> None:
        """Finish what is pending and end the thread; idempotent. Failures stay for `raise_failures`."""
        self.join()
        thread = self._thread
        self.end()
        if thread is not None:
            thread.join()

    def end(self) -> None:
        """Let the thread end when nothing is pending. Does not wait."""
        with self._lock:
            self._closing = True
            self._thread = None
            self._changed.notify_all()

    def outlast(self, patience_s: float) -> bool:
        """`join`, for as long as work shows a sign of life every `patience_s`. False: it did not."""
        while True:
            before = self._num_signs
            with self._lock:
                if self._wait_for(lambda: not self._num_pending and not self._num_resting, patience_s):
                    return True
                if self._num_signs == before:
                    return False

    def _wait_for(self, is_reached: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """On the training thread, under the condition."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(
                "an event sink, which runs on the writer thread, called what waits for that thread (save, join, close, "
                "...). Nothing is lost: do it in the training loop"
            )
        self._num_waiting += 1
        self._changed.notify_all()
        try:
            return self._changed.wait_for(is_reached, timeout_s)
        finally:
            self._num_waiting -= 1

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            rest = self._attempt(job)
            del job  # it holds the staged copy
            with self._lock:
                self._num_signs += 1
                self._num_pending -= 1
                self._num_resting += 1
                self._changed.notify_all()
            if rest is not None:
                self._attempt(rest)
            del rest  # it holds the manager
            with self._lock:
                self._num_resting -= 1
                self._changed.notify_all()

    def _attempt(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except BaseException as exc:  # without the thread `join` would never return
            self.keep_failure(exc)
            return None

    def _next_job(self) -> Job | None:
        with self._lock:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            return self._jobs.popleft() if self._jobs else None
