"""The bytes of one open file: written past the page cache from memory as it lies, read in parallel into memory.

Knows descriptors and offsets, nothing of names, folders or checkpoints; storage_local.py calls it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import numpy as np

# O_DIRECT writes past the page cache. On the machine this was measured on (ext4 on virtio, 1 GiB, 2 cores) that is 1.8x
# the rate and an eighth of the CPU of buffered writes plus fsync; 2 to 4 threads of 16 MiB reach the limit of the disk,
# and neither posix_fallocate nor a first ftruncate adds to it.
ALIGNMENT = 4096  # of address, file offset and length; the largest that filesystems and disks in use ask for
SLICE_BYTES = 16 << 20
BLOCK_BYTES = 4 << 20
DIRECT_MIN_BYTES = 1 << 20  # a guess: below, a copy into a block is cheaper than a write of its own
MAX_IOV = 1024  # IOV_MAX of Linux
O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)


class FileWriter:
    """Writes a file front to back from views, past the page cache, several writes in flight.

    Views whose memory lies on 4 KiB where the file position does are written from where they are; all else is gathered
    in blocks that do. The end is padded to 4 KiB and cut off again. Leaving the context ends every write in flight.
    """

    def __init__(self, descriptor: int, size: int, num_threads: int, what: str) -> None:
        self._descriptor = descriptor
        self._size = size
        self._what = what
        self._position = 0  # in the file, of the next byte
        self._filled = 0  # bytes of `_block` in use; its end is at `_position`
        self._block_bytes = min(BLOCK_BYTES, -(-size // ALIGNMENT) * ALIGNMENT) or ALIGNMENT
        self._free_blocks = deque[memoryview]()
        self._num_blocks = 0
        self._max_blocks = num_threads + 1
        self._block = self._next_block()
        self._pool = ThreadPoolExecutor(num_threads)
        self._in_flight = deque[Future[None]]()
        self._max_in_flight = 2 * num_threads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, view: memoryview) -> None:
        """The next bytes of the file; written some time before `finish` returns."""
        length = len(view)
        if self._position + length > self._size:
            raise ValueError(f"the views hold more than the {self._size} bytes that were announced")
        if length < DIRECT_MIN_BYTES:
            self._gather(view)
            return
        head = -self._position % ALIGNMENT
        if (_address(view) + head) % ALIGNMENT:
            self._gather(view)
            return
        self._gather(view[:head])
        self._flush()
        tail = head + (length - head) // ALIGNMENT * ALIGNMENT
        for start in range(head, tail, SLICE_BYTES):
            piece = view[start : min(start + SLICE_BYTES, tail)]
            self._submit(write_full, self._descriptor, piece, self._position)
            self._position += len(piece)
        self._gather(view[tail:])

    def finish(self) -> None:
        """Everything is in the file and durable; the name is not yet."""
        if self._position != self._size:
            raise ValueError(f"the views hold {self._position} bytes, {self._size} were announced")
        self._flush()
        while self._in_flight:
            self._wait_for_oldest()
        with named_errors(self._what):
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)

    def _gather(self, view: memoryview) -> None:
        while length := len(view):
            room = self._block_bytes - self._filled
            if length <= room:  # the common case, made for a hundred thousand tiny views
                self._block[self._filled : self._filled + length] = view
                self._filled += length
                self._position += length
                return
            self._block[self._filled :] = view[:room]
            self._filled += room
            self._position += room
            self._flush()
            view = view[room:]

    def _flush(self) -> None:
        """Send the block on its way, padded with zeros, and take another."""
        if not self._filled:
            return
        padded = -(-self._filled // ALIGNMENT) * ALIGNMENT
        self._block[self._filled : padded] = bytes(padded - self._filled)
        self._submit(self._write_block, self._block, padded, self._position - self._filled)
        self._block, self._filled = self._next_block(), 0

    def _next_block(self) -> memoryview:
        if self._num_blocks < self._max_blocks and not self._free_blocks:
            self._num_blocks += 1
            return memoryview(mmap.mmap(-1, self._block_bytes))  # on a page, so on 4 KiB
        while not self._free_blocks:
            self._wait_for_oldest()
        return self._free_blocks.popleft()

    def _write_block(self, block: memoryview, length: int, offset: int) -> None:
        try:
            write_full(self._descriptor, block[:length], offset)
        finally:
            self._free_blocks.append(block)

    def _submit(self, write: Callable[..., None], *arguments: object) -> None:
        while len(self._in_flight) >= self._max_in_flight:
            self._wait_for_oldest()
        self._in_flight.append(self._pool.submit(write, *arguments))

    def _wait_for_oldest(self) -> None:
        with named_errors(self._what):
            self._in_flight.popleft().result()


def read_ranges(descriptor: int, ranges: Sequence[tuple[int, memoryview]], num_threads: int) -> None:
    """Fill each view from its offset; nothing writes into one after the return. EOFError if the file ends first."""
    reads = list(_group_adjacent(ranges))
    if len(reads) == 1:
        _read_full(descriptor, *reads[0])
        return
    with ThreadPoolExecutor(num_threads) as pool:
        deque(pool.map(lambda read: _read_full(descriptor, *read), reads), maxlen=0)


def write_full(descriptor: int, view: memoryview, offset: int) -> None:
    """All of `view`; buffered from here on where the filesystem refuses O_DIRECT, or refuses it for this write."""
    may_be_direct = True
    while view:
        try:
            written = os.pwrite(descriptor, view, offset)
        except OSError as exc:
            if exc.errno not in NO_DIRECT_IO or not may_be_direct:
                raise
            may_be_direct = False
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~O_DIRECT)
            continue
        if not written:
            raise OSError(errno.EIO, f"nothing was written at byte {offset}")
        view, offset = view[written:], offset + written


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:  # the errno chooses the class
        raise OSError(exc.errno, f"{what}: {exc.strerror or exc}") from exc


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def _group_adjacent(ranges: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """(offset, views) of one preadv each: large views cut into slices, neighbours in the file joined up to a slice."""
    start = end = 0
    group: list[memoryview] = []
    for offset, view in ranges:
        for at in range(0, len(view), SLICE_BYTES):
            piece = view[at : at + SLICE_BYTES]
            if offset + at != end or end + len(piece) - start > SLICE_BYTES or len(group) == MAX_IOV:
                if group:
                    yield start, group
                start, group = offset + at, []
            group.append(piece)
            end = offset + at + len(piece)
    if group:
        yield start, group


def _read_full(descriptor: int, offset: int, views: list[memoryview]) -> None:
    while views:
        count = os.preadv(descriptor, views, offset)
        if not count:
            raise EOFError(f"the file ends at byte {os.fstat(descriptor).st_size}, byte {offset} was asked for")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
