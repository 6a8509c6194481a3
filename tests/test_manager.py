"""CheckpointManager in one process: which steps are taken, kept, restored, and what is refused."""

from __future__ import annotations

import os
import pathlib
import signal
import threading
import warnings
from typing import Any

import pytest
import torch

from asyncckpt import (
    CheckpointError,
    CheckpointManager,
    Committed,
    DamagedStepError,
    Event,
    KeepBest,
    KeepEvery,
    Pruned,
    Restored,
    SaveAny,
    SaveError,
    SaveEvery,
    SaveEverySeconds,
    Skipped,
    Staged,
    StateMismatchError,
    StepNotFoundError,
    UnsafeObjectError,
    Written,
)
from asyncckpt.testing import GatedStorage, RecordingStorage
from stagers import BlockingAsyncStager, OverlappingAsyncStager
from tests.states import assert_same, every_kind, restored, state, target_like

# -- which steps are taken


def test_every_nth_step_is_taken_and_step_0_counts(tmp_path: pathlib.Path) -> None:
    """save_async tells which, and all of them restore bit for bit."""
    with CheckpointManager(str(tmp_path), 10) as manager:
        taken = [step for step in range(31) if manager.save_async(step, state(step))]
        manager.join()
        assert taken == manager.all_steps() == [0, 10, 20, 30]
        assert manager.latest_step() == 30
        for step in taken:
            assert_same(state(step), restored(manager, step))


def test_force_takes_any_step(tmp_path: pathlib.Path) -> None:
    """save waits for the commit, so the step is there at once."""
    with CheckpointManager(str(tmp_path), 10) as manager:
        assert manager.should_save(7) is False
        assert manager.save(7, state(7)) is False
        assert manager.save(7, state(7), force=True) is True
        assert manager.all_steps() == [7]


def test_everything_a_checkpoint_may_hold_comes_back(any_url: tuple[str, dict[str, Any]]) -> None:
    """On every storage, through both stagers, and again from a new manager."""
    url, options = any_url
    with CheckpointManager(url, 1, storage_options=options, stager=OverlappingAsyncStager()) as manager:
        manager.save_async(1, every_kind(1))
        manager.save_async(2, every_kind(2))
    with CheckpointManager(url, 1, storage_options=options) as manager:
        assert manager.all_steps() == [1, 2]
        for step in (1, 2):
            target = target_like(every_kind(step))
            manager.restore(step, target)
            assert_same(every_kind(step), target)


def test_a_policy_by_the_clock_saves_when_its_time_has_come(tmp_path: pathlib.Path) -> None:
    """And a union of policies takes what either wants."""
    with CheckpointManager(str(tmp_path), save_policy=SaveEverySeconds(1e-9)) as manager:
        assert manager.should_save(1)
    with CheckpointManager(str(tmp_path), save_policy=SaveAny(SaveEverySeconds(3600), SaveEvery(5))) as manager:
        assert [manager.should_save(step) for step in (4, 5)] == [False, True]


