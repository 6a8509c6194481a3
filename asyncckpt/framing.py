"""The bytes around a tensor in a stock DCP file, known before the tensor is.

A stock item is what `torch.save(tensor)` writes: a zip archive whose record "data/0" is the payload. Everything but the
payload depends only on dtype, shape and stride, save for the payload's CRC32, which zip keeps *after* the payload: in
the data descriptor and in the central directory. So `frame_of` asks torch once for the bytes around a payload that is
never read or written (`torch.serialization.skip_data`), and the writer streams head, payload, patched tail. Objects
are small and go through torch.save itself. Used by shard.py; knows nothing of files or storage.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from isal.isal_zlib import crc32, crc32_combine

from asyncckpt.errors import CheckpointError

BLOCK_BYTES = 4 * 1024 * 1024
"""Payloads carry one CRC32 per block, so that a reader of a slice verifies what it read, at most one block more at each
end. A guess between manifest size (262,144 blocks per TiB) and bytes read in vain."""

_LOCAL_HEADER, _DESCRIPTOR = b"PK\x03\x04", b"PK\x07\x08"
_CENTRAL_ENTRY = struct.Struct("<4s6H3L5H2L")
_PAYLOAD_RECORD = b"/data/0"


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides the framing of a tensor: dtype by name without "torch.", shape and stride in elements.

    The strides are dense and non-overlapping: the payload is the tensor's memory, `numel * itemsize` bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Layout:
        return cls(str(tensor.dtype)[6:], tuple(tensor.shape), tensor.stride())

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown dtype {self.dtype!r}; a newer torch may know it")  # noqa: TRY004
        return dtype

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    @property
    def is_dense(self) -> bool:
        """Whether the elements fill one gapless range of memory, each once, in some order of dimensions."""
        if 0 in self.shape:
            return len(self.shape) == len(self.stride)
        expected = 1
        for stride, size in sorted(zip(self.stride, self.shape, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Frame:
    """One item = head + payload + tail. `crc_at`: where the payload's CRC32 goes in the tail, little-endian."""

    head: bytes
    tail: bytes
    payload_bytes: int
    crc_at: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return len(self.head) + self.payload_bytes + len(self.tail)

    def tail_with(self, payload_crc32: int) -> bytes:
        tail = bytearray(self.tail)
        for at in self.crc_at:
            struct.pack_into("<L", tail, at, payload_crc32)
        return bytes(tail)

    def item_crc32(self, payload_crc32: int) -> int:
        """CRC32 of the whole item, of which only the payload's needs to be known."""
        before = crc32_combine(crc32(self.head), payload_crc32, self.payload_bytes)
        return crc32(self.tail_with(payload_crc32), before)

    def item_crc32s(self, payload_crc32s: np.ndarray) -> np.ndarray:
        """The same for many items at once, uint32 in and out; some nanoseconds each."""
        if len(payload_crc32s) < _WORTH_TABLES:
            return np.array([self.item_crc32(crc) for crc in payload_crc32s.tolist()], np.uint32)
        base, tables = _item_crc_tables(self)
        return _looked_up(tables, payload_crc32s) ^ np.uint32(base)


_WORTH_TABLES = 64  # items; the tables cost as much as this many
Tables: TypeAlias = list[np.ndarray]


@lru_cache(maxsize=256)
def _item_crc_tables(frame: Frame) -> tuple[int, Tables]:
    """An item's CRC32 is the first number XOR what the tables say of the payload's CRC32.

    CRC32 is linear over XOR, also where the payload's CRC32 is stored in the tail: a bit of it flips the same bits of
    the item's whatever the others are.
    """
    base = frame.item_crc32(0)
    return base, _tables(lambda payload_crc32: frame.item_crc32(payload_crc32) ^ base)


def crc32_of_equal(crc32s: np.ndarray, num_bytes: int) -> int:
    """The CRC32 of pieces of `num_bytes` each, one behind the other, from theirs."""
    while len(crc32s) > _WORTH_TABLES:
        if len(crc32s) % 2:
            crc32s = np.concatenate((np.zeros(1, np.uint32), crc32s))  # of nothing, which changes nothing
        crc32s = _looked_up(_shift_tables(num_bytes), crc32s[::2]) ^ crc32s[1::2]
        num_bytes *= 2
    whole = 0
    for crc in crc32s.tolist():
        whole = crc32_combine(whole, crc, num_bytes)
    return whole


