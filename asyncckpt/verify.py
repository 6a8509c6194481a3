"""Read every byte of a step and compare it with its checksums; nothing is loaded or run, and nothing is written.

All files are read in pieces, some at a time, into a few buffers. Only a file that differs is looked at once more, to
tell which of its items are hit. What is in the folder besides what the manifest names (the data of a save that died)
is not looked at: nothing reads it, and the next commit removes it. Called by restorer.py, fetch.py
and cli/verify.py.
"""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from torch.distributed.checkpoint.filesystem import _StorageInfo

from asyncckpt.chunks import Chunk, ChunkTable, payload_bytes_of
from asyncckpt.errors import UNCHANGED, DamagedStepError
from asyncckpt.framing import BLOCK_BYTES, crc32, crc32_combine
from asyncckpt.manifest import FileRecord, Manifest
from asyncckpt.parallel import for_each
from asyncckpt.read import new_buffer
from asyncckpt.read_items import check_stock_item
from asyncckpt.restore import OpenStep, is_inside, join, open_step, wrong_size
from asyncckpt.steps import DCP_METADATA
from asyncckpt.storage import Storage

PIECE_BYTES = 8 << 20
READ_THREADS = 8
"""With PIECE_BYTES the memory that a call takes, 64 MiB; an object store has as many requests in flight."""
MAX_NAMED = 20
"""Of the places in one file that an error names; a file that is damaged all over may have a million."""

