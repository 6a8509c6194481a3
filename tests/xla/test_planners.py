"""SPMDSavePlanner and SPMDLoadPlanner under stock dcp.save and dcp.load: where torch_xla's lose or change values."""

from __future__ import annotations

import datetime
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from asyncckpt.integrations.xla import LocalShards, SPMDLoadPlanner, SPMDSavePlanner
from tests.states import assert_same, target_like
from tests.xla.models import mesh_of, model_and_optimizer, on_cpu, sharded, state_of, train, trained

pytestmark = [
    pytest.mark.xla,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
]


def save(state: dict[str, Any], path: pathlib.Path) -> None:
    dcp.save(state, checkpoint_id=str(path), planner=SPMDSavePlanner())


def load(state: dict[str, Any], path: pathlib.Path, **options: Any) -> None:
    dcp.load(state, checkpoint_id=str(path), planner=SPMDLoadPlanner(**options))


@pytest.mark.parametrize("spec", [("fsdp", None), (None, "tensor"), ("tensor", "fsdp"), (None, None)], ids=str)
def test_a_tensor_sharded_over_any_part_of_the_mesh_is_written(tmp_path: pathlib.Path, spec: tuple[Any, ...]) -> None:
    """torch_xla's planner drops the first two (pytorch/xla#7919)."""
    weight = torch.arange(24.0).reshape(6, 4)
    save({"w": sharded(weight, mesh_of(2, 2), *spec)}, tmp_path)
    target = {"w": torch.zeros(6, 4)}
    dcp.load(target, checkpoint_id=str(tmp_path))
    assert torch.equal(target["w"], weight)


def test_what_the_compiler_shards_by_itself_is_written(tmp_path: pathlib.Path) -> None:
    """Of biases that nobody marked, and their optimizer state: torch_xla's planner wrote 11 of 17 tensors."""
    state = trained(mesh_of(2, 2), seed=1)
    save(state, tmp_path)
    target = target_like(on_cpu(state))
    dcp.load(target, checkpoint_id=str(tmp_path))  # torch alone, options of the optimizer and all
    assert_same(on_cpu(state), target)


@pytest.mark.parametrize("shape", [(127, 63), (5, 3), (2, 3), (1, 1)], ids=str)
def test_shards_of_unequal_size_and_empty_ones_come_back(tmp_path: pathlib.Path, shape: tuple[int, int]) -> None:
    """Four devices along a dimension that four does not divide, and along the other one on the way back."""
    weight = torch.rand(shape)
    save({"w": sharded(weight, mesh_of(4, 1), "fsdp", None)}, tmp_path)
    target = sharded(torch.zeros(shape), mesh_of(4, 1), None, "fsdp")
    load({"w": target}, tmp_path)
    assert torch.equal(target.cpu(), weight)


@pytest.mark.parametrize("spec", [("fsdp", None), ("fsdp", "tensor"), (None, None)], ids=str)
def test_a_checkpoint_of_stock_dcp_loads_into_any_sharding(tmp_path: pathlib.Path, spec: tuple[Any, ...]) -> None:
    """Also where several devices hold the same part."""
    weight = torch.rand(6, 4)
    dcp.save({"w": weight}, checkpoint_id=str(tmp_path))
    target = sharded(torch.zeros(6, 4), mesh_of(2, 2), *spec)
    load({"w": target}, tmp_path)
    assert torch.equal(target.cpu(), weight)


def test_training_goes_on_after_a_load_as_it_would_have(tmp_path: pathlib.Path) -> None:
    """On the same mesh, bit for bit."""
    model, optimizer = model_and_optimizer(mesh_of(2, 2), seed=1)
    train(model, optimizer, 2)
    save(state_of(model, optimizer), tmp_path)
    other, other_optimizer = model_and_optimizer(mesh_of(2, 2), seed=2)
    train(other, other_optimizer, 1)
    state = state_of(other, other_optimizer)
    load(state, tmp_path)
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optim"])
    for one in ((model, optimizer), (other, other_optimizer)):
        train(*one, num_steps=2)
    assert_same(on_cpu(state_of(model, optimizer)), on_cpu(state_of(other, other_optimizer)))


def test_a_value_under_an_int_key_comes_back_under_it(tmp_path: pathlib.Path) -> None:
    """torch_xla's puts it under '0', and the value under 0 stays what it was."""
    mesh = mesh_of(4, 1)
    save({"state": {0: {"n": 7, "w": sharded(torch.ones(4, 4), mesh, "fsdp", None)}}}, tmp_path)
    target = {"state": {0: {"n": 0, "w": sharded(torch.zeros(4, 4), mesh, "fsdp", None)}}}
    load(target, tmp_path)
    assert target["state"].keys() == {0}
    assert target["state"][0]["n"] == 7


def test_objects_load_if_their_class_is_named(tmp_path: pathlib.Path) -> None:
    """torch_xla's saves a datetime, and cannot load it."""
    moment = datetime.datetime(2026, 11, 22, 12)
    save({"t": moment}, tmp_path)
    target: dict[str, Any] = {"t": None}
    with pytest.raises(CheckpointException, match=r"UnsafeObjectError: the object at 't' .* safe_globals"):
        load(target, tmp_path)
    load(target, tmp_path, safe_globals=[datetime.datetime])
    assert target["t"] == moment


def test_keys_and_shapes_that_do_not_fit_are_all_named_and_nothing_is_changed(tmp_path: pathlib.Path) -> None:
    """torch_xla's leaves a sharded tensor of another size as it was, without a word."""
    mesh = mesh_of(4, 1)
    save({"a": sharded(torch.ones(4, 4), mesh, "fsdp", None), "b": sharded(torch.ones(4), mesh, "fsdp")}, tmp_path)
    target = {name: sharded(torch.zeros(8, 4), mesh, "fsdp", None) for name in "ac"} | {"b": torch.zeros(4).to("xla")}
    with pytest.raises(CheckpointException, match=r"missing in the checkpoint: 'c'\n.*'a': .*\(4, 4\).*\(8, 4\)"):
        load(target, tmp_path)
    assert not target["b"].cpu().any()


def test_hosts_that_hold_the_same_shard_write_it_once() -> None:
    """A host's replicas are its own to drop, another host's are the coordinator's."""
    plans = []
    for first in (0, 2):
        shards = {torch.Size([row, 0]): torch.ones(2, 4) for row in (first, first + 2)}
        planner = SPMDSavePlanner()
        planner.set_up_planner({"w": LocalShards(shards, torch.Size([6, 4]))}, is_coordinator=first == 0)
        plans.append(planner.create_local_plan())
    written, metadata = planner.create_global_plan(plans)
    assert [[tuple(item.index.offset) for item in plan.items] for plan in written] == [[(0, 0), (2, 0)], [(4, 0)]]
    assert len(metadata.state_dict_metadata["w"].chunks) == 3
