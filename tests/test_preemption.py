"""preemption.py: SIGTERM asks for a save instead of ending the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from asyncckpt.preemption import SigtermHandler


@pytest.fixture(autouse=True)
def _sigterm_as_before() -> Iterator[None]:
    """Each test begins and ends with what pytest had."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def terminate_ourselves() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def recorder(calls: list[str], name: str) -> Any:
    return lambda *_: calls.append(name)


def test_sigterm_calls_us_and_the_process_lives() -> None:
    """The default action does not run."""
    calls: list[str] = []
    handler = SigtermHandler(recorder(calls, "ours"))
    assert not handler.received
    terminate_ourselves()
    terminate_ourselves()
    assert calls == ["ours", "ours"]
    assert handler.received


def test_a_previous_python_handler_still_runs_after_ours() -> None:
    """And gets the signal number it would have got."""
    calls: list[object] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: calls.append(signum))
    SigtermHandler(lambda: calls.append("ours"))
    terminate_ourselves()
    assert calls == ["ours", signal.SIGTERM]


def test_a_previous_handler_runs_even_if_ours_fails() -> None:
    """The error still surfaces."""
    calls: list[str] = []
    signal.signal(signal.SIGTERM, recorder(calls, "previous"))

    def fail() -> None:
        raise RuntimeError("ours failed")

    SigtermHandler(fail)
    with pytest.raises(RuntimeError, match="ours failed"):
        terminate_ourselves()
    assert calls == ["previous"]


def test_an_ignored_sigterm_asks_for_a_save_and_still_ends_nothing() -> None:
    """The user asked for both: not to die, and to save on preemption. Uninstalling ignores again."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    calls: list[str] = []
    handler = SigtermHandler(recorder(calls, "ours"))
    terminate_ourselves()
    assert calls == ["ours"]
    handler.uninstall()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_uninstall_brings_the_previous_handler_back() -> None:
    """Twice is once."""
    previous = recorder([], "previous")
    signal.signal(signal.SIGTERM, previous)
    handler = SigtermHandler(lambda: None)
    handler.uninstall()
    handler.uninstall()
    assert signal.getsignal(signal.SIGTERM) is previous


def test_uninstall_leaves_a_handler_that_came_later_alone() -> None:
    """One that calls us on still gets the handler from before us, and `on_signal` stays silent."""
    calls: list[str] = []
    signal.signal(signal.SIGTERM, recorder(calls, "previous"))
    handler = SigtermHandler(recorder(calls, "ours"))
    below: Any = signal.getsignal(signal.SIGTERM)

    def later(signum: int, frame: object) -> None:
        calls.append("later")
        below(signum, frame)

    signal.signal(signal.SIGTERM, later)
    handler.uninstall()
    assert signal.getsignal(signal.SIGTERM) is later
    terminate_ourselves()
    assert calls == ["later", "previous"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_several_managers_all_hear_the_signal_and_leave_in_any_order(order: tuple[int, ...]) -> None:
    """After the last has gone the first handler is in place, with none of ours in between."""
    calls: list[str] = []
    previous = recorder(calls, "previous")
    signal.signal(signal.SIGTERM, previous)
    handlers = [SigtermHandler(recorder(calls, str(number))) for number in range(3)]
    alive = [0, 1, 2]
    for number in order:
        terminate_ourselves()
        assert calls == [*map(str, reversed(alive)), "previous"]
        calls.clear()
        handlers[number].uninstall()
        alive.remove(number)
    assert signal.getsignal(signal.SIGTERM) is previous


def test_outside_the_main_thread_it_is_refused_with_the_way_out() -> None:
    """Python allows handlers on the main thread only."""
    before = signal.getsignal(signal.SIGTERM)
    errors: list[ValueError] = []

    def construct() -> None:
        try:
            SigtermHandler(lambda: None)
        except ValueError as exc:
            errors.append(exc)

    thread = threading.Thread(target=construct, name="trainer-7")
    thread.start()
    thread.join()
    assert "chkpt_on_preemption=False" in str(errors[0])
    assert "trainer-7" in str(errors[0])
    assert signal.getsignal(signal.SIGTERM) is before


SCRIPT = """
import os, signal, sys, threading
from asyncckpt.preemption import SigtermHandler
handler = SigtermHandler(lambda: print("asked", flush=True))
{then}
print("ready", flush=True)
sys.stdin.readline()
print("lives", flush=True)
"""


def run_script(then: str) -> tuple[list[str], int]:
    """Run SCRIPT, send it SIGTERM once it is ready, and let it end: its lines after "ready" and its exit code."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(then=then)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        lines = process.stdout.readline()
        if lines == "asked\n":
            process.stdin.write("\n")
            process.stdin.flush()
        lines += process.stdout.read()
    return lines.splitlines(), process.returncode


def test_a_real_sigterm_leaves_a_process_alive_that_would_have_died() -> None:
    """From outside, while the main thread waits."""
    assert run_script("") == (["asked", "lives"], 0)


@pytest.mark.parametrize(
    "then",
    [
        "handler.uninstall()",
        # from another thread, where Python cannot put the default back: ours stays in place and steps aside
        "t = threading.Thread(target=handler.uninstall); t.start(); t.join()",
        "second = SigtermHandler(lambda: None); handler.uninstall(); second.uninstall()",
    ],
)
def test_after_uninstalling_sigterm_ends_the_process_again(then: str) -> None:
    """With the exit status of a process that never had a handler."""
    assert run_script(then) == ([], -signal.SIGTERM)


FORKS = """
import os, signal
from asyncckpt.preemption import SigtermHandler
handler = SigtermHandler(lambda: print("asked", flush=True))
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b"x")  # Python forgets a signal that came during the fork
    while True:  # busy, as it would not see one that comes just before a blocking call
        pass
os.read(reader, 1)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_dies_of_sigterm() -> None:
    """A data loader's workers are ended by it, and would otherwise hang their parent."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(-signal.SIGTERM)]