Tell = Callable[[int], None]
"""Hears, on any thread, of bytes that were read."""
Take = Callable[["FileCheck", int, memoryview], None]
"""Is given, on any thread, the bytes of a file from an offset on, before they are known to be right."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """checksums: "manifest": every byte was compared; "zip": a foreign step, whose items carry their own CRC32s while
    its `.metadata` carries none; "none": a foreign step with items that carry none, which were only found to be there.
    """

    num_files: int
    num_bytes: int
    seconds: float
    checksums: str


def verify_step(storage: Storage, folder: str, tell: Tell = lambda num_bytes: None) -> VerifyReport:
    """Raises DamagedStepError that lists the differences: file, key, offset, expected and found; StepNotFoundError."""
    report, problems = find_damage(storage, folder, tell)
    if problems:
        raise DamagedStepError(
            f"the checkpoint at {join(storage.url, folder)} is damaged\n  " + "\n  ".join(problems),
            url=storage.url,
            outcome=UNCHANGED,
        )
    return report


def find_damage(
    storage: Storage, folder: str, tell: Tell = lambda num_bytes: None
) -> tuple[VerifyReport, Sequence[str]]:
    """(what was read, what is wrong with it). DamagedStepError: the index is unreadable; StepNotFoundError."""
    started = time.perf_counter()
    while True:
        step = open_step(storage, folder)
        if step.manifest is None:
            num_files, num_bytes, checksums, problems = _verify_foreign(storage, step, tell)
        else:
            problems = list(file_problems(storage, step, step.manifest, _all_files(step, step.manifest), tell))
            num_files = len(step.manifest.files) + 2
            num_bytes, checksums = step.manifest.num_bytes + step.manifest.dcp_metadata_size, "manifest"
        # A step that another run saves again or deletes meanwhile loses its files after its manifest.
        if not problems or open_step(storage, folder).sequence == step.sequence:
            return VerifyReport(num_files, num_bytes, time.perf_counter() - started, checksums), problems


@dataclass(slots=True)
class FileCheck:
    """A file to be read. blocks: the CRC32 of each BLOCK_BYTES, in a list made when the file was found to be of that
    length. gone: why it could not be read to its end."""

    path: str
    record: FileRecord
    blocks: list[int] = field(default_factory=list)
    gone: str = ""

    @property
    def crc32(self) -> int:
        value, size = 0, self.record.size
        for start, block in zip(range(0, size, BLOCK_BYTES), self.blocks, strict=True):
            value = crc32_combine(value, block, min(BLOCK_BYTES, size - start))
        return value


def _all_files(step: OpenStep, manifest: Manifest) -> list[FileCheck]:
    """The first is for stock readers alone."""
    stock = FileRecord(DCP_METADATA, manifest.dcp_metadata_size, manifest.dcp_metadata_crc32)
    return [FileCheck(join(step.folder, stock.name), stock), *data_files(step, manifest)]


def data_files(step: OpenStep, manifest: Manifest) -> list[FileCheck]:
    """What a restore may read."""
    return [FileCheck(join(step.data_folder, file.name), file) for file in manifest.files]


def file_problems(
    storage: Storage,
    step: OpenStep,
    manifest: Manifest,
    files: Sequence[FileCheck],
    tell: Tell = lambda num_bytes: None,
    take: Take = lambda file, offset, view: None,
) -> Iterator[str]:
    """What is wrong with files that a manifest names."""
    sizes = storage.list_files(step.folder)
    present: list[FileCheck] = []
    for file in files:
        if wrong := wrong_size(file.path, file.record.size, sizes):
            yield wrong
        else:
            file.blocks = [0] * -(-file.record.size // BLOCK_BYTES)
            present.append(file)
    _read_all(storage, present, tell, take)
    for file in present:
        if file.gone:
            yield f"{file.path} went away or was cut short while it was read: {file.gone}"
        elif file.crc32 != file.record.crc32:
            yield f"{file.path} has CRC32 {file.crc32:08x}, the manifest says {file.record.crc32:08x}"
            if file.path == join(step.folder, DCP_METADATA):
                yield "  it is for stock readers alone: asyncckpt restores this step without it"
            else:
                yield from _places(storage, file, manifest.chunks)


def _read_all(storage: Storage, files: Iterable[FileCheck], tell: Tell, take: Take) -> None:
    spare: deque[memoryview] = deque()

    def read(piece: tuple[FileCheck, int]) -> None:
        file, start = piece
        if file.gone:
            return
        buffer = spare.pop() if spare else new_buffer(PIECE_BYTES, None)
        view = buffer[: min(PIECE_BYTES, file.record.size - start)]
        blocks = [view[at : at + BLOCK_BYTES] for at in range(0, len(view), BLOCK_BYTES)]
        first = start // BLOCK_BYTES

        def check(index: int) -> None:
            file.blocks[first + index] = crc32(blocks[index])

        try:
            ranges = [(start + number * BLOCK_BYTES, block) for number, block in enumerate(blocks)]
            storage.read_into(file.path, ranges, check)
        except (EOFError, FileNotFoundError) as exc:
            file.gone = str(exc)
        else:
            take(file, start, view)
        spare.append(buffer)
        tell(len(view))

    for_each(read, ((file, at) for file in files for at in range(0, file.record.size, PIECE_BYTES)), READ_THREADS)


def _places(storage: Storage, file: FileCheck, chunks: ChunkTable) -> Iterator[str]:
    """Where a file differs from what was written: the first few places."""
    try:
        places = list(islice(_all_places(storage, file, chunks), MAX_NAMED + 1))
    except (EOFError, FileNotFoundError) as exc:
        places = [f"and then it went away or was cut short: {exc}"]
    for place in places[:MAX_NAMED]:
        yield f"  {place}"
    if len(places) > MAX_NAMED:
        yield "  and more"
    if not places:
        yield "  read once more it does not differ: not the file may be at fault, but memory or the way here"


def _all_places(storage: Storage, file: FileCheck, chunks: ChunkTable) -> Iterator[str]:
    """In the order of the file."""
    place = chunks.placement
    if file.record.name not in place.files:
        if _crc32_of(storage, file.path, 0, file.record.size) != file.record.crc32:
            yield "it was given as a file, which has no parts whose checksums would tell where"
        return
    numbers = np.flatnonzero(place.file == place.files.index(file.record.name))
    end = 0
    for number in numbers[np.argsort(place.offset[numbers], kind="stable")].tolist():
        chunk = chunks[number]
        yield from _gap(storage, file.path, end, chunk.offset)
        yield from _item(storage, file.path, chunk)
        end = max(end, chunk.offset + chunk.length)
    yield from _gap(storage, file.path, end, file.record.size)


def _item(storage: Storage, path: str, chunk: Chunk) -> Iterator[str]:
    """The blocks of its payload that differ, or else its framing."""
    payload_bytes = chunk.length if chunk.layout is None else payload_bytes_of(chunk.layout)
    item = _crc32_of(storage, path, chunk.offset, chunk.length)
    if item == chunk.item_crc32:
        return
    is_payload = False
    for at, expected in zip(range(0, payload_bytes, BLOCK_BYTES), chunk.block_crcs, strict=False):
        offset, size = chunk.payload_offset + at, min(BLOCK_BYTES, payload_bytes - at)
        if (found := _crc32_of(storage, path, offset, size)) != expected:
            is_payload = True
            yield (
                f"{chunk.key!r}: the {size} bytes at offset {offset} have CRC32 {found:08x}, the manifest says "
                f"{expected:08x}"
            )
    if not is_payload:
        yield (
            f"{chunk.key!r}: its item at offset {chunk.offset}, {chunk.length} bytes, has CRC32 {item:08x}, the "
            f"manifest says {chunk.item_crc32:08x}; the payload is whole, the bytes around it are not"
        )


def _gap(storage: Storage, path: str, start: int, stop: int) -> Iterator[str]:
    """Between items there are zeros."""
    for offset, view in _pieces(storage, path, start, stop - start):
        if hit := np.flatnonzero(np.frombuffer(view, np.uint8))[:1].tolist():
            yield f"no item: the byte at offset {offset + hit[0]} is {view[hit[0]]:#04x}, it was 0x00"
            return


def _crc32_of(storage: Storage, path: str, start: int, size: int) -> int:
    value = 0
    for _, view in _pieces(storage, path, start, size):
        value = crc32(view, value)
    return value


def _pieces(storage: Storage, path: str, start: int, size: int) -> Iterator[tuple[int, memoryview]]:
    """(offset, bytes) of a range; the next piece takes the place of the one before."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(0, size))))
    for at in range(0, size, PIECE_BYTES):
        view = buffer[: min(PIECE_BYTES, size - at)]
        storage.read_into(path, [(start + at, view)])
        yield start + at, view


