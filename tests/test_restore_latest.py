"""restore_latest: which step it takes, what it says of those it passes over, and what becomes of the state."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner

from asyncckpt import (
    CheckpointManager,
    DamagedStepError,
    Event,
    Restored,
    RestoreError,
    StateMismatchError,
    TrainState,
    UnsafeObjectError,
)
from asyncckpt.events import log_events
from asyncckpt.testing import FaultyStorage, RecordingStorage
from tests.exact import bits
from tests.states import assert_same, state, target_like
from tests.test_verify import data_file, flip, manifest_of


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 1 and 2."""
    with CheckpointManager(str(tmp_path)) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
    return tmp_path


def flip_payload(run: pathlib.Path, step: int, key: str) -> None:
    chunk = next(chunk for chunk in manifest_of(run, step).chunks if chunk.key == key)
    flip(data_file(run, step), chunk.payload_offset + 3)


def remove(path: pathlib.Path) -> None:
    path.unlink()


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [remove, cut])
def test_a_file_that_is_missing_or_cut_is_found_before_anything_is_changed(
    run: pathlib.Path, damage: Callable[[pathlib.Path], None]
) -> None:
    """By the listing that is made anyway; no byte of data is read."""
    for step in (1, 2):
        damage(data_file(run, step))
    target = state(-1)
    with CheckpointManager(str(run)) as manager:
        manager._storage = storage = RecordingStorage(manager._storage)
        with pytest.raises(
            DamagedStepError, match=r"tried \[2, 1\]. Nothing was changed.\n  step 2: .*__0_0"
        ) as raised:
            manager.restore_latest(target)
        assert not storage.count("read_into")
    assert "half overwritten" not in str(raised.value)
    assert_same(state(-1), target)


def test_what_lies_in_other_files_than_the_missing_one_can_be_restored(tmp_path: pathlib.Path) -> None:
    """A part of the state may be all that is left of weeks."""
    parts = {key: torch.full((50_000,), number) for number, key in enumerate("abc")}
    with CheckpointManager(str(tmp_path)) as manager:
        manager._storage.max_file_bytes = 210_000
        manager.save(1, parts)
        lost = next(chunk.file for chunk in manifest_of(tmp_path).chunks if chunk.key == "b")
        next(tmp_path.rglob(lost)).unlink()
        for key in "ac":
            target = {key: torch.zeros(50_000, dtype=torch.int64)}
            manager.restore(1, target)
            assert_same({key: parts[key]}, target)
        with pytest.raises(DamagedStepError, match=rf"is damaged: 1/\S+/{lost} is missing\. Nothing was changed"):
            manager.restore(1, target_like(parts))
        with pytest.raises(DamagedStepError, match=rf"{lost} is missing"):
            manager.verify(1)


