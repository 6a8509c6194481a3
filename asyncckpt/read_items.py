"""The items of a DCP load plan: the boxes of payloads it asks for, and items of stock steps.

Where a saved box and its target have the same memory layout it is read straight into the target; everything else goes
through a buffer. A slice of a large payload is read block by block, so that what was read is always what was verified.
Items of stock steps (no manifest) are verified by the CRC32s of their own zip. Called by restore.py, for what
read_whole.py does not take, and by ShardReader (dcp.py); knows nothing of steps, attempts or missing keys.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from asyncckpt.chunks import Chunk, payload_bytes_of
from asyncckpt.errors import DamagedStepError
from asyncckpt.framing import BLOCK_BYTES, Layout
from asyncckpt.objects import load_object
from asyncckpt.read import (
    COALESCE_GAP_BYTES,
    RUN_BYTES,
    Read,
    carry_out,
    direct_reads,
    has_strides,
    payload_tensor,
    verify,
)
from asyncckpt.shard import payload_view
from asyncckpt.storage import Storage

_MAGIC = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
_LEGACY_START = b"\x80\x02\x8a\x0a" + _MAGIC + b"."  # its pickle, protocol 2


@dataclass(slots=True)
class _Fetch:
    """One chunk's share of the plan: the range [offset, offset + size) of a file, and whom it serves.

    first: where the range starts in the payload, a multiple of BLOCK_BYTES. direct: the target, if the range can be
    read right into it. is_unverified: it was read, and has no checksum.
    """

    path: str
    chunk: Chunk | _StorageInfo
    key: str
    offset: int
    size: int
    first: int = 0
    items: list[tuple[ReadItem, torch.Tensor | None]] = field(default_factory=list)
    direct: torch.Tensor | None = None
    is_unverified: bool = False


def read_items(
    storage: Storage,
    folder: str,
    where: Mapping[MetadataIndex, Chunk | _StorageInfo],
    items: Iterable[ReadItem],
    planner: LoadPlanner,
    unverified: list[str] | None = None,
) -> int:
    """Carry out a load plan and return the bytes read. `folder` is what the files' names are relative to.

    unverified: gets the keys of those items of a stock step that carry no checksum.
    Raises DamagedStepError with file, key, offset, expected and found; targets may be partly overwritten by then.
    """
    fetches = list(_fetches(folder, where, items, planner))
    objects: list[tuple[ReadItem, bytes]] = []
    num_bytes = carry_out(storage, _reads(storage.url, fetches, objects))
    for item, data in objects:
        planner.load_bytes(item, io.BytesIO(data))
    for fetch in fetches:
        for item, target in fetch.items:
            if target is not None:
                planner.commit_tensor(item, target)
    if unverified is not None:
        unverified += (fetch.key for fetch in fetches if fetch.is_unverified)
    return num_bytes


def _fetches(
    folder: str,
    where: Mapping[MetadataIndex, Chunk | _StorageInfo],
    items: Iterable[ReadItem],
    planner: LoadPlanner,
) -> Iterator[_Fetch]:
    wanted: dict[MetadataIndex, list[tuple[ReadItem, torch.Tensor | None]]] = {}
    for item in items:
        target = None if item.type == LoadItemType.BYTE_IO else planner.resolve_tensor(item).detach()
        wanted.setdefault(item.storage_index, []).append((item, target))
    for index, group in wanted.items():
        chunk = where[index]
        if isinstance(chunk, Chunk):
            fetch = _fetch(f"{folder}/{chunk.file}", chunk, group)
        else:
            path = f"{folder}/{chunk.relative_path}" if folder else chunk.relative_path
            fetch = _Fetch(path, chunk, index.fqn, chunk.offset, chunk.length, items=group)
        yield fetch


def _fetch(path: str, chunk: Chunk, group: list[tuple[ReadItem, torch.Tensor | None]]) -> _Fetch:
    if chunk.layout is None:
        return _Fetch(path, chunk, chunk.key, chunk.offset, chunk.length, items=group)
    payload_bytes, itemsize = payload_bytes_of(chunk.layout), chunk.layout.torch_dtype.itemsize
    spans = [_span(item, chunk.layout) for item, _ in group]
    start, stop = min(span[0] for span in spans) * itemsize, max(span[1] for span in spans) * itemsize
    first = start // BLOCK_BYTES * BLOCK_BYTES
    last = min(payload_bytes, -(-stop // BLOCK_BYTES) * BLOCK_BYTES)
    fetch = _Fetch(path, chunk, chunk.key, chunk.payload_offset + first, max(0, last - first), first, group)
    if len(group) == 1 and (first, last) == (start, stop):
        fetch.direct = _same_memory(*group[0], chunk.layout)
    return fetch


def _span(item: ReadItem, layout: Layout) -> tuple[int, int]:
    """The elements [start, stop) of the payload's memory between which the wanted box lies."""
    if 0 in item.lengths:
        return 0, 0
    start = sum(offset * stride for offset, stride in zip(item.storage_offsets, layout.stride, strict=True))
    extent = sum((length - 1) * stride for length, stride in zip(item.lengths, layout.stride, strict=True))
    return start, start + extent + 1


