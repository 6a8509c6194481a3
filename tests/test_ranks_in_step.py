"""CheckpointManager on real ranks: what one of them hears, decides or suffers, all of them know."""

from __future__ import annotations

import pathlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from asyncckpt import CheckpointError, CheckpointManager, Committed, Event, Failed, PerRank, Restored, Skipped
from asyncckpt.testing import FaultyStorage, GatedStorage, RecordingStorage
from stagers import BlockingAsyncStager
from tests.crew import Crew
from tests.processes import Link
from tests.test_many_ranks import manifest_of


@pytest.fixture(scope="module")
def four() -> Iterator[Crew]:
    with Crew(4) as crew:
        yield crew


def state(step: int) -> dict[str, Any]:
    """A tensor that all ranks have, and one of each rank's own, so that every rank writes and reads."""
    return {"w": torch.full((1000,), float(step)), "mine": PerRank(torch.full((9,), 100.0 * step + dist.get_rank()))}


def restored(restore: Callable[[dict[str, Any]], Any]) -> tuple[float, float]:
    """What `restore` makes of the two tensors."""
    target = {"w": torch.zeros(1000), "mine": PerRank(torch.zeros(9))}
    restore(target)
    return target["w"][0].item(), target["mine"].value[0].item()


@dataclass(frozen=True)
class Raised:
    kind: str
    text: str
    rank: int | None
    step: int | None


def attempt(call: Callable[[], Any]) -> Any:
    """What the call returns or raises."""
    try:
        return call()
    except (CheckpointError, RuntimeError, ValueError) as exc:
        return Raised(type(exc).__name__, str(exc), getattr(exc, "rank", None), getattr(exc, "step", None))


# -- which steps there are


def save_ten_and_restart(link: Link, path: str) -> list[Any]:
    seen: list[Any] = []
    with CheckpointManager(path, 10, max_to_keep=2) as manager:
        seen.append([step for step in range(50) if manager.save_async(step, state(step))])
        manager.join()
        seen += [manager.all_steps(), manager.latest_step()]
    with CheckpointManager(path, 10, max_to_keep=2) as manager:
        seen += [manager.all_steps(), manager.latest_step()]
        manager.save(35, state(35), force=True)
        seen += [manager.all_steps(), manager.latest_step(), restored(manager.restore_latest)[0]]
    return seen


def test_all_ranks_know_the_same_steps_after_retention_and_a_restart(four: Crew, tmp_path: pathlib.Path) -> None:
    """torch_xla's manager forgets pruned steps on rank 0 alone: the others would restore what is gone."""
    seen = four.run(save_ten_and_restart, str(tmp_path))
    assert seen == [[[0, 10, 20, 30, 40], [30, 40], 40, [30, 40], 40, [35, 40], 40, 35.0]] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["35", "40"]


def follow(link: Link, path: str) -> list[list[int]]:
    with CheckpointManager(path, 1) as trainer, CheckpointManager(path, 1) as follower:
        trainer.save(3, state(3))
        seen = [follower.all_steps()]
        follower.refresh()
        return [*seen, follower.all_steps()]


def test_refresh_shows_all_ranks_what_another_run_committed(four: Crew, tmp_path: pathlib.Path) -> None:
    """And not before."""
    assert four.run(follow, str(tmp_path)) == [[[], [3]]] * 4


# -- a save that fails on one rank fails on all


def fail_to_stage(link: Link, path: str) -> list[Any]:
    stager = BlockingAsyncStager(max_bytes=10 if link.rank == 3 else None)
    with CheckpointManager(path, 1) as manager, CheckpointManager(path + "-small", 1, stager=stager) as small:
        return [
            attempt(lambda: manager.save_async(1, state(1) | ({"lock": threading.Lock()} if link.rank == 1 else {}))),
            attempt(lambda: small.save_async(1, state(1))),
            attempt(lambda: manager.save_async(1, state(1), metadata={"x": object()} if link.rank == 2 else {})),
            attempt(lambda: manager.save(2, state(2))),
            manager.all_steps(),
        ]


