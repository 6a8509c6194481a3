"""Where each tensor of a state dict lies in one buffer, computed once and kept while the structure stays the same.

Every distinct tensor has a range of its own: writers read it straight from the buffer, so large ones start on a page.
Tensors that are the same memory seen the same way (tied weights) share a range; overlapping views do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stagers.base import StagingError
from stagers.flatten import TENSOR, Flat, Spec, assemble, leaf_specs, names

PAGE_BYTES = 4096
"""O_DIRECT needs addresses on a multiple of the logical block size: 512 or 4096 bytes on today's disks."""
_PAGE_ALIGNED_FROM = 1 << 20
_SMALL_ALIGNMENT = 64  # a cache line, and a multiple of every dtype's size


class Range(NamedTuple):
    """One distinct tensor in the buffer; offset and num_bytes in bytes."""

    key: str
    offset: int
    num_bytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_dense: bool
    """The source has the same strides, so that its memory is a byte-wise copy of the range."""


class Layout:
    """The ranges for one structure: keys, nesting, shapes, strides, dtypes, devices, placements and ties.

    structure: the number the stager gave it. first_of: for each range the index of its source among `Flat.tensors`.
    num_bytes: payload of the ranges. buffer_bytes: with padding.
    """

    def __init__(self, flat: Flat, structure: int) -> None:
        self.structure = structure
        self._spec = flat.spec
        self._signature = _checked_signature(flat)
        self._ties = _ties(flat.tensors, self._signature)
        ties = range(len(flat.tensors)) if self._ties is None else self._ties
        self.first_of = sorted(set(ties))
        range_of_source = {source: i for i, source in enumerate(self.first_of)}
        self._range_of = [range_of_source[source] for source in ties]
        keys = list(names(flat.spec, TENSOR))
        self.ranges: list[Range] = []
        self.num_bytes = self.buffer_bytes = 0
        for source in self.first_of:
            self._append(keys[source], flat.tensors[source])

    def _append(self, key: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.itemsize
        alignment = PAGE_BYTES if num_bytes >= _PAGE_ALIGNED_FROM else _SMALL_ALIGNMENT
        offset = -(-self.buffer_bytes // alignment) * alignment
        stride = _dense_stride(tensor.shape, tensor.stride())
        is_dense = stride == tensor.stride()
        self.ranges.append(Range(key, offset, num_bytes, tensor.shape, stride, tensor.dtype, is_dense))
        self.num_bytes += num_bytes
        self.buffer_bytes = offset + num_bytes

    def fits(self, flat: Flat) -> bool:
        """True while only values (and the memory they are in) changed."""
        try:
            return (
                len(flat.tensors) == len(self._signature)
                and _is_alike(flat.tensors, self._signature)
                and flat.spec == self._spec
                and _ties(flat.tensors, self._signature) == self._ties
            )
        except Exception:
            return False  # a tensor without strides, a context that refuses comparison: a new Layout looks closely

    def views(self, buffer: Any) -> list[Tensor]:
        """A tensor over `buffer` for each range; each has a storage of its own, of exactly its bytes.

        buffer: exports at least `buffer_bytes` writable bytes; it lives until the last storage is gone. Stock DCP
        clones tensors whose storage is larger than they are, and torch.save would write all of a shared one.
        """
        return [_view(buffer, place) for place in self.ranges]

    def leaves(self, views: Sequence[Tensor]) -> list[Tensor]:
        """A tensor for each tensor of the tree; subclasses wrap their views again, tied ones are one object."""
        indices = iter(self._range_of)
        wrapped: dict[tuple[int, ...], list[tuple[Spec, Tensor]]] = {}
        leaves = []
        for spec in leaf_specs(self._spec):
            if spec is TENSOR:
                leaves.append(views[next(indices)])
                continue
            parts = tuple(islice(indices, sum(1 for _ in names(spec, TENSOR))))
            known = wrapped.setdefault(parts, [])
            leaf = next((other for twin, other in known if twin == spec), None)
            if leaf is None:
                leaf = assemble(spec, (views[i] for i in parts))
                known.append((spec, leaf))
            leaves.append(leaf)
        return leaves


def _view(buffer: Any, place: Range) -> Tensor:
    if not place.num_bytes:
        return torch.empty_strided(place.shape, place.stride, dtype=place.dtype)
    count = place.num_bytes // place.dtype.itemsize
    flat = torch.frombuffer(buffer, dtype=place.dtype, count=count, offset=place.offset)
    return flat.as_strided(place.shape, place.stride)


def _checked_signature(flat: Flat) -> list[Any]:
    for key, tensor in zip(names(flat.spec, TENSOR), flat.tensors, strict=True):
        reason = _why_not(tensor)
        if reason:
            raise StagingError(f"{key!r} is {reason}, which cannot be staged. Nothing was copied.")
    # None for the CPU, as `is_cpu` is quicker to check than a device.
    return [(t.shape, t.stride(), t.dtype, None if t.is_cpu else t.device) for t in flat.tensors]


def _is_alike(tensors: Sequence[Tensor], signature: Sequence[Any]) -> bool:
    # A second list to compare with would cost four times as much: keeping tuples wakes the garbage collector.
    for tensor, (shape, stride, dtype, device) in zip(tensors, signature, strict=True):
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.stride() != stride:
            return False
        if not tensor.is_cpu if device is None else tensor.device != device:
            return False
    return True


def _why_not(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "a nested tensor of strided layout"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}"
    if tensor.is_quantized:
        return "a quantised tensor"
    if tensor.is_meta:
        return "a meta tensor without data"
    try:
        tensor.data_ptr()
    except RuntimeError as error:
        return f"a tensor without memory to read ({error})"
    return None


def _ties(tensors: Sequence[Tensor], signature: Sequence[Any]) -> list[int] | None:
    """For each tensor the index of the first one that is the same memory seen the same way; None if all differ."""
    addresses = [t.data_ptr() for t in tensors]
    if len(set(addresses)) == len(addresses):
        return None
    first: dict[Any, int] = {}
    ties = []
    for i, (tensor, address) in enumerate(zip(tensors, addresses, strict=True)):
        # 0 is no address: an empty tensor, or a device that hides it.
        key = (address, signature[i], tensor.is_conj(), tensor.is_neg()) if address else i
        ties.append(first.setdefault(key, i))
    return ties


def _dense_stride(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """`stride` where it covers its memory without gaps or overlaps (in any order of dimensions), else contiguous."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size != 1 and step != expected:
            return contiguous_stride(shape)
        expected *= size
    return stride


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a row-major tensor."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