def _verify_foreign(storage: Storage, step: OpenStep, tell: Tell) -> tuple[int, int, str, list[str]]:
    """(files, bytes, which checksums, what is wrong). Item by item, as only they have checksums."""
    sizes, items, problems = storage.list_files(step.folder), list[tuple[str, str, _StorageInfo]](), list[str]()
    for index, info in step.where.items():
        assert isinstance(info, _StorageInfo)
        path = join(step.data_folder, info.relative_path)
        if is_inside(info, path, sizes):
            items.append((path, index.fqn, info))
        else:
            problems.append(
                f"{path} lacks the item {index.fqn!r} at offset {info.offset}, {info.length} bytes: it has "
                f"{sizes.get(path, 'none at all')}"
            )
    has_crcs: list[bool] = []

    def check(item: tuple[str, str, _StorageInfo]) -> None:
        path, key, info = item
        try:
            has_crcs.append(check_stock_item(_open_item(storage, path, info)))
        except ValueError as exc:
            problems.append(f"{path}: the item {key!r} at offset {info.offset} is no intact archive ({exc})")
        except (EOFError, FileNotFoundError) as exc:
            problems.append(f"{path} lacks the item {key!r} at offset {info.offset}: {exc}")
        tell(info.length)

    for_each(check, items, READ_THREADS)
    num_bytes = sum(info.length for _, _, info in items)
    return len({path for path, _, _ in items}), num_bytes, "zip" if all(has_crcs) else "none", sorted(problems)


def _open_item(storage: Storage, path: str, info: _StorageInfo) -> io.BufferedReader:
    """An item as a file, of which one piece at a time is in memory."""
    return io.BufferedReader(RangeFile(storage, path, info.offset, info.length), min(PIECE_BYTES, max(1, info.length)))


class RangeFile(io.RawIOBase):
    """A range of a file in storage, as a file to be read."""

    def __init__(self, storage: Storage, path: str, start: int, size: int) -> None:
        self._storage, self._path, self._start, self._size, self._at = storage, path, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at < 0:
            raise ValueError(f"position {at} is before the item")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        if len(view):
            self._storage.read_into(self._path, [(self._start + self._at, view)])
        self._at += len(view)
        return len(view)
