"""Processes that end without `close()` while saves are in flight, each in its way, and what must be true afterwards.

`run_to_its_end` starts one; run as a script, this file is one. Used by tests and by the campaign.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from asyncckpt import CheckpointManager
from asyncckpt.testing import GatedStorage
from tests.states import assert_same, restored, state

ROOT = Path(__file__).parents[1]
STEPS = [1, 2, 3]
LIMIT_S = 200.0  # most of it imports, where other work goes on
made = threading.Event()
DRAINED = ("return", "exit", "raise", "interrupt", "thread", "daemon thread", "cycle", "collected")
"""Ends at which Python gets a say: every save that was taken is committed."""
AT_ONCE = ("os._exit", "sigterm")
"""Ends of which nobody hears: what was not committed is not there."""
HANGING = ("hang", "hang, interrupt")
"""Storage never answers: the process ends all the same, after `timeout` seconds, and says what was not saved."""


def run_to_its_end(kind: str, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.endings", kind, url]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def assert_as_promised(kind: str, url: str) -> None:
    """Run a process to its end; what it left, and what it said."""
    done = run_to_its_end(kind, url)
    with CheckpointManager(url, chkpt_on_preemption=False) as manager:
        steps = manager.all_steps()
        for step in steps:
            assert_same(state(step), restored(manager, step))
            manager.verify(step)
        if kind in DRAINED:
            assert steps == STEPS, done.stderr
            assert "Exception ignored" not in done.stderr, done.stderr
        elif kind in HANGING:
            assert steps == [1], done.stderr
            assert "the process ends before all saves are committed" in done.stderr, done.stderr
            assert "Committed steps are safe: [1]" in done.stderr, done.stderr
        else:
            assert steps == STEPS[: len(steps)]
        manager.save(9, state(9))
        assert manager.all_steps() == [*steps, 9]


def main(kind: str, url: str) -> Any:
    manager = CheckpointManager(
        url, max_pending_async=3, chkpt_on_preemption=False, timeout=1.0 if kind in HANGING else 60.0
    )
    made.set()
    manager.save(1, state(1))
    if kind in HANGING:
        manager._saver.committer.storage = GatedStorage(manager._storage, "write_file")  # type: ignore[assignment]
    for step in STEPS[1:]:
        manager.save_async(step, state(step))
    match kind:
        case "return" | "hang":
            return manager
        case "exit":
            sys.exit(3)
        case "raise":
            raise LookupError("of the user")
        case "interrupt":
            signal.raise_signal(signal.SIGINT)
        case "cycle":
            cycle: list[Any] = [manager]
            cycle.append(cycle)
        case "collected":
            del manager
        case "os._exit":
            os._exit(0)
        case "sigterm":
            signal.raise_signal(signal.SIGTERM)
        case "hang, interrupt":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            return manager
    return None


if __name__ == "__main__":
    if "thread" in sys.argv[1]:
        thread = threading.Thread(target=main, args=sys.argv[1:], daemon="daemon" in sys.argv[1])
        thread.start()
        made.wait()
        if thread.daemon:  # Python stops such a thread anywhere, so that only what it has handed over is drained
            thread.join()
    else:
        kept = main(*sys.argv[1:])
