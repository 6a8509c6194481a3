"""A rank that dies, is stopped or is slow, in every phase: the others hear who and in what, and nothing is lost.

The ranks are real processes, killed and stopped by signals, always at a gate: a rank says that it is there.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from asyncckpt import CheckpointManager, Delayed, Event, Failed, log_events
from asyncckpt.testing import Call, RecordingStorage
from stagers import BlockingAsyncStager
from tests.crew import Crew
from tests.processes import Job, Link
from tests.test_ranks_in_step import attempt, restored, state

NUM_RANKS = 3
TIMEOUT_S = 4.0


class Gate:
    """A place where a rank says that it is there and waits until the test lets it on, the first time after `is_set`."""

    def __init__(self, link: Link, place: str) -> None:
        self._link = link
        self._place = place
        self.is_set = False

    def __call__(self, place: str) -> None:
        if self.is_set and place == self._place:
            self.is_set = False
            self._link.send("at the gate")
            self._link.receive()


class HeldStorage(RecordingStorage):
    """A gate before each verb, and one after it."""

    def __init__(self, inner: Any, gate: Gate) -> None:
        super().__init__(inner)
        self._gate = gate

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        self._gate(call.verb)
        result = super()._around(call, run)
        self._gate(f"{call.verb} done")
        return result


class HeldStager(BlockingAsyncStager):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def snapshot(self, state_dict: Any) -> Any:
        self._gate("snapshot")
        return super().snapshot(state_dict)


class HeldPlanner(DefaultSavePlanner):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def create_local_plan(self) -> Any:
        self._gate("create_local_plan")
        return super().create_local_plan()

    def create_global_plan(self, plans: Any) -> Any:
        self._gate("create_global_plan")
        return super().create_global_plan(plans)


def held_manager(
    path: str, gate: Gate, on_event: Callable[[Event], None], timeout_s: float = TIMEOUT_S, **options: Any
) -> CheckpointManager:
    """One that has saved step 1 on all ranks, and from now on holds at the gate."""
    events = [on_event, lambda event: gate(type(event).__name__)]
    manager = CheckpointManager(path, 1, stager=HeldStager(gate), events=events, timeout=60.0, **options)
    manager._storage = manager._saver.committer.storage = HeldStorage(manager._storage, gate)
    manager.save(1, state(1))
    manager._ranks.agree([], phase="all have saved it")
    # Only now: on a busy machine it could be too short for the constructor.
    manager._saver.timeout_s = manager._ranks.timeout_s = timeout_s
    group: Any = manager._ranks._group
    group.timeout = timedelta(seconds=timeout_s)
    group.backend._set_default_timeout(group.timeout)
    gate.is_set = True
    return manager


def save_and_wait(manager: CheckpointManager, step: int, more: dict[str, Any] | None = None) -> bool:
    taken = manager.save_async(step, state(step) | (more or {}))
    manager.join()
    return taken


# -- in every phase


@dataclass(frozen=True)
class Phase:
    """gate: where a rank is held. told: what the others hear if it is lost there, as a pattern; None: nothing.
    on_waking: what it hears itself if it was only stopped; None: the same. act: the call that comes to the gate.

    steps: what there is in the end, the rank lost; if_it_wakes: and if it was only stopped, and step 3 saved after it.
    """

    name: str
    gate: str
    told: str | None
    on_waking: str | None = None
    act: str = "save"
    steps: tuple[int, ...] = (1,)
    if_it_wakes: tuple[int, ...] = (1,)

    def __str__(self) -> str:
        return self.name


def collective(name: str, gate: str, phase: str, act: str = "save") -> Phase:
    told = rf"{phase} failed on rank \d after .* s: ranks \[VICTIM\] of 3 did not take part"
    return Phase(
        name, gate, f"CheckpointError: {told}", rf"CheckpointError: {phase} .*it had been given up: {told}", act
    )


NOT_DURABLE = r"WriteError: step 2 .* not saved: rank VICTIM failed to write: ranks \[VICTIM\] of 3 were not durable"
UNKNOWN = (
    r"CommitError: step 2 .* may be saved or not \(refresh\(\) tells\): rank 0 failed to commit: rank \d waited 4 s"
)
UNHEARD = r"CommitError: step 2 .* is saved, but no other rank knows \(refresh\(\) tells\): rank 0 failed to commit"

STAGE = collective("stage", "snapshot", "save of step 2")
PLAN = collective("plan", "create_local_plan", "plan of step 2")
PLAN_ALL = collective("plan of all", "create_global_plan", "plan of step 2")
WRITE = Phase("write", "write_file", NOT_DURABLE, if_it_wakes=(1, 3))
REPORT = Phase("report", "Written", NOT_DURABLE, if_it_wakes=(1, 3))
COMMIT = Phase("commit", "create", UNKNOWN, UNHEARD, if_it_wakes=(1, 2, 3))
END = Phase("end of commit", "create done", UNKNOWN, UNHEARD, steps=(1, 2), if_it_wakes=(1, 2, 3))
PRUNE = Phase("prune", "delete", None, steps=(1, 2), if_it_wakes=(3,))
RESTORE = collective("restore", "read_into", "restore of step 1", act="restore")
CLOSE = collective("close", "close", "close", act="close")


def go_through(link: Link, path: str, phase: Phase, held: int) -> dict[str, Any]:
    """One call, in which the rank `held` comes to the gate; and, when the test says so, a save."""
    gate, events = Gate(link, phase.gate if link.rank == held else ""), list[Event]()
    manager = held_manager(
        path, gate, events.append,
        save_planner=HeldPlanner(gate) if "plan" in phase.name else None, max_to_keep=1 if phase.name == "prune" else 0,
    )  # fmt: skip
    told: Any = None
    if phase.act == "save":
        told = attempt(
            lambda: save_and_wait(manager, 2, {"new": torch.ones(3)})
        )  # new, so that there is a plan to make
    elif phase.act == "restore":
        told = attempt(lambda: restored(lambda target: manager.restore(1, target)))
    else:
        gate("close")
        manager.close()
        (error,) = [event.error for event in events if isinstance(event, Failed)]
        told = raised(error)
    link.send(told)
    link.receive()
    after = attempt(lambda: save_and_wait(manager, 3)) if phase.act != "close" else None
    steps = manager.all_steps()
    manager.close()
    return {"after": after, "steps": steps}


def raised(error: BaseException) -> Any:
    def throw() -> None:
        raise error

    return attempt(throw)


def lose(job: Job, held: int, victim: int, signum: int) -> dict[int, Any]:
    """Signal `victim` when `held` is at the gate; what the others are told."""
    assert job.hear(held) == "at the gate"
    job.signal(victim, signum)
    if held != victim:
        job.tell(held)
    return {rank: job.hear(rank) for rank in range(NUM_RANKS) if rank != victim}


def check_told(told: Any, pattern: str | None, victim: int) -> None:
    if pattern is None:
        assert told is True
    else:
        assert re.search(pattern.replace("VICTIM", str(victim)), f"{told.kind}: {told.text}"), told
        assert told.rank == victim


def check_whole(path: pathlib.Path, steps: tuple[int, ...]) -> None:
    """What a later run finds: these steps, bit for bit, and after its first save nothing else."""
    with CheckpointManager(str(path), 1) as manager:
        assert manager.all_steps() == list(steps)
        for step in steps:
            manager.verify(step)
            expected = {"w": torch.full((1000,), float(step))}
            expected |= {f"mine/rank_{rank}": torch.full((9,), 100.0 * step + rank) for rank in range(NUM_RANKS)}
            target = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
            manager.restore(step, target)
            assert all(torch.equal(target[key], tensor) for key, tensor in expected.items())
        manager.save(9, {"w": torch.ones(1)})
    assert sorted(int(folder.name) for folder in path.iterdir()) == [*steps, 9]


PLACES = [
    *[(phase, 0) for phase in (STAGE, PLAN, PLAN_ALL, WRITE, REPORT, COMMIT, END, PRUNE, RESTORE, CLOSE)],
    *[(phase, 2) for phase in (STAGE, PLAN, WRITE, REPORT, RESTORE, CLOSE)],
]


def cases(*quick: tuple[Phase, int]) -> list[Any]:
    """Each place where a rank can be lost; all but the quick ones are slow."""
    marks = [() if place in quick else (pytest.mark.slow,) for place in PLACES]
    return [
        pytest.param(phase, victim, marks=mark, id=f"{phase} {victim}")
        for (phase, victim), mark in zip(PLACES, marks, strict=True)
    ]


@pytest.mark.parametrize(("phase", "victim"), cases((STAGE, 2), (PLAN_ALL, 0), (WRITE, 2), (PRUNE, 0), (RESTORE, 0)))
def test_a_rank_killed_in_any_phase_is_named_by_all_others(tmp_path: pathlib.Path, phase: Phase, victim: int) -> None:
    """With the phase, within the timeout. They can go on to their end, and whoever comes later finds whole steps."""
    with Job(NUM_RANKS, go_through, str(tmp_path), phase, victim) as job:
        for rank, told in lose(job, victim, victim, signal.SIGKILL).items():
            check_told(told, phase.told, victim)
            job.tell(rank)
        for rank in {0, 1, 2} - {victim}:
            result = job.result(rank)
            if phase is not CLOSE:
                assert f"ranks [{victim}] of 3 did not take part" in result["after"].text
            assert job.exit_code(rank) == 0
    check_whole(tmp_path, phase.steps)


@pytest.mark.parametrize(("phase", "victim"), cases((REPORT, 0), (COMMIT, 0)))
def test_a_rank_stopped_in_any_phase_is_named_and_hears_of_it_when_it_wakes_up(
    tmp_path: pathlib.Path, phase: Phase, victim: int
) -> None:
    """It does nothing that the others do not know of; and if they are still in step, all go on."""
    with Job(NUM_RANKS, go_through, str(tmp_path), phase, victim) as job:
        for told in lose(job, victim, victim, signal.SIGSTOP).values():
            check_told(told, phase.told, victim)
        job.signal(victim, signal.SIGCONT)
        job.tell(victim)
        check_told(job.hear(victim), phase.on_waking or phase.told, victim)
        for rank in range(NUM_RANKS):
            job.tell(rank)
        for rank in range(NUM_RANKS):
            result = job.result(rank)
            assert tuple(result["steps"]) == phase.if_it_wakes
            if 3 in phase.if_it_wakes:
                assert result["after"] is True
            elif phase is not CLOSE:
                assert "cannot start save" in result["after"].text
            assert job.exit_code(rank) == 0
    check_whole(tmp_path, phase.if_it_wakes)


# -- where a rank is lost that the others do not wait for


@pytest.mark.parametrize("phase", [COMMIT, pytest.param(PRUNE, marks=pytest.mark.slow)], ids=str)
def test_what_is_durable_is_committed_without_the_rank_that_wrote_it(tmp_path: pathlib.Path, phase: Phase) -> None:
    """Rank 1 dies while rank 0 commits; the others miss it at the next save."""
    with Job(NUM_RANKS, go_through, str(tmp_path), phase, 0) as job:
        for rank, told in lose(job, 0, 1, signal.SIGKILL).items():
            assert told is True
            job.tell(rank)
        for rank in (0, 2):
            assert "ranks [1] of 3 did not take part" in job.result(rank)["after"].text
    check_whole(tmp_path, (2,) if phase is PRUNE else (1, 2))


def wait_for_rank_0(link: Link, path: str) -> Any:
    told_of: list[Event] = []

    def tell_that_all_others_wait(event: Event) -> None:
        if isinstance(event, Delayed) and event.ranks == (0,) and not told_of:
            told_of.append(event)
            link.send()

    manager = held_manager(path, Gate(link, "snapshot" if link.rank == 0 else ""), tell_that_all_others_wait)
    told = attempt(lambda: save_and_wait(manager, 2))
    manager.close()
    return told


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_lost_while_it_waits_for_another_is_named(tmp_path: pathlib.Path, signum: int) -> None:
    """It had come to the agreement, so it does not show that it is missing; but it does not answer any more."""
    with Job(NUM_RANKS, wait_for_rank_0, str(tmp_path)) as job:
        assert job.hear(0) == "at the gate"
        job.hear(1)
        job.signal(2, signum)
        job.tell(0)
        for told in (job.result(0), job.result(1)):
            assert (told.kind, told.rank, told.step) == ("CheckpointError", 2, 2)
            assert "save of step 2 failed" in told.text
            assert "ranks [2] of 3 took part, but died or were stopped meanwhile" in told.text


def save_two(link: Link, path: str) -> list[Any]:
    manager = held_manager(path, Gate(link, "write_file" if link.rank == 2 else ""), len, max_pending_async=2)
    manager.save_async(2, state(2))
    manager.save_async(3, state(3))
    link.send("both are taken")
    told = attempt(manager.join)
    link.send(told)
    link.receive()
    after = attempt(lambda: save_and_wait(manager, 4))
    manager.close()
    return [after, manager.all_steps()]


@pytest.mark.slow
def test_saves_behind_one_that_is_stopped_are_given_up_with_it(tmp_path: pathlib.Path) -> None:
    """Each has its own word in the store; when the rank wakes up all are in step again."""
    with Job(NUM_RANKS, save_two, str(tmp_path)) as job:
        assert {job.hear(2), job.hear(2)} == {"at the gate", "both are taken"}
        for rank in (0, 1):
            assert job.hear(rank) == "both are taken"
        job.signal(2, signal.SIGSTOP)
        told = [job.hear(rank) for rank in (0, 1)]
        job.signal(2, signal.SIGCONT)
        job.tell(2)
        for each in (*told, job.hear(2)):
            check_told(each, NOT_DURABLE, 2)
        for rank in range(NUM_RANKS):
            job.tell(rank)
        assert job.results() == [[True, [1, 4]]] * 3
    check_whole(tmp_path, (1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("phase", [STAGE, WRITE, COMMIT], ids=str)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_losing_the_host_of_the_store_ends_every_wait(tmp_path: pathlib.Path, phase: Phase, signum: int) -> None:
    """Without torchrun rank 0 hosts it: stopped, or its machine without power, it answers nobody and closes nothing."""
    with Job(NUM_RANKS, go_through, str(tmp_path), phase, 0, store_on_rank_0=True) as job:
        for rank, told in lose(job, 0, 0, signum).items():
            assert (told.rank, told.step) == (0, 2)
            assert "save of step 2 failed" in told.text if phase is STAGE else "may be saved or not" in told.text
            assert "store" in told.text
            job.tell(rank)
        for rank in (1, 2):
            assert "cannot start save" in job.result(rank)["after"].text or phase is not STAGE
            assert job.exit_code(rank) == 0
    check_whole(tmp_path, (1,))


# -- a rank that is slow


@pytest.fixture(scope="module")
def three() -> Iterator[Crew]:
    with Crew(NUM_RANKS) as crew:
        yield crew


def be_slow(link: Link, path: str, place: str, held: int) -> list[Any]:
    delays: list[Event] = []

    def tell_the_first_two(event: Event) -> None:
        if isinstance(event, Delayed):
            delays.append(event)
            if len(delays) <= 2:
                link.send((event.step, event.phase, event.ranks, event.waited_s))

    gate = Gate(link, place if link.rank == held else "")
    with held_manager(path, gate, tell_the_first_two, timeout_s=10.0) as manager:
        if place == "read_into":
            restored(lambda target: manager.restore(1, target))
        else:
            save_and_wait(manager, 2)
        return [bool(delays), manager.all_steps()]


@pytest.mark.parametrize(
    ("place", "held", "teller", "step", "phase"),
    [
        ("snapshot", 2, 0, 2, "save"),
        ("write_file", 0, 1, 2, "write"),
        ("create", 0, 1, 2, "commit"),
        pytest.param("snapshot", 0, 1, 2, "save", marks=pytest.mark.slow),
        pytest.param("write_file", 2, 0, 2, "write", marks=pytest.mark.slow),
        pytest.param("read_into", 1, 0, 1, "restore", marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_told_of_while_it_is_slow(
    three: Crew, tmp_path: pathlib.Path, place: str, held: int, teller: int, step: int, phase: str
) -> None:
    """By the lowest rank that waits, also while its training thread is blocked, and again when the wait has doubled."""
    job = three.start(be_slow, str(tmp_path), place, held)
    assert job.hear(held) == "at the gate"
    *first, waited_s = job.hear(teller)
    *second, waited_longer_s = job.hear(teller)
    assert first[:2] == second[:2] == [step, phase]
    assert held in first[2]
    assert held in second[2]
    assert waited_longer_s >= 2 * waited_s
    job.tell(held)
    assert three.hear() == [[rank == teller, [1] if step == 1 else [1, 2]] for rank in range(NUM_RANKS)]


def test_a_delay_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """By the default sink."""
    values: Any = {"url": "s3://b/run", "step": 12, "rank": 0, "time_s": 0.0}
    log_events(Delayed(phase="write", ranks=(3, 5), waited_s=37.5, **values))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == "step 12 at s3://b/run: waited 38 s for ranks [3, 5], phase write"


# -- the next launch


def torchrun(path: pathlib.Path, num_ranks: int, num_steps: int, *options: str) -> list[str]:
    """What rank 0 printed, over all restarts."""
    tests = pathlib.Path(__file__).parent
    # Elsewhere, where the folder `tests/stagers` does not shadow ours.
    script = shutil.copy(tests / "losing_script.py", path.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    # Else torchrun keeps the store when it starts ranks again, and `init_process_group("gloo")` of the rank that comes
    # first finds the address of a dead one there: "Connection refused" (torch 2.13, always if 3 s are between them).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command += [*options, script, str(path), str(num_steps)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_torchrun_goes_on_from_the_newest_whole_step_with_as_many_fewer_or_more_ranks(tmp_path: pathlib.Path) -> None:
    """One rank dies in mid-save and torchrun starts all anew; later launches have one rank, and three. The losses are
    those of a run that nothing happened to: sums over ranks round differently, so not to the last bit."""
    reference = dict(line.split() for line in torchrun(tmp_path / "undisturbed", 1, 14)[1:])
    lines = torchrun(tmp_path / "run", 2, 8, "--max-restarts", "1")
    lines += torchrun(tmp_path / "run", 1, 10)
    lines += torchrun(tmp_path / "run", 3, 14)
    starts = [line for line in lines if "from" in line]
    assert starts == [
        "2 ranks from None of []",
        "2 ranks from 4 of [0, 2, 4]",
        "1 ranks from 6 of [0, 2, 4, 6]",
        "3 ranks from 8 of [0, 2, 4, 6, 8]",
    ]
    for step, loss in (line.split() for line in lines if line not in starts):
        assert float(loss) == pytest.approx(float(reference[step]), rel=1e-6)
    assert lines[-1].startswith("13 ")
