"""One state in every layout that ranks can give it: as whole tensors, the truth, and as this rank's part of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from asyncckpt import PerRank
from tests.states import raw_bytes, tensor_of

LINE: dict[str, tuple[torch.dtype, tuple[int, ...], Placement]] = {
    "rows": (torch.float32, (8, 6), Shard(0)),
    "columns": (torch.float64, (3, 8), Shard(1)),
    "replicated": (torch.float32, (5, 5), Replicate()),
    "uneven_rows": (torch.bfloat16, (7, 3), Shard(0)),
    "uneven_columns": (torch.int64, (3, 10), Shard(1)),
    "fewer_rows_than_ranks": (torch.float32, (2, 4), Shard(0)),
    "no_rows": (torch.float32, (0, 3), Shard(0)),
    "flags": (torch.bool, (5,), Shard(0)),
    "scalar": (torch.float32, (), Replicate()),
    "large_rows": (torch.float32, (1031, 1024), Shard(0)),  # shards above 1 MiB are aligned and read in place
    "large_columns": (torch.bfloat16, (513, 8200), Shard(1)),  # and a column's part of them is read block by block
}
"""On a line of all ranks: {key: (dtype, shape, placement)}."""

GRID: dict[str, tuple[torch.dtype, tuple[int, ...], tuple[Placement, Placement]]] = {
    "tiles": (torch.float32, (6, 10), (Shard(0), Shard(1))),
    "uneven_tiles": (torch.complex64, (5, 3), (Shard(1), Shard(0))),
    "hybrid": (torch.float16, (9, 4), (Replicate(), Shard(0))),
    "twice": (torch.float32, (10, 3), (Shard(0), Shard(0))),
    "everywhere": (torch.int8, (4,), (Replicate(), Replicate())),
}
"""On a grid of two rows."""


def whole(seed: int) -> dict[str, torch.Tensor]:
    kinds = {**LINE, **GRID}
    return {key: tensor_of(dtype, *shape, seed=seed) for key, (dtype, shape, _) in kinds.items()}


def own(seed: int, rank: int) -> dict[str, Any]:
    """What each rank has for itself; not of one shape."""
    return {"draws": tensor_of(torch.float32, 3 + rank % 2, seed=seed + rank), "name": f"rank {rank} of run {seed}"}


def state_of(seed: int, rank: int, world_size: int, *, turned: bool = False) -> dict[str, Any]:
    """This rank's part. turned: of the same tensors in other layouts: rows for columns, replicas for shards."""
    line, grid = init_device_mesh("cpu", (world_size,)), init_device_mesh("cpu", (2, world_size // 2))
    tensors = whole(seed)
    placed = {key: _place(tensors[key], line, (placement,), turned) for key, (_, _, placement) in LINE.items()}
    placed |= {key: _place(tensors[key], grid, placements, turned) for key, (_, _, placements) in GRID.items()}
    return {
        "sharded": placed,
        "plain": tensor_of(torch.float32, 700, 600, seed=seed),
        "nested": [{"n": seed}, torch.arange(3) + seed],
        "mine": PerRank(own(seed, rank)),
    }


def target_of(rank: int, world_size: int, *, turned: bool = False) -> dict[str, Any]:
    """The same with other values, to restore into."""
    state = state_of(0, rank, world_size, turned=turned)
    for tensor in [*state["sharded"].values(), state["plain"], state["nested"][1]]:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.zero_()
    state["nested"][0]["n"] = -1
    state["mine"].value = {"draws": torch.zeros(3 + rank % 2), "name": ""}
    return state


def parts(state: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of this rank's part of each tensor."""
    tensors = {**state["sharded"], "plain": state["plain"], "nested": state["nested"][1]}
    return {key: raw_bytes(t.to_local() if isinstance(t, DTensor) else t) for key, t in tensors.items()}


def _place(tensor: torch.Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], turned: bool) -> DTensor:
    if turned and tensor.dim():
        placements = tuple(_turn(placement, tensor.dim()) for placement in placements)
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # all ranks have it: nothing is sent


def _turn(placement: Placement, num_dims: int) -> Placement:
    if not isinstance(placement, Shard):
        return Shard(0)
    return Shard(1 - placement.dim) if num_dims > 1 else Replicate()
