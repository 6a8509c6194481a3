"""What ranks have of a state, put together by the process that tests, without any distributed code: a wrong idea of who
has what cannot go unseen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from tests.states import raw_bytes


class Piece(NamedTuple):
    """What one rank has of a value. splits: (tensor dimension, whether it was cut last) of each mesh dimension that
    divides the tensor; place: this rank's number along each."""

    value: Any
    place: tuple[int, ...] = ()
    splits: tuple[tuple[int, bool], ...] = ()


def piece_of(value: Any) -> Piece | None:
    if isinstance(value, DTensor):
        placed = zip(value.device_mesh.get_coordinate(), value.placements, strict=True)
        cuts = [(place, p.dim, isinstance(p, _StridedShard)) for place, p in placed if not isinstance(p, Replicate)]
        return Piece(exact(value.to_local()), tuple(cut[0] for cut in cuts), tuple(cut[1:] for cut in cuts))
    if isinstance(value, ShardedTensor):  # FSDP1's
        for shard in value.local_shards():
            return Piece(exact(shard.tensor), (shard.metadata.shard_offsets[0],), ((0, False),))
        return None
    if isinstance(value, torch.Tensor):
        return Piece(exact(value))
    return Piece(repr(list(value) if isinstance(value, tuple) else value))  # DCP makes lists where it gathers


class Exact(NamedTuple):
    """A tensor in full that compares by its bits, and that pickles fast."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes


def exact(tensor: torch.Tensor) -> Exact:
    return Exact(tensor.dtype, tuple(tensor.shape), raw_bytes(tensor))


def tensor_from(value: Exact) -> torch.Tensor:
    empty = torch.empty(value.shape, dtype=value.dtype)
    return torch.frombuffer(bytearray(value.data), dtype=value.dtype).reshape(value.shape) if value.data else empty


def together(ranks: list[dict[str, Piece]]) -> dict[str, Any]:
    """All ranks' pieces as whole values. What several ranks have must be the same."""
    found: dict[str, dict[tuple[int, ...], Piece]] = {}
    for pieces in ranks:
        for key, piece in pieces.items():
            same = found.setdefault(key, {}).setdefault(piece.place, piece)
            assert same == piece, f"ranks differ in {key}"
    return {key: _join({p: one.value for p, one in places.items()}, next(iter(places.values())).splits)
            for key, places in found.items()}  # fmt: skip


def _join(parts: dict[tuple[int, ...], Any], splits: tuple[tuple[int, bool], ...]) -> Any:
    if not splits:
        (value,) = parts.values()
        return value
    first = next((number for number, (_, was_last) in enumerate(splits) if not was_last), 0)
    rows: dict[int, dict[tuple[int, ...], Any]] = {}
    for place, part in parts.items():
        rows.setdefault(place[first], {})[place[:first] + place[first + 1 :]] = part
    joined = [tensor_from(_join(rows[number], splits[:first] + splits[first + 1 :])) for number in sorted(rows)]
    return exact(torch.cat(joined, dim=splits[first][0]))
