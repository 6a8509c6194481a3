"""The limits: plain copies, writes and reads of the same bytes, as fast as this machine does them from Python.

Threads hold the GIL only between system calls of SLICE_BYTES, so more than 4 of them or C would gain nothing here.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from .frame import LIMIT, Contender, Round, timed

SLICE_BYTES = 16 << 20  # of a read or write; smaller ones do not reach the disk's rate


def scratch(num_bytes: int) -> mmap.mmap:
    """Warm memory, page-aligned and whole pages, as O_DIRECT needs it."""
    memory = mmap.mmap(-1, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory[:] = b"\1" * len(memory)
    return memory


@contextmanager
def copies(tensors: Sequence[torch.Tensor], memory: mmap.mmap) -> Iterator[Round]:
    """Tensor by tensor to warm memory, by torch."""
    targets, offset = [], 0
    for tensor in tensors:
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        targets.append(flat.view(tensor.shape))
        offset += tensor.nbytes
    pairs = list(zip(targets, tensors, strict=True))

    def one_round(_: int) -> Mapping[str, float]:
        seconds = timed(lambda: [target.copy_(source) for target, source in pairs])
        return {"call": seconds, "stall": seconds}

    yield one_round


@contextmanager
def _writes(memory: mmap.mmap, path: Path, num_threads: int, flags: int) -> Iterator[Round]:
    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
        try:
            _in_slices(memory, num_threads, lambda view, at: os.pwrite(descriptor, view, at))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def one_round(_: int) -> Mapping[str, float]:
        seconds = timed(write)
        path.unlink()
        return {"time": seconds}

    yield one_round


def writers(memory: mmap.mmap, path: Path) -> dict[str, Contender]:
    found: dict[str, Contender] = {"plain write, fsync": (LIMIT, partial(_writes, memory, path, 1, 0))}
    for num_threads in (1, 2, 4):
        name = f"plain O_DIRECT, {num_threads} thread{'s' * (num_threads > 1)}"
        found[name] = (LIMIT, partial(_writes, memory, path, num_threads, os.O_DIRECT))
    return found


@contextmanager
def _reads(memory: mmap.mmap, path: Path, num_threads: int, before: Callable[[Path], None]) -> Iterator[Round]:
    if not path.exists():
        path.write_bytes(memory)

    def read() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _in_slices(memory, num_threads, lambda view, at: os.preadv(descriptor, [view], at))
        finally:
            os.close(descriptor)

    def readinto() -> None:
        with open(path, "rb", buffering=0) as file:
            _in_slices(memory, 1, lambda view, at: file.readinto(view) or 0)

    def one_round(_: int) -> Mapping[str, float]:
        before(path)
        return {"time": timed(read if num_threads else readinto)}

    yield one_round


def readers(memory: mmap.mmap, path: Path, before: Callable[[Path], None]) -> dict[str, Contender]:
    """before: is called with the path, untimed, ahead of each round."""
    found: dict[str, Contender] = {"plain readinto": (LIMIT, partial(_reads, memory, path, 0, before))}
    for num_threads in (1, 2, 4):
        name = f"plain preadv, {num_threads} thread{'s' * (num_threads > 1)}"
        found[name] = (LIMIT, partial(_reads, memory, path, num_threads, before))
    return found


def _in_slices(memory: mmap.mmap, num_threads: int, move: Callable[[memoryview, int], int]) -> None:
    def move_slice(at: int) -> None:
        view = memoryview(memory)[at : at + SLICE_BYTES]
        if move(view, at) != len(view):
            raise OSError(f"a short read or write at {at}")

    if num_threads == 1:
        for at in range(0, len(memory), SLICE_BYTES):
            move_slice(at)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(move_slice, range(0, len(memory), SLICE_BYTES)))


def drop_from_cache(path: Path) -> None:
    """Take a file, or every file below a folder, out of the page cache. OSError if it does not go (tmpfs)."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if os.fstat(descriptor).st_size and _is_cached(descriptor):
                raise OSError(f"{file} stays in the page cache")
        finally:
            os.close(descriptor)


def _is_cached(descriptor: int) -> bool:
    """Whether a tenth of its pages or more are in memory. By mincore: a read with RWF_NOWAIT starts to read ahead."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as view:
        pages = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        start = (ctypes.c_char * len(view)).from_buffer(view)
        failed = ctypes.CDLL(None, use_errno=True).mincore(start, ctypes.c_size_t(len(view)), pages)
        number = ctypes.get_errno()
        del start
    if failed:
        raise OSError(number, os.strerror(number))
    return sum(page & 1 for page in pages) > len(pages) // 10