def test_int_keys_and_lists_come_back_where_they_were(tmp_path: pathlib.Path) -> None:
    """DCP would restore the value under int key 0 to a new key '0'."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, {"state": {0: {"n": 5, "t": torch.ones(2)}}, "list": [[1], {"x": 2}]})
        target = {"state": {0: {"n": 0, "t": torch.zeros(2)}}, "list": [[0], {"x": 0}]}
        manager.restore(1, target)
    assert_same({"state": {0: {"n": 5, "t": torch.ones(2)}}, "list": [[1], {"x": 2}]}, target)


# -- retention


def test_the_last_k_commits_are_kept_and_a_step_saved_again_is_the_newest(tmp_path: pathlib.Path) -> None:
    """The order survives a restart."""
    with CheckpointManager(str(tmp_path), 10, max_to_keep=2) as manager:
        for step in (10, 20, 30):
            manager.save_async(step, state(step))
        manager.save(10, state(99))
        assert manager.all_steps() == [10, 30]
    with CheckpointManager(str(tmp_path), 10, max_to_keep=2) as manager:
        assert manager.all_steps() == [10, 30]
        assert_same(state(99), restored(manager, 10))
        manager.save(40, state(40))
        assert manager.all_steps() == [10, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "40"]


def test_policies_add_up_and_metrics_survive_a_restart(tmp_path: pathlib.Path) -> None:
    """Best by metric, and every n, besides the newest."""
    keep = KeepBest(1, "loss") | KeepEvery(40)
    with CheckpointManager(str(tmp_path), 10, keep=keep) as manager:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan"))):
            manager.save(step, state(step), metrics={"loss": loss})
        assert manager.all_steps() == [20, 40]
    with CheckpointManager(str(tmp_path), 10, keep=keep) as manager:
        manager.save(50, state(50), metrics={"loss": 0.5})
        assert manager.all_steps() == [40, 50]


def test_a_protected_step_is_kept(tmp_path: pathlib.Path) -> None:
    """For the life of the manager."""
    with CheckpointManager(str(tmp_path), 1, max_to_keep=1) as manager:
        manager.save(1, state(1))
        manager.protect(1)
        for step in (2, 3):
            manager.save(step, state(step))
        assert manager.all_steps() == [1, 3]


# -- the queue


def gated(manager: CheckpointManager, verb: str) -> GatedStorage:
    gate = GatedStorage(manager._storage, verb)
    manager._storage = manager._saver.committer.storage = gate
    return gate


def test_a_full_queue_holds_the_next_save_before_it_copies(tmp_path: pathlib.Path) -> None:
    """Host memory is one copy per save in flight; the event reports the wait."""
    seen: list[Event] = []
    started = threading.Event()
    with CheckpointManager(str(tmp_path), 1, events=[seen.append]) as manager, gated(manager, "write_file") as gate:
        manager.save_async(1, state(1))
        gate.wait_reached()
        second = state(2)

        def open_later() -> None:
            started.wait()
            second["w"].fill_(7)  # the copy has not been taken yet
            gate.open()

        thread = threading.Thread(target=open_later)
        thread.start()
        started.set()
        manager.save_async(2, second)
        thread.join()
        manager.join()
        assert restored(manager, 2)["w"][0] == 7
    waits = [event.wait_s for event in seen if isinstance(event, Staged)]
    assert waits[1] > waits[0]


def test_on_busy_skip_passes_a_step_over_and_says_so(tmp_path: pathlib.Path) -> None:
    """Force waits all the same."""
    seen: list[Event] = []
    with (
        CheckpointManager(str(tmp_path), 1, on_busy="skip", events=[seen.append]) as manager,
        gated(manager, "write_file") as gate,
    ):
        assert manager.save_async(1, state(1))
        gate.wait_reached()
        assert not manager.save_async(2, state(2))
        gate.open()
        assert manager.save_async(3, state(3), force=True)
        manager.join()
        assert manager.all_steps() == [1, 3]
    assert [event.step for event in seen if isinstance(event, Skipped)] == [2]


def test_two_saves_may_be_pending_and_commit_in_order(tmp_path: pathlib.Path) -> None:
    """max_pending_async counts the one being written."""
    with CheckpointManager(str(tmp_path), 1, max_pending_async=2) as manager, gated(manager, "create") as gate:
        manager.save_async(1, state(1))
        manager.save_async(2, state(2))
        gate.wait_reached()
        assert manager.all_steps() == []
        gate.open()
        manager.join()
        assert manager._index.by_commit() == [(1, 1), (2, 2)]


# -- restoring


def test_an_unknown_step_names_the_known_ones(tmp_path: pathlib.Path) -> None:
    """It is a FileNotFoundError, too."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, state(1))
        with pytest.raises(StepNotFoundError, match=r"no whole step 5 .* committed are \[1\]") as raised:
            manager.restore(5, state(0))
    assert isinstance(raised.value, FileNotFoundError)
    assert raised.value.known == [1]


