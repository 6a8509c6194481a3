"""What torch_xla's CheckpointManager does wrong, one test each: here it is right. See its experimental/
distributed_checkpoint/manager.py, torch_xla 2.9.0. Pruning on all ranks is in test_many_ranks.py; XLA tensors are in
tests/xla/."""

from __future__ import annotations

import datetime
import errno
import importlib.util
import pathlib
from typing import Any

import pytest
import torch

from asyncckpt import CheckpointError, CheckpointManager, SaveError, UnsafeObjectError
from asyncckpt.testing import FaultyStorage, GatedStorage
from tests.states import assert_same, restored, state


def test_cpu_tensors_are_copied_not_aliased(tmp_path: pathlib.Path) -> None:
    """There, AdamW's step saved at 2 was restored as 5."""
    step = torch.tensor(2.0)
    with CheckpointManager(str(tmp_path), 1) as manager, GatedStorage(manager._storage, "write_file") as gate:
        manager._saver.committer.storage = gate
        manager.save_async(1, {"step": step})
        step.fill_(5)
        gate.open()
        manager.join()
        target = {"step": torch.zeros(())}
        manager.restore(1, target)
    assert target["step"].item() == 2


def test_one_kept_step_saved_twice_is_still_there(tmp_path: pathlib.Path) -> None:
    """There, the directory was deleted under its twin: no checkpoint left, and one listed."""
    with CheckpointManager(str(tmp_path), 10, max_to_keep=1) as manager:
        manager.save(10, state(1))
        manager.save(10, state(2))
        assert manager.all_steps() == [10]
        assert_same(state(2), restored(manager, 10))


def test_a_resumed_run_that_saves_its_step_again_loses_none(tmp_path: pathlib.Path) -> None:
    """There, all_steps() was [20, 30] and the disk held 30 alone."""
    with CheckpointManager(str(tmp_path), 10, max_to_keep=2) as manager:
        manager.save(10, state(10))
        manager.save(20, state(20))
    with CheckpointManager(str(tmp_path), 10, max_to_keep=2) as manager:
        manager.save(20, state(21))
        manager.save(30, state(30))
        assert manager.all_steps() == [20, 30]
        assert_same(state(21), restored(manager, 20))
        assert_same(state(30), restored(manager, 30))


def test_a_background_failure_is_raised(tmp_path: pathlib.Path) -> None:
    """There, save_async returned True, join() None, and nothing was said."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
        assert manager.save_async(1, state(1))
        with pytest.raises(SaveError, match=r"step 1 .* injected fault") as raised:
            manager.join()
        assert isinstance(raised.value.__cause__, OSError)
        manager.join()
        assert manager.save(2, state(2))


def test_the_copy_is_taken_after_the_place_in_the_queue(tmp_path: pathlib.Path) -> None:
    """There, host memory held one copy more than max_pending_async."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        for step in range(3):
            manager.save_async(step, state(step))
        manager.join()
        assert "1 idle, 0 lent" in repr(manager._stager)


def test_objects_that_could_not_be_restored_are_refused_when_saved(tmp_path: pathlib.Path) -> None:
    """There, a datetime was saved, and the restore failed."""
    now = datetime.datetime(2026, 11, 22, tzinfo=datetime.UTC)
    with CheckpointManager(str(tmp_path), 1) as manager, pytest.raises(UnsafeObjectError, match="'t'"):
        manager.save(1, {"t": now})
    allowed = [datetime.datetime, datetime.timezone, datetime.timedelta]
    with CheckpointManager(str(tmp_path), 1, safe_globals=allowed) as manager:
        manager.save(1, {"t": now})
        target: dict[str, Any] = {"t": None}
        manager.restore(1, target)
        assert target["t"] == now


def test_a_failed_re_save_leaves_the_old_save(tmp_path: pathlib.Path) -> None:
    """There, the old directory was deleted before the new one was written."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, state(1))
        for verb in ("write_file", "create"):
            manager._saver.committer.storage = FaultyStorage(manager._storage, verb)
            with pytest.raises(SaveError):
                manager.save(1, state(2))
            assert_same(state(1), restored(manager, 1))
    with CheckpointManager(str(tmp_path), 1) as manager:
        assert_same(state(1), restored(manager, 1))


def test_a_network_error_does_not_look_like_a_fresh_start(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, a bare except took it for an invalid checkpoint: training began anew and overwrote the run."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, state(1))

    def unreachable(self: Any, prefix: str = "") -> dict[str, int]:
        raise OSError(errno.ENETUNREACH, "network is unreachable")

    monkeypatch.setattr("asyncckpt.storage_local.LocalStorage.list_files", unreachable)
    with pytest.raises(CheckpointError, match=r"cannot be listed.*unreachable"):
        CheckpointManager(str(tmp_path), 1)


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is here")
def test_where_torch_xla_is_missing_its_integration_says_what_to_install() -> None:
    """Each release of it works with one minor release of torch."""
    with pytest.raises(ImportError, match=r"pip install 'torch==2\.9\.\*' 'torch_xla==2\.9\.\*'"):
        importlib.import_module("asyncckpt.integrations.xla")
