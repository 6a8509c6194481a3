"""Who writes what, decided by rank 0 from the items of all ranks: pure, and in columns.

DCP's own global plan costs some 60 us of Python for each rank's item, and pickles it twice; with a million of them that
is minutes. Here an item is a row: two ranks' rows with the same key and box are replicas, of which one is written.
Called by plan.py, unless the user's planner has a global plan of its own.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.planner import SavePlan

from asyncckpt.chunks import Keys, Numbers, Path, numbers
from asyncckpt.errors import SaveError

SPREAD_BYTES = 64 * 1024
"""Smaller replicas are the lowest rank's to write: it is little to write, and where replicas are not equal after all
(BatchNorm's statistics under DDP) they then come from one rank, as with torch.save on rank 0."""

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes in the whole tensor."""
_OBJECT: Box = ((), ())
Mask: TypeAlias = npt.NDArray[np.bool_]
Kind: TypeAlias = tuple[str, tuple[int, ...]]
"""dtype and shape of the whole tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class LocalItems:
    """One rank's items. key: of each item, index into fqns, paths and kind. kind: index into kinds, -1 for an object.

    digests: {fqn: a checksum of its value}, of what should be the same on all ranks that have it.
    """

    fqns: tuple[str, ...]
    paths: tuple[Path, ...]
    kinds: tuple[Kind, ...]
    kind: tuple[int, ...]
    key: tuple[int, ...]
    boxes: tuple[Box, ...]
    digests: Mapping[str, int]

    @classmethod
    def of(cls, plan: SavePlan, digests: Mapping[str, int]) -> LocalItems:
        """Of what a planner's `create_local_plan` made."""
        paths = plan.planner_data or {}
        fqns: dict[str, int] = {}
        kinds: dict[tuple[torch.dtype, torch.Size], int] = {}
        kind, key, boxes = [], [], []
        for item in plan.items:
            fqn, data = item.index.fqn, item.tensor_data
            if fqn not in fqns:
                fqns[fqn] = len(fqns)
                kind.append(-1 if data is None else kinds.setdefault((data.properties.dtype, data.size), len(kinds)))
            key.append(fqns[fqn])
            boxes.append(_OBJECT if data is None else (tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
        named = tuple((str(dtype)[6:], tuple(shape)) for dtype, shape in kinds)
        where = tuple(tuple(paths.get(fqn, (fqn,))) for fqn in fqns)
        return cls(tuple(fqns), where, named, tuple(kind), tuple(key), tuple(boxes), digests)

    def encode(self) -> bytes:
        """For rank 0 of the same job. Names and shapes shrink to a tenth."""
        return zlib.compress(pickle.dumps(tuple(getattr(self, name) for name in self.__slots__)), 1)

    @classmethod
    def decode(cls, data: bytes) -> LocalItems:
        return cls(*pickle.loads(zlib.decompress(data)))


@dataclass(frozen=True, slots=True)
class Assignment:
    """written: for each rank the numbers of its items that it writes. differing: keys whose replicas are not equal."""

    keys: Keys
    written: list[Numbers]
    differing: tuple[str, ...]


def assign(parts: Sequence[LocalItems]) -> Assignment:
    """Each item to one of the ranks that have it: small ones to the lowest, the others so that all ranks write about
    the same number of bytes. Raises SaveError if the ranks do not agree on a tensor, or their parts do not make it up.
    """
    keys, key_of = _merged_keys(parts)
    index: dict[tuple[int, Box], int] = {}
    number_of = index.setdefault  # called a million times
    items = [
        numbers(number_of(row, len(index)) for row in zip(of_rank[list(part.key)].tolist(), part.boxes, strict=True))
        for part, of_rank in zip(parts, key_of, strict=True)
    ]
    key = numbers(number for number, _ in index)
    boxes = [box for _, box in index]
    shapes = [*(shape for _, shape in keys.kinds), ()]
    volume = numbers(math.prod(sizes) for _, sizes in boxes)
    # Empty parts of a tensor that is not: nobody need write them.
    is_empty = (volume == 0) & (numbers(map(math.prod, shapes))[keys.kind[key]] > 0)
    _check_cover(keys, shapes, key, boxes, is_empty)
    num_bytes = volume * numbers([*(getattr(torch, dtype).itemsize for dtype, _ in keys.kinds), 0])[keys.kind[key]]
    return Assignment(keys, _written(items, num_bytes, is_empty), _differing(parts))


def _merged_keys(parts: Sequence[LocalItems]) -> tuple[Keys, list[Numbers]]:
    """The tree of keys of all ranks, and for each rank which of them its own are."""
    fqns: dict[str, int] = {}
    kinds: dict[Kind, int] = {}
    kind: list[int] = []
    paths: list[Path] = []
    key_of: list[Numbers] = []
    for rank, part in enumerate(parts):
        before = parts[rank - 1]
        if rank and (part.fqns, part.kinds, part.kind) == (before.fqns, before.kinds, before.kind):
            key_of.append(key_of[-1])  # as nearly all ranks of a job with sharded parameters
            continue
        theirs = [*(kinds.setdefault(one, len(kinds)) for one in part.kinds), -1]
        of_rank = []
        for fqn, path, local_kind in zip(part.fqns, part.paths, part.kind, strict=True):
            number = fqns.setdefault(fqn, len(fqns))
            if number == len(kind):
                kind.append(theirs[local_kind])
                paths.append(path)
            elif kind[number] != theirs[local_kind]:
                raise _disagreement(parts, fqn, rank)
            of_rank.append(number)
        key_of.append(numbers(of_rank))
    return Keys(tuple(fqns), paths, tuple(kinds), numbers(kind)), key_of


def _disagreement(parts: Sequence[LocalItems], fqn: str, rank: int) -> SaveError:
    def describe(part: LocalItems) -> str:
        kind = part.kind[part.fqns.index(fqn)]
        return "an object" if kind < 0 else "torch.{} {}".format(*part.kinds[kind])

    first = next(number for number, part in enumerate(parts) if fqn in part.fqns)
    return SaveError(
        f"{fqn!r} is {describe(parts[first])} on rank {first} and {describe(parts[rank])} on rank {rank}. Nothing was "
        "written. Wrap what each rank has for itself in PerRank, or give it a key of its own on each rank.",
        rank=rank,
    )


def _check_cover(
    keys: Keys, shapes: Sequence[tuple[int, ...]], key: Numbers, boxes: Sequence[Box], is_empty: Mask
) -> None:
    """Raise SaveError for a tensor that its boxes, other than empty ones, do not make up."""
    order = np.argsort(key, kind="stable")
    order = order[~is_empty[order]]
    stops = np.searchsorted(key[order], np.arange(len(keys)), side="right").tolist()
    of_key = [boxes[number] for number in order.tolist()]
    start = 0
    for number, (stop, kind) in enumerate(zip(stops, keys.kind.tolist(), strict=True)):
        theirs, shape = of_key[start:stop], shapes[kind]
        start = stop
        if len(theirs) == 1 and theirs[0][1] == shape and not any(theirs[0][0]):
            continue
        if not _is_grid(shape, theirs) and (problem := _problem(shape, theirs)):
            raise SaveError(
                f"the ranks' parts of {keys.fqns[number]!r}, {shape} in all, do not make it up: {problem}. Nothing was "
                "written. Check that the ranks have the same mesh and placements."
            )


def _is_grid(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether the boxes, no two of them the same, are the tensor cut along each dimension, as a mesh cuts it."""
    if not boxes or not shape:
        return False
    # Number by number: numpy takes four times as long on nested tuples.
    flat = chain.from_iterable(chain.from_iterable(boxes))
    table, num_cells = np.fromiter(flat, np.int64).reshape(len(boxes), 2, len(shape)), 1
    for dim, length in enumerate(shape):
        cuts = table[:, :, dim]
        if (cuts == (0, length)).all():
            continue
        cuts = cuts[np.lexsort((cuts[:, 1], cuts[:, 0]))]
        is_new = np.ones(len(cuts), np.bool_)
        is_new[1:] = (cuts[1:] != cuts[:-1]).any(axis=1)
        cuts = cuts[is_new]
        if cuts[0, 0] != 0 or (cuts[:-1].sum(axis=1) != cuts[1:, 0]).any() or cuts[-1].sum() != length:
            return False
        num_cells *= len(cuts)
    return num_cells == len(boxes)


def _problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """What is wrong with boxes of any arrangement; "" if nothing is."""
    table = np.array(boxes, np.int64).reshape(len(boxes), 2, len(shape))
    starts, ends = table[:, 0], table.sum(axis=1)
    for number, box in enumerate(boxes):
        if (starts[number] < 0).any() or (ends[number] > shape).any():
            return f"the one at {box[0]} of size {box[1]} reaches beyond it"
        meets = ((starts < ends[number]) & (ends > starts[number])).all(axis=1)
        meets[number] = False
        if meets.any():
            return f"those at {box[0]} and {boxes[int(np.argmax(meets))][0]} overlap"
    missing = math.prod(shape) - sum(math.prod(sizes) for _, sizes in boxes)
    return f"{missing} elements are missing" if missing else ""


def _written(items: Sequence[Numbers], num_bytes: Numbers, is_empty: Mask) -> list[Numbers]:
    """For each rank the places of what it writes among its items."""
    item = np.concatenate(items)
    rank = np.repeat(np.arange(len(items)), list(map(len, items)))
    place = np.concatenate([np.arange(len(part)) for part in items])
    _, writer = np.unique(item, return_index=True)  # the row of the lowest rank that has it
    spread = np.flatnonzero((np.bincount(item) > 1) & (num_bytes >= SPREAD_BYTES))
    is_settled = np.ones(len(num_bytes), np.bool_)
    is_settled[spread] = False
    load = np.bincount(rank[writer[is_settled]], num_bytes[is_settled], minlength=len(items))
    order = np.argsort(item, kind="stable")
    starts = np.searchsorted(item, np.arange(len(num_bytes) + 1), sorter=order)
    for number in spread[np.argsort(-num_bytes[spread], kind="stable")].tolist():
        holders = order[starts[number] : starts[number + 1]]
        writer[number] = holders[np.argmin(load[rank[holders]])]
        load[rank[writer[number]]] += num_bytes[number]
    rows = np.sort(writer[~is_empty])
    return np.split(place[rows], np.searchsorted(rank[rows], np.arange(1, len(items))))


def _differing(parts: Sequence[LocalItems]) -> tuple[str, ...]:
    first: dict[str, int] = {}
    differing: dict[str, None] = {}
    for part in parts:
        for fqn, digest in part.digests.items():
            if first.setdefault(fqn, digest) != digest:
                differing[fqn] = None
    return tuple(differing)
