"""XlaStager: all that a stager must do, and the same for tensors on XLA devices."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch_xla.distributed.spmd as xs

from asyncckpt.integrations import xla
from asyncckpt.integrations.xla import LocalShards, XlaStager
from tests.stagers.conformance import StagerTests
from tests.states import assert_same, target_like
from tests.xla.models import mesh_of, model_and_optimizer, on_cpu, sharded, state_of, train, trained

pytestmark = pytest.mark.xla


class TestXlaStager(StagerTests):
    make = staticmethod(XlaStager)


def assembled(staged: Any) -> Any:
    """A staged state dict with whole tensors."""
    if isinstance(staged, dict):
        return {key: assembled(value) for key, value in staged.items()}
    if isinstance(staged, list):
        return [assembled(value) for value in staged]
    if not isinstance(staged, LocalShards):
        return staged
    whole = torch.empty(staged.shape, dtype=staged.dtype)
    for offsets, shard in staged.shards.items():
        box = tuple(slice(start, start + size) for start, size in zip(offsets, shard.shape, strict=True))
        whole[box] = shard
    return whole


def test_a_copy_of_a_sharded_state_is_equal_bit_for_bit_and_training_does_not_reach_it() -> None:
    """Parameters, optimizer state on the devices, and AdamW's step on the CPU, which torch_xla's copy shares."""
    model, optimizer = model_and_optimizer(mesh_of(2, 2), seed=1)
    train(model, optimizer, 2)
    state = state_of(model, optimizer)
    before = on_cpu(state)
    with XlaStager() as stager:
        snapshot, staged = stager.snapshot(state), stager.stage(state)
        train(model, optimizer, 2)
        assert_same(before, assembled(snapshot.state_dict))
        assert_same(before, assembled(staged))


def test_what_was_computed_but_not_yet_run_is_in_the_copy() -> None:
    """The stager has the devices finish first."""
    weight = sharded(torch.ones(4, 4), mesh_of(4, 1), "fsdp", None)
    weight.mul_(3).add_(1)
    with XlaStager() as stager:
        assert assembled(stager.snapshot({"w": weight}).state_dict)["w"].eq(4).all()


def test_replicas_on_one_host_are_copied_once() -> None:
    """Two of four devices hold each half: the copy is no larger than the tensor, and shards have no padding."""
    with XlaStager() as stager:
        snapshot = stager.snapshot({"w": sharded(torch.ones(5, 4), mesh_of(2, 2), "fsdp", None)})
        shards = snapshot.state_dict["w"].shards
        found = {tuple(offsets): tuple(shard.shape) for offsets, shard in shards.items()}
        assert found == {(0, 0): (3, 4), (3, 0): (2, 4)}
        assert snapshot.num_bytes == sum(shard.untyped_storage().nbytes() for shard in shards.values()) == 80


def test_tied_tensors_on_the_device_are_one_tensor() -> None:
    """As a state dict gives them: each time another tensor object around the same data."""
    weight = sharded(torch.ones(4, 4), mesh_of(4, 1), "fsdp", None)
    bias = torch.ones(4).to("xla")
    with XlaStager() as stager:
        snapshot = stager.snapshot({"a": weight.detach(), "b": weight.detach(), "c": bias, "d": bias.detach()})
    copy = snapshot.state_dict
    assert copy["a"] is copy["b"]
    assert copy["c"] is copy["d"]
    assert snapshot.num_bytes == 80


def test_torch_xla_s_wrapper_is_staged_as_what_it_wraps() -> None:
    """`mark_sharding` returns one, and users keep it."""
    wrapper = xs.mark_sharding(torch.arange(4.0).to("xla"), mesh_of(4, 1), ("fsdp",))
    with XlaStager() as stager:
        assert assembled(stager.snapshot({"w": [wrapper]}).state_dict)["w"][0].tolist() == [0, 1, 2, 3]


def test_structure_stays_with_new_values_and_changes_with_the_sharding() -> None:
    """It says whether a plan still fits."""
    mesh, one, other = mesh_of(2, 2), torch.ones(4, 4), torch.zeros(4, 4)
    with XlaStager() as stager:

        def structure(tensor: torch.Tensor, *spec: str | None) -> int:
            return stager.snapshot({"w": sharded(tensor, mesh, *spec), "n": 1}).structure

        assert structure(one, "fsdp", None) == structure(other, "fsdp", None)
        found = [structure(one, *spec) for spec in (("fsdp", None), (None, "fsdp"), ("fsdp", "tensor"), (None, None))]
        assert len(set(found)) == 4


def test_fetching_in_several_portions_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the replicas that come along take little memory."""
    state = trained(mesh_of(2, 2), seed=1, num_steps=1)
    monkeypatch.setattr(xla, "_FETCH_BYTES", 200)
    with XlaStager() as stager:
        assert_same(on_cpu(state), assembled(stager.snapshot(state).state_dict))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_makes_torch_s_own_async_save_work_on_xla(tmp_path: pathlib.Path) -> None:
    """Which fails without, with each of torch's stagers; no planner is needed, and any mesh can be on the way back."""
    model, optimizer = model_and_optimizer(mesh_of(2, 2), seed=1)
    train(model, optimizer, 2)
    state = state_of(model, optimizer)
    before = on_cpu(state)
    with XlaStager() as stager:
        saving = dcp.async_save(state, checkpoint_id=str(tmp_path), async_stager=stager)
        train(model, optimizer, 1)
        saving.result()
    target = target_like(before)
    dcp.load(target, checkpoint_id=str(tmp_path))
    assert_same(before, target)
