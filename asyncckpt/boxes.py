"""Which chunks of a step make up this rank's part of a tensor, by the manifest's columns and without DCP's planner.

Answers where whole chunks do: a shard as it was saved, one that was saved in smaller shards, all of a tensor that was
saved in shards. Where a chunk would have to be cut it has no answer, and DCP's planner plans. Called by read_whole.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from asyncckpt.chunks import ChunkTable, Keys, Numbers

PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Classes whose memory is what they hold."""

Pieces = Sequence[tuple[int, torch.Tensor]]
"""(number of a chunk, the part of the target that it fills)"""


def boxes_of(keys: Keys, chunks: ChunkTable) -> Boxes:
    """Kept with the keys: an export asks for some at a time."""
    found: Boxes = keys.kept.get("boxes", (chunks,), lambda: Boxes(chunks))
    return found


class Boxes:
    """Of the chunks of one step."""

    def __init__(self, chunks: ChunkTable) -> None:
        self._place = chunks.placement
        self._layouts = [layout for layout, _ in chunks.placement.layouts]
        self._box: dict[Any, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def pieces_of(self, key: str, value: Any) -> Pieces | None:
        """None: whole chunks do not make it up, or it is none of the kinds of tensor that are known here.

        value: of the saved tensor's dtype and shape. The pieces share its memory.
        """
        part = self._own_part(value)
        if part is None:
            return None
        begin, tensor = part
        left, pieces = tensor.numel(), []
        for number, box in self._chunks_in(key, begin, tensor) if left else ():
            pieces.append((number, tensor if box is None else tensor[box]))
            left -= pieces[-1][1].numel()
        return None if left else pieces

    def _own_part(self, value: Any) -> tuple[tuple[int, ...], torch.Tensor] | None:
        """Where in the saved tensor this rank's part begins, and the part."""
        if type(value) in PLAIN:
            return (0,) * value.dim(), value
        if isinstance(value, ShardedTensor):
            shards = value.local_shards()
            return (tuple(shards[0].metadata.shard_offsets), shards[0].tensor) if len(shards) == 1 else None
        if not isinstance(value, DTensor) or any(placement.is_partial() for placement in value.placements):
            return None
        local = value.to_local()
        if type(local) not in PLAIN:
            return None
        if not local.numel():  # nothing, as on a rank outside of the mesh
            return (), local
        begin, shape = self._box_of(value)
        return (begin, local) if shape == tuple(local.shape) else None

    def _box_of(self, value: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        alike = value.device_mesh, value.placements, value.shape
        if alike not in self._box:  # 40 us, and many tensors are alike
            chunks: Any = value.__create_chunk_list__()  # type: ignore[no-untyped-call]
            self._box[alike] = tuple(chunks[0].offsets), tuple(chunks[0].sizes)
        return self._box[alike]

    def _chunks_in(
        self, key: str, begin: tuple[int, ...], tensor: torch.Tensor
    ) -> Iterator[tuple[int, tuple[slice, ...] | None]]:
        """The chunks that lie in the part that begins there, and where in it; None: they are all of it."""
        numbers, shape, dtype = self.numbers_of(key), tuple(tensor.shape), str(tensor.dtype)[6:]
        offsets = [self._place.offsets[number] or () for number in numbers]
        layouts = [self._layouts[layout] for layout in self._place.layout[numbers].tolist()]
        if any(layout.dtype != dtype or len(layout.shape) != len(shape) for layout in layouts):
            return  # nothing that we wrote
        if begin in offsets and layouts[at := offsets.index(begin)].shape == shape:
            yield numbers[at], None
            return
        for number, start, layout in zip(numbers, offsets, layouts, strict=True):
            box = tuple(slice(a - b, a - b + size) for a, b, size in zip(start, begin, layout.shape, strict=True))
            if all(side.start >= 0 and side.stop <= end for side, end in zip(box, shape, strict=True)):
                yield number, box

    def numbers_of(self, key: str) -> list[int]:
        """Of the chunks of a key."""
        order, start = self._by_key
        number = self._number_of_key.get(key, -2)  # a key that has no chunks
        found: list[int] = order[start[number] : start[number + 1]].tolist() if number >= 0 else []
        return found

    @cached_property
    def _number_of_key(self) -> dict[str, int]:
        return {fqn: number for number, fqn in enumerate(self._place.fqns)}

    @cached_property
    def _by_key(self) -> tuple[Numbers, Numbers]:
        """The chunks of each key side by side, and where those of the first, the second, ... begin."""
        order = np.argsort(self._place.key, kind="stable")
        return order, np.searchsorted(self._place.key[order], np.arange(len(self._place.fqns) + 1))
