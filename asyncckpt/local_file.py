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

from asyncckpt.parallel import Arrivals, for_each

# O_DIRECT writes past the page cache. On the machine this was measured on (ext4 on virtio, 1 GiB, 2 cores) that is 1.8x
# the rate and an eighth of the CPU of buffered writes plus fsync; 2 to 4 threads of 16 MiB reach the limit of the disk,
# and neither posix_fallocate nor a first ftruncate adds to it.
ALIGNMENT = 4096  # of address, file offset and length; the largest that filesystems and disks in use ask for
BATCH_BYTES = 16 << 20
BLOCK_BYTES = 4 << 20
DIRECT_MIN_BYTES = 64 << 10  # a guess: below, a copy costs less than the bookkeeping of one more piece
# One read and its checksums stay in a cache of 32 MiB. Measured there (2 cores, 512 MiB in the page cache, 2 to 4
# threads): 4 MiB read and checksummed 0.13 s per GB, 1 MiB or slices of 256 KiB 0.14, 16 MiB without checksum 0.09.
READ_BYTES = 4 << 20
MAX_PIECES = 1024  # IOV_MAX of Linux
O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)


class FileWriter:
    """Writes a file front to back from views, past the page cache, several writes in flight.

    Views whose memory lies on 4 KiB where the file position does are written from where they are; all else is gathered
    in blocks that do. Neighbours go out in one pwritev. The end is padded to 4 KiB and cut off again. Leaving the
    context ends every write in flight.
    """

    def __init__(self, descriptor: int, size: int, num_threads: int, what: str) -> None:
        self._descriptor = descriptor
        self._size = size
        self._what = what
        self._position = 0  # in the file, of the next byte
        self._batch: list[memoryview] = []  # pieces for the next write, which ends where the block's open part begins
        self._batch_bytes = 0
        self._submitted = 0  # the file offset at which the batch begins
        self._block_bytes = min(BLOCK_BYTES, _round_up(size)) or ALIGNMENT
        self._free_blocks: list[memoryview] = []
        self._full_blocks: list[memoryview] = []  # with pieces in the batch, and no room
        self._blocks_left = 2 * num_threads
        self._block = self._next_block()
        self._begin = self._end = 0  # of the block's open part: gathered, not in the batch yet
        self._pool = ThreadPoolExecutor(num_threads)
        self._in_flight = deque[tuple[Future[None], list[memoryview]]]()
        self._max_in_flight = num_threads + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, view: memoryview) -> None:
        """The next bytes of the file; written some time before `finish` returns."""
        length = len(view)
        if self._position + length > self._size:
            raise ValueError(f"the views hold more than the {self._size} bytes that were announced")
        head = -self._position % ALIGNMENT
        if length < DIRECT_MIN_BYTES or (address_of(view) + head) % ALIGNMENT:
            self._gather(view)
            return
        self._gather(view[:head])
        self._close_part()
        tail = head + (length - head) // ALIGNMENT * ALIGNMENT
        self._add(view[head:tail])
        self._position += tail - head
        self._gather(view[tail:])

    def finish(self) -> None:
        """Everything is in the file and durable; the name is not yet."""
        if self._position != self._size:
            raise ValueError(f"the views hold {self._position} bytes, {self._size} were announced")
        padding = -self._end % ALIGNMENT
        self._block[self._end : self._end + padding] = bytes(padding)
        self._end += padding
        self._close_part()
        self._submit()
        while self._in_flight:
            self._wait_for_oldest()
        with named_errors(self._what):
            os.ftruncate(self._descriptor, self._size)
            os.fsync(self._descriptor)

    def _gather(self, view: memoryview) -> None:
        while length := len(view):
            if self._end == self._block_bytes:
                self._close_part()
                self._full_blocks.append(self._block)
                self._block = self._next_block()
                self._begin = self._end = 0
            if length > self._block_bytes - self._end:
                length = self._block_bytes - self._end
            self._block[self._end : self._end + length] = view[:length]
            self._end += length
            self._position += length
            view = view[length:]

    def _close_part(self) -> None:
        if self._end > self._begin:
            self._add(self._block[self._begin : self._end])
            self._begin = self._end

    def _add(self, piece: memoryview) -> None:
        while piece:
            room = BATCH_BYTES - self._batch_bytes
            if not room or len(self._batch) == MAX_PIECES:
                self._submit()
                continue
            self._batch.append(piece[:room])
            self._batch_bytes += len(self._batch[-1])
            piece = piece[room:]

    def _submit(self) -> None:
        if not self._batch:
            return
        while len(self._in_flight) >= self._max_in_flight:
            self._wait_for_oldest()
        write = self._pool.submit(write_full, self._descriptor, self._batch, self._submitted)
        self._in_flight.append((write, self._full_blocks))
        self._submitted += self._batch_bytes
        self._batch, self._batch_bytes, self._full_blocks = [], 0, []

    def _next_block(self) -> memoryview:
        if not self._free_blocks and self._blocks_left:
            self._blocks_left -= 1
            return memoryview(mmap.mmap(-1, self._block_bytes))  # on a page, so on 4 KiB
        if not self._free_blocks:
            self._submit()
        while not self._free_blocks:
            self._wait_for_oldest()
        return self._free_blocks.pop()

    def _wait_for_oldest(self) -> None:
        """In order: the blocks that come back with a write may have pieces in the writes before it."""
        write, blocks = self._in_flight.popleft()
        with named_errors(self._what):
            write.result()
        self._free_blocks += blocks