def test_the_steps_passed_over_and_why_are_in_the_event_and_the_log(
    run: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By file, key, offset, expected and found, or by what the manifest lacks."""
    with CheckpointManager(str(run)) as manager:
        manager.save(3, state(3))
    flip_payload(run, 3, "w")
    flip(next((run / "2").glob("manifest-*")), 40)
    seen: list[Event] = []
    with CheckpointManager(str(run), events=[seen.append]) as manager:
        assert manager.restore_latest(state(0)) == 1
    (event,) = [event for event in seen if isinstance(event, Restored)]
    assert (event.skipped_steps, event.checksums) == ((3, 2), "manifest")
    first, second = event.skip_reasons
    assert "'w' at offset" in first
    assert "the manifest says" in first
    assert "manifest-00000002.json" in second
    assert not first.endswith(("training on", "."))
    caplog.clear()
    log_events(event)
    assert f"damaged newer steps: 3 ({first}); 2 ({second})" in caplog.text


@pytest.mark.parametrize("planner", [None, DefaultLoadPlanner(allow_partial_load=True)], ids=["ours", "partial"])
def test_an_older_step_that_lacks_what_a_damaged_one_changed_is_not_taken(
    tmp_path: pathlib.Path, planner: DefaultLoadPlanner | None
) -> None:
    """The state would be half of either: the error says so, and what to do."""
    newer = {"a": torch.ones(50_000), "b": torch.ones(50_000)}
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"a": torch.zeros(50_000)})
        manager.save(2, newer)
    flip_payload(tmp_path, 2, "b")
    with CheckpointManager(str(tmp_path), load_planner=planner) as manager:
        with pytest.raises(RestoreError, match=r"half overwritten by steps \[2\]: do not train on") as raised:
            manager.restore_latest(target_like(newer))
        assert "Make the state anew and restore step 1 into it" in str(raised.value)
        assert "Nothing was changed" not in str(raised.value)


def test_a_step_found_damaged_before_it_was_read_puts_no_bounds_on_the_next(tmp_path: pathlib.Path) -> None:
    """The error of one that does not fit is then the usual one."""
    newer = {"a": torch.ones(50_000), "b": torch.ones(50_000)}
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"a": torch.zeros(50_000)})
        manager.save(2, newer)
        flip_payload(tmp_path, 2, "b")
        target = target_like(newer)
        with pytest.raises(StateMismatchError, match=r"missing in the checkpoint: 'b'"):
            manager.restore_latest(target, verify=True)
    assert_same(target_like(newer), target)


def test_verify_reads_a_step_before_the_state_is_changed(run: pathlib.Path) -> None:
    """So damage anywhere in it leaves the state as it was."""
    for step in (1, 2):
        flip_payload(run, step, "w")
    target = state(-1)
    with CheckpointManager(str(run)) as manager:
        with pytest.raises(DamagedStepError, match="Nothing was changed") as raised:
            manager.restore_latest(target, verify=True)
        assert_same(state(-1), target)
        assert "'w': the 4000 bytes at offset" in str(raised.value)
        with pytest.raises(DamagedStepError, match="may be half overwritten: do not train on"):
            manager.restore_latest(target)
    flip_payload(run, 1, "w")
    with CheckpointManager(str(run)) as manager:
        assert manager.restore_latest(target, verify=True) == 1
    assert_same(state(1), target)


def test_a_restore_that_finds_damage_on_its_way_says_that_the_state_is_no_good(run: pathlib.Path) -> None:
    """Objects are put in their place when all has been read."""
    flip_payload(run, 2, "w")
    target = state(-1)
    with (
        CheckpointManager(str(run)) as manager,
        pytest.raises(DamagedStepError, match="may be half overwritten: restore a whole step into it"),
    ):
        manager.restore(2, target)
    assert target["n"] == -1


def test_a_step_that_cannot_be_read_after_a_damaged_one_does_not_say_that_nothing_was_changed(
    run: pathlib.Path,
) -> None:
    """The damaged one was half read by then."""
    flip_payload(run, 2, "w")
    with CheckpointManager(str(run)) as manager:
        manager._storage = FaultyStorage(manager._storage, "list_files", nth=2)
        with pytest.raises(RestoreError, match=r"step 1 at .* cannot be read: .*injected fault") as raised:
            manager.restore_latest(state(-1))
    assert raised.value.outcome.startswith("The state may be half overwritten")
    assert "Nothing was changed" not in str(raised.value)
    assert raised.value.step == 1


class Vanishing(RecordingStorage):
    """Loses a step to another run's retention when it is first read."""

    def __init__(self, inner: Any, run: pathlib.Path, step: int) -> None:
        super().__init__(inner)
        self._folder = run / str(step)

    def read_into(self, path: str, *arguments: Any) -> None:
        if path.startswith(f"{self._folder.name}/"):
            for pattern in ("manifest-*", ".metadata", "*.distcp"):
                for file in self._folder.rglob(pattern):
                    file.unlink()
        super().read_into(path, *arguments)


def test_a_step_that_goes_while_it_is_read_leaves_no_lie(run: pathlib.Path) -> None:
    """restore says that it is gone and the state no good, restore_latest takes the step before."""
    target = state(-1)
    with CheckpointManager(str(run)) as manager:
        manager.save(3, state(3))
        plain = manager._storage
        for step in (3, 2):
            manager._storage = Vanishing(plain, run, step)
            if step == 3:
                with pytest.raises(DamagedStepError, match=r"step 3 at .* is gone; .*refresh\(\)") as raised:
                    manager.restore(3, target)
                assert "Nothing was changed" not in str(raised.value)
                assert "may be half overwritten" in str(raised.value)
            else:
                assert manager.restore_latest(target) == 1
    assert_same(state(1), target)


def test_a_step_that_goes_while_it_is_verified_is_said_to_be_gone(run: pathlib.Path) -> None:
    """Not to be damaged."""
    seen: list[Event] = []
    target = state(-1)
    with CheckpointManager(str(run), events=[seen.append]) as manager:
        manager._storage = Vanishing(manager._storage, run, 2)
        assert manager.restore_latest(target, verify=True) == 1
    assert_same(state(1), target)
    (event,) = [event for event in seen if isinstance(event, Restored)]
    (reason,) = event.skip_reasons
    assert reason.startswith(f"step 2 at {run} was listed and is gone")


class Point:
    """weights_only does not load it."""


def test_an_object_that_is_not_allowed_is_found_when_tensors_are_overwritten(tmp_path: pathlib.Path) -> None:
    """And the error says so."""
    with CheckpointManager(str(tmp_path), safe_globals=[Point]) as manager:
        manager.save(1, {"w": torch.ones(3), "o": Point()})
    with (
        CheckpointManager(str(tmp_path)) as manager,
        pytest.raises(UnsafeObjectError, match=r"'o' .*safe_globals.* may be half overwritten"),
    ):
        manager.restore(1, {"w": torch.zeros(3), "o": None})


def test_a_step_that_is_gone_since_it_was_listed_is_passed_over(run: pathlib.Path) -> None:
    """Another run's retention took it, or somebody its manifest."""
    seen: list[Event] = []
    with CheckpointManager(str(run), events=[seen.append]) as manager:
        next((run / "2").glob("manifest-*")).unlink()
        target = state(0)
        assert manager.restore_latest(target) == 1
    assert_same(state(1), target)
    (event,) = [event for event in seen if isinstance(event, Restored)]
    (reason,) = event.skip_reasons
    assert reason.startswith(f"step 2 at {run} was listed and is gone")


def make_state(seed: int) -> TrainState:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    loader = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=2, shuffle=True)
    return TrainState(model=model, optimizer=optimizer, scheduler=scheduler, dataloader=loader)


