"""preemption.py: SIGTERM asks for a save instead of ending the process, if there is time for one."""

from __future__ import annotations

import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asyncckpt import CheckpointManager, Event, PerRank, Skipped, Written
from asyncckpt.preemption import GracePeriod, SavePace, SigtermHandler, in_ms, why_too_late
from asyncckpt.testing import GatedStorage
from stagers import BlockingAsyncStager, StateDict
from tests.crew import Crew
from tests.processes import Job, Link


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


def seconds_in(reason: str) -> tuple[float, float]:
    """(left, needed) as the words say; staging takes real time, some tens of ms."""
    left, needed = re.findall(r"in ([\d.]+) s", reason)
    return float(left), float(needed)


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
        assert seconds_in(event.reason) == pytest.approx((19, 20), abs=3)
        manager.save(4, state(4), force=True)
    assert manager.all_steps() == [1, 4]


def test_twice_the_state_needs_twice_the_time(tmp_path: pathlib.Path) -> None:
    """Though what was saved before would have fit."""
    with hurried(tmp_path) as (manager, _, skipped):
        terminate_ourselves()
        assert not manager.save_async(2, {"w": torch.zeros(1000), "more": torch.zeros(1000)})
        assert seconds_in(skipped[0].reason) == pytest.approx((30, 40), abs=3)


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
        manager._saver.committer.storage = gate
        manager.save_async(2, state(2), force=True)
        gate.wait_reached()
        terminate_ourselves()
        assert not manager.save_async(3, state(3))
        assert manager.reached_preemption(3)
        gate.open()
    assert manager.all_steps() == [1, 2]
    assert seconds_in(skipped[0].reason) == pytest.approx((30, 40), abs=3)
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
        manager._saver.committer.storage = gate
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
        manager._saver.committer.storage = gate
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


# -- on many ranks


@pytest.fixture(scope="module")
def three() -> Iterator[Crew]:
    with Crew(3) as crew:
        yield crew