def _same_memory(item: ReadItem, target: torch.Tensor | None, layout: Layout) -> torch.Tensor | None:
    """The target, if the box fills its memory element by element in the order in which it is stored."""
    if target is None or not target.is_cpu or target.dtype != layout.torch_dtype or target.shape != item.lengths:
        return None
    return target if has_strides(target, layout) and not target.is_neg() and not target.is_conj() else None


def _reads(url: str, fetches: Iterable[_Fetch], objects: list[tuple[ReadItem, bytes]]) -> Iterator[Read]:
    in_order = sorted((fetch for fetch in fetches if fetch.size), key=lambda fetch: (fetch.path, fetch.offset))
    for path, group in groupby(in_order, key=lambda fetch: fetch.path):
        for run in _runs(group):
            fetch = run[0]
            if fetch.direct is None or not isinstance(fetch.chunk, Chunk):
                yield _read_of(url, run, objects)
            else:
                first_block, num_blocks = fetch.first // BLOCK_BYTES, -(-fetch.size // BLOCK_BYTES)
                crcs = fetch.chunk.block_crcs[first_block : first_block + num_blocks]
                yield from direct_reads(url, path, fetch.key, fetch.offset, fetch.direct, crcs)


def _runs(fetches: Iterable[_Fetch]) -> Iterator[list[_Fetch]]:
    """Neighbours of one file that are read as one range; a direct read stands alone unless it is small."""
    run: list[_Fetch] = []
    start = end = 0
    for fetch in fetches:
        if fetch.direct is not None and fetch.size <= COALESCE_GAP_BYTES:
            fetch.direct = None
        alone = fetch.direct is not None or (run and run[-1].direct is not None)
        stop = fetch.offset + fetch.size
        if run and (alone or fetch.offset - end > COALESCE_GAP_BYTES or stop - start > RUN_BYTES):
            yield run
            run = []
        if not run:
            start = end = fetch.offset
        run.append(fetch)
        end = max(end, stop)
    if run:
        yield run


def _read_of(url: str, run: Sequence[_Fetch], objects: list[tuple[ReadItem, bytes]]) -> Read:
    start = run[0].offset
    size = max(fetch.offset + fetch.size for fetch in run) - start

    def take(view: memoryview) -> None:
        for fetch in run:
            _deliver(url, fetch, view[fetch.offset - start : fetch.offset - start + fetch.size], objects)

    return Read(run[0].path, start, size, take, [fetch.key for fetch in run[:4]])