def read_ranges(
    descriptor: int,
    ranges: Sequence[tuple[int, memoryview]],
    num_threads: int,
    filled: Callable[[int], None],
    what: str,
) -> None:
    """Fill each view from its offset and then call `filled` with its index, on the thread that read its last bytes.

    EOFError if the file ends first. When this returns or raises, no thread is left that writes into a view.
    """
    arrivals = Arrivals(ranges, filled)

    def read(piece: tuple[int, list[memoryview], list[int]]) -> None:
        offset, views, indices = piece
        _read_full(descriptor, offset, views, what)
        for index, view in zip(indices, views, strict=True):
            arrivals.add(index, len(view))

    for_each(read, list(_pieces(ranges)), num_threads)


def advise_sequential(descriptor: int) -> None:
    """Twice the readahead: with several threads on one file 0.75 s per GB from the disk of that machine, else 0.93."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def write_full(descriptor: int, views: list[memoryview], offset: int) -> None:
    """All of `views`; through the page cache from here on where the filesystem refuses O_DIRECT."""
    may_be_direct = True
    while views:
        try:
            count = os.pwritev(descriptor, views, offset)
        except OSError as exc:
            if exc.errno not in NO_DIRECT_IO or not may_be_direct:
                raise
            may_be_direct = False
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~O_DIRECT)
            continue
        if not count:
            raise OSError(errno.EIO, f"nothing was written at byte {offset}")
        offset += count
        views = _after(views, count)


@contextmanager
def named_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:  # the errno chooses the class
        raise OSError(exc.errno, f"{what}: {exc.strerror or exc}") from exc


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def address_of(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def _pieces(ranges: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview], list[int]]]:
    """(offset, views, the index in `ranges` of each) of one preadv each: large views cut, neighbours in the file joined
    up to READ_BYTES."""
    start = end = 0
    views: list[memoryview] = []
    indices: list[int] = []
    for index, (offset, view) in enumerate(ranges):
        for at in range(0, len(view), READ_BYTES):
            piece = view[at : at + READ_BYTES]
            if offset + at != end or end + len(piece) - start > READ_BYTES or len(views) == MAX_PIECES:
                if views:
                    yield start, views, indices
                start, views, indices = offset + at, [], []
            views.append(piece)
            indices.append(index)
            end = offset + at + len(piece)
    if views:
        yield start, views, indices


def _read_full(descriptor: int, offset: int, views: list[memoryview], what: str) -> None:
    while views:
        with named_errors(what):
            count = os.preadv(descriptor, views, offset)
        if not count:
            size = os.fstat(descriptor).st_size
            raise EOFError(f"{what}: the file ends at byte {size}, byte {offset} was asked for")
        offset += count
        views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `views` after `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []
