"""One rank's items as the bytes of its files: the stream of views that storage writes, and their checksums.

Every place in the file is known before a byte is written (shard_layout.py), so large payloads go from the staged tensor
to storage as they lie; only frames, small tensors and objects pass through a buffer. Checksums are computed in the same
pass. Called by the background writer (save.py) and by ShardWriter (dcp.py); decides nothing about steps or commits.
"""

from __future__ import annotations

import io
import itertools
import mmap
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from asyncckpt.chunks import Checksums, ChunkTable, Numbers
from asyncckpt.framing import BLOCK_BYTES, Layout, PayloadCrc, crc32, crc32_combine, crc32_of_equal, frame_of
from asyncckpt.local_file import address_of
from asyncckpt.manifest import FileRecord
from asyncckpt.shard_layout import REGION_BYTES, Run, ShardFile, ShardLayout
from asyncckpt.storage import Storage

VIEW_BYTES = 4 * BLOCK_BYTES
"""Payload bytes checksummed ahead of being handed to storage; 16 MiB is also what O_DIRECT and multipart like."""
PARALLEL_FILES = 4
PAUSE_S_PER_TENSOR = 100e-6
"""A small tensor takes 1.5 us of the GIL, and each time the GIL is handed over costs a busy training thread half a
millisecond more (a virtual machine's wake-up). Spread out like this, a step of 10 ms bound by Python takes 1.03 times
as long beside a save, at the 99th percentile 1.3 times; with 20 us 1.15 and 1.4."""

Places: TypeAlias = Numbers
"""[start, stop) of each of a plan's tensors in a buffer; a row for each item."""


class Payloads(Protocol):
    """The bytes of a plan's tensors, by row. What it gives stays unchanged until the write is over."""

    def small(self, rows: Numbers) -> list[memoryview]: ...

    def large(self, row: int) -> Iterator[memoryview]:
        """In views of VIEW_BYTES."""
        ...


class Regions:
    """Buffers of REGION_BYTES for small tensors, used again once nobody holds a view of them: fresh memory would cost
    several times the copy into it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: deque[mmap.mmap] = deque()

    def take(self, num_bytes: int) -> memoryview:
        """At most REGION_BYTES; the contents are arbitrary."""
        try:
            region = self._free.pop()
        except IndexError:
            region = mmap.mmap(-1, REGION_BYTES)
        lease = np.frombuffer(region, np.uint8, num_bytes)  # every view of the memoryview keeps it alive
        weakref.finalize(lease, self._free.append, region)
        return lease.data


# -- a plan's items as tensors and bytes


@dataclass(frozen=True, slots=True)
class Resolved:
    """A plan's items as the planner gives them. tensors: dense, on the CPU; None for an object. objects: their items,
    in order."""

    tensors: list[torch.Tensor | None]
    objects: list[bytes]

    @classmethod
    def of(cls, items: Sequence[WriteItem], planner: SavePlanner) -> Resolved:
        found = cls([], [])
        for item in items:
            value = planner.resolve_data(item)
            if isinstance(value, io.BytesIO):
                found.objects.append(value.getvalue())
                found.tensors.append(None)
            else:
                found.tensors.append(_dense(value.detach()))
        return found

    def layout(self, items: Sequence[WriteItem], rank: int, max_file_bytes: int) -> ShardLayout:
        """Tied tensors (same memory, same layout) are one item: all are kept alive, so an equal address says so."""
        layouts = [None if tensor is None else Layout.of(tensor) for tensor in self.tensors]
        first: dict[tuple[int, Layout], int] = {}
        same_as = [
            row if tensor is None or layout is None or not tensor.numel() else
            first.setdefault((tensor.data_ptr(), layout), row)
            for row, (tensor, layout) in enumerate(zip(self.tensors, layouts, strict=True))
        ]  # fmt: skip
        indices = [item.index for item in items]
        return ShardLayout(indices, layouts, same_as, rank=rank, max_file_bytes=max_file_bytes)

    def small(self, rows: Numbers) -> list[memoryview]:
        return [self._view(row) for row in rows.tolist()]

    def large(self, row: int) -> Iterator[memoryview]:
        return in_views(self._view(row))

    def _view(self, row: int) -> memoryview:
        tensor = self.tensors[row]
        assert tensor is not None
        return payload_view(tensor)

    def places_in(self, memory: memoryview) -> Places:
        """[start, stop) of each tensor in `memory`, in which all lie; (0, 0) for an object. A row for each item."""
        base, places = address_of(memory), []
        for tensor in self.tensors:
            if tensor is None or not tensor.numel():
                places.append((0, 0))
                continue
            start = tensor.data_ptr() - base
            if not 0 <= start <= len(memory) - tensor.nbytes:
                raise RuntimeError("a staged tensor lies outside of its snapshot's memory: please report it")
            places.append((start, start + tensor.nbytes))
        return np.array(places, np.int64).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class StagedPayloads:
    """Payloads at known places of a staging buffer. wait_for, wait: return when the bytes [start, stop), or all of
    them, are there."""

    memory: memoryview
    places: Places
    wait_for: Callable[[int, int], None]
    wait: Callable[[], None]

    def small(self, rows: Numbers) -> list[memoryview]:
        self.wait()  # they come after the large ones, so there is hardly anything to wait for
        starts, stops = self.places[rows].T.tolist()
        return list(map(self.memory.__getitem__, map(slice, starts, stops)))

    def large(self, row: int) -> Iterator[memoryview]:
        start, stop = self.places[row].tolist()
        for view in in_views(self.memory[start:stop]):
            self.wait_for(start, start + len(view))
            start += len(view)
            yield view


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, resolved, and its memory all payload: staged tensors are already; stock dcp.save gives any tensor."""
    tensor = tensor.cpu().resolve_conj().resolve_neg()
    return tensor if is_dense(tensor) else tensor.contiguous()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one gapless range of memory, each once, in some order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    dims = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
    for stride, size in sorted(dims):
        if stride != expected:
            return False
        expected *= size
    return True


def payload_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a dense CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def in_views(payload: memoryview) -> Iterator[memoryview]:
    return (payload[at : at + VIEW_BYTES] for at in range(0, len(payload), VIEW_BYTES))


# -- writing


def write_items(
    storage: Storage,
    folder: str,
    rank: int,
    items: Sequence[WriteItem],
    planner: SavePlanner,
    regions: Regions | None = None,
) -> tuple[ChunkTable, list[FileRecord]]:
    """Write a rank's part of a save into `folder` and return what the manifest has to say of it; durable on return.

    planner: resolves the items; the tensors it gives must stay unchanged until this returns. OSError: storage failed.
    """
    resolved = Resolved.of(items, planner)
    layout = resolved.layout(items, rank, storage.max_file_bytes)
    return write_shard(storage, folder, layout, resolved, resolved.objects, regions or Regions())


def write_shard(
    storage: Storage,
    folder: str,
    layout: ShardLayout,
    payloads: Payloads,
    objects: Sequence[bytes],
    regions: Regions,
    pause: Callable[[float], None] = lambda seconds: None,
) -> tuple[ChunkTable, list[FileRecord]]:
    """The same for items whose places are known. objects: their items, in the order of `layout.object_rows`.

    pause: called between regions of small tensors and views of large ones, as a sign of life; may wait that long, so
        that a training loop gets its turn.
    """
    placement, files = layout.place([len(data) for data in objects])
    writing = _Writing(payloads, dict(zip(layout.object_rows, objects, strict=True)), regions, pause, len(placement))

    def write(file: ShardFile) -> FileRecord:
        checksum = Checksum()
        storage.write_file(f"{folder}/{file.name}", file.size, writing.views(file, checksum))
        return FileRecord(file.name, file.size, checksum.value)

    if len(files) < 2:
        records = list(map(write, files))
    else:  # one upload session of GCS is sequential: only several files fill the line
        with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="asyncckpt-files") as pool:
            records = list(pool.map(write, files))
    same_as, blocks = layout.same_as, {row: tuple(crcs) for row, crcs in writing.blocks.items()}
    for twin in np.flatnonzero(same_as != np.arange(len(same_as))).tolist():
        if (found := blocks.get(int(same_as[twin]))) is not None:
            blocks[twin] = found
    return ChunkTable(placement, writing.crc32[same_as], writing.item_crc32[same_as], blocks), records