@lru_cache(maxsize=4096)
def _shift_tables(num_bytes: int) -> Tables:
    """What becomes of a CRC32 when so many bytes follow, but for their own part in it."""
    return _tables(lambda crc: int(crc32_combine(crc, 0, num_bytes)))


def _tables(linear: Callable[[int], int]) -> Tables:
    """A function of 32 bits that is linear over XOR, by the bytes of its argument."""
    tables = []
    for byte in range(4):
        table = np.zeros(256, np.uint32)
        for bit in range(8):
            table[1 << bit : 2 << bit] = table[: 1 << bit] ^ np.uint32(linear(1 << (8 * byte + bit)))
        tables.append(table)
    return tables


def _looked_up(tables: Tables, values: np.ndarray) -> np.ndarray:
    octets = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)
    found: np.ndarray = tables[0][octets[:, 0]]
    for byte in (1, 2, 3):
        found ^= tables[byte][octets[:, byte]]
    return found


class _SparseSink(io.RawIOBase):
    """Collects the writes of torch.save; a skipped payload is a gap, not memory."""

    def __init__(self) -> None:
        self.position = 0
        self.pieces: list[tuple[int, bytes]] = []

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self.pieces.append((self.position, piece))
        self.position += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (self.position if whence == io.SEEK_CUR else 0)
        return self.position

    def tell(self) -> int:
        return self.position

    def slice(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), gaps as zeros."""
        out = bytearray(stop - start)
        for at, piece in self.pieces:
            if start <= at and at + len(piece) <= stop:
                out[at - start : at - start + len(piece)] = piece
        return bytes(out)


@lru_cache(maxsize=65536)
def frame_of(layout: Layout) -> Frame:
    """The framing of a tensor; about 0.3 ms the first time a layout is seen."""
    sink = _SparseSink()
    tensor = torch.empty_strided(layout.shape, layout.stride, dtype=layout.torch_dtype)
    with torch.serialization.skip_data():
        torch.save(tensor, sink)  # type: ignore[arg-type]
    payload_bytes = tensor.numel() * tensor.element_size()
    start = _payload_start(sink)
    head, tail = sink.slice(0, start), sink.slice(start + payload_bytes, sink.position)
    return Frame(head, tail, payload_bytes, _crc_positions(tail) if payload_bytes else ())


def _payload_start(sink: _SparseSink) -> int:
    """Offset of the payload: behind the local header (30 bytes, name, padding) of record "data/0"."""
    for (at, header), (name_at, name) in zip(sink.pieces, sink.pieces[1:], strict=False):
        if header.startswith(_LOCAL_HEADER) and name.endswith(_PAYLOAD_RECORD):
            name_length, extra_length = struct.unpack_from("<HH", header, 26)
            if name_at == at + 30 and len(name) == name_length:
                return at + 30 + int(name_length) + int(extra_length)
    raise CheckpointError(
        f"torch {torch.__version__} frames tensors in a way asyncckpt does not know: please report it"
    )


def _crc_positions(tail: bytes) -> tuple[int, ...]:
    """Positions in the tail of the payload's CRC32: data descriptor first, then its entry in the central directory.

    An empty payload has no descriptor, and its CRC32 is 0 already.
    """
    if not tail.startswith(_DESCRIPTOR):
        raise CheckpointError(f"torch {torch.__version__} writes no data descriptor: please report it")
    name_at = tail.rfind(_PAYLOAD_RECORD)
    entry_at = tail.rfind(b"PK\x01\x02", 0, name_at)
    _CENTRAL_ENTRY.unpack_from(tail, entry_at)
    return 4, entry_at + 16


def encode_object(value: Any) -> bytes:
    """The item of a value that is no tensor, CRC32 fields right."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@dataclass(slots=True)
class PayloadCrc:
    """CRC32 of a payload from the CRC32s of its blocks, in order."""

    value: int = 0
    num_bytes: int = 0

    def add(self, block_crc32: int, num_bytes: int) -> None:
        self.value = crc32_combine(self.value, block_crc32, num_bytes) if self.num_bytes else block_crc32
        self.num_bytes += num_bytes


__all__ = [
    "BLOCK_BYTES", "Frame", "Layout", "PayloadCrc", "crc32", "crc32_combine", "crc32_of_equal",
    "encode_object", "frame_of",
]  # fmt: skip
