"""preemption.py: SIGTERM asks for a save instead of ending the process, if there is time for one."""

from __future__ import annotations

import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from asyncckpt import CheckpointManager, Event, Skipped, Written
from asyncckpt.preemption import GracePeriod, SavePace, SigtermHandler, in_ms, why_too_late
from asyncckpt.testing import GatedStorage


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


# -- the seconds that are left


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_grace_period_runs_from_the_first_signal() -> None:
    """A second SIGTERM gives no more time; without one, or if nobody knows, there is no end."""
    grace, unknown, clock = GracePeriod(30.0), GracePeriod(None), Clock()
    grace.clock = unknown.clock = clock
    assert (grace.is_running, grace.left_s(), unknown.left_s()) == (False, math.inf, math.inf)
    for each in (grace, unknown):
        each.begin()
    clock.now_s += 20
    for each in (grace, unknown):
        each.begin()
    assert (grace.is_running, grace.left_s()) == (True, 10.0)
    assert (unknown.is_running, unknown.left_s()) == (False, math.inf)
    clock.now_s += 15
    assert grace.left_s() == -5.0


def save_for(pace: SavePace, clock: Clock, num_bytes: int, seconds: float, stage_s: float = 0.0) -> None:
    """A save that takes `seconds` in all."""

    def run() -> None:
        clock.now_s += seconds - stage_s

    pace.timed(num_bytes, stage_s, run)()


@pytest.fixture
def paced() -> tuple[SavePace, Clock]:
    pace, clock = SavePace(), Clock()
    pace.clock = clock
    return pace, clock


def test_a_save_is_expected_to_take_what_the_last_five_took(paced: tuple[SavePace, Clock]) -> None:
    """Their median: one that met a hiccup, or the first, says little. Staging is a part of each."""
    pace, clock = paced
    assert pace.needed_s(100) == 0.0
    for seconds in (90.0, 10.0, 11.0, 12.0, 13.0, 60.0):
        save_for(pace, clock, 100, seconds, stage_s=1.0)
    assert pace.needed_s(100) == pace.needed_s(None) == 12.0


def test_a_state_of_another_size_is_expected_to_take_its_share(paced: tuple[SavePace, Clock]) -> None:
    """By the largest save there was, unless one had this very size."""
    pace, clock = paced
    save_for(pace, clock, 10, 2.0)
    save_for(pace, clock, 1000, 40.0)
    assert [pace.needed_s(n) for n in (10, 500, 1000, 2000, None)] == [2.0, 20.0, 40.0, 80.0, 40.0]


def test_a_failed_save_says_nothing_of_the_next(paced: tuple[SavePace, Clock]) -> None:
    """It may have ended at once, or at a deadline."""
    pace, clock = paced
    save_for(pace, clock, 100, 10.0)

    def fail() -> None:
        clock.now_s += 600
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        pace.timed(100, 0.0, fail)()
    assert pace.needed_s(100) == 10.0


def test_saves_under_way_come_first(paced: tuple[SavePace, Clock]) -> None:
    """What is left of the one being written, and all of the one behind it in the queue but for its staging."""
    pace, clock = paced
    save_for(pace, clock, 100, 10.0, stage_s=2.0)
    seen = []

    def run() -> None:
        clock.now_s += 3.0
        seen.append(pace.needed_s(100))

    first = pace.timed(100, 2.0, run)
    second = pace.timed(100, 2.0, lambda: None)
    assert pace.needed_s(100) == 8.0 + 8.0 + 10.0
    first()
    assert seen == [5.0 + 8.0 + 10.0]
    second()


def test_a_save_that_takes_longer_than_usual_is_believed(paced: tuple[SavePace, Clock]) -> None:
    """Storage has become slow, and it will not be faster for the next one; so also if there was none before."""
    for num_before in (0, 3):
        pace, clock = SavePace(), Clock()
        pace.clock = clock
        for _ in range(num_before):
            save_for(pace, clock, 100, 10.0)

        def run(pace: SavePace = pace, clock: Clock = clock) -> None:
            clock.now_s += 25.0
            assert pace.needed_s(100) == 25.0
            assert pace.needed_s(50) == (5.0 if pace._committed else 0.0)  # a smaller one may yet be as fast as usual

        pace.timed(100, 0.0, run)()


def test_the_earliest_deadline_and_the_slowest_rank_decide() -> None:
    """In words, with both figures; nobody's deadline, or a tie, is no reason not to try."""
    never = in_ms(math.inf)
    assert why_too_late([[never, 5000], [never, 0]]) == ""
    assert why_too_late([[7000, 5000], [5000, 0]]) == ""
    reason = why_too_late([[never, 5000], [7000, 0], [4000, 100]])
    assert "the grace period ends in 4.0 s (on rank 2)" in reason
    assert "would be committed in 5.0 s (on rank 0)" in reason
    assert "ends in 0.0 s" in why_too_late([[-3000, 1]])


# -- a manager in a hurry


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((1000,), float(step))}


@contextmanager
def hurried(path: pathlib.Path, **options: Any) -> Iterator[tuple[CheckpointManager, Clock, list[Skipped]]]:
    """A manager with 30 seconds of grace on a clock of its own, which has saved step 1 in 20 seconds."""
    skipped: list[Skipped] = []
    clock = Clock()

    def note(event: Event) -> None:
        if isinstance(event, Skipped):
            skipped.append(event)
        if isinstance(event, Written):
            clock.now_s += 20

    with CheckpointManager(str(path), 1000, grace_period=30.0, events=[note], **options) as manager:
        manager._grace.clock = manager._pace.clock = clock
        manager.save(1, state(1), force=True)
        yield manager, clock, skipped


