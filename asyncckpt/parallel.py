"""The same work on many things, on a few threads, none of which is left running when it ends.

For work that blocks without the GIL: reads, writes, checksums. Called by local_file.py and read.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def for_each(work: Callable[[T], None], things: Iterable[T], num_threads: int) -> None:
    """Do `work` on each of `things`, in their order but for the threads; on this thread where one is enough.

    The first error ends it: nothing more is begun, what is under way is waited for, then the error is raised.
    """
    todo = deque(things)
    num_threads = min(num_threads, len(todo))

    def work_on() -> None:
        try:
            while True:
                try:
                    thing = todo.popleft()
                except IndexError:
                    return
                work(thing)
        except BaseException:
            todo.clear()
            raise

    if num_threads < 2:
        work_on()
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="asyncckpt-io") as pool:
        workers = [pool.submit(work_on) for _ in range(num_threads)]
        try:
            for worker in workers:
                worker.result()
        finally:
            todo.clear()  # also where this thread is interrupted while it waits