def test_a_mismatch_lists_every_difference_and_changes_nothing(tmp_path: pathlib.Path) -> None:
    """Missing keys, shapes, dtypes and kinds, in one error."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, {"a": torch.ones(3), "b": torch.ones(2), "c": 1, "d": torch.ones(2), "ok": torch.ones(1)})
        target = {
            "a": torch.zeros(4), "b": torch.zeros(2, dtype=torch.float16), "c": torch.zeros(1), "d": 0,
            "ok": torch.zeros(1), "gone.x": 1, "gone.y": torch.zeros(1),
        }  # fmt: skip
        with pytest.raises(StateMismatchError) as raised:
            manager.restore(1, target)
        for part in ("'gone.x'", "'gone.y'", "(3,)", "(4,)", "float16", "'c'", "'d'", "6 keys differ"):
            assert part in str(raised.value)
        assert target["ok"].item() == 0


def test_extra_keys_are_reported_and_refused_only_when_strict(tmp_path: pathlib.Path) -> None:
    """A part of a checkpoint can be restored."""
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), 1, events=[seen.append]) as manager:
        manager.save(1, state(1))
        manager.restore(1, {"n": 0})
        with pytest.raises(StateMismatchError, match="not in the state dict: 'w'"):
            manager.restore(1, {"n": 0}, strict=True)
    assert [event.ignored_keys for event in seen if isinstance(event, Restored)] == [("w",)]


def test_restore_latest_passes_over_damaged_steps_and_says_so(tmp_path: pathlib.Path) -> None:
    """Damaged data, and a damaged manifest."""
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), 1, events=[seen.append]) as manager:
        assert manager.restore_latest(state(0)) is None
        for step in (1, 2, 3):
            manager.save(step, state(step))
        flip(next((tmp_path / "3").glob("*/__0_0.distcp")), 900)
        flip(next((tmp_path / "2").glob("manifest-*")), 40)
        target = state(0)
        assert manager.restore_latest(target) == 1
        assert_same(state(1), target)
        with pytest.raises(DamagedStepError, match=r"'w' at offset \d+ have CRC32 \w+, the manifest says"):
            manager.restore(3, state(0))
        with pytest.raises(DamagedStepError, match="manifest"):
            manager.restore(2, state(0))
        assert manager.all_steps() == [1, 2, 3]
        flip(next((tmp_path / "1").glob("*/__0_0.distcp")), 900)
        with pytest.raises(DamagedStepError, match=r"no step .* is whole"):
            manager.restore_latest(state(0))
    assert [event.skipped_steps for event in seen if isinstance(event, Restored)] == [(3, 2)]


def flip(path: pathlib.Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_finds_a_flipped_bit_wherever_it_is(tmp_path: pathlib.Path) -> None:
    """Payload, framing, gaps and `.metadata`; a missing file, too."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, {"big": torch.randn(600, 1000), "small": torch.ones(3), "o": [1]})
        data = next((tmp_path / "1").glob("*/__0_0.distcp"))
        assert manager.verify(1).num_bytes == data.stat().st_size + (tmp_path / "1" / ".metadata").stat().st_size
        for at in (10, 3000, 100_000, data.stat().st_size - 5):
            flip(data, at)
            with pytest.raises(DamagedStepError, match="CRC32"):
                manager.verify(1)
            flip(data, at)
        flip(tmp_path / "1" / ".metadata", 100)
        with pytest.raises(DamagedStepError, match="metadata has CRC32"):
            manager.verify(1)
        data.unlink()
        with pytest.raises(DamagedStepError, match="is missing"):
            manager.verify(1)


def test_a_reader_caught_by_a_re_save_starts_over(tmp_path: pathlib.Path) -> None:
    """The files of the old save go away between its manifest and its data."""
    with CheckpointManager(str(tmp_path), 1) as writer, CheckpointManager(str(tmp_path), 1) as reader:
        writer.save(1, state(1))
        reader.refresh()
        storage = RecordingStorage(reader._storage)
        plain_read = storage.read_into

        def read_into(path: str, ranges: Any, filled: Any = None) -> None:
            if storage.count("read_into") == 0:
                writer.save(1, state(2))
                writer.join()  # the old files are gone
            plain_read(path, ranges, filled)

        storage.read_into = read_into  # type: ignore[method-assign]
        reader._storage = storage
        assert_same(state(2), restored(reader, 1))


