"""The tensors of a step as the bytes of a file that is written: read ahead, verified, in order, never all at once.

A file is made in pieces. Each is a buffer into which the tensors are read at the places that they have in the file, so
nothing is copied; buffers are used again when nobody holds a view of them. Called by export.py, which knows the file.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from asyncckpt.boxes import boxes_of
from asyncckpt.chunks import Chunk, payload_bytes_of
from asyncckpt.errors import DamagedStepError
from asyncckpt.framing import BLOCK_BYTES
from asyncckpt.read import carry_out, direct_reads
from asyncckpt.read_whole import find_whole, read_whole
from asyncckpt.restore import PASS_OVER, OpenStep, join, prepare, read
from asyncckpt.safetensors_file import Kind
from asyncckpt.storage import Storage

PIECE_BYTES = BLOCK_BYTES
"""What one thread reads and verifies at once. With four times as much a folder is read by threads of its own for each
piece: 1 GB then took 0.37 s in place of 0.22 s, and a restore 0.15 s (2 cores)."""
BUDGET_BYTES = 32 * PIECE_BYTES
"""Of pieces that are read ahead, and that storage still writes."""
READERS = 6  # pieces that are read at once: requests in flight, where they take long
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a file a tensor goes, row-major."""

    key: str
    offset: int
    kind: Kind

    @property
    def end(self) -> int:
        return self.offset + self.kind.num_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of a file. tensors: their places, and the part of each that is in it; between tensors its bytes are
    arbitrary."""

    memory: memoryview
    tensors: Sequence[tuple[Place, memoryview]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Of a tensor too large for a piece: what a chunk's payload has from the byte `first` on, where a block begins."""

    place: Place
    offset: int
    num_bytes: int
    chunk: Chunk
    first: int

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


_Wanted: TypeAlias = Sequence[Place] | Sequence[_Part]
"""What is in a piece: whole tensors, or one part of one."""


def stream(storage: Storage, step: OpenStep, places: Sequence[Place]) -> Iterator[Piece]:
    """The pieces of a file, in its order. places: in that order, too.

    Memory: BUDGET_BYTES, and what the consumer keeps. Only of a tensor that has to be put together, as it was saved in
    columns or transposed, or by stock DCP, twice its size. Raises DamagedStepError, OSError.
    """
    pieces = deque(_in_pieces(step, places))
    buffers = Buffers(max(map(_span, pieces), default=0))
    reading: deque[Future[Piece]] = deque()

    def begin() -> None:
        while pieces and len(reading) < READERS and (not reading or buffers.has_room_for(_span(pieces[0]))):
            wanted = pieces.popleft()
            # On the page on which the file has it: storage then writes it past the page cache from where it lies.
            memory = buffers.take(_span(wanted), wanted[0].offset % PAGE_BYTES)
            reading.append(pool.submit(_read_piece, storage, step, wanted, memory))

    with ThreadPoolExecutor(READERS, thread_name_prefix="asyncckpt-ahead") as pool:
        try:
            begin()
            while reading:
                piece = reading.popleft().result()
                if pieces and buffers.has_room_for(_span(pieces[0])):
                    begin()
                yield piece
                del piece
                begin()
        finally:
            pool.shutdown(cancel_futures=True)


def _in_pieces(step: OpenStep, places: Sequence[Place]) -> Iterator[_Wanted]:
    piece: list[Place] = []
    for place in places:
        if piece and place.end - piece[0].offset > PIECE_BYTES:
            yield piece
            piece = []
        if place.kind.num_bytes > PIECE_BYTES and (parts := _parts(step, place)):
            if piece:
                yield piece
                piece = []
            yield from ([part] for part in parts)
        else:
            piece.append(place)
    if piece:
        yield piece


def _parts(step: OpenStep, place: Place) -> list[_Part]:
    """None where a chunk's payload is not, as it lies, a range of the row-major tensor."""
    chunks = chunks_of(step, place.key)
    starts = [_start_in(place.kind, chunk) for chunk in chunks]
    if not chunks or None in starts or place.key in step.lacking:
        return []
    return [
        _Part(place, place.offset + start + first, min(PIECE_BYTES, size - first), chunk, first)
        for start, chunk in sorted(zip(starts, chunks, strict=True), key=lambda pair: pair[0] or 0)
        if start is not None and chunk.layout is not None
        for size in [payload_bytes_of(chunk.layout)]
        for first in range(0, size, PIECE_BYTES)
    ]


def chunks_of(step: OpenStep, key: str) -> list[Chunk]:
    """None of a foreign step."""
    if step.manifest is None:
        return []
    chunks = step.manifest.chunks
    return [chunks[number] for number in boxes_of(step.keys, chunks).numbers_of(key)]


