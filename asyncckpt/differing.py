"""Two steps compared, key by key: which have only one of them, other shapes or dtypes, and which values differ and how.

What both saved in the same pieces with the same checksums is equal, and is not read; of the rest one tensor of each
side is in memory at a time. Objects are compared by value, as far as they load without running what they ask for.
Called by the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from asyncckpt.chunks import Numbers
from asyncckpt.errors import UnsafeObjectError
from asyncckpt.lookup import read_object, read_tensor
from asyncckpt.restore import OpenStep
from asyncckpt.storage import Storage

_PIECE = 1 << 22  # elements: what comparing takes beside the tensors is 100 MiB
Result = Literal["equal", "only in A", "only in B", "shape", "dtype", "kind", "differs", "unknown"]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the steps."""

    storage: Storage
    step: OpenStep


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one key. a, b: what it is in each, "" where it is not. was_read: False where the checksums sufficed.

    num_elements, num_bytes: of the tensor that differ. max_abs: infinite where only one side is finite; None where
    torch cannot tell. detail: of objects, and why one could not be compared.
    """

    key: str
    result: Result
    a: str = ""
    b: str = ""
    was_read: bool = False
    num_elements: int = 0
    num_bytes: int = 0
    max_abs: float | None = None
    detail: str = ""


def compare(
    a: Side, b: Side, matches: Callable[[str], bool] | None = None, tell: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[Difference]:
    """Every key of either, in the order of A, then what only B has. tell: hears of bytes of tensors that were read.
    DamagedStepError, OSError."""
    same = _same_bytes(a.step, b.step)
    for key in a.step.keys.fqns:
        if matches is None or matches(key):
            found = _compare_key(a, b, key, same)
            yield found
            if found.was_read:
                tell(2 * _num_bytes(a.step, key))
    for key in b.step.keys.fqns:
        if key not in a.step.keys and (matches is None or matches(key)):
            yield Difference(key, "only in B", b=_kind(b.step, key))


def bytes_to_read(a: Side, b: Side, matches: Callable[[str], bool] | None = None) -> int:
    """That `compare` will read of both, for a progress bar."""
    same, total = _same_bytes(a.step, b.step), 0
    for key in a.step.keys.fqns:
        if key in b.step.keys and key not in same and (matches is None or matches(key)):
            total += _num_bytes(a.step, key) * 2 if _kind(a.step, key) == _kind(b.step, key) else 0
    return total


def _num_bytes(step: OpenStep, key: str) -> int:
    saved = step.keys[key]
    if saved.dtype is None or saved.shape is None:
        return 0
    return int(np.prod(saved.shape, dtype=np.int64)) * int(getattr(torch, saved.dtype).itemsize)


def _kind(step: OpenStep, key: str) -> str:
    saved = step.keys[key]
    return "object" if saved.dtype is None or saved.shape is None else f"{saved.dtype} {list(saved.shape)}"


def _compare_key(a: Side, b: Side, key: str, same: Mapping[str, object]) -> Difference:
    kind = _kind(a.step, key)
    if key not in b.step.keys:
        return Difference(key, "only in A", kind)
    other, mine, theirs = _kind(b.step, key), a.step.keys[key], b.step.keys[key]
    if mine.dtype is None or theirs.dtype is None:
        if mine.dtype is not theirs.dtype:
            return Difference(key, "kind", kind, other)
        return Difference(key, "equal", kind, other) if key in same else _compare_objects(a, b, key)
    if mine.shape != theirs.shape:
        return Difference(key, "shape", kind, other)
    if mine.dtype != theirs.dtype:
        return Difference(key, "dtype", kind, other)
    if key in same:
        return Difference(key, "equal", kind, other)
    found = _compare_tensors(read_tensor(a.storage, a.step, key), read_tensor(b.storage, b.step, key))
    num_elements, num_bytes, max_abs = found
    return Difference(
        key, "differs" if num_bytes else "equal", kind, other, True, num_elements, num_bytes, max_abs
    )  # fmt: skip


# -- by checksums


def _same_bytes(a: OpenStep, b: OpenStep) -> Mapping[str, object]:
    """Keys whose pieces have the same places, layouts and CRC32s in both; none if one has no checksums."""
    if a.manifest is None or b.manifest is None:
        return {}
    mine, theirs = _prints(a), _prints(b)
    return {key: None for key, number in a.keys.number.items() if _print_of(b, theirs, key) == mine[number]}


def _print_of(step: OpenStep, prints: list[int], key: str) -> int | None:
    return prints[step.keys.number[key]] if key in step.keys else None


def _prints(step: OpenStep) -> list[int]:
    """A number for each key: a hash of all that tells of its bytes, in columns, as there may be a million chunks."""
    assert step.manifest is not None
    chunks = step.manifest.chunks
    place = chunks.placement
    boxes: dict[object, int] = {}
    box = np.fromiter((boxes.setdefault(one, _hash(one)) for one in place.offsets), np.uint64, len(place))
    layouts = np.array([*(_hash((one.dtype, one.shape, one.stride)) for one, _ in place.layouts), 0], np.uint64)
    row = box * np.uint64(0x9E3779B97F4A7C15) + layouts[place.layout]
    row = _mixed(row ^ (chunks.crc32.astype(np.uint64) << np.uint64(20)))
    key: Numbers = step.keys.numbers_of(place)
    total = np.zeros(len(step.keys), np.uint64)
    np.add.at(total, key, row)
    return [int(value) for value in total]


def _mixed(values: Any) -> Any:
    """splitmix64: sums of what it gives tell sets apart."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash(value: object) -> int:
    return hash(value) & (2**64 - 1)


