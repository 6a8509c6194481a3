"""One rank's items as the bytes of its files: where each goes, and the stream of views that storage writes.

Offsets are fixed before a byte is written (framing.py), so payloads go from the staged tensor to storage without a
copy; only frames, small tensors and objects pass through a buffer. Checksums are computed in the same pass. Called by
the background writer (manager.py) and by ShardWriter (dcp.py); decides nothing about steps or commits.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from asyncckpt.framing import BLOCK_BYTES, Layout, PayloadCrc, crc32, crc32_combine, frame_of
from asyncckpt.manifest import Chunk, FileRecord
from asyncckpt.storage import Storage

ALIGNED_PAYLOAD_BYTES = 1024 * 1024
"""From this size on a payload starts on 4 KiB in the file, which O_DIRECT needs; smaller ones are copied anyway."""
PAGE_BYTES = 4096
VIEW_BYTES = 4 * BLOCK_BYTES
"""Payload bytes checksummed ahead of being handed to storage; 16 MiB is also what O_DIRECT and multipart like."""
REGION_BYTES = 1024 * 1024
PARALLEL_FILES = 4


@dataclass(slots=True)
class _Item:
    """An item with its place. `tensor` is None for an object, whose whole item is `data`."""

    index: MetadataIndex
    tensor: torch.Tensor | None
    layout: Layout | None
    data: bytes
    length: int
    file: str = ""
    offset: int = 0
    crc32: int = 0
    item_crc32: int = 0
    blocks: list[int] = field(default_factory=list)
    same_as: _Item | None = None

    @property
    def head_bytes(self) -> int:
        return 0 if self.layout is None else len(frame_of(self.layout).head)

    def chunk(self) -> Chunk:
        source = self.same_as or self
        offsets = None if self.layout is None else tuple(self.index.offset or ())
        blocks = tuple(source.blocks) if len(source.blocks) > 1 else ()
        return Chunk(
            self.index.fqn, offsets, self.layout, self.head_bytes, source.file, source.offset, source.length,
            source.crc32, source.item_crc32, blocks,
        )  # fmt: skip


@dataclass(slots=True)
class _File:
    name: str
    items: list[_Item] = field(default_factory=list)
    size: int = 0
    crc32: int = 0


def write_items(
    storage: Storage, folder: str, rank: int, items: Sequence[WriteItem], planner: SavePlanner
) -> tuple[list[Chunk], list[FileRecord]]:
    """Write a rank's part of a save into `folder` and return what the manifest has to say of it; durable on return.

    planner: resolves the items; the tensors it gives must stay unchanged until this returns. OSError: storage failed.
    """
    resolved = [_resolve(item, planner) for item in items]
    files = _lay_out(resolved, rank, storage.max_file_bytes)

    def write(file: _File) -> None:
        storage.write_file(f"{folder}/{file.name}", file.size, _views(file))

    if len(files) < 2:
        list(map(write, files))
    else:  # one upload session of GCS is sequential: only several files fill the line
        with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="asyncckpt-files") as pool:
            list(pool.map(write, files))
    return [item.chunk() for item in resolved], [FileRecord(file.name, file.size, file.crc32) for file in files]


def _resolve(item: WriteItem, planner: SavePlanner) -> _Item:
    value = planner.resolve_data(item)
    if isinstance(value, io.BytesIO):
        data = value.getvalue()
        return _Item(item.index, None, None, data, len(data))
    tensor = _dense(value.detach())
    layout = Layout.of(tensor)
    return _Item(item.index, tensor, layout, b"", frame_of(layout).num_bytes)


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


def _lay_out(items: Sequence[_Item], rank: int, max_file_bytes: int) -> list[_File]:
    """Give every item its file and offset: tensors in plan order, then objects, whose sizes change from save to save.

    Tied tensors (same memory, same layout) are one item in the file; `items` keeps them alive, so an equal address is
    the same tensor. A rank without items has no file.
    """
    files: list[_File] = []
    seen: dict[tuple[int, Layout], _Item] = {}
    for item in sorted(items, key=lambda item: item.tensor is None):
        if item.tensor is not None and item.layout is not None and item.tensor.numel():
            first = seen.setdefault((item.tensor.data_ptr(), item.layout), item)
            if first is not item:
                item.same_as = first
                continue
        if not files or files[-1].size + item.length > max_file_bytes:
            files.append(_File(f"__{rank}_{len(files)}.distcp"))
        file = files[-1]
        item.file, item.offset = file.name, _aligned(file.size, item)
        file.size = item.offset + item.length
        file.items.append(item)
    return files


def _aligned(position: int, item: _Item) -> int:
    if item.layout is None or frame_of(item.layout).payload_bytes < ALIGNED_PAYLOAD_BYTES:
        return position
    return position + -(position + item.head_bytes) % PAGE_BYTES


def payload_view(tensor: torch.Tensor) -> memoryview:
    """The memory of a dense CPU tensor, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _views(file: _File) -> Iterator[memoryview]:
    """The bytes of a file in order; fills in the checksums of its items and its own on the way."""
    region = bytearray()
    position = 0  # where the region starts in the file
    for item in file.items:
        region += bytes(item.offset - position - len(region))
        if item.tensor is None or item.layout is None:
            item.crc32 = item.item_crc32 = crc32(item.data)
            region += item.data
        elif item.length <= ALIGNED_PAYLOAD_BYTES:
            _append_small(region, item)
        else:
            frame, payload = frame_of(item.layout), PayloadCrc()
            region += frame.head
            yield _flush(file, region)
            yield from _checksummed(item, payload)
            item.crc32, tail = payload.value, frame.tail_with(payload.value)
            file.crc32 = crc32_combine(file.crc32, payload.value, payload.num_bytes)
            item.item_crc32 = crc32(tail, crc32_combine(crc32(frame.head), payload.value, payload.num_bytes))
            position = item.offset + item.length - len(tail)
            region = bytearray(tail)
        if len(region) >= REGION_BYTES:
            position += len(region)
            yield _flush(file, region)
            region = bytearray()
    if region:
        yield _flush(file, region)


def _append_small(region: bytearray, item: _Item) -> None:
    assert item.tensor is not None
    assert item.layout is not None
    frame, start, view = frame_of(item.layout), len(region), payload_view(item.tensor)
    item.crc32 = crc32(view)
    region += frame.head
    region += view
    region += frame.tail_with(item.crc32)
    item.item_crc32 = crc32(memoryview(region)[start:])


def _checksummed(item: _Item, payload: PayloadCrc) -> Iterator[memoryview]:
    """The payload of a large item in views of VIEW_BYTES, each checksummed block by block before it is yielded."""
    assert item.tensor is not None
    whole = payload_view(item.tensor)
    for start in range(0, len(whole), VIEW_BYTES):
        view = whole[start : start + VIEW_BYTES]
        for at in range(0, len(view), BLOCK_BYTES):
            block = view[at : at + BLOCK_BYTES]
            item.blocks.append(crc32(block))
            payload.add(item.blocks[-1], len(block))
        yield view


def _flush(file: _File, region: bytearray) -> memoryview:
    file.crc32 = crc32(region, file.crc32)
    return memoryview(region)
