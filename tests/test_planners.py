"""DCP's planners, and users' own, on our steps: under stock `dcp.load` and under the manager; and its converters."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.storage import StorageReader

from asyncckpt import CheckpointManager, ShardReader, StateMismatchError
from tests.states import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized")


def state(scale: float) -> dict[str, Any]:
    return {
        "model": {"a": torch.full((3,), scale), "b": torch.full((2, 2), scale)},
        "list": [torch.full((2,), scale), {"n": scale}],
        "step": scale,
    }


@pytest.fixture
def run(tmp_path: pathlib.Path) -> Iterator[CheckpointManager]:
    with CheckpointManager(str(tmp_path / "run"), chkpt_on_preemption=False) as manager:
        manager.save(1, state(1.0))
        yield manager


@pytest.fixture(params=[FileSystemReader, ShardReader])
def reader(request: pytest.FixtureRequest, run: CheckpointManager) -> StorageReader:
    """Stock DCP's, or ours, of our step."""
    reader: StorageReader = request.param(f"{run.url}/1")
    return reader


# -- stock planners


def test_a_partial_load_leaves_what_the_checkpoint_lacks(reader: StorageReader) -> None:
    """DCP's way to say `allow_missing`."""
    target = {"model": {"a": torch.zeros(3), "new": torch.full((2,), 7.0)}}
    dcp.load(target, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert_same({"model": {"a": torch.ones(3), "new": torch.full((2,), 7.0)}}, target)


@pytest.mark.parametrize("keys", [None, {"model"}, {"list"}, {"model.a", "step"}], ids=str)
def test_a_state_is_made_from_what_the_index_says(reader: StorageReader, keys: set[str] | None) -> None:
    """The planner under DCP's converters, all of a checkpoint or the subtrees of some keys."""
    found: dict[str, Any] = {}
    dcp.state_dict_loader._load_state_dict(
        found, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(keys), no_dist=True
    )
    expected = state(1.0)
    if keys is not None:
        expected = {key: value for key, value in expected.items() if any(part.split(".")[0] == key for part in keys)}
        if "model.a" in keys:
            del expected["model"]["b"]
    assert_same(expected, found)


def test_keys_are_loaded_by_name(run: CheckpointManager) -> None:
    """By torch's own helper, and by ours: the same."""
    found = _load_state_dict_from_keys({"model"}, checkpoint_id=f"{run.url}/1")
    assert_same({"model": run.read(1, "model")}, found)


# -- a user's load planner


class Renaming(DefaultLoadPlanner):
    """Loads keys of the checkpoint into a state that calls them otherwise."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        renamed = {self.names.get(key, key): value for key, value in state_dict.items()}
        super().set_up_planner(renamed, metadata, is_coordinator)


def test_a_planner_that_renames_keys(run: CheckpointManager, reader: StorageReader) -> None:
    """In the manager and under dcp.load."""
    target = {"encoder": {"a": torch.zeros(3), "b": torch.zeros(2, 2)}}
    dcp.load(target, storage_reader=reader, planner=Renaming({"encoder": "model"}))
    assert_same({"encoder": state(1.0)["model"]}, target)
    target = {"encoder": {"a": torch.zeros(3), "b": torch.zeros(2, 2)}}
    with CheckpointManager(run.url, load_planner=Renaming({"encoder": "model"})) as manager:
        manager.restore(1, target)
    assert_same({"encoder": state(1.0)["model"]}, target)


class Counting(DefaultLoadPlanner):
    """Sees every item, and changes what was read; DCP's documentation has one like it."""

    seen: list[str]

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.seen = []
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        self.seen += sorted(item.dest_index.fqn for item in plan.items)
        return plan

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        tensor.mul_(10)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(read_item, value)
        LOG.append((read_item.dest_index.fqn, self.seen))


LOG: list[tuple[str, list[str]]] = []


def test_a_planner_sees_and_changes_all_that_is_read(run: CheckpointManager) -> None:
    """Every call that DCP makes, also when keys are chosen: then the chosen ones alone."""
    with CheckpointManager(run.url, load_planner=Counting()) as manager:
        for keys, seen in [
            (None, ["list.0", "list.1.n", "model.a", "model.b", "step"]),
            (["model.a", "list.1"], ["list.1.n", "model.a"]),
        ]:
            LOG.clear()
            target = state(0.0)
            manager.restore(1, target, keys=keys)
            assert LOG[0][1] == seen
            assert target["list"][1]["n"] == 1.0
            assert target["model"]["a"].eq(10).all()
            assert target["model"]["b"].eq(10 if keys is None else 0).all()
            assert target["step"] == (1.0 if keys is None else 0.0)


def test_a_planner_may_let_keys_be_missing_under_the_manager(run: CheckpointManager) -> None:
    """It alone decides, unless `allow_missing` has done so."""
    target = state(0.0) | {"new": torch.full((2,), 7.0)}
    for options, keys in [({"allow_partial_load": True}, False), ({}, "new")]:
        with CheckpointManager(run.url, load_planner=DefaultLoadPlanner(**options)) as manager:
            manager.restore(1, target, allow_missing=keys)
        assert_same(state(1.0) | {"new": torch.full((2,), 7.0)}, target)
    with (
        CheckpointManager(run.url, load_planner=DefaultLoadPlanner()) as manager,
        pytest.raises(RuntimeError, match="new"),
    ):
        manager.restore(1, target)


def test_under_dcp_load_a_target_may_have_another_dtype(reader: StorageReader) -> None:
    """As stock DCP has it; the manager casts nothing."""
    target = {"model": {"a": torch.zeros(3, dtype=torch.bfloat16)}}
    dcp.load(target, storage_reader=reader)
    assert target["model"]["a"].tolist() == [1, 1, 1]


def test_the_manager_casts_nothing_whatever_the_planner(run: CheckpointManager) -> None:
    """A dtype that differs is an error."""
    with (
        CheckpointManager(run.url, load_planner=DefaultLoadPlanner()) as manager,
        pytest.raises(StateMismatchError, match="bfloat16"),
    ):
        manager.restore(1, {"model": {"a": torch.zeros(3, dtype=torch.bfloat16)}})


# -- a user's save planner


class Halving(DefaultSavePlanner):
    """Saves floating-point tensors in half precision; DCP's documentation has one like it."""

    def create_local_plan(self) -> SavePlan:
        self.state_dict = {key: self._half(value) for key, value in self.state_dict.items()}
        return super().create_local_plan()

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        return self._half(data)

    @staticmethod
    def _half(value: Any) -> Any:
        return value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_a_save_planner_that_changes_what_is_saved(tmp_path: pathlib.Path) -> None:
    """Read back by us and by stock DCP."""
    with CheckpointManager(str(tmp_path), save_planner=Halving()) as manager:
        manager.save(1, state(1.5))
        assert manager.tree(1)["model"]["a"].dtype == torch.float16
        assert manager.read(1, "model.a", slice(0, 2)).tolist() == [1.5, 1.5]
    target = {"model": {"a": torch.zeros(3, dtype=torch.float16)}}
    dcp.load(target, checkpoint_id=tmp_path / "1")
    assert target["model"]["a"].tolist() == [1.5] * 3


# -- converters


def test_torch_save_and_back(run: CheckpointManager, tmp_path: pathlib.Path) -> None:
    """Our step to a file of torch.save, that to a step of DCP, and that into a state."""
    file, folder = tmp_path / "file.pt", tmp_path / "converted" / "3"
    dcp_to_torch_save(f"{run.url}/1", file)
    assert_same(state(1.0), torch.load(file, weights_only=True))
    torch_save_to_dcp(file, folder)
    target = state(0.0)
    with CheckpointManager(str(tmp_path / "converted")) as manager:
        manager.restore(3, target)
        assert_same(state(1.0)["model"], manager.read(3, "model"))
    assert_same(state(1.0), target)


def test_hugging_faces_files_and_back(run: CheckpointManager, tmp_path: pathlib.Path) -> None:
    """DCP's writer of safetensors gets what was read of our step, and its reader what a manager then saves."""
    weights = run.read(1, "model")
    dcp.save(weights, storage_writer=HuggingFaceStorageWriter(str(tmp_path / "hf")))
    found = {key: torch.zeros_like(value) for key, value in weights.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path / "hf")))
    assert_same(weights, found)
    run.save(2, {"model": found})
    assert_same(weights, run.read(2, "model"))