def _deliver(url: str, fetch: _Fetch, view: memoryview, objects: list[tuple[ReadItem, bytes]]) -> None:
    """Verify and copy; objects are kept for the planner, which takes them on the caller's thread."""
    if isinstance(fetch.chunk, _StorageInfo):
        objects += _deliver_stock(url, fetch, view)
    elif fetch.chunk.layout is None:
        verify(url, fetch.path, fetch.key, fetch.offset, fetch.chunk.crc32, view)
        objects += [(item, bytes(view)) for item, _ in fetch.items]
    else:
        crcs = fetch.chunk.block_crcs[fetch.first // BLOCK_BYTES :]
        for start, crc in zip(range(0, len(view), BLOCK_BYTES), crcs, strict=False):
            verify(url, fetch.path, fetch.key, fetch.offset + start, crc, view[start : start + BLOCK_BYTES])
        for item, target in fetch.items:
            assert target is not None
            _copy_box(view, fetch.first, fetch.chunk.layout, item, target)


def _copy_box(view: memoryview, first: int, layout: Layout, item: ReadItem, target: torch.Tensor) -> None:
    """Copy the wanted box out of the payload bytes [first, first + len(view))."""
    if target.numel() == 0:
        return
    whole = _same_memory(item, target, layout)
    itemsize = layout.torch_dtype.itemsize
    start, stop = _span(item, layout)
    piece = view[start * itemsize - first : stop * itemsize - first]
    if whole is not None and whole.nbytes == len(piece):
        payload_view(whole)[:] = piece
        return
    target.copy_(payload_tensor(piece, layout, item.lengths))


def check_stock_item(item: io.BufferedReader | io.BytesIO) -> bool:
    """Whether an item of a stock step has checksums, which are then right: the CRC32s of its own zip.

    It has none if it was saved with `torch.serialization.set_crc32_options(False)`, which leaves zeros. Raises
    ValueError: it differs from its checksums, or is in a format that is not read here.
    """
    start = item.read(len(_LEGACY_START))
    if start == _LEGACY_START:
        raise ValueError("it is in torch.save's format before 1.6; load it with torch and save it again")
    if start[8:9] == b"{":
        raise ValueError("it is in safetensors, which torch's FileSystemReader does not read either")
    try:
        with zipfile.ZipFile(item) as archive:
            records = [record for record in archive.infolist() if record.file_size]
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise ValueError("a record is compressed, and torch compresses none")
            if not any(record.CRC for record in records):
                return False
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as exc:
        raise ValueError(str(exc) or type(exc).__name__) from exc
    if bad:
        raise ValueError(f"its record {bad} differs from its CRC32")
    return True


def _deliver_stock(url: str, fetch: _Fetch, view: memoryview) -> list[tuple[ReadItem, bytes]]:
    """An item of a stock step: its zip's own CRC32s are all there is to verify it by."""
    data = bytes(view)
    try:
        fetch.is_unverified = not check_stock_item(io.BytesIO(data))
        if fetch.items[0][0].type == LoadItemType.BYTE_IO:
            return [(item, data) for item, _ in fetch.items]
        saved = load_object(data, (), fetch.key)
    except ValueError as exc:
        raise DamagedStepError(
            f"{fetch.path} at {url} is damaged: the item of {fetch.key!r} at offset {fetch.offset} is no intact "
            f"archive ({exc})"
        ) from exc
    for item, target in fetch.items:
        assert target is not None
        box = _box_of(saved, item)
        if box is None or box.shape != target.shape or box.dtype != target.dtype:
            raise DamagedStepError(
                f"{fetch.path} at {url} is damaged: the item of {fetch.key!r} at offset {fetch.offset} holds "
                f"{_describe(saved)}, where the index says {target.dtype} {tuple(target.shape)}"
            )
        target.copy_(box)
    return []


def _box_of(saved: object, item: ReadItem) -> torch.Tensor | None:
    """The wanted part of a stock tensor; None: it has none."""
    if not isinstance(saved, torch.Tensor) or saved.dim() != len(item.lengths):
        return None
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        if offset + length > saved.size(dim):
            return None
        saved = saved.narrow(dim, offset, length)
    return saved


def _describe(saved: Any) -> str:
    return f"{saved.dtype} {tuple(saved.shape)}" if isinstance(saved, torch.Tensor) else type(saved).__name__
