"""Bytes back into tensors: the items of a load plan as coalesced, verified, parallel ranged reads.

Where a saved box and its target have the same memory layout, storage reads straight into the target and the checksum
is computed there; everything else goes through a buffer. A slice of a large payload is read block by block, so that
what was read is always what was verified. Items of stock steps (no manifest) are verified by the CRC32s of their own
zip. Called by restore.py and by ShardReader (dcp.py); knows nothing of steps, attempts or missing keys.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from asyncckpt.errors import DamagedStepError
from asyncckpt.framing import BLOCK_BYTES, Layout, crc32
from asyncckpt.manifest import Chunk, payload_bytes_of
from asyncckpt.shard import is_dense, payload_view
from asyncckpt.storage import Storage

COALESCE_GAP_BYTES = 64 * 1024
"""Two reads closer than this become one: a request costs more than the bytes between. A guess."""
BATCH_BYTES = 64 * 1024 * 1024
"""Bytes asked of storage in one call; with READ_THREADS it bounds the memory of buffers."""
READ_THREADS = 4


@dataclass(slots=True)
class _Fetch:
    """One chunk's share of the plan: the range [offset, offset + size) of a file, and whom it serves.

    first: where the range starts in the payload, a multiple of BLOCK_BYTES. direct: the target's own memory, if the
    range can be read right into it.
    """

    path: str
    chunk: Chunk | _StorageInfo
    key: str
    offset: int
    size: int
    first: int = 0
    items: list[tuple[ReadItem, torch.Tensor | None]] = field(default_factory=list)
    direct: memoryview | None = None


def read_items(
    storage: Storage,
    folder: str,
    where: Mapping[MetadataIndex, Chunk | _StorageInfo],
    items: Iterable[ReadItem],
    planner: LoadPlanner,
) -> int:
    """Carry out a load plan and return the bytes read. `folder` is what the files' names are relative to.

    Raises DamagedStepError with file, key, offset, expected and found; targets may be partly overwritten by then.
    """
    fetches = list(_fetches(folder, where, items, planner))
    objects: list[tuple[ReadItem, bytes]] = []
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="asyncckpt-read") as pool:
        for found in pool.map(lambda batch: _read_batch(storage, batch), _batches(fetches)):
            objects += found
    for item, data in objects:
        planner.load_bytes(item, io.BytesIO(data))
    for fetch in fetches:
        for item, target in fetch.items:
            if target is not None:
                planner.commit_tensor(item, target)
    return sum(fetch.size for fetch in fetches)


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
        fetch.direct = _same_memory(group[0], chunk.layout)
    return fetch


def _span(item: ReadItem, layout: Layout) -> tuple[int, int]:
    """The elements [start, stop) of the payload's memory between which the wanted box lies."""
    if 0 in item.lengths:
        return 0, 0
    start = sum(offset * stride for offset, stride in zip(item.storage_offsets, layout.stride, strict=True))
    extent = sum((length - 1) * stride for length, stride in zip(item.lengths, layout.stride, strict=True))
    return start, start + extent + 1


def _same_memory(wanted: tuple[ReadItem, torch.Tensor | None], layout: Layout) -> memoryview | None:
    """The target's memory, if the box fills it element by element in the order in which it is stored."""
    item, target = wanted
    if target is None or target.device.type != "cpu" or target.dtype != layout.torch_dtype or not is_dense(target):
        return None
    dims = zip(item.lengths, target.stride(), layout.stride, strict=True)
    if all(length == 1 or stride == stored for length, stride, stored in dims):
        return payload_view(target)
    return None