@dataclass(slots=True)
class Checksum:
    """Of a file, as far as it was yielded."""

    value: int = 0


class _Writing:
    """One rank's part of one save; each row is touched by the one thread that writes its file."""

    def __init__(
        self,
        payloads: Payloads,
        objects: dict[int, bytes],
        regions: Regions,
        pause: Callable[[float], None],
        num_rows: int,
    ) -> None:
        self._payloads = payloads
        self._pause = pause
        self._objects = objects
        self._regions = regions
        self.crc32: Checksums = np.zeros(num_rows, np.uint32)
        self.item_crc32: Checksums = np.zeros(num_rows, np.uint32)
        self.blocks: dict[int, list[int]] = {}

    def views(self, file: ShardFile, checksum: Checksum) -> Iterator[memoryview]:
        """The bytes of a file in order; fills in the checksums of its items and its own on the way."""
        position = 0
        for run in file.runs:
            if run.offset > position:
                yield _counted(memoryview(bytes(run.offset - position)), checksum)
            if run.is_large:
                yield from self._large(run, checksum)
            else:
                yield from self._small(run, checksum)
            position = run.offset + len(run.rows) * frame_of(run.layout).num_bytes
        for row, _ in file.objects:
            data = self._objects[row]
            self.crc32[row] = self.item_crc32[row] = crc32(data)
            yield _counted(memoryview(data), checksum)

    def _large(self, run: Run, checksum: Checksum) -> Iterator[memoryview]:
        """An item whose payload goes out as it lies, each view checksummed block by block before it is yielded."""
        (row,), frame, payload = run.rows.tolist(), frame_of(run.layout), PayloadCrc()
        blocks: list[int] = []
        yield _counted(memoryview(frame.head), checksum)
        for view in self._payloads.large(row):
            for at in range(0, len(view), BLOCK_BYTES):
                block = view[at : at + BLOCK_BYTES]
                blocks.append(crc32(block))
                payload.add(blocks[-1], len(block))
            self._pause(0.0)
            yield view
        checksum.value = crc32_combine(checksum.value, payload.value, payload.num_bytes)
        self.crc32[row], self.item_crc32[row] = payload.value, frame.item_crc32(payload.value)
        if len(blocks) > 1:
            self.blocks[row] = blocks
        yield _counted(memoryview(frame.tail_with(payload.value)), checksum)

    def _small(self, run: Run, checksum: Checksum) -> Iterator[memoryview]:
        """Items that are put together in a buffer: in few calls of C, none of which gives up the GIL (REGION_ITEMS says
        why), and their checksum from those of the payloads."""
        frame, count = frame_of(run.layout), len(run.rows)
        start, stop, size = len(frame.head), len(frame.head) + frame.payload_bytes, frame.num_bytes
        payloads = self._payloads.small(run.rows)
        crcs = np.fromiter(map(crc32, payloads), np.uint32, count)
        region = self._regions.take(count * size)
        between = itertools.repeat(frame.tail + frame.head)
        _set(region, range(start, count * size, size), range(stop, count * size, size), payloads)
        _set(region, range(stop, count * size - size, size), range(start + size, count * size, size), between)
        region[:start], region[stop - size :] = frame.head, frame.tail
        for at in frame.crc_at:
            np.ndarray(count, "<u4", region, stop + at, size)[:] = crcs
        items = frame.item_crc32s(crcs)
        self.crc32[run.rows], self.item_crc32[run.rows] = crcs, items
        checksum.value = crc32_combine(checksum.value, crc32_of_equal(items, size), count * size)
        yield region
        self._pause(PAUSE_S_PER_TENSOR * count)


def _set(target: memoryview, starts: range, stops: range, values: Iterable[memoryview | bytes]) -> None:
    """target[start:stop] = value for each, in one call of C."""
    deque(map(target.__setitem__, map(slice, starts, stops), values), maxlen=0)


def _counted(view: memoryview, checksum: Checksum) -> memoryview:
    checksum.value = crc32(view, checksum.value)
    return view
