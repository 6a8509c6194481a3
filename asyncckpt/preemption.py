"""SIGTERM as a request to save. Knows nothing of ranks or steps: the manager says what to call.

A preempted machine gets SIGTERM and some seconds of grace. Python runs a signal handler on the main thread, between
two bytecodes: a main thread that sits in one long C call (a collective, a blocking copy) is told only afterwards.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType


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
