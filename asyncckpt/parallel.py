"""The same work on many things, on a few threads, none of which is left running when it ends.

For work that blocks without the GIL: reads, writes, checksums. Called by local_file.py, storage_fsspec.py and read.py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def for_each(
    work: Callable[[T], None], things: Iterable[T], num_threads: int, ends: threading.Event | None = None
) -> None:
    """Do `work` on each of `things`, in their order but for the threads; on this thread where one is enough.

    The first error ends it: nothing more is begun, `ends` is set for long work that looks at it, what is under way is
    waited for, then the error is raised. So does an interrupt of this thread.
    """
    todo = deque(things)
    num_threads = min(num_threads, len(todo))
    errors: list[BaseException] = []

    def end() -> None:
        todo.clear()
        if ends is not None:
            ends.set()

    def work_on() -> None:
        while True:
            try:
                thing = todo.popleft()
            except IndexError:
                return
            try:
                work(thing)
            except BaseException as exc:
                errors.append(exc)
                end()

    if num_threads < 2:
        work_on()
    else:
        with ThreadPoolExecutor(num_threads, thread_name_prefix="asyncckpt-io") as pool:
            try:
                wait([pool.submit(work_on) for _ in range(num_threads)])
            except BaseException:
                end()
                raise
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # else an error and this frame keep each other, and the memory they know, alive


class Arrivals:
    """Calls `filled` with the index of each range whose bytes are all there, on the thread that brought the last of
    them; of empty ones when made."""

    def __init__(self, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None]) -> None:
        self._filled = filled
        self._left = [len(view) for _, view in ranges]
        self._lock = threading.Lock()
        for index, left in enumerate(self._left):
            if not left:
                filled(index)

    def add(self, index: int, num_bytes: int) -> None:
        """More than 0 bytes of a range have come."""
        with self._lock:
            self._left[index] -= num_bytes
            is_full = not self._left[index]
        if is_full:
            self._filled(index)