def test_a_rank_that_cannot_stage_is_named_by_all_and_nothing_is_written(four: Crew, tmp_path: pathlib.Path) -> None:
    """An object that cannot be saved, too little memory, wrong metadata; the next save works."""
    for rank, (unsafe, full, wrong, saved, steps) in enumerate(four.run(fail_to_stage, str(tmp_path / "run"))):
        for culprit, kind, raised in (
            (1, "UnsafeObjectError", unsafe),
            (3, "StagingError", full),
            (2, "ValueError", wrong),
        ):
            assert raised.kind == (kind if rank == culprit else "SaveError")
            assert raised.rank == culprit or (rank == culprit and kind != "UnsafeObjectError")
            assert f"rank {culprit} could not stage" in raised.text or rank == culprit
        assert saved is True
        assert steps == [2]
    assert [path.name for path in tmp_path.rglob("[0-9]")] == ["2"]


class BrokenSavePlanner(DefaultSavePlanner):
    """Fails on one rank, in one of its methods; `copy.copy` keeps what it is told."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def _fail(self, method: str) -> None:
        if method == self.method:
            raise RuntimeError(f"{method} broke")

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self._fail("set_up_planner")
        super().set_up_planner(*args, **kwargs)

    def create_local_plan(self) -> Any:
        self._fail("create_local_plan")
        return super().create_local_plan()

    def create_global_plan(self, plans: Any) -> Any:
        self._fail("create_global_plan")
        return super().create_global_plan(plans)

    def finish_plan(self, plan: Any) -> Any:
        self._fail("finish_plan")
        return super().finish_plan(plan)


def fail_to_plan(link: Link, path: str, method: str, culprit: int) -> list[Any]:
    planner = BrokenSavePlanner(method if link.rank == culprit else "")
    with CheckpointManager(path, 1, save_planner=planner) as manager:
        seen = [attempt(lambda: manager.save(1, state(1)))]
        manager._planning._template = DefaultSavePlanner()
        return [*seen, attempt(lambda: manager.save(2, state(2))), manager.all_steps()]


@pytest.mark.parametrize(
    ("method", "culprit"),
    [("set_up_planner", 1), ("create_local_plan", 1), ("create_global_plan", 0), ("finish_plan", 2)],
)
def test_a_rank_that_cannot_plan_is_heard_by_all(four: Crew, tmp_path: pathlib.Path, method: str, culprit: int) -> None:
    """Whichever method of a user's planner fails; the next save works."""
    for rank, (first, second, steps) in enumerate(four.run(fail_to_plan, str(tmp_path), method, culprit)):
        assert first.kind == "SaveError"
        assert first.rank == culprit
        if method != "finish_plan" or rank == culprit:  # with the others it was over by then
            assert f"{method} broke" in first.text
        assert second is True
        assert steps == [2]


def fail_to_write(link: Link, path: str) -> list[Any]:
    seen: list[Event] = []
    with CheckpointManager(path, 1, max_pending_async=2, events=[seen.append]) as manager:
        manager.save(1, state(1))
        if link.rank == 2:
            manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
        taken = manager.save_async(2, state(2))
        manager._writer.join()  # it has failed, and nobody was told
        left = (pathlib.Path(path) / "2").exists()
        told = attempt(lambda: manager.save_async(3, state(3)))
        again = attempt(lambda: manager.save(3, state(3)))
        failures = [(event.step, event.phase) for event in seen if isinstance(event, Failed)]
        return [taken, left, told, again, manager.all_steps(), failures]