def test_a_train_state_is_wholly_of_the_older_step(tmp_path: pathlib.Path) -> None:
    """Model, buffers, optimizer, schedule, progress, random streams and the place in the data."""
    saved: dict[int, Any] = {}
    with CheckpointManager(str(tmp_path)) as manager:
        train_state = make_state(1)
        for step, batch in enumerate(train_state.batches(epochs=2), start=train_state.step):
            module, optimizer = train_state._model.module, train_state.optimizers[0]  # type: ignore[union-attr]
            module(torch.randn(4, 64) * batch.sum()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            manager.save(step, train_state)
    keys = [chunk.key for chunk in manifest_of(tmp_path, 5).chunks]
    flip_payload(tmp_path, 5, keys[-1])
    for restore in ("restore_latest", "restore"):
        fresh = make_state(2)
        with CheckpointManager(str(tmp_path)) as manager:
            if restore == "restore_latest":
                assert manager.restore_latest(fresh) == 4
            else:
                manager.restore(4, fresh)
        saved[restore] = fresh.state_dict(), next(fresh.batches()), torch.rand(3)
    assert bits(saved["restore_latest"]) == bits(saved["restore"])


def test_an_older_save_of_a_step_stays_where_the_newer_one_lost_its_files(tmp_path: pathlib.Path) -> None:
    """A crash left both, then a file went: what cleans up must not take the only whole data there are."""
    run, aside = tmp_path / "run", tmp_path / "aside"
    with CheckpointManager(str(run)) as manager:
        manager.save(1, state(1))
        shutil.copytree(run / "1", aside)
        manager.save(1, state(2))
    shutil.copytree(aside, run / "1", dirs_exist_ok=True)
    older = {path.relative_to(aside) for path in aside.rglob("*") if path.is_file()}
    next((run / "1").glob("00000002-*/*.distcp")).unlink()
    with CheckpointManager(str(run)) as manager:
        manager.save(3, state(3))
    assert older <= {path.relative_to(run / "1") for path in (run / "1").rglob("*")}
