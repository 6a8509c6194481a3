"""Ranges of a step's files, read in parallel, each verified and delivered by whoever filled it.

Says how much is asked of storage at a time and which memory it goes to; what the bytes are is known to the `take` of
each `Read`: read_whole.py makes those of whole tensors and objects, read_items.py those of a DCP load plan.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from asyncckpt.chunks import Numbers
from asyncckpt.errors import DamagedStepError, RestoreError
from asyncckpt.framing import BLOCK_BYTES, Layout, crc32
from asyncckpt.parallel import for_each
from asyncckpt.shard import is_dense, payload_view
from asyncckpt.storage import Storage

COALESCE_GAP_BYTES = 64 * 1024
"""Two reads closer than this become one: a request costs more than the bytes between. A guess."""
RUN_BYTES = 4 * 1024 * 1024
"""Of one read of small neighbours, which stay in the cache until they are verified and copied."""
BATCH_BYTES = 16 * 1024 * 1024
"""Of buffers lent to one call of storage; with READ_THREADS it bounds their memory."""
READ_THREADS = 4
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One range of a file, not empty. take: called with its bytes on some thread, several at once; verifies, delivers.

    view: where the bytes go; None: into a buffer, which is `take`'s until it returns or, if `device` is an accelerator
    that `take` copies it to without waiting, until that copy is done. keys: whose bytes these are, or the first few.
    """

    path: str
    offset: int
    size: int
    take: Callable[[memoryview], None]
    keys: Sequence[str]
    view: memoryview | None = None
    device: torch.device | None = None


def carry_out(storage: Storage, reads: Iterable[Read]) -> int:
    """The bytes read. Returns, or raises, when no thread is left that writes into a view or calls a `take`.

    Raises what a `take` raises; DamagedStepError for a file that is missing or too short; OSError.
    """
    reads = list(reads)
    devices = {read.device for read in reads if read.device is not None and read.device.type != "cpu"}
    ends = threading.Event()
    spare: deque[memoryview] = deque()  # buffers: touching fresh memory costs more than filling it
    synchronize(devices)  # kernels on any stream may still use what is about to be overwritten

    def read_one(batch: list[Read]) -> None:
        buffer = spare.pop() if spare else memoryview(b"")
        needed = _buffer_bytes(batch)
        if needed > len(buffer):
            buffer = new_buffer(needed, next(iter(devices), None))
        read_batch(storage, batch, buffer, ends)
        synchronize(devices)
        spare.append(buffer)

    for_each(read_one, _batches(reads), READ_THREADS, ends)
    return sum(read.size for read in reads)


