"""State dicts of several ranks: DTensor (FSDP2) and ShardedTensor (FSDP1), staged by both stagers, read by DCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

from stagers import BlockingAsyncStager, OverlappingAsyncStager, StagingError
from tests.processes import Job, Link
from tests.stagers.test_overlapping import held


def _locals(state: Any) -> dict[str, torch.Tensor]:
    """Copies of this rank's part of everything."""
    flat = {**state["model"], **{f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}}
    return {key: (v.to_local() if isinstance(v, DTensor) else v).detach().clone() for key, v in flat.items()}


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 301)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_fsdp2(link: Link, folder: Path) -> None:
    for make in (BlockingAsyncStager, OverlappingAsyncStager):
        with make() as stager:
            save_fsdp2_with(stager, folder / make.__name__)


def save_fsdp2_with(stager: Any, folder: Path) -> None:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    model = torch.nn.Linear(301, 401)  # neither divides by two
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    _train(model, optimizer)
    assert not stager.snapshot({"w": model.weight}).state_dict["w"].requires_grad
    structures = set()
    for _ in range(3):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        state["model"]["tied"] = state["model"]["weight"]
        before = _locals(state)
        snapshot = stager.snapshot(state)
        _train(model, optimizer)
        snapshot.wait()
        structures.add(snapshot.structure)
        copy = snapshot.state_dict
        assert all(torch.equal(before[key], value) for key, value in _locals(copy).items())
        assert not all(torch.equal(before[key], value) for key, value in _locals(state).items())
        weight = copy["model"]["weight"]
        assert type(weight) is DTensor
        assert weight is copy["model"]["tied"]
        assert (weight.device_mesh, weight.placements) == (mesh, model.weight.placements)
        assert weight.shape == (401, 301)
        snapshot.release()
    assert len(structures) == 1
    snapshot = stager.snapshot(state)
    snapshot.wait()
    dcp.save(snapshot.state_dict, checkpoint_id=folder)
    saved = _locals(state)
    if isinstance(stager, OverlappingAsyncStager):
        assert_torn_when_edited(stager, model)
    for value in saved.values():
        assert value.numel() == 0 or value.any()
    _fill(state)
    dcp.load(state, checkpoint_id=folder)
    assert all(torch.equal(saved[key], value) for key, value in _locals(state).items())


def assert_torn_when_edited(stager: OverlappingAsyncStager, model: torch.nn.Module) -> None:
    """A DTensor counts changes itself, its local tensor does not."""
    with held(stager), torch.no_grad():
        snapshots = [stager.snapshot({"w": model.weight}), stager.snapshot({"w": model.state_dict()["weight"]})]
        model.weight.add_(1).sub_(1)
    for snapshot in snapshots:
        with pytest.raises(StagingError, match="'w' changed outside"):
            snapshot.wait()


def _fill(state: Any) -> None:
    with torch.no_grad():
        for value in [*state["model"].values(), *(v for s in state["optimizer"]["state"].values() for v in s.values())]:
            value.fill_(-7)


def save_sharded_tensor(link: Link, folder: Path) -> None:
    for make in (BlockingAsyncStager, OverlappingAsyncStager):
        with make() as stager:
            save_sharded_tensor_with(stager, link.rank, folder / make.__name__)


def save_sharded_tensor_with(stager: Any, rank: int, folder: Path) -> None:
    rows = torch.arange(12.0).reshape(3, 4) + 100 * rank
    shard = Shard.from_tensor_and_offsets(rows.clone(), [3 * rank, 0], rank)
    source = init_from_local_shards([shard], 6, 4)
    snapshot = stager.snapshot({"w": source, "again": source})
    again = stager.snapshot({"w": source, "again": source})
    assert snapshot.structure == again.structure
    shard.tensor.zero_()
    copy = snapshot.state_dict["w"]
    assert type(copy) is ShardedTensor
    assert copy is snapshot.state_dict["again"]
    assert torch.equal(copy.local_shards()[0].tensor, rows)
    dcp.save(snapshot.state_dict, checkpoint_id=folder)
    whole = {"w": torch.zeros(6, 4)}
    dcp.load(whole, checkpoint_id=folder)
    assert torch.equal(whole["w"][3 * rank :][:3], rows)
    dist.barrier()


@pytest.mark.parametrize("body", [save_fsdp2, save_sharded_tensor])
def test_two_ranks_stage_what_dcp_saves_and_loads(body, tmp_path):
    """The copy keeps mesh, placements and shards, holds this rank's part, and stays while training goes on."""
    with Job(2, body, tmp_path) as job:
        assert job.results() == [None, None]
