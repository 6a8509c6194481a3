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

import numpy as np
import torch

from asyncckpt.errors import DamagedStepError
from asyncckpt.read_whole import find_whole, read_whole
from asyncckpt.restore import PASS_OVER, OpenStep, join, prepare, read
from asyncckpt.safetensors_file import Kind
from asyncckpt.shard import VIEW_BYTES
from asyncckpt.storage import Storage

PIECE_BYTES = 32 << 20
"""A guess: several ranges of an object store at once, and small beside what a process takes anyway."""
BUDGET_BYTES = 5 * PIECE_BYTES
"""Of pieces that are read ahead, and that storage still writes."""
READERS = 2  # pieces that are read at once, so that the end of one does not leave the line empty
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
    """A range of a file, with the tensors in it. memory: its bytes; between tensors they are arbitrary."""

    places: Sequence[Place]
    memory: memoryview

    def bytes_of(self, place: Place) -> memoryview:
        start = place.offset - self.places[0].offset
        return self.memory[start : start + place.kind.num_bytes]


def stream(storage: Storage, step: OpenStep, places: Sequence[Place]) -> Iterator[Piece]:
    """The pieces of a file, in its order. places: in that order, too.

    Memory: BUDGET_BYTES or twice the largest tensor, whichever is more, and what the consumer keeps. Raises
    DamagedStepError, OSError.
    """
    pieces = deque(_in_pieces(places))
    buffers = Buffers(max((_span(piece) for piece in pieces), default=0))
    reading: deque[Future[Piece]] = deque()

    def begin() -> None:
        while pieces and len(reading) <= READERS and (not reading or buffers.has_room_for(_span(pieces[0]))):
            wanted = pieces.popleft()
            # On the page on which the file has it: storage then writes it past the page cache from where it lies.
            memory = buffers.take(_span(wanted), wanted[0].offset % PAGE_BYTES)
            reading.append(pool.submit(_read_piece, storage, step, Piece(wanted, memory)))

    with ThreadPoolExecutor(READERS, thread_name_prefix="asyncckpt-ahead") as pool:
        try:
            begin()
            while reading:
                piece = reading.popleft().result()
                if buffers.has_room_for(_span(pieces[0]) if pieces else 0):
                    begin()
                yield piece
                del piece
                begin()
        finally:
            pool.shutdown(cancel_futures=True)


def _in_pieces(places: Sequence[Place]) -> Iterator[list[Place]]:
    piece: list[Place] = []
    for place in places:
        if piece and place.end - piece[0].offset > PIECE_BYTES:
            yield piece
            piece = []
        piece.append(place)
    if piece:
        yield piece


def _span(piece: Sequence[Place]) -> int:
    return piece[-1].end - piece[0].offset


def _read_piece(storage: Storage, step: OpenStep, piece: Piece) -> Piece:
    read_into(storage, step, {place.key: _tensor(piece.bytes_of(place), place.kind) for place in piece.places})
    return piece


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
    """A file's bytes, read ahead; the last of `size` stand in the last view. Raises EOFError, OSError."""
    buffers = Buffers(VIEW_BYTES)
    starts = deque(range(0, size, VIEW_BYTES))
    reading: deque[Future[memoryview]] = deque()

    def read_view(start: int) -> memoryview:
        view = buffers.take(min(VIEW_BYTES, size - start), 0)
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