def _start_in(kind: Kind, chunk: Chunk) -> int | None:
    """The byte of the row-major tensor at which the chunk's payload begins; None: it is no range of it."""
    layout, offsets, start, step = chunk.layout, chunk.offsets, 0, kind.dtype.itemsize
    if layout is None or offsets is None or not layout.is_contiguous:
        return None
    is_cut = False
    for size, own, offset in zip(reversed(kind.shape), reversed(layout.shape), reversed(offsets), strict=True):
        if is_cut and own != 1:
            return None
        is_cut = is_cut or own != size
        start += offset * step
        step *= size
    return start


def _span(wanted: _Wanted) -> int:
    return wanted[-1].end - wanted[0].offset


def _read_piece(storage: Storage, step: OpenStep, wanted: _Wanted, memory: memoryview) -> Piece:
    one = wanted[0]
    if isinstance(one, _Part):
        path, blocks = join(step.data_folder, one.chunk.file), one.chunk.block_crcs[one.first // BLOCK_BYTES :]
        crcs = blocks[: -(-one.num_bytes // BLOCK_BYTES)]
        target = torch.frombuffer(memory, dtype=torch.uint8)
        at = one.chunk.payload_offset + one.first
        carry_out(storage, direct_reads(storage.url, path, one.place.key, at, target, crcs))
        return Piece(memory, [(one.place, memory)])
    places = [place for place in wanted if isinstance(place, Place)]
    views = [memory[place.offset - one.offset : place.end - one.offset] for place in places]
    tensors = {place.key: _tensor(view, place.kind) for place, view in zip(places, views, strict=True)}
    read_into(storage, step, tensors)
    return Piece(memory, list(zip(places, views, strict=True)))


def _tensor(memory: memoryview, kind: Kind) -> torch.Tensor:
    if not len(memory):
        return torch.empty(kind.shape, dtype=kind.dtype)
    return torch.frombuffer(memory, dtype=kind.dtype).view(kind.shape)


def read_into(storage: Storage, step: OpenStep, tensors: Mapping[str, torch.Tensor]) -> None:
    """Read tensors of a step into these, which have the dtypes and shapes that `step.keys` says."""
    rest = dict(tensors)
    if step.manifest is not None:
        if lost := [step.lacking[key] for key in tensors if key in step.lacking]:
            where = f"the checkpoint at {join(storage.url, step.folder)}"
            raise DamagedStepError(f"{where} is damaged: {lost[0]}", url=storage.url, outcome=PASS_OVER)
        whole, rest = find_whole(step.manifest, step.keys, tensors)
        read_whole(storage, step.data_folder, whole)
    if rest:
        read(storage, prepare(storage, step, rest, is_coordinator=True, load_planner=None, safe_globals=()))


def file_views(storage: Storage, path: str, size: int) -> Iterator[memoryview]:
    """A file's bytes, read ahead. Memory: some pieces, and what the consumer keeps. Raises EOFError, OSError."""
    buffers = Buffers(PIECE_BYTES)
    starts = deque(range(0, size, PIECE_BYTES))
    reading: deque[Future[memoryview]] = deque()

    def read_view(start: int) -> memoryview:
        view = buffers.take(min(PIECE_BYTES, size - start), 0)
        storage.read_into(path, [(start, view)])
        return view

    with ThreadPoolExecutor(READERS, thread_name_prefix="asyncckpt-ahead") as pool:
        try:
            while starts or reading:
                while starts and len(reading) <= READERS:
                    reading.append(pool.submit(read_view, starts.popleft()))
                yield reading.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class Buffers:
    """Memory that is used again once nobody holds a view of it: fresh memory costs several times a copy into it."""

    def __init__(self, largest: int) -> None:
        self._capacity = largest + 2 * PAGE_BYTES  # of each; what is not touched is no memory
        self._budget = max(BUDGET_BYTES, 2 * largest)
        self._free: deque[mmap.mmap] = deque()
        self._in_use: deque[int] = deque()

    def has_room_for(self, num_bytes: int) -> bool:
        return sum(self._in_use.copy()) + num_bytes <= self._budget

    def take(self, num_bytes: int, start: int) -> memoryview:
        """`num_bytes` that begin `start` bytes into a page."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, self._capacity)
        lease = np.frombuffer(memory, np.uint8, num_bytes, start)  # every view of the memoryview keeps it alive
        self._in_use.append(num_bytes)
        weakref.finalize(lease, self._give_back, memory, num_bytes)
        return lease.data

    def _give_back(self, memory: mmap.mmap, num_bytes: int) -> None:
        self._in_use.remove(num_bytes)
        self._free.append(memory)