def _batches(fetches: Sequence[_Fetch]) -> Iterator[list[_Fetch]]:
    """Fetches in file order, about BATCH_BYTES of one file at a time."""
    batch: list[_Fetch] = []
    for fetch in sorted(fetches, key=lambda fetch: (fetch.path, fetch.offset)):
        if batch and (batch[0].path != fetch.path or fetch.offset + fetch.size - batch[0].offset > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(fetch)
    if batch:
        yield batch


def _read_batch(storage: Storage, batch: list[_Fetch]) -> list[tuple[ReadItem, bytes]]:
    """Read, verify and deliver; returns the objects, which the planner takes on the caller's thread."""
    ranges: list[tuple[int, memoryview]] = []
    views: list[tuple[_Fetch, memoryview]] = []
    for run, end in _runs(batch):
        if run[0].direct is not None:
            ranges.append((run[0].offset, run[0].direct))
            views.append((run[0], run[0].direct))
            continue
        buffer = memoryview(bytearray(end - run[0].offset))
        ranges.append((run[0].offset, buffer))
        for fetch in run:
            at = fetch.offset - run[0].offset
            views.append((fetch, buffer[at : at + fetch.size]))
    try:
        storage.read_into(batch[0].path, [(offset, view) for offset, view in ranges if len(view)])
    except (EOFError, FileNotFoundError) as exc:
        keys = ", ".join(repr(fetch.key) for fetch in batch[:3]) + (", ..." if len(batch) > 3 else "")
        raise DamagedStepError(
            f"{batch[0].path} at {storage.url} is missing or too short, it should hold {keys}: {exc}"
        ) from exc
    objects: list[tuple[ReadItem, bytes]] = []
    for fetch, view in views:
        objects += _deliver(storage.url, fetch, view)
    return objects


def _runs(batch: Sequence[_Fetch]) -> Iterator[tuple[list[_Fetch], int]]:
    """Neighbours that are read as one range, with its end; a direct read stands alone unless it is small."""
    run: list[_Fetch] = []
    end = 0
    for fetch in batch:
        if fetch.direct is not None and fetch.size <= COALESCE_GAP_BYTES:
            fetch.direct = None
        alone = fetch.direct is not None
        if run and (alone or run[-1].direct is not None or fetch.offset - end > COALESCE_GAP_BYTES):
            yield run, end
            run, end = [], 0
        run.append(fetch)
        end = max(end, fetch.offset + fetch.size)
    if run:
        yield run, end


def _deliver(url: str, fetch: _Fetch, view: memoryview) -> list[tuple[ReadItem, bytes]]:
    if isinstance(fetch.chunk, _StorageInfo):
        return _deliver_stock(url, fetch, view)
    if fetch.chunk.layout is None:
        _verify(url, fetch, 0, view, fetch.chunk.crc32)
        return [(item, bytes(view)) for item, _ in fetch.items]
    first_block = fetch.first // BLOCK_BYTES
    for number, start in enumerate(range(0, len(view), BLOCK_BYTES)):
        block = view[start : start + BLOCK_BYTES]
        _verify(url, fetch, start, block, fetch.chunk.block_crcs[first_block + number])
    if fetch.direct is None:
        for item, target in fetch.items:
            assert target is not None
            _copy_box(view, fetch.first, fetch.chunk.layout, item, target)
    return []


def _verify(url: str, fetch: _Fetch, start: int, block: memoryview, expected: int) -> None:
    found = crc32(block)
    if found != expected:
        raise DamagedStepError(
            f"{fetch.path} at {url} is damaged: the {len(block)} bytes of {fetch.key!r} at offset "
            f"{fetch.offset + start} have CRC32 {found:08x}, the manifest says {expected:08x}"
        )


def _copy_box(view: memoryview, first: int, layout: Layout, item: ReadItem, target: torch.Tensor) -> None:
    """Copy the wanted box out of the payload bytes [first, first + len(view))."""
    if target.numel() == 0:
        return
    whole = _same_memory((item, target), layout)
    itemsize = layout.torch_dtype.itemsize
    start, stop = _span(item, layout)
    piece = view[start * itemsize - first : stop * itemsize - first]
    if whole is not None and len(whole) == len(piece):
        whole[:] = piece
        return
    # A fresh bytearray: a view into a coalesced read need not be aligned for the dtype.
    source = torch.frombuffer(bytearray(piece), dtype=layout.torch_dtype)
    target.copy_(source.as_strided(tuple(item.lengths), layout.stride))


def check_stock_item(data: bytes) -> str:
    """What is wrong with an item by the CRC32s of its own zip; "" if nothing is."""
    try:
        return zipfile.ZipFile(io.BytesIO(data)).testzip() or ""
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as exc:
        return str(exc) or type(exc).__name__


def _deliver_stock(url: str, fetch: _Fetch, view: memoryview) -> list[tuple[ReadItem, bytes]]:
    """An item of a stock step: its zip's own CRC32s are all there is to verify it by."""
    data = bytes(view)
    if bad := check_stock_item(data):
        raise DamagedStepError(
            f"{fetch.path} at {url} is damaged: the item of {fetch.key!r} at offset {fetch.offset} is no intact "
            f"archive ({bad})"
        )
    if fetch.items[0][0].type == LoadItemType.BYTE_IO:
        return [(item, data) for item, _ in fetch.items]
    saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    for item, target in fetch.items:
        assert target is not None
        box = saved
        for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            box = box.narrow(dim, offset, length)
        if box.shape != target.shape or box.dtype != target.dtype:
            raise DamagedStepError(f"{fetch.path} at {url}: {fetch.key!r} holds {box.dtype} {tuple(box.shape)}")
        target.copy_(box)
    return []