def own_state(step: int) -> dict[str, Any]:
    """Every rank has something to write and to read."""
    return state(step) | {"mine": PerRank(torch.full((9,), float(step)))}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[None]:
    """`work` on a thread, while the main thread is busy; over before the block is left."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work)
        yield
        future.result(60)


def report(link: Link) -> None:
    """Let the test act, and wait until it has."""
    link.send()
    link.receive()


def train_on(manager: CheckpointManager, step: int, stride: int = 1) -> list[Any]:
    """Until it is time to leave: steps saved, the last step, and all that are committed."""
    saved = []
    while not manager.reached_preemption(step):
        time.sleep(0.001)  # a step of training
        step += stride
        if manager.save_async(step, own_state(step)):
            saved.append(step)
    manager.join()
    return [saved, step, manager.all_steps()]


def preempt(crew: Crew, job: Job, acting: int, signalled: int, told: Sequence[int] = (0, 1, 2)) -> list[Any]:
    """SIGTERM to one rank when another says that the moment has come; what all ranks return."""
    job.hear(acting)
    job.signal(signalled, signal.SIGTERM)
    for rank in told:
        job.tell(rank)
    return crew.hear()


def assert_one_step(results: list[Any], before: Sequence[int] = ()) -> int:
    """All ranks saved one and the same step, and left the loop after it."""
    saved, step, committed = results[0]
    assert results == [[saved, step, committed]] * len(results)
    assert saved == [step]
    assert committed == [*before, step]
    return int(step)


def build_while_preempted(link: Link, path: str, victim: int) -> list[Any]:
    before = signal.getsignal(signal.SIGTERM)

    def tell_when_inside() -> None:
        eventually(lambda: signal.getsignal(signal.SIGTERM) is not before)
        link.send()

    if link.rank != victim:
        link.receive()
    with beside(tell_when_inside if link.rank == victim else lambda: None), CheckpointManager(path, 1000) as manager:
        return train_on(manager, 0)


@pytest.mark.parametrize("victim", [0, 2])
def test_sigterm_in_the_constructor_saves_the_first_steps_on_all(
    three: Crew, tmp_path: pathlib.Path, victim: int
) -> None:
    """On a rank that waits there for the others, in a C call."""
    job = three.start(build_while_preempted, str(tmp_path), victim)
    results = preempt(three, job, victim, victim, [rank for rank in range(3) if rank != victim])
    assert_one_step(results)


def begin_after_sigterm(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1000) as manager:
        report(link)
        return train_on(manager, 1234)


def test_sigterm_before_the_first_step_saves_an_early_one(three: Crew, tmp_path: pathlib.Path) -> None:
    """The run goes on at step 1234, and one rank may have begun before it heard."""
    job = three.start(begin_after_sigterm, str(tmp_path))
    for rank in (0, 1):
        job.hear(rank)
    assert assert_one_step(preempt(three, job, 2, 2)) >= 1235


class HeldStager(BlockingAsyncStager):
    """Calls `hold` in the middle of its work."""

    def __init__(self, hold: Callable[[], object]) -> None:
        super().__init__()
        self.hold = hold

    def snapshot(self, state_dict: StateDict) -> Any:
        self.hold()
        return super().snapshot(state_dict)


def stage_while_preempted(link: Link, path: str, victim: int) -> list[Any]:
    stager = HeldStager(lambda: report(link) if link.rank == victim and not manager.reached_preemption(5) else None)
    with CheckpointManager(path, 1000, stager=stager) as manager:
        manager.save_async(5, own_state(5), force=True)
        stager.hold = lambda: None
        return train_on(manager, 5)


def wait_for_a_place_while_preempted(link: Link, path: str, victim: int) -> list[Any]:
    with CheckpointManager(path, 1000) as manager, GatedStorage(manager._storage, "write_file") as gate:
        manager._saver.committer.storage = gate
        manager.save_async(4, own_state(4), force=True)

        def release() -> None:
            gate.wait_reached()
            eventually(lambda: bool(manager._writer._num_waiting))
            if link.rank == victim:
                report(link)
            gate.open()

        with beside(release):
            manager.save_async(5, own_state(5), force=True)
        return train_on(manager, 5)


def restore_while_preempted(link: Link, path: str, victim: int) -> list[Any]:
    with CheckpointManager(path, 1000) as manager:
        manager.save(5, own_state(5), force=True)
        with GatedStorage(manager._storage, "read_into") as gate:
            manager._storage = gate

            def release() -> None:
                gate.wait_reached()
                if link.rank == victim:
                    report(link)
                gate.open()

            with beside(release):
                manager.restore(5, own_state(0))
        return train_on(manager, 5)


@pytest.mark.parametrize(
    ("body", "before"),
    [(stage_while_preempted, [5]), (wait_for_a_place_while_preempted, [4, 5]), (restore_while_preempted, [5])],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_inside_a_call_saves_one_later_step_on_all(
    three: Crew, tmp_path: pathlib.Path, body: Callable[..., Any], before: list[int], victim: int
) -> None:
    """While one rank stages, while all wait for a place in the queue, while one still reads."""
    job = three.start(body, str(tmp_path), victim)
    assert assert_one_step(preempt(three, job, victim, victim, [victim]), before) > 5


def sit_in_a_c_call(link: Link, path: str, sitting: int, signalled: int) -> list[Any]:
    helper = (sitting + 1) % 3
    with CheckpointManager(path, 1000) as manager:

        def end_the_call() -> None:
            if link.rank == sitting != signalled:
                eventually(lambda: "saving at" in repr(manager._sync_point))  # without its main thread
                link.send()
            if link.rank == helper:
                link.receive()
                dist.send(torch.ones(1), sitting)

        with beside(end_the_call):
            if link.rank == sitting:
                link.send()
                dist.recv(torch.empty(1), helper)
            return train_on(manager, 0)


@pytest.mark.parametrize(("sitting", "signalled"), [(1, 1), (1, 0), (0, 2)])
def test_a_rank_in_a_long_c_call_keeps_nobody_from_agreeing(
    three: Crew, tmp_path: pathlib.Path, sitting: int, signalled: int
) -> None:
    """If the signal went elsewhere; if it went there, Python hears of it when the call is over, and then all do."""
    job = three.start(sit_in_a_c_call, str(tmp_path), sitting, signalled)
    job.hear(sitting)
    job.signal(signalled, signal.SIGTERM)
    if sitting != signalled:
        job.hear(sitting)
    job.tell((sitting + 1) % 3)
    assert_one_step(three.hear())


def train_far_apart(link: Link, path: str, starts: list[int]) -> list[Any]:
    with CheckpointManager(path, 1_000_000) as manager:
        manager.save_async(starts[link.rank], own_state(0))
        report(link)
        return train_on(manager, starts[link.rank], stride=10)


@pytest.mark.parametrize("signalled", [[0], [1], [0, 1, 2]])
def test_ranks_hundreds_of_steps_apart_save_at_the_same_step(
    three: Crew, tmp_path: pathlib.Path, signalled: list[int]
) -> None:
    """The first one that none has passed, though only each tenth is offered; on all, each hears at its own step."""
    job = three.start(train_far_apart, str(tmp_path), [10, 700, 320])
    for rank in range(3):
        job.hear(rank)
    for rank in signalled:
        job.signal(rank, signal.SIGTERM)
    for rank in range(3):
        job.tell(rank)
    assert assert_one_step(three.hear()) >= 710


def be_told_again_and_again(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1000) as manager:
        report(link)
        result = train_on(manager, 0)
        report(link)
        more = [step for step in range(result[1] + 1, result[1] + 300) if manager.save_async(step, own_state(step))]
        report(link)  # and on the way out
        return [*result, more]


def test_a_second_sigterm_means_the_same_preemption(three: Crew, tmp_path: pathlib.Path) -> None:
    """Before the save, after it, and once no step follows, on the same rank and on another: one step is saved."""
    job = three.start(be_told_again_and_again, str(tmp_path))
    for _ in range(3):
        for rank in range(3):
            job.hear(rank)
        for rank in (1, 1, 2):
            job.signal(rank, signal.SIGTERM)
        for rank in range(3):
            job.tell(rank)
    results = three.hear()
    assert [more for *_, more in results] == [[]] * 3
    assert_one_step([result for *result, _ in results])


class OnceByTheClock:
    """Wants one save, at the tenth question on rank 0, and lets the test act before it says so."""

    uses_clock = True

    def __init__(self, link: Link) -> None:
        self.link, self.num_asked = link, 0

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        self.num_asked += 1
        if self.num_asked == 10:
            report(self.link)
        return self.num_asked == 10


def train_by_the_clock(link: Link, path: str, on_busy: Any) -> list[Any]:
    with CheckpointManager(path, save_policy=OnceByTheClock(link), on_busy=on_busy) as manager:
        return train_on(manager, 0)


@pytest.mark.parametrize("on_busy", ["wait", "skip"])
@pytest.mark.parametrize("signalled", [0, 2])
def test_sigterm_while_a_save_by_the_clock_is_agreed_on(
    three: Crew, tmp_path: pathlib.Path, signalled: int, on_busy: Any
) -> None:
    """Both come true, at one step or at two, the same on all ranks; the loop is left after the one for SIGTERM."""
    job = three.start(train_by_the_clock, str(tmp_path), on_busy)
    results = preempt(three, job, 0, signalled, [0])
    saved, step, committed = results[0]
    assert results == [[saved, step, committed]] * 3
    assert saved[-1] == step
    assert saved == committed
    assert len(saved) <= 2


class AtEachStepByTheClock:
    uses_clock = True

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        return True


def skip_by_the_clock(link: Link, path: str) -> list[Any]:
    with (
        CheckpointManager(path, save_policy=AtEachStepByTheClock(), on_busy="skip") as manager,
        GatedStorage(manager._storage, "write_file") as gate,
    ):
        manager._saver.committer.storage = gate
        manager.save_async(1, own_state(1), force=True)
        taken = [manager.save_async(step, own_state(step)) for step in range(2, 300)]
        gate.open()
        manager.join()
        step, saved = 300, []
        while len(saved) < 2:
            time.sleep(0.001)
            if manager.save_async(step := step + 1, own_state(step)):
                saved.append(step)
        manager.join()
        return [any(taken), saved, manager.all_steps()]


def test_a_save_by_the_clock_is_not_taken_while_one_is_busy(three: Crew, tmp_path: pathlib.Path) -> None:
    """on_busy="skip" holds for it on many ranks, too: training is not stopped, and the next free step saves."""
    results = three.run(skip_by_the_clock, str(tmp_path))
    assert results == [results[0]] * 3
    is_any_taken, saved, committed = results[0]
    assert not is_any_taken
    assert committed == [1, *saved]


def outlast_a_stopped_rank(link: Link, path: str) -> list[Any]:
    skipped: list[Skipped] = []

    def tell(event: Event) -> None:
        if isinstance(event, Skipped):
            skipped.append(event)
            if len(skipped) == 1 and link.rank == 1:
                link.send()

    with CheckpointManager(path, 1000, events=[tell]) as manager:
        manager._sync_point._timeout_s = 0.5
        report(link)
        result = train_on(manager, 0)
        return [*result, [event.reason for event in skipped]]


@pytest.mark.parametrize(("victim", "reason"), [(2, "ranks [2] did not answer"), (0, "rank 0 did not answer")])
def test_a_request_that_a_stopped_rank_did_not_hear_is_made_again(
    three: Crew, tmp_path: pathlib.Path, victim: int, reason: str
) -> None:
    """SIGTERM is not forgotten because one rank was late; and rank 0, when it wakes, names no step of its own."""
    job = three.start(outlast_a_stopped_rank, str(tmp_path))
    for rank in range(3):
        job.hear(rank)
    job.signal(victim, signal.SIGSTOP)
    for rank in {0, 1, 2} - {victim}:
        job.tell(rank)
    job.signal(1, signal.SIGTERM)
    job.hear(1)
    job.signal(victim, signal.SIGCONT)
    job.tell(victim)
    results = three.hear()
    assert_one_step([result for *result, _ in results])
    assert any(reason in told for told in results[1][-1])


def close_while_preempted(link: Link, path: str, victim: int) -> list[Any]:
    with CheckpointManager(path, 1000) as manager, GatedStorage(manager._storage, "write_file") as gate:
        manager._saver.committer.storage = gate
        manager.save_async(1, own_state(1), force=True)

        def release() -> None:
            eventually(lambda: bool(manager._writer._num_waiting))
            if link.rank == victim:
                report(link)
            gate.open()

        with beside(release):
            manager.close()
        return manager.all_steps()


@pytest.mark.parametrize("victim", [0, 2])
def test_sigterm_while_closing_ends_nothing_early(three: Crew, tmp_path: pathlib.Path, victim: int) -> None:
    """The saves in flight are finished on all ranks; there is no further step to save."""
    job = three.start(close_while_preempted, str(tmp_path), victim)
    assert preempt(three, job, victim, victim, [victim]) == [[1]] * 3


# -- in a hurry on many ranks


def hurry(link: Link, path: str, grace_of: dict[int, float], seconds_of: list[float]) -> list[Any]:
    """Rank r needs seconds_of[r] for a save, and has grace_of[r]. Step 2 is still being written when they come to step
    3, where ranks 0 and 1 wait 20 seconds for rank 2."""
    skipped: list[str] = []
    clock = Clock()

    def note(event: Event) -> None:
        if isinstance(event, Skipped):
            skipped.append(event.reason)
        if isinstance(event, Written):
            clock.now_s += seconds_of[link.rank]

    with (
        CheckpointManager(path, 1000, grace_period=grace_of.get(link.rank), events=[note]) as manager,
        GatedStorage(manager._storage, "write_file") as gate,
    ):
        manager._grace.clock = manager._pace.clock = clock
        manager.save(1, own_state(1), force=True)
        manager._saver.committer.storage = gate
        manager.save_async(2, own_state(2), force=True)
        gate.wait_reached()
        report(link)
        eventually(lambda: "saving at [3]" in repr(manager._sync_point))
        num_entered = manager._ranks._num_entered

        def pass_time() -> None:
            if link.rank != 2:
                eventually(lambda: manager._ranks._num_entered > num_entered)
                clock.now_s += 20
                link.send()
            eventually(lambda: bool(skipped or manager._writer._num_waiting))
            gate.open()

        if link.rank == 2:
            link.receive()
        with beside(pass_time):
            taken = manager.save_async(3, own_state(3))
        left = manager.reached_preemption(3)
        manager.join()
        return [taken, left, manager.all_steps(), skipped]


@pytest.mark.parametrize(("slowest_s", "fits"), [(25.0, True), (35.0, False)])
def test_the_slowest_rank_and_the_earliest_deadline_decide_for_all(
    three: Crew, tmp_path: pathlib.Path, slowest_s: float, fits: bool
) -> None:
    """As they stand when the last rank has come: what is left of two saves of the slowest, against the 40 seconds that
    rank 0 still has. Rank 1 hears of no signal at all."""
    job = three.start(hurry, str(tmp_path), {0: 60.0, 2: 45.0}, [5.0, slowest_s, 5.0])
    for rank in range(3):
        job.hear(rank)
    for rank in (0, 2):
        job.signal(rank, signal.SIGTERM)
    for rank in range(3):
        job.tell(rank)
    for rank in (0, 1):
        job.hear(rank)
    job.tell(2)
    results = three.hear()
    assert results == [results[0]] * 3
    taken, left, committed, skipped = results[0]
    assert (taken, left, committed) == ((True, True, [1, 2, 3]) if fits else (False, True, [1, 2]))
    if not fits:
        assert seconds_in(skipped[0]) == pytest.approx((40, 50), abs=3)
        assert skipped[0].index("(on rank 0)") < skipped[0].index("(on rank 1)")
