"""A run with many steps: what opening it and saving to it cost does not grow with them."""

from __future__ import annotations

import pathlib
import sys
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from asyncckpt import CheckpointManager, KeepAny, KeepEvery, KeepLast, KeepPolicy
from asyncckpt.index import RunIndex
from asyncckpt.steps import Listing, attempt_name, manifest_name
from asyncckpt.storage import open_storage
from asyncckpt.testing import Call, RecordingStorage
from tests.states import state


class LongRun(RecordingStorage):
    """A folder that seems to hold whole steps 0, 10, 20, ... besides what is saved to it."""

    def __init__(self, path: pathlib.Path, num_steps: int) -> None:
        super().__init__(open_storage(str(path)))
        self.steps = {10 * number: number + 1 for number in range(num_steps)}

    def list_files(self, prefix: str = "") -> Mapping[str, int]:
        files = dict(super().list_files(prefix))
        assert prefix == "" or int(prefix.split("/")[0]) not in self.steps
        if prefix == "":
            for step, sequence in self.steps.items():
                names = f"{attempt_name(sequence, 7)}/__0_0.distcp", ".metadata", manifest_name(sequence)
                files |= {f"{step}/{name}": 1000 for name in names}
        return files


def opened(
    monkeypatch: pytest.MonkeyPatch, path: pathlib.Path, num_steps: int, **arguments: Any
) -> tuple[CheckpointManager, LongRun]:
    storage = LongRun(path, num_steps)
    monkeypatch.setattr("asyncckpt.manager.open_storage", lambda *_, **__: storage)
    return CheckpointManager(str(path), **arguments), storage


def test_a_run_of_10000_steps_is_opened_by_one_listing(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """No step of it is looked at."""
    manager, storage = opened(monkeypatch, tmp_path, 10_000)
    with manager:
        assert storage.calls == [Call("list_files", ("",))]
        assert len(manager.all_steps()) == 10_000
        assert manager.latest_step() == 99_990


KEEPS_ALL = KeepAny(KeepLast(3), KeepEvery(1))


@pytest.mark.parametrize("keep", [None, KEEPS_ALL])
def test_a_save_calls_storage_as_often_however_many_steps_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, keep: KeepPolicy | None
) -> None:
    """With retention and without."""
    counts = []
    for num_steps in (10, 10_000):
        manager, storage = opened(monkeypatch, tmp_path / str(num_steps), num_steps, keep=keep)
        with manager:
            manager.save(200_001, state(1))  # the first one tidies up, by one listing more
            manager.join()
            storage.calls.clear()
            manager.save(200_002, state(2))
            manager.join()
            counts.append([call.verb for call in storage.calls])
    assert counts[0] == counts[1]
    assert counts[0] == ["write_file", "list_files", "replace", "create", "list_files"]


def calls_of_a_save(monkeypatch: pytest.MonkeyPatch, path: pathlib.Path, num_steps: int) -> int:
    """Calls, Python's and C's, on all threads but this one, of a save to a run that keeps all its steps."""
    calls, is_counting = 0, False

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += is_counting and event in ("call", "c_call")

    threading.setprofile(count)  # for threads that are started from now on
    try:
        manager, _ = opened(monkeypatch, path, num_steps, keep=KEEPS_ALL)
        with manager:
            manager.save(200_001, state(1))
            manager.join()
            is_counting = True
            manager.save(200_002, state(2))
            manager.join()
            is_counting = False
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.setprofile(None)
    return calls


def test_retention_looks_a_kept_step_up_and_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """On the writer's thread, at each save."""
    few = calls_of_a_save(monkeypatch, tmp_path / "few", 100)
    many = calls_of_a_save(monkeypatch, tmp_path / "many", 2100)
    assert (many - few) / 2000 <= 2.1


def test_steps_are_told_in_the_order_of_their_commits() -> None:
    """Those listed, those committed since, and one that was saved again."""
    index = RunIndex()
    index.load(Listing({30: 1, 10: 3, 20: 2}, frozenset(), 4), {})
    index.commit(40, 5, [])
    index.commit(30, 6, [])
    index.remove([20])
    assert index.by_commit() == [(10, 3), (40, 5), (30, 6)]
