"""Whether the chunks of every tensor make it up, each element once: else a restore would leave old values in place.

Of all tensors at once, by columns: pairs of chunks would be too many to look at, and a hostile manifest has a million
of one tensor. Used by manifest.py, when a manifest is written and when it is read.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

from asyncckpt.chunks import Keys, Numbers, numbers
from asyncckpt.framing import Layout

Hashes = npt.NDArray[np.uint64]
MAX_DIMS = 64  # torch's
_SECRETS = [np.uint64(secrets.randbits(64)) for _ in range(MAX_DIMS)]


def check_tiling(
    keys: Keys, key: Numbers, box: Numbers, boxes: Sequence[tuple[int, ...]], layout: Numbers, layouts: Sequence[Layout]
) -> None:
    """Raise ValueError for the first tensor that is not made up, or object that is not there once.

    key, box, layout: of each chunk, -1 for an object; boxes as long as the shapes of their layouts, of at most MAX_DIMS
    dimensions.
    """
    _check_kinds(keys, key, layout, layouts)
    is_tensor = layout >= 0
    shapes = [layout.shape for layout in layouts]
    found = np.zeros(len(keys), np.uint64)
    np.add.at(found, key[is_tensor], _measures(boxes, box[is_tensor], shapes, layout[is_tensor]))
    origins = [(0,) * len(shape) for _, shape in keys.kinds]
    all_kinds = np.arange(len(origins))
    expected = np.append(_measures(origins, all_kinds, [shape for _, shape in keys.kinds], all_kinds), np.uint64(1))
    np.add.at(found, key[~is_tensor], np.uint64(1))
    for number in np.flatnonzero(found != expected[keys.kind]):
        raise ValueError(
            f"the chunks of {keys.fqns[number]!r} do not make it up: some of it is missing, or there twice, or outside"
        )


def _check_kinds(keys: Keys, key: Numbers, layout: Numbers, layouts: Sequence[Layout]) -> None:
    """Objects have objects' chunks, and tensors those of their dtype and number of dimensions."""
    forms: dict[tuple[str, int], int] = {}
    form_of_kind = numbers(
        chain((forms.setdefault((dtype, len(shape)), len(forms)) for dtype, shape in keys.kinds), [-1])
    )
    form_of_layout = numbers(chain((forms.get((x.dtype, len(x.shape)), -2) for x in layouts), [-1]))
    for number in np.flatnonzero(form_of_kind[keys.kind[key]] != form_of_layout[layout]):
        fqn = keys.fqns[key[number]]
        if (keys.kind[key[number]] < 0) != (layout[number] < 0):
            raise ValueError(f"{fqn!r} is an object and a tensor at once")
        raise ValueError(f"a chunk of {fqn!r} has another dtype or number of dimensions than the tensor")


def _measures(
    boxes: Sequence[tuple[int, ...]], box: Numbers, shapes: Sequence[tuple[int, ...]], shape: Numbers
) -> Hashes:
    """Of each box with its corner and shape: a volume for which every edge has a random length.

    A number for each coordinate of each dimension is drawn, and an edge is as long as the numbers at its ends differ.
    Boxes that make up a larger one have volumes that add up to its own, whatever the numbers; boxes that do not have
    so by a chance of less than 2**-40. Nobody outside of this process knows the numbers.
    """
    offsets, begins = _flat(boxes)
    sizes, size_begins = _flat(shapes)
    num_dims = numbers(map(len, shapes))[shape]
    measures = np.ones(len(box), np.uint64)
    for dim in range(int(num_dims.max(initial=0))):
        some = np.flatnonzero(num_dims > dim)
        start = offsets[begins[box[some]] + dim]
        stop = start + sizes[size_begins[shape[some]] + dim]
        measures[some] *= _drawn(stop, dim) - _drawn(start, dim)
    return measures


def _flat(rows: Sequence[tuple[int, ...]]) -> tuple[Numbers, Numbers]:
    """(the rows, one behind the other; where each begins)"""
    lengths = numbers(map(len, rows))
    return numbers(chain.from_iterable(rows)), np.cumsum(lengths) - lengths


def _drawn(coordinates: Numbers, dim: int) -> Hashes:
    """splitmix64 (Steele, Lea, Flood 2014)."""
    mixed = coordinates.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + _SECRETS[dim]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