def test_a_job_that_follows_sees_new_steps_after_refresh(tmp_path: pathlib.Path) -> None:
    """all_steps does no I/O."""
    with CheckpointManager(str(tmp_path), 1) as writer, CheckpointManager(str(tmp_path), 1) as reader:
        writer.save(1, state(1))
        assert reader.all_steps() == []
        reader.refresh()
        assert reader.all_steps() == [1]


# -- bad input


@pytest.mark.parametrize(
    "arguments",
    [
        {"save_interval": 0}, {"save_interval": -5}, {"save_interval": 2.5}, {"max_to_keep": -1},
        {"max_pending_async": 0}, {"num_of_threads": 0}, {"on_busy": "drop"}, {"timeout": 0}, {"timeout": "5"},
        {"grace_period": 0}, {"grace_period": "5"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_value_errors(tmp_path: pathlib.Path, arguments: dict[str, Any]) -> None:
    """With the value in the text."""
    with pytest.raises(ValueError, match=str(*arguments.values())):
        CheckpointManager(str(tmp_path), **arguments)


def test_a_path_that_cannot_hold_a_run_is_refused(tmp_path: pathlib.Path) -> None:
    """Neither a folder nor a URL that fsspec knows."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file"):
        CheckpointManager(str(tmp_path / "file"), 1)
    with pytest.raises(ValueError, match="nosuch"):
        CheckpointManager("nosuch://bucket/run", 1)


def test_a_missing_bucket_is_refused_at_once(s3_options: dict[str, Any]) -> None:
    """By the constructor."""
    with pytest.raises(CheckpointError, match="no-such-bucket"):
        CheckpointManager("s3://no-such-bucket/run", 1, storage_options=s3_options)


class Custom:
    """weights_only does not load it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("bad", "error", "reason"),
    [
        ({"f": lambda: 1}, UnsafeObjectError, "'f'"),
        ({"f": threading.Lock()}, UnsafeObjectError, "'f'"),
        ({"a": {"f": Custom()}}, UnsafeObjectError, "'a.f'.*safe_globals"),
        ({"a": {"b": 1}, "a.b": 2}, ValueError, "'a.b'"),
    ],
)
def test_a_state_that_could_not_be_restored_is_refused_at_the_call(
    tmp_path: pathlib.Path, bad: dict[str, Any], error: type[Exception], reason: str
) -> None:
    """Nothing is written, and the next save works."""
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        with pytest.raises(error, match=reason):
            manager.save_async(1, bad)
        with open(__file__) as file, pytest.raises(UnsafeObjectError, match="'file'"):
            manager.save_async(1, {"file": file})
        assert list((tmp_path / "run").rglob("*.distcp")) == []
        assert manager.save(2, state(2))


def test_safe_globals_allow_a_class_to_be_saved_and_restored(tmp_path: pathlib.Path) -> None:
    """The user's word is needed on both sides."""
    with CheckpointManager(str(tmp_path), 1, safe_globals=[Custom]) as manager:
        manager.save(1, {"x": Custom()})
        target: dict[str, Any] = {"x": None}
        manager.restore(1, target)
        assert target["x"] == Custom()
    with CheckpointManager(str(tmp_path), 1) as manager, pytest.raises(UnsafeObjectError, match="safe_globals"):
        manager.restore(1, {"x": None})


def test_a_restore_warns_of_nothing(tmp_path: pathlib.Path) -> None:
    """An object with a tensor in it did, and failed where a user has warnings be errors."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, {"o": (torch.ones(2), 0.5)})
        target: dict[str, Any] = {"o": None}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            manager.restore(1, target)
    assert torch.equal(target["o"][0], torch.ones(2))


@pytest.mark.parametrize("step", [-1, 1.5, "3", True])
def test_a_wrong_step_is_a_value_error(tmp_path: pathlib.Path, step: Any) -> None:
    """For every method that takes one."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        for call in (manager.should_save, manager.protect, manager.verify):
            with pytest.raises(ValueError, match="step must be"):
                call(step)
        with pytest.raises(ValueError, match="step must be"):
            manager.save(step, state(1))


def test_metadata_must_be_json_and_metrics_numbers(tmp_path: pathlib.Path) -> None:
    """Before anything is copied."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        with pytest.raises(ValueError, match="metadata must be JSON"):
            manager.save(1, state(1), metadata={"x": object()})
        with pytest.raises(ValueError, match="metrics must be numbers"):
            manager.save(1, state(1), metrics={"loss": "low"})  # type: ignore[dict-item]


# -- preemption


def test_sigterm_saves_the_next_step_whatever_the_interval(tmp_path: pathlib.Path) -> None:
    """Once, and the previous handler still runs."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with CheckpointManager(str(tmp_path), 100) as manager:
            assert not manager.save_async(1, state(1))
            os.kill(os.getpid(), signal.SIGTERM)
            assert manager.save_async(2, state(2))
            assert manager.reached_preemption(2)
            assert not manager.save_async(3, state(3))
        assert manager.all_steps() == [2]
        assert heard == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_manager_outside_the_main_thread_must_do_without_preemption(tmp_path: pathlib.Path) -> None:
    """Python sets signal handlers in the main thread alone."""
    errors: list[BaseException] = []

    def build(chkpt_on_preemption: bool) -> None:
        try:
            CheckpointManager(str(tmp_path), 1, chkpt_on_preemption=chkpt_on_preemption).close()
        except ValueError as exc:
            errors.append(exc)

    for value in (True, False):
        thread = threading.Thread(target=build, args=(value,))
        thread.start()
        thread.join()
    assert [("chkpt_on_preemption=False" in str(error)) for error in errors] == [True]


# -- events, closing


def test_each_phase_is_one_event_with_its_figures(tmp_path: pathlib.Path) -> None:
    """Bytes, seconds, stall."""
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), 1, max_to_keep=1, events=[seen.append]) as manager:
        manager.save(1, state(1))
        manager.save(2, state(2))
        manager.join()
        restored(manager, 2)
    kinds = [type(event) for event in seen]
    assert kinds == [Staged, Written, Committed, Staged, Written, Committed, Pruned, Restored]
    committed = next(event for event in seen if isinstance(event, Committed))
    assert committed.num_bytes > 4000
    assert 0 < committed.stall_s < committed.durable_s
    assert (committed.url, committed.step, committed.rank) == (str(tmp_path), 1, 0)


