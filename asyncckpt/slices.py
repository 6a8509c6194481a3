"""A part of a tensor, asked for as one asks a tensor itself, and which bytes of a payload it is made of.

Pure: ranges of whole numbers, no tensors and no I/O. Called by lookup.py.
"""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

Box = tuple[slice, ...]
"""A slice of each dimension's range: positions in it, not elements of the tensor."""


class Part(NamedTuple):
    """ranges: the elements asked for, along each dimension. view: the index that makes what was asked for of the tensor
    that has just those."""

    ranges: tuple[range, ...]
    view: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Before `view`."""
        return tuple(map(len, self.ranges))


def part_of(shape: Sequence[int], index: Any) -> Part:
    """The part that `tensor[index]` is, of a tensor of that shape: ints, slices, Ellipsis, None, or a tuple of them.

    IndexError: out of range, or too many; ValueError: a step that is not above 0, which torch has not, either;
    TypeError: an index by other tensors or lists, which no ranges of bytes answer.
    """
    entries = list(index) if isinstance(index, tuple) else [index]
    num_dots = sum(entry is Ellipsis for entry in entries)
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if num_dots > 1 or used > len(shape):
        raise IndexError(f"the index {index!r} is for more dimensions than the {len(shape)} of shape {tuple(shape)}")
    at = next((n for n, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    entries[at : at + 1] = [slice(None)] * (len(shape) - used)
    ranges: list[range] = []
    view: list[Any] = []
    for entry in entries:
        if entry is None:
            view.append(None)
            continue
        ranges.append(_range_of(entry, shape[len(ranges)], len(ranges)))
        view.append(slice(None) if isinstance(entry, slice) else 0)
    return Part(tuple(ranges), tuple(view))


def _range_of(entry: Any, size: int, dim: int) -> range:
    if isinstance(entry, slice):
        if entry.step is not None and operator.index(entry.step) <= 0:
            raise ValueError(f"the step of {entry} is not above 0: read it forwards, then flip it")
        return range(*entry.indices(size))
    if isinstance(entry, bool):
        raise TypeError("a bool is no index here: only ints, slices, Ellipsis and None are")
    try:
        number = operator.index(entry)
    except TypeError as exc:
        raise TypeError(
            f"a {type(entry).__name__} is no index here: only ints, slices, Ellipsis and None are. Read the rows, then "
            "index them"
        ) from exc
    if not -size <= number < size:
        raise IndexError(f"index {number} is out of range for dimension {dim} with size {size}")
    return range(number % size, number % size + 1)


def within(wanted: Sequence[range], offsets: Sequence[int], sizes: Sequence[int]) -> Box | None:
    """Where in `wanted` the elements lie that a chunk [offset, offset + size) of each dimension has; None: nowhere."""
    box = tuple(
        slice(bisect_left(one, start), bisect_left(one, start + size))
        for one, start, size in zip(wanted, offsets, sizes, strict=True)
    )
    return None if any(side.start >= side.stop for side in box) else box


def boxes_between(start: int, stop: int, strides: Sequence[int], wanted: Sequence[range]) -> Iterator[Box]:
    """Of the `wanted` elements of a dense payload those that lie at [start, stop) of its memory, in elements.

    The dimensions are in the order of their strides, the largest first. A few boxes, whatever there is of elements: of
    each dimension but the last there may be two rows that are only partly there.
    """
    if not wanted:
        if start <= 0 < stop:
            yield ()
        return
    stride, rows = max(1, strides[0]), wanted[0]
    low, high = (sum(s * one[end] for s, one in zip(strides[1:], wanted[1:], strict=True)) for end in (0, -1))

    def first_from(element: int) -> int:
        """The first row that begins there or later."""
        return bisect_left(rows, -(-element // stride))

    any_start, any_stop = first_from(start - high), first_from(stop - low)
    all_start, all_stop = first_from(start - low), first_from(stop - high)
    if all_start >= all_stop:
        all_start = all_stop = any_stop
    for row in chain(range(any_start, all_start), range(all_stop, any_stop)):
        at = rows[row] * stride
        for box in boxes_between(start - at, stop - at, strides[1:], wanted[1:]):
            yield slice(row, row + 1), *box
    if all_start < all_stop:
        yield slice(all_start, all_stop), *(slice(0, len(one)) for one in wanted[1:])
