"""What a save costs in steady state, counted: calls of Python and C per tensor, copies, fsyncs, calls of storage.

Times are measured by scripts/bench and never asserted.
"""

from __future__ import annotations

import gc
import os
import pathlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.logger import _dcp_logger

from asyncckpt import CheckpointManager
from asyncckpt.testing import RecordingStorage
from stagers import BlockingAsyncStager, OverlappingAsyncStager


def small_tensors(count: int) -> dict[str, Any]:
    return {"model": {f"layers.{i}.weight": torch.full((1024,), float(i)) for i in range(count)}, "epoch": 3}


def calls_of_a_steady_save(url: str, num_tensors: int) -> tuple[int, int]:
    """Calls, Python's and C's, on the training thread and on all others."""
    found, is_counting = Counter[bool](), False

    def count(frame: Any, event: str, argument: Any) -> None:
        if is_counting and event in ("call", "c_call"):
            found[threading.current_thread() is threading.main_thread()] += 1

    state = small_tensors(num_tensors)
    threading.setprofile(count)  # for the threads that are started from now on
    try:
        with CheckpointManager(url, chkpt_on_preemption=False) as manager:
            for step in (1, 2):
                manager.save(step, state)
            is_counting = True
            sys.setprofile(count)
            manager.save_async(3, state)
            sys.setprofile(None)
            manager.join()
            is_counting = False
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return found[True], found[False]


def test_a_tensor_more_costs_a_steady_save_a_handful_of_calls(tmp_path: pathlib.Path) -> None:
    """On the training thread to take the state apart, on the writer's a checksum and a slice."""
    one = calls_of_a_steady_save(f"{tmp_path}/a", 1000)
    two = calls_of_a_steady_save(f"{tmp_path}/b", 2000)
    training, writing = ((b - a) / 1000 for a, b in zip(one, two, strict=True))
    assert training <= 12
    assert writing <= 3


def live_objects() -> Counter[str]:
    """What the garbage collector tracks, by type."""
    gc.collect()
    return Counter(type(one).__qualname__ for one in gc.get_objects())


@pytest.fixture
def _dcps_log_as_torch_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent: pytest listens to loggers that do not propagate, too, and keeps what it hears."""
    monkeypatch.setattr(_dcp_logger, "disabled", True)


@pytest.mark.usefixtures("_dcps_log_as_torch_leaves_it")
@pytest.mark.parametrize("stager", [BlockingAsyncStager, OverlappingAsyncStager])
def test_saves_leave_no_objects_behind(tmp_path: pathlib.Path, stager: type[BlockingAsyncStager]) -> None:
    """After forty saves more, two of which are kept, there are no more of any type, hardly more allocations."""
    state = small_tensors(50)
    with CheckpointManager(str(tmp_path), max_to_keep=2, chkpt_on_preemption=False, stager=stager()) as manager:
        for step in range(45):
            if step in (4, 5):  # the first count leaves a few references of its own
                before = live_objects()
                num_blocks = sys.getallocatedblocks()
            manager.save_async(step, state)
            manager.join()
        gc.collect()
        num_blocks = sys.getallocatedblocks() - num_blocks
        more = {kind: count - before[kind] for kind, count in live_objects().items() if count - before[kind] >= 20}
    assert more == {}
    assert num_blocks < 3 * 40  # 63 were seen where none stay: caches of the process that fill up


class WatchedStorage(RecordingStorage):
    """Notes the address and length of every view it is given."""

    def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        def watched() -> Iterator[memoryview]:
            for view in views:
                self.seen.append((np.frombuffer(view, np.uint8).ctypes.data, len(view)))
                yield view

        super().write_file(path, size, watched())

    seen: list[tuple[int, int]]


@pytest.mark.parametrize("save", ["save", "save_async"])
def test_large_tensors_go_from_the_staging_buffer_to_storage_as_they_lie(tmp_path: pathlib.Path, save: str) -> None:
    """One copy in all, by address; the buffer is the same from save to save."""
    state = {f"w{i}": torch.randn(500_000) for i in range(4)}
    stager = BlockingAsyncStager()
    slabs: list[tuple[int, int]] = []

    def noted(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def snapshot(view: Any) -> Any:
            taken = plain(view)
            slabs.append((np.frombuffer(taken.memory, np.uint8).ctypes.data, len(taken.memory)))
            return taken

        return snapshot

    stager.snapshot = noted(stager.snapshot)  # type: ignore[method-assign]
    stager.borrow = noted(stager.borrow)  # type: ignore[method-assign]
    with CheckpointManager(str(tmp_path), stager=stager) as manager:
        storage = manager._storage = manager._saver.committer.storage = WatchedStorage(manager._storage)
        for step in (1, 2, 3):
            storage.seen = []
            getattr(manager, save)(step, state)
            manager.join()
            start, size = slabs[-1]
            assert sum(n for at, n in storage.seen if start <= at < start + size) == 8_000_000
    assert len(set(slabs)) == 1


def test_a_save_calls_storage_five_times_whatever_is_kept(tmp_path: pathlib.Path) -> None:
    """The data, a look whether it is still there, the stock index, the manifest, a look whether another run was faster;
    then of a step that is dropped a look whose it is now, and one deletion for each group."""
    with CheckpointManager(str(tmp_path), max_to_keep=2) as manager:
        for step in range(5):
            manager.save(step, small_tensors(3))
        manager.join()
        storage = manager._storage = manager._saver.committer.storage = RecordingStorage(manager._storage)
        manager.save(5, small_tensors(3))
        manager.join()
    names = [call.verb for call in storage.calls]
    assert names[:5] == ["write_file", "list_files", "replace", "create", "list_files"]
    assert names[5:] == ["list_files", *["delete"] * 3]


def test_a_save_to_a_folder_syncs_each_file_and_each_folder_that_changed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tensors there are; and what the manifest names before the manifest."""
    synced: list[str] = []
    plain = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        plain(descriptor)

    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, small_tensors(300))
        manager.join()
        monkeypatch.setattr(os, "fsync", fsync)
        manager.save(2, small_tensors(300))
    kinds = [
        "data" if name.endswith(".distcp") else "temporary" if ".tmp-" in name else "attempt" if "-" in name else name
        for name in synced
    ]
    assert kinds == [".", "2", "data", "attempt", "temporary", "2", "temporary", "2"]


def test_prewarm_leaves_nothing_for_the_first_save_to_plan(tmp_path: pathlib.Path) -> None:
    """Neither a plan, nor a buffer, nor a try of the path."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.prewarm(small_tensors(10))
        plan = manager._planning._plan
        assert plan is not None
        assert plan.places is not None
        storage = manager._storage = manager._saver.committer.storage = RecordingStorage(manager._storage)
        manager.save(1, small_tensors(10))
        assert manager._planning._plan is plan
        assert storage.count("check_writable") == 0
        assert manager.all_steps() == [1]