def test_a_sink_that_raises_harms_nothing(tmp_path: pathlib.Path) -> None:
    """It is logged."""

    def broken(event: Event) -> None:
        raise RuntimeError("sink")

    with CheckpointManager(str(tmp_path), 1, events=[broken]) as manager:
        manager.save(1, state(1))
        assert manager.all_steps() == [1]


def test_a_closed_manager_says_so(tmp_path: pathlib.Path) -> None:
    """close is idempotent."""
    manager = CheckpointManager(str(tmp_path), 1)
    manager.close()
    manager.close()
    with pytest.raises(ValueError, match="closed"):
        manager.save(1, state(1))


def test_steady_state_saves_reuse_one_buffer_and_one_plan(tmp_path: pathlib.Path) -> None:
    """And a change of structure is noticed."""
    with CheckpointManager(str(tmp_path), 1, stager=(stager := BlockingAsyncStager())) as manager:
        manager.save(1, state(1))
        plan, pool = manager._planning._plan, repr(stager)
        manager.save(2, state(2))
        assert manager._planning._plan is plan
        assert repr(stager) == pool
        manager.save(3, state(3) | {"more": torch.ones(1)})
        assert manager._planning._plan is not plan
        target = {"more": torch.zeros(1)}
        manager.restore(3, target)
        assert target["more"].item() == 1


def test_a_foreign_step_is_never_overwritten(tmp_path: pathlib.Path) -> None:
    """Nor counted, nor deleted."""
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "__0_0.distcp").write_bytes(b"theirs")
    with CheckpointManager(str(tmp_path), 1, max_to_keep=1) as manager:
        with pytest.raises(SaveError, match="another writer"):
            manager.save(5, state(5))
        manager.save(6, state(6))
        manager.save(7, state(7))
    assert (tmp_path / "5" / "__0_0.distcp").read_bytes() == b"theirs"