def test_a_save_that_fits_into_the_grace_period_is_taken(tmp_path: pathlib.Path) -> None:
    """20 seconds of 30."""
    with hurried(tmp_path) as (manager, _, skipped):
        terminate_ourselves()
        assert manager.save_async(2, state(2))
        assert manager.reached_preemption(2)
    assert manager.all_steps() == [1, 2]
    assert skipped == []


def test_a_save_that_does_not_fit_is_skipped_and_the_loop_is_left(tmp_path: pathlib.Path) -> None:
    """20 seconds of 19: an event says so in words, and with force it is tried all the same."""
    with hurried(tmp_path) as (manager, clock, skipped):
        terminate_ourselves()
        clock.now_s += 11
        assert manager.should_save(2)
        assert not manager.save_async(2, state(2))
        assert manager.reached_preemption(2)
        assert not manager.save_async(3, state(3))
        (event,) = skipped
        assert event.step == 2
        assert "ends in 19.0 s (on rank 0), and this save would be committed in 20.0 s" in event.reason
        manager.save(4, state(4), force=True)
    assert manager.all_steps() == [1, 4]


def test_twice_the_state_needs_twice_the_time(tmp_path: pathlib.Path) -> None:
    """Though what was saved before would have fit."""
    with hurried(tmp_path) as (manager, _, skipped):
        terminate_ourselves()
        assert not manager.save_async(2, {"w": torch.zeros(1000), "more": torch.zeros(1000)})
        assert "would be committed in 40.0 s" in skipped[0].reason


def test_the_first_save_is_tried_as_nobody_knows_how_long_it_takes(tmp_path: pathlib.Path) -> None:
    """Even with a millisecond left."""
    with CheckpointManager(str(tmp_path), 1000, grace_period=0.001) as manager:
        manager._grace.clock = clock = Clock()
        terminate_ourselves()
        clock.now_s += 0.0005
        assert manager.save_async(2, state(2))


@pytest.mark.parametrize("on_busy", ["wait", "skip"])
def test_the_save_in_flight_is_finished_where_another_would_be_too_late(tmp_path: pathlib.Path, on_busy: Any) -> None:
    """What is left of it, and all of the next, exceed the 30 seconds. on_busy has no say in it."""
    with (
        hurried(tmp_path, on_busy=on_busy) as (manager, _, skipped),
        GatedStorage(manager._storage, "write_file") as gate,
    ):
        manager._saver.storage = gate
        manager.save_async(2, state(2), force=True)
        gate.wait_reached()
        terminate_ourselves()
        assert not manager.save_async(3, state(3))
        assert manager.reached_preemption(3)
        gate.open()
    assert manager.all_steps() == [1, 2]
    assert "would be committed in 40.0 s" in skipped[0].reason
    assert "What is in flight is finished" in skipped[0].reason


@pytest.mark.parametrize("on_busy", ["wait", "skip"])
def test_a_save_for_sigterm_waits_for_its_place_and_is_never_skipped_as_busy(
    tmp_path: pathlib.Path, on_busy: Any
) -> None:
    """Where the time suffices, or nobody knows it."""
    with (
        CheckpointManager(str(tmp_path), 1000, on_busy=on_busy) as manager,
        GatedStorage(manager._storage, "write_file") as gate,
    ):
        manager._saver.storage = gate
        manager.save_async(2, state(2), force=True)
        terminate_ourselves()
        opener = threading.Thread(target=lambda: (gate.wait_reached(), gate.open()))
        opener.start()
        assert manager.save_async(3, state(3))
        opener.join()
    assert manager.all_steps() == [2, 3]


@pytest.mark.parametrize("leave", ["close", "join"])
def test_the_end_of_the_grace_period_is_told_while_a_save_still_goes_on(tmp_path: pathlib.Path, leave: str) -> None:
    """Not in silence, and not in vain either: if nobody kills us it is committed. SIGTERM may come only meanwhile."""
    told = threading.Event()
    with hurried(tmp_path) as (manager, clock, skipped), GatedStorage(manager._storage, "write_file") as gate:
        manager._saver.storage = gate
        manager._sinks = (*manager._sinks, lambda event: told.set() if isinstance(event, Skipped) else None)
        manager.save_async(2, state(2), force=True)

        def preempt() -> None:
            gate.wait_reached()
            terminate_ourselves()
            while not manager._sigterm.received:  # type: ignore[union-attr]
                time.sleep(0.001)
            clock.now_s += 30
            assert told.wait(60)
            gate.open()

        preempting = threading.Thread(target=preempt)
        preempting.start()
        getattr(manager, leave)()
        preempting.join()
    assert manager.all_steps() == [1, 2]
    (event,) = skipped
    assert event.step == 2
    assert "the grace period of 30 s is over and this save still goes on" in event.reason
    assert "Committed are [1]" in event.reason


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan])
def test_a_grace_period_is_some_seconds_or_unknown(tmp_path: pathlib.Path, value: float) -> None:
    """The error names the value."""
    with pytest.raises(ValueError, match="grace_period must be a finite number"):
        CheckpointManager(str(tmp_path), grace_period=value)
