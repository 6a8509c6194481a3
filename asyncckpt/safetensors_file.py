"""A safetensors file as a stream of views: what `safetensors.torch.save_file` writes, byte for byte.

The format is eight bytes with the length of a JSON header, the header, padded with spaces to a multiple of eight, and
the tensors, row-major, one behind the other: those of the widest kinds first (_KINDS says in which order), then by
name. Needs no package. Used by files.py's callers (a file of a step), export.py and imports.py (a header read back).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from asyncckpt.chunks import HUGE
from asyncckpt.manifest import members_once
from asyncckpt.shard import in_views, payload_view

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors package
_KINDS: tuple[tuple[str, str], ...] = (
    ("BOOL", "bool"), ("U8", "uint8"), ("I8", "int8"),
    ("F8_E5M2", "float8_e5m2"), ("F8_E4M3", "float8_e4m3fn"), ("F8_E8M0", "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", "float8_e4m3fnuz"), ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    ("I16", "int16"), ("U16", "uint16"), ("F16", "float16"), ("BF16", "bfloat16"),
    ("I32", "int32"), ("U32", "uint32"), ("F32", "float32"), ("C64", "complex64"),
    ("F64", "float64"), ("I64", "int64"), ("U64", "uint64"),
)  # fmt: skip
"""(name in a file, torch's), in the package's order, which its files have backwards."""
_RANK = {getattr(torch, dtype): (number, name) for number, (name, dtype) in enumerate(_KINDS)}
_DTYPES = {name: getattr(torch, dtype) for name, dtype in _KINDS}


class Kind(NamedTuple):
    """What a file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """data: what a file begins with. names: of the tensors, in the file's order."""

    data: bytes
    names: Sequence[str]
    size: int
    """Of the whole file, in bytes."""


def header_of(kinds: Mapping[str, Kind], metadata: Mapping[str, str] | None = None) -> Header:
    """ValueError, naming the tensors, for dtypes that the format does not have."""
    if unknown := {name: kind.dtype for name, kind in kinds.items() if kind.dtype not in _RANK}:
        named = ", ".join(f"{name!r} ({dtype})" for name, dtype in list(unknown.items())[:5])
        raise ValueError(
            f"safetensors has no dtype for {len(unknown)} tensors: {named}. Nothing was written. Leave them out, "
            "convert them, or use the format torch"
        )
    if "__metadata__" in kinds:
        raise ValueError('no tensor of a safetensors file can be named "__metadata__". Nothing was written')
    names = sorted(kinds, key=lambda name: (-_RANK[kinds[name].dtype][0], name.encode()))
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        dtype, shape = kinds[name]
        end = at + kinds[name].num_bytes
        entries[name] = {"dtype": _RANK[dtype][1], "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"its header would have {len(text)} bytes, and readers take {MAX_HEADER_BYTES}. Split it")
    return Header(len(text).to_bytes(8, "little") + text, names, 8 + len(text) + at)


def _tensor_kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, Kind]:
    """ValueError for what the format cannot hold, as `safetensors.torch.save_file` refuses it."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r} is no tensor but {type(tensor).__name__}. Nothing was written")  # noqa: TRY004
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"safetensors has no sparse or quantized tensors: {name!r}. Nothing was written")
        if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg() or tensor.is_conj():
            raise ValueError(f"{name!r} is not contiguous, or not on the CPU. Nothing was written. Copy it first")
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors.items() if t.numel())
    for (_, end, name), (start, _, other) in pairwise(places):
        if start < end:
            raise ValueError(
                f"{name!r} and {other!r} share memory, and safetensors has each by itself. Nothing was written. "
                "Leave one out, as safetensors.torch.save_model does"
            )
    return {name: Kind(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


class SafetensorsFile:
    """The content of a file (files.FileContent). Holds the tensors, which stay as they are for as long as views are.

    tensors: contiguous, on the CPU, no two in one memory; ValueError otherwise, and for complex128 and what else
    safetensors has no name for.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        self._tensors = dict(tensors)
        self._header = header_of(_tensor_kinds(self._tensors), metadata)
        self.size = self._header.size

    def views(self) -> Iterator[memoryview]:
        """`size` bytes, the tensors' as they lie in memory."""
        yield memoryview(self._header.data)
        for name in self._header.names:
            yield from in_views(payload_view(self._tensors[name].detach()))


class Stored(NamedTuple):
    """A tensor in a file. offset: of its first byte, from the file's beginning."""

    kind: Kind
    offset: int


def header_length(data: bytes, file_bytes: int) -> int:
    """What the first eight bytes of a file say. ValueError for what no reader takes."""
    length = int.from_bytes(data, "little")
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"its header would have {length} bytes, and it has {file_bytes}")
    return length


def read_header(data: bytes, file_bytes: int) -> tuple[dict[str, Stored], dict[str, str]]:
    """({name: tensor}, metadata) of a file that begins with `data`, its length and header. ValueError, if the tensors
    do not make up the rest of the file, as every reader of the format asks."""
    try:
        entries = json.loads(data[8:], object_pairs_hook=members_once)
        metadata = entries.pop("__metadata__", None) or {}
        stored = {name: _stored(len(data), **entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise ValueError(f"its header is none of safetensors: {str(exc)[:300]}") from exc
    end = len(data)
    for kind, offset in sorted(stored.values(), key=lambda one: (one.offset, one.kind.num_bytes)):
        if offset != end:
            raise ValueError(f"its tensors overlap, or leave out bytes, at byte {offset}")
        end = offset + kind.num_bytes
    if end != file_bytes:
        raise ValueError(f"it has {file_bytes} bytes, and by its header {end}")
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise ValueError("its metadata are no texts")
    return stored, metadata


def _stored(header_bytes: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    start, end = data_offsets
    if dtype not in _DTYPES:
        raise ValueError(f"torch has no dtype {str(dtype)[:20]!r}")
    if not all(type(size) is int and 0 <= size < HUGE for size in (*shape, start, end)):
        raise ValueError("a size is no natural number")
    kind = Kind(_DTYPES[dtype], tuple(shape))
    if kind.num_bytes != end - start:
        raise ValueError(f"a tensor of shape {kind.shape} has {end - start} bytes")
    return Stored(kind, header_bytes + start)