def starts_run(file: Numbers, start: Numbers, size: Numbers) -> npt.NDArray[np.bool_]:
    """Of small payloads in the order of the files: which do not come in one read with the one before."""
    starts = np.ones(len(file), np.bool_)
    starts[1:] = (
        (file[1:] != file[:-1])
        | (start[1:] - (start + size)[:-1] > COALESCE_GAP_BYTES)
        | (start[1:] // RUN_BYTES != start[:-1] // RUN_BYTES)
    )
    return starts


def direct_reads(
    url: str, path: str, key: str, offset: int, tensor: torch.Tensor, crcs: Sequence[int]
) -> Iterator[Read]:
    """The payload at `offset`, or whole blocks of one, right into the memory of a dense CPU tensor: a read for each
    block, which has a checksum."""
    memory = payload_view(tensor)
    for at, crc in zip(range(0, len(memory), BLOCK_BYTES), crcs, strict=True):
        view = memory[at : at + BLOCK_BYTES]
        yield Read(path, offset + at, len(view), partial(verify, url, path, key, offset + at, crc), (key,), view)


def upload_reads(
    url: str, path: str, key: str, offset: int, tensor: torch.Tensor, crcs: Sequence[int]
) -> Iterator[Read]:
    """The same into a tensor on an accelerator, through page-locked buffers."""
    memory = flat_bytes(tensor)
    for at, crc in zip(range(0, len(memory), BLOCK_BYTES), crcs, strict=True):
        block = memory[at : at + BLOCK_BYTES]
        take = partial(_upload, partial(verify, url, path, key, offset + at, crc), block)
        yield Read(path, offset + at, len(block), take, (key,), device=tensor.device)


def _upload(check: Callable[[memoryview], None], target: torch.Tensor, view: memoryview) -> None:
    check(view)
    target.copy_(torch.frombuffer(view, dtype=torch.uint8), non_blocking=True)


def has_strides(tensor: torch.Tensor, layout: Layout) -> bool:
    """Whether the tensor, of the layout's shape, fills its memory element by element in the order in which it is
    stored."""
    dims = zip(tensor.shape, tensor.stride(), layout.stride, strict=True)
    return all(size == 1 or stride == stored for size, stride, stored in dims) and is_dense(tensor)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor as bytes, on its device."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def payload_tensor(payload: memoryview, layout: Layout, shape: Sequence[int]) -> torch.Tensor:
    """A copy of the payload of a box, or of what lies between its ends in a larger one's; the place in a read need not
    be aligned for the dtype. layout: of what it is a part of."""
    return torch.frombuffer(bytearray(payload), dtype=layout.torch_dtype).as_strided(tuple(shape), layout.stride)


def verify(url: str, path: str, key: str, offset: int, expected: int, view: memoryview) -> None:
    found = crc32(view)
    if found != expected:
        raise DamagedStepError(
            f"{path} at {url} is damaged: the {len(view)} bytes of {key!r} at offset {offset} have CRC32 "
            f"{found:08x}, the manifest says {expected:08x}"
        )


def _batches(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """What one call of storage is asked for, in file order: all of a file that needs no buffers, which storage reads in
    parallel by itself; else about BATCH_BYTES."""
    in_order = sorted(reads, key=lambda read: (read.path, read.view is None, read.offset))
    for (_, is_buffered), group in groupby(in_order, key=lambda read: (read.path, read.view is None)):
        if not is_buffered:
            yield list(group)
            continue
        batch: list[Read] = []
        room = BATCH_BYTES
        for read in group:
            if batch and read.size > room:
                yield batch
                batch, room = [], BATCH_BYTES
            batch.append(read)
            room -= read.size
        yield batch


def _buffer_bytes(batch: Sequence[Read]) -> int:
    return sum(read.size + 2 * PAGE_BYTES for read in batch if read.view is None)


def new_buffer(size: int, device: torch.device | None) -> memoryview:
    """Memory that starts on a page; page-locked, from torch's own pool, where it is for an accelerator."""
    # The current device is per thread; without it each rank opens a context on GPU 0.
    with torch.accelerator.device_index(device.index) if device else nullcontext():
        memory = torch.empty(size + PAGE_BYTES, dtype=torch.uint8, pin_memory=device is not None)
    start = -memory.data_ptr() % PAGE_BYTES
    return payload_view(memory[start : start + size])


def read_batch(storage: Storage, batch: Sequence[Read], buffer: memoryview, ends: threading.Event) -> None:
    views: list[memoryview] = []
    at = 0
    for read in batch:
        if read.view is None:
            # As far from the start of a page as in the file: with an address a few bytes further the kernel's copy out
            # of the page cache was seen to be four times slower (AMD EPYC, "rep movsb").
            at += (read.offset - at) % PAGE_BYTES
            views.append(buffer[at : at + read.size])
            at += read.size
        else:
            views.append(read.view)
    ranges = [(read.offset, view) for read, view in zip(batch, views, strict=True)]

    def take(index: int) -> None:
        if ends.is_set():  # a file may take minutes
            raise RestoreError(f"reading {batch[0].path} at {storage.url} ended early: another read failed")
        batch[index].take(views[index])

    try:
        storage.read_into(batch[0].path, ranges, take)
    except (EOFError, FileNotFoundError) as exc:
        keys = list(dict.fromkeys(key for read in batch for key in read.keys))
        named = ", ".join(map(repr, keys[:3])) + (", ..." if len(keys) > 3 else "")
        raise DamagedStepError(
            f"{batch[0].path} at {storage.url} is missing or too short, it should hold {named}: {exc}"
        ) from exc


def synchronize(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)
