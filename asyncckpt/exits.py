"""What is to be done at the end of the process, while threads still may be started and awaited.

Called by whoever has work in the background: manager.py, event_file.py, and integrations.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def at_exit(owner: T, work: Callable[[T], None]) -> None:
    """Call `work(owner)` at interpreter exit, unless `owner` is gone by then or this is a forked child, which has none
    of its threads. The last one registered comes first.

    Before Python stops its thread pools: a plain atexit handler would come too late for fsspec's clients, which resolve
    names in one. work: must not hold `owner`.
    """
    reference, pid = weakref.ref(owner), os.getpid()

    def run() -> None:
        if (alive := reference()) is not None and os.getpid() == pid:
            work(alive)

    register: Callable[[Callable[[], None]], None] | None = getattr(threading, "_register_atexit", None)
    if register is not None:
        with contextlib.suppress(RuntimeError):  # the main thread is over already: Python waits for this one alone
            register(run)