def test_a_rank_that_cannot_write_is_named_by_all_once(four: Crew, tmp_path: pathlib.Path) -> None:
    """At their next call. The data of the others is deleted, and the next save works."""
    for taken, left, told, again, steps, failures in four.run(fail_to_write, str(tmp_path)):
        assert (taken, left, again, steps) == (True, False, True, [1, 3])
        assert (told.kind, told.rank, told.step) == ("WriteError", 2, 2)
        assert "rank 2 failed to write: OSError: [Errno 5] injected fault" in told.text
        assert failures == [(2, "write")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def hear_late(link: Link, path: str) -> list[Any]:
    agreed = threading.Event()

    def hold_back(event: Event) -> None:
        if isinstance(event, Failed) and link.rank == 3:  # its writer has heard, its training thread has not
            assert agreed.wait(60)

    with CheckpointManager(path, 1, max_pending_async=2, events=[hold_back]) as manager:
        if link.rank == 1:
            manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
        manager.save_async(1, state(1))
        if link.rank != 3:
            manager._writer.join()
        agree = manager._ranks.agree

        def agree_and_tell(*args: Any, **kwargs: Any) -> Any:
            rows = agree(*args, **kwargs)
            agreed.set()
            return rows

        manager._ranks.agree = agree_and_tell  # type: ignore[method-assign]
        return [attempt(lambda: manager.save_async(2, state(2))), attempt(lambda: manager.save(3, state(3)))]


def test_a_rank_that_hears_late_of_a_failure_raises_it_at_the_same_call(four: Crew, tmp_path: pathlib.Path) -> None:
    """Otherwise it would wait for the others in a save that they have left."""
    for first, second in four.run(hear_late, str(tmp_path)):
        assert (first.kind, first.rank, first.step) == ("WriteError", 1, 1)
        assert second is True


def join_on_rank_0_alone(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1) as manager:
        if link.rank == 2:
            manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
        manager.save_async(1, state(1))
        joined = attempt(manager.join) if link.rank == 0 else None
        manager._writer.join()
        return [
            joined,
            attempt(lambda: manager.save_async(2, state(2))),
            attempt(lambda: manager.save(3, state(3))),
            manager.all_steps(),
        ]


def test_a_failure_told_to_one_rank_ahead_of_the_others_keeps_them_in_step(four: Crew, tmp_path: pathlib.Path) -> None:
    """`if rank == 0: manager.join()`: the next save fails on all, on rank 0 because the others heard only now."""
    for rank, (joined, second, third, steps) in enumerate(four.run(join_on_rank_0_alone, str(tmp_path))):
        assert rank or (joined.kind, joined.rank, joined.step) == ("WriteError", 2, 1)
        assert (second.kind, second.rank, second.step) == (("WriteError", 2, 1) if rank else ("SaveError", 1, 2))
        assert (third, steps) == (True, [3])


def fail_to_commit(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1) as manager:
        manager.save(1, state(1))
        if link.rank == 0:
            manager._saver.committer.storage = FaultyStorage(manager._storage, "create", nth=1)
        manager.save_async(2, state(2))
        return [
            attempt(manager.join),
            attempt(manager.join),
            attempt(lambda: manager.save(3, state(3))),
            manager.all_steps(),
        ]


def test_a_commit_that_fails_is_heard_by_all_once(four: Crew, tmp_path: pathlib.Path) -> None:
    """Rank 0 alone commits."""
    for told, again, saved, steps in four.run(fail_to_commit, str(tmp_path)):
        assert (told.kind, told.rank, told.step) == ("CommitError", 0, 2)
        assert (again, saved, steps) == (None, True, [1, 3])


def save_apart(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1) as manager:
        apart = attempt(lambda: manager.save_async(7 if link.rank == 3 else 6, state(6)))
        return [apart, attempt(lambda: manager.save(8, state(8))), manager.all_steps()]


def test_ranks_that_save_different_steps_are_told(four: Crew, tmp_path: pathlib.Path) -> None:
    """Nothing is written."""
    for rank, (apart, saved, steps) in enumerate(four.run(save_apart, str(tmp_path))):
        other = 0 if rank == 3 else 3
        assert (apart.kind, apart.rank) == ("SaveError", other)
        assert "rank 3 saves step 7" in apart.text or "while rank 3 saves step 7" in apart.text
        assert (saved, steps) == (True, [8])


def do_different_things(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1) as manager:
        manager.save(1, state(1))
        apart = [
            attempt(lambda: restored(lambda target: manager.restore(1, target)))
            if link.rank == 2
            else attempt(lambda: manager.save(2, state(2))),
            attempt(manager.refresh) if link.rank == 1 else attempt(lambda: manager.save(2, state(2))),
        ]
        return [apart, attempt(lambda: manager.save(3, state(3))), manager.all_steps()]


def test_ranks_that_call_different_methods_are_told(four: Crew, tmp_path: pathlib.Path) -> None:
    """gloo would abort the process: "Received data size doesn't match expected size"."""
    for apart, saved, steps in four.run(do_different_things, str(tmp_path)):
        assert "restore" in apart[0].text
        assert "save" in apart[0].text
        assert "refresh" in apart[1].text
        assert (saved, steps) == (True, [1, 3])


# -- a restore that fails on one rank fails on all


def save_three(link: Link, path: str) -> None:
    with CheckpointManager(path, 1) as manager:
        for step in (1, 2, 3):
            manager.save_async(step, state(step))


@pytest.fixture
def run_of_three(four: Crew, tmp_path: pathlib.Path) -> pathlib.Path:
    four.run(save_three, str(tmp_path / "run"))
    return tmp_path / "run"


def damage(step: pathlib.Path, key: str) -> None:
    (chunk,) = [chunk for chunk in manifest_of(step).chunks if chunk.key == key]
    (path,) = step.glob(f"*/{chunk.file}")
    data = bytearray(path.read_bytes())
    data[chunk.payload_offset] ^= 1
    path.write_bytes(data)


def restore_apart(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1) as manager:
        untouched = {"w": torch.full((1000,), -1.0), "mine": PerRank(torch.zeros(8 if link.rank == 3 else 9))}
        return [
            attempt(lambda: restored(lambda target: manager.restore(1 if link.rank == 2 else 2, target))),
            attempt(lambda: restored(lambda target: manager.restore(9 if link.rank == 1 else 2, target))),
            attempt(lambda: manager.restore(2, untouched)),
            set(untouched["w"].tolist()),
            restored(lambda target: manager.restore(2, target)),
        ]


def test_ranks_that_cannot_restore_the_same_are_told(four: Crew, run_of_three: pathlib.Path) -> None:
    """Different steps, a step that one rank alone asks for, a state that does not fit on one rank: nothing changes."""
    for rank, (apart, unknown, misfit, values, at_last) in enumerate(four.run(restore_apart, str(run_of_three))):
        assert (apart.kind, apart.rank) == ("RestoreError", 0 if rank == 2 else 2)
        assert "step 1" in apart.text
        assert "step 2" in apart.text
        assert unknown.kind == ("StepNotFoundError" if rank == 1 else "RestoreError")
        assert misfit.kind == ("StateMismatchError" if rank == 3 else "RestoreError")
        if rank not in (1, 3):
            assert "rank 1" in unknown.text
            assert (misfit.rank, misfit.step) == (3, 2)
        assert values == {-1.0}
        assert at_last == (2.0, 200.0 + rank)


def restore_damaged(link: Link, path: str) -> list[Any]:
    seen: list[Event] = []
    with CheckpointManager(path, 1, events=[seen.append]) as manager:
        found = [
            attempt(lambda: restored(lambda target: manager.restore(3, target))),
            restored(manager.restore_latest),
            [event.skipped_steps for event in seen if isinstance(event, Restored)],
        ]
        if link.rank == 2:
            manager._storage = FaultyStorage(manager._storage, "read_into", nth=1)
        return [*found, attempt(lambda: restored(manager.restore_latest)), restored(manager.restore_latest)]


def test_damage_that_one_rank_alone_reads_is_damage_to_all(four: Crew, run_of_three: pathlib.Path) -> None:
    """restore says so, restore_latest walks back; but where another rank failed for other reasons, all stop there."""
    damage(run_of_three / "3", "mine/rank_1")
    results = four.run(restore_damaged, str(run_of_three))
    for rank, (damaged, latest, skipped, stopped, at_last) in enumerate(results):
        assert damaged.kind == "DamagedStepError"
        assert ("'mine/rank_1' at offset" in damaged.text) if rank == 1 else (damaged.rank == 1)
        assert latest == at_last == (2.0, 200.0 + rank)
        assert skipped == [(3,)]
        assert (stopped.kind, stopped.step) == ("RestoreError", 3)
        assert "injected fault" in stopped.text if rank == 2 else stopped.rank == 2


def restore_verified(link: Link, path: str) -> list[Any]:
    seen: list[Event] = []
    with CheckpointManager(path, 1, events=[seen.append]) as manager:
        manager._storage = storage = RecordingStorage(manager._storage)
        target = {"w": torch.full((1000,), -1.0), "mine": PerRank(torch.zeros(9))}
        failed = attempt(lambda: manager.restore_latest(target, verify=True))
        num_reads = storage.count("read_into")
        return [failed, set(target["w"].tolist()), num_reads]


def test_damage_that_one_rank_verifies_changes_nothing_on_any(four: Crew, run_of_three: pathlib.Path) -> None:
    """With verify=True each file is read by one rank, in time for all to leave their state alone."""
    for step in (1, 2, 3):
        damage(run_of_three / str(step), "mine/rank_1")
    for rank, (failed, values, num_reads) in enumerate(four.run(restore_verified, str(run_of_three))):
        assert failed.kind == "DamagedStepError"
        assert "tried [3, 2, 1]. Nothing was changed" in failed.text
        assert ("'mine/rank_1'" if rank == 1 else "rank 1 could not restore") in failed.text
        assert values == {-1.0}
        assert num_reads == 3 or rank == 1


def restore_while_saved_again(link: Link, path: str, verb: str) -> Any:
    with CheckpointManager(path, 1) as manager:
        if link.rank != 1:
            return restored(lambda target: manager.restore(1, target))
        gate = GatedStorage(manager._storage, verb)
        manager._storage = gate

        def hold() -> None:
            gate.wait_reached()
            link.send()
            link.receive()
            gate.open()

        holder = threading.Thread(target=hold)
        holder.start()
        found = restored(lambda target: manager.restore(1, target))
        holder.join()
        return found


@pytest.mark.parametrize(("verb", "old_is_deleted"), [("list_files", False), ("read_into", True)])
def test_ranks_never_restore_two_different_saves_of_a_step(
    four: Crew, run_of_three: pathlib.Path, verb: str, old_is_deleted: bool
) -> None:
    """Another run saves the step anew when three ranks have opened the old save, and one is late: all read the new."""
    job = four.start(restore_while_saved_again, str(run_of_three), verb)
    job.hear(1)
    own = {f"mine/rank_{rank}": torch.full((9,), 7000.0 + rank) for rank in range(4)}
    with CheckpointManager(str(run_of_three), 1) as other_run, GatedStorage(other_run._storage, "delete") as deletion:
        other_run._saver.committer.storage = deletion
        if old_is_deleted:
            deletion.open()
        other_run.save_async(1, {"w": torch.full((1000,), 70.0)} | own)
        deletion.wait_reached()  # it is committed
        if old_is_deleted:
            other_run.join()
        job.tell(1)
        assert four.hear() == [(70.0, 7000.0 + rank) for rank in range(4)]


def restore_stages(link: Link, path: str) -> list[Any]:
    seen: list[Event] = []
    stage = {f"stage.{link.rank}.w": torch.full((4,), float(link.rank)), "shared": 5, "spare": 6}
    with CheckpointManager(path, 1, events=[seen.append]) as manager:
        manager.save(1, stage)
        target = {f"stage.{link.rank}.w": torch.zeros(4), "shared": 0}
        manager.restore(1, target)
        strict = attempt(lambda: manager.restore(1, target, strict=True))
        manager.restore(1, target | {"spare": 0}, strict=True)
    ignored = [event.ignored_keys for event in seen if isinstance(event, Restored)]
    return [target[f"stage.{link.rank}.w"][0].item(), ignored, strict]


def test_what_another_rank_asks_for_is_not_left_out(four: Crew, tmp_path: pathlib.Path) -> None:
    """The stages of a pipeline have different keys: only what no rank asks for is reported, or an error if strict."""
    for rank, (value, ignored, strict) in enumerate(four.run(restore_stages, str(tmp_path))):
        assert value == rank
        assert ignored == [("spare",), ()]
        assert strict.kind == "StateMismatchError"
        assert "not in the state dict: 'spare'" in strict.text
        assert "stage" not in strict.text


class BrokenLoadPlanner(DefaultLoadPlanner):
    """One with a global plan of its own, which the ranks must exchange, and a fault."""

    def __init__(self, is_broken: bool) -> None:
        super().__init__()
        self.is_broken = is_broken

    def create_local_plan(self) -> Any:
        if self.is_broken:
            raise RuntimeError("create_local_plan broke")
        return super().create_local_plan()

    def create_global_plan(self, plans: Any) -> Any:
        return super().create_global_plan(plans)


def restore_with_planner(link: Link, path: str) -> list[Any]:
    with CheckpointManager(path, 1, load_planner=BrokenLoadPlanner(link.rank == 3)) as manager:
        broken = attempt(lambda: restored(lambda target: manager.restore(2, target)))
        manager._load_planner = BrokenLoadPlanner(False)
        return [broken, restored(lambda target: manager.restore(2, target))]


def test_a_load_planner_that_fails_on_one_rank_is_heard_by_all(four: Crew, run_of_three: pathlib.Path) -> None:
    """A user's planner may exchange plans; one without a fault works."""
    for rank, (broken, found) in enumerate(four.run(restore_with_planner, str(run_of_three))):
        assert broken.kind == ("RuntimeError" if rank == 3 else "RestoreError")
        assert "create_local_plan broke" in broken.text if rank == 3 else broken.rank == 3
        assert found == (2.0, 200.0 + rank)


# -- when to save


def train_until_preempted(link: Link, path: str, ahead: list[int]) -> list[Any]:
    with CheckpointManager(path, 1000) as manager:
        saved = [step for step in range(1, ahead[link.rank]) if manager.save_async(step, state(step))]
        link.send()
        link.receive()
        step = ahead[link.rank] - 1
        while not manager.reached_preemption(step):
            time.sleep(0.001)  # a step of training
            step += 1
            if manager.save_async(step, state(step)):
                saved.append(step)
        manager.join()
        return [saved, step, manager.all_steps(), restored(manager.restore_latest)]


@pytest.mark.parametrize("signalled", [[1], [0, 1, 2, 3]])
def test_sigterm_on_any_rank_saves_one_step_on_all(four: Crew, tmp_path: pathlib.Path, signalled: list[int]) -> None:
    """The ranks are at different steps when it comes; all leave the loop at the step that was saved."""
    ahead = [30, 10, 70, 50]
    job = four.start(train_until_preempted, str(tmp_path), ahead)
    four.hear()
    for rank in signalled:
        job.signal(rank, signal.SIGTERM)
    for rank in range(4):
        job.tell(rank)
    results = four.hear()
    step = results[0][1]
    assert step >= max(ahead)
    for rank, result in enumerate(results):
        assert result == [[step], step, [step], (float(step), 100.0 * step + rank)]


class ByTheClockOfRank0:
    """Wants a save at each tenth question, and is asked nowhere else."""

    uses_clock = True

    def __init__(self) -> None:
        self.num_asked = 0

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        assert dist.get_rank() == 0
        self.num_asked += 1
        return self.num_asked % 10 == 0


def train_by_the_clock(link: Link, path: str) -> list[Any]:
    chance = random.Random(link.rank)
    with CheckpointManager(path, save_policy=ByTheClockOfRank0()) as manager:
        step, saved = 0, []
        while len(saved) < 3:
            time.sleep(chance.choice([0, 0.001, 0.002]))  # a step of training
            step += 1
            if manager.save_async(step, state(step)):
                saved.append(step)
        manager.join()
        return [saved, manager.all_steps()]


def test_a_policy_by_the_clock_is_asked_on_rank_0_and_saves_on_all(four: Crew, tmp_path: pathlib.Path) -> None:
    """Ranks run at different speeds, and rank 0's wish is announced ahead."""
    results = four.run(train_by_the_clock, str(tmp_path))
    saved = results[0][0]
    assert results == [[saved, saved]] * 4


def skip_when_busy(link: Link, path: str) -> list[Any]:
    seen: list[Event] = []
    may_end = threading.Event()

    def linger(event: Event) -> None:
        if isinstance(event, Committed) and link.rank == 3 and event.step == 2:
            assert may_end.wait(60)

    with CheckpointManager(path, 1, on_busy="skip", events=[seen.append, linger]) as manager:
        manager.save(1, state(1))
        taken = [manager.save_async(2, state(2))]
        if link.rank != 3:
            manager._writer.join()
        taken += [manager.save_async(step, state(step)) for step in (3, 4)]
        may_end.set()
        taken.append(manager.save_async(5, state(5), force=True))
        manager.join()
        skipped = [event.step for event in seen if isinstance(event, Skipped)]
        return [taken, skipped, manager.all_steps()]


def test_a_save_is_skipped_on_all_ranks_while_one_is_busy(four: Crew, tmp_path: pathlib.Path) -> None:
    """Even where a rank has been free for long."""
    for taken, skipped, steps in four.run(skip_when_busy, str(tmp_path)):
        assert taken == [True, False, False, True]
        assert skipped == [3, 4]
        assert steps == [1, 2, 5]


# -- what it costs

COLLECTIVES = ["agree", "gather_objects", "scatter_objects", "broadcast_object"]
KEYS = ["post", "missing", "collect", "announce", "claim", "await_announcement", "forget"]


def count_messages(link: Link, path: str) -> list[Any]:
    training, writing = [], []

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                training.append(name)
            elif "writer" in threading.current_thread().name:
                writing.append(name)
            return call(*args, **kwargs)

        return count

    with CheckpointManager(path, 10) as manager:
        for name in [*COLLECTIVES, *KEYS]:
            setattr(manager._ranks, name, counted(name, getattr(manager._ranks, name)))

        def messages(step: int, more: dict[str, Any]) -> tuple[list[str], list[str]]:
            training.clear()
            writing.clear()
            manager.save_async(step, state(step) | more)
            manager._writer.join()
            return list(training), list(writing)

        only_here = {"more": torch.ones(3)} if link.rank == 1 else {}
        return [messages(step, more) for step, more in ((0, {}), (7, {}), (10, {}), (20, only_here), (30, only_here))]


def test_a_save_in_steady_state_costs_one_agreement_and_other_steps_nothing(four: Crew, tmp_path: pathlib.Path) -> None:
    """Plans are exchanged at the first save, and when the structure changed on any rank."""
    replanned = ["agree", "gather_objects", "scatter_objects"]
    for rank, seen in enumerate(four.run(count_messages, str(tmp_path))):
        assert [training for training, _ in seen] == [replanned, [], ["agree"], replanned, ["agree"]]
        written = [writing for _, writing in seen]
        assert written[1] == []
        if rank == 0:
            assert written[2] == ["post", "collect", "forget", "claim", "claim"]
        else:  # the second time where it saw that rank 0 commits
            assert written[2] in (["post", *["await_announcement"] * times, "forget"] for times in (1, 2))


class CountingStore:
    """A store client that keeps its requests, but for those of watchers; one asked again and again counts once, if it
    ever found something."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.requests: set[tuple[str, Any]] = set()

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        def ask(*args: Any) -> Any:
            answer = getattr(self._inner, verb)(*args)
            what = args[0] if isinstance(args[0], str) else args[0][0]
            if not what.startswith("sync/") and answer is not False:
                self.requests.add((verb, what if verb != "compare_set" else args))
            return answer

        return ask


def count_messages_by_request(link: Link, path: str) -> int:
    with CheckpointManager(path, 1) as manager:
        manager.save(1, state(1))
        manager.save(2, state(2))
        ranks: Any = manager._ranks
        ranks._training_store = entries = CountingStore(ranks._training_store)
        ranks._store = others = CountingStore(ranks._store)
        manager.save(3, state(3))
        return 2 * len(entries.requests) + len(others.requests)  # an entry is said in the store, and is a collective


def test_a_save_in_steady_state_costs_nine_small_messages_at_most(four: Crew, tmp_path: pathlib.Path) -> None:
    """Collectives and requests to the store, in all phases; while a rank waits, it asks again."""
    on_rank_0, *on_others = four.run(count_messages_by_request, str(tmp_path))
    assert on_rank_0 <= 9
    assert max(on_others) <= 6


def save_often(link: Link, path: str) -> None:
    with CheckpointManager(path, 1, max_to_keep=1) as manager:
        for step in range(12):
            manager.save(step, state(step))
            if step in (2, 11):
                link.send()
                link.receive()


def test_the_store_does_not_grow_with_the_number_of_saves(four: Crew, tmp_path: pathlib.Path) -> None:
    """It lives in the memory of one process for as long as the job."""
    job = four.start(save_often, str(tmp_path))
    num_keys = []
    for _ in range(2):
        four.hear()
        num_keys.append(job.num_store_keys())
        for rank in range(4):
            job.tell(rank)
    four.hear()
    assert num_keys[0] == num_keys[1]


# -- several managers


def use_two_managers(link: Link, path: str) -> list[Any]:
    part = dist.new_group([1, 3])
    seen: list[Any] = []
    with CheckpointManager(f"{path}/all", 2, max_to_keep=1) as everyone:
        some = CheckpointManager(f"{path}/part", 1, process_group=part) if link.rank in (1, 3) else None
        for step in range(5):
            everyone.save_async(step, state(step))
            if some is not None:
                some.save_async(step, state(step + 50))
        everyone.join()
        seen += [everyone.all_steps(), restored(everyone.restore_latest)]
        if some is not None:
            some.join()
            seen += [some.all_steps(), restored(lambda target: some.restore(2, target))]
            some.close()
        everyone.save(6, state(6))
        return [*seen, everyone.all_steps()]


def test_a_manager_of_a_part_of_the_world_and_one_of_all_do_not_interfere(four: Crew, tmp_path: pathlib.Path) -> None:
    """Different paths, both with saves in flight, one closed before the other."""
    for rank, seen in enumerate(four.run(use_two_managers, str(tmp_path))):
        of_part = [[0, 1, 2, 3, 4], (52.0, 5200.0 + rank)] if rank in (1, 3) else []
        assert seen == [[4], (4.0, 400.0 + rank), *of_part, [6]]