# -- by value


def _compare_tensors(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int, float | None]:
    """(elements, bytes that differ, largest absolute difference)"""
    num_elements, num_bytes, largest = 0, 0, 0.0
    rows = _bytes_of(a), _bytes_of(b)
    for start in range(0, len(rows[0]), _PIECE):
        mine, theirs = (row[start : start + _PIECE] for row in rows)
        hit = mine != theirs
        if not bool(hit.any()):
            continue
        num_bytes += int(hit.sum())
        wrong = hit.any(1)
        num_elements += int(wrong.sum())
        here = _largest(a.dtype, mine[wrong], theirs[wrong])
        largest = here if math.isnan(here) else max(largest, here)
    return num_elements, num_bytes, largest if num_bytes and not math.isnan(largest) else None


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """[elements, bytes of each]"""
    return tensor.contiguous().view(-1).view(torch.uint8).view(-1, tensor.element_size())


def _largest(dtype: torch.dtype, a: torch.Tensor, b: torch.Tensor) -> float:
    """inf where one is not finite, or NaN in one alone."""
    values = [row.contiguous().view(dtype).view(-1) for row in (a, b)]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    try:
        mine, theirs = (value.to(wide) for value in values)
    except RuntimeError:  # a dtype that torch stores and cannot convert: float4_e2m1fn_x2
        return math.nan
    both_nan = mine.isnan() & theirs.isnan()
    difference = torch.where((mine == theirs) | both_nan, torch.zeros_like(mine), mine - theirs).abs()
    return float(torch.nan_to_num(difference, nan=math.inf, posinf=math.inf).max())


def _compare_objects(a: Side, b: Side, key: str) -> Difference:
    try:
        mine, theirs = read_object(a.storage, a.step, key), read_object(b.storage, b.step, key)
    except UnsafeObjectError as exc:
        return Difference(key, "unknown", "object", "object", True, detail=str(exc).splitlines()[0])
    if _is_equal(mine, theirs):
        return Difference(key, "equal", "object", "object", True)
    return Difference(key, "differs", "object", "object", True, detail=f"{_short(mine)} -> {_short(theirs)}")


def _is_equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(_bytes_of(a), _bytes_of(b)))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_is_equal, a, b))
    return bool(a == b) or (isinstance(a, float) and a != a and b != b)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
