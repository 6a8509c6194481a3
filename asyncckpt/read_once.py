"""What several ranks want is read by one of them, verified, and passed on to the others, block by block.

For storage that is slower than the network between ranks. It goes in rounds, before each of which all ranks hear
whether one has failed: so none is left waiting, and buffers stay small. While one round is passed on, the next ones are
read. Each rank reads for itself, as it does without, what it alone wants; what it delivers in a way of its own (a large
tensor in another memory layout, two targets in one memory); and what a load plan cuts to other shards (read_items.py).
Called by restore.py.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np

from asyncckpt.chunks import Numbers
from asyncckpt.ranks import Ranks
from asyncckpt.read import PAGE_BYTES, Read, new_buffer, read_batch, synchronize
from asyncckpt.read_whole import Whole, reads_of, without_clashes
from asyncckpt.sharing import Payloads, share
from asyncckpt.storage import Storage

PHASE = "read once"
AHEAD_BYTES = 64 << 20
"""Of its own parcels that a rank reads before their round: 16 requests of 4 MiB, which keep an object store busy."""
NUM_THREADS = 8
"""Storage serves one parcel with one of them."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What came in parcels. num_bytes: that this rank took from storage for it. objects: as of `read_whole`.
    positions: of the Whole, that are done."""

    num_bytes: int
    objects: dict[str, bytes]
    positions: Numbers


def read_shared(storage: Storage, folder: str, whole: Whole, ranks: Ranks) -> Shared | None:
    """Read what the ranks share of their `whole`, all of one step. A collective call. None: another rank failed.

    Raises what `carry_out` does if this rank failed, and the others hear of it; CheckpointError if one is gone. Tensors
    may be partly overwritten then.
    """
    payloads, objects = Payloads.of(whole.chunks.placement), dict[str, bytes]()
    position_of = _shareable(whole, payloads)
    edges = ranks.gather_numbers(payloads.edges(np.flatnonzero(position_of >= 0)), phase=PHASE)
    sharing = share(payloads, edges, ranks.rank)
    rounds: list[list[_Letter]] = [[] for _ in range(sharing.num_rounds)]
    done = [np.zeros(0, np.int64)]
    for numbers, parcels in sharing.groups:
        done.append(position_of[numbers])
        reads = {(read.path, read.offset): read for read in reads_of(storage.url, folder, whole, done[-1], objects)}
        for parcel in parcels:
            path = f"{folder}/{whole.chunks.placement.files[parcel.file]}"
            rounds[parcel.round].append(_Letter(parcel.ranks, reads[path, parcel.start]))
    num_bytes = _exchange(storage, rounds, ranks)
    return None if num_bytes is None else Shared(num_bytes, objects, np.concatenate(done))


def _shareable(whole: Whole, payloads: Payloads) -> Numbers:
    """For each payload the position at which this rank wants it as all ranks do, or -1."""
    at_once, _ = without_clashes(whole)
    of = payloads.of_chunk[whole.chunk[at_once]]
    is_usual = ~payloads.in_blocks[of] | whole.is_direct[at_once]
    positions = np.full(len(payloads), -1)
    positions[of[is_usual]] = at_once[is_usual]
    return positions


@dataclass(slots=True)
class _Letter:
    """A read that the first of `ranks` makes for all of them. view: where its bytes are, or will be. reading: on the
    first rank."""

    ranks: Sequence[int]
    read: Read
    view: memoryview | None = None
    reading: Future[None] | None = None

    def open(self) -> memoryview:
        """`view`, made if need be."""
        if self.view is None:
            self.view = self.read.view
        if self.view is None:
            start = self.read.offset % PAGE_BYTES  # as read.py does, which says why
            self.view = new_buffer(start + self.read.size, self.read.device)[start : start + self.read.size]
        return self.view


def _exchange(storage: Storage, rounds: Sequence[Sequence[_Letter]], ranks: Ranks) -> int | None:
    """The bytes that this rank read; None: another one failed."""
    own = [letter for letters in rounds for letter in letters if letter.ranks[0] == ranks.rank]
    devices = {letter.read.device for letters in rounds for letter in letters if letter.read.device is not None}
    synchronize(devices)  # kernels on any stream may still use what is about to be overwritten
    failures: list[BaseException] = []
    with _ReadingAhead(storage, own) as ahead:
        for letters in rounds:
            failures += ahead.failures([letter for letter in letters if letter.ranks[0] == ranks.rank])
            if any(failed for (failed,) in ranks.agree([bool(failures)], phase=PHASE)):
                break
            failures += _pass_on(letters, ranks)
            synchronize(devices)
            for letter in letters:
                letter.view = None
        else:
            if not failures:
                return sum(letter.read.size for letter in own)
    if failures:
        raise failures[0]
    return None


def _pass_on(letters: Sequence[_Letter], ranks: Ranks) -> list[Exception]:
    """What went wrong here, where the letters themselves arrived."""
    failures: list[Exception] = []

    def arrived(index: int) -> None:
        try:
            letters[index].read.take(letters[index].open())
        except Exception as exc:  # the others count on this rank until they hear of it
            failures.append(exc)

    ranks.pass_on([(letter.ranks, letter.open()) for letter in letters], arrived, phase=PHASE)
    return failures


class _ReadingAhead:
    """Threads that read and deliver this rank's own letters, in their order. Leaving it ends them."""

    def __init__(self, storage: Storage, letters: Sequence[_Letter]) -> None:
        self._storage = storage
        self._waiting = deque(letters)
        self._ahead_bytes = 0
        self._ends = threading.Event()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="asyncckpt-once")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._pool.shutdown(cancel_futures=True)

    def failures(self, letters: Sequence[_Letter]) -> list[BaseException]:
        """What these, the next ones, failed with; waits for them. Meanwhile more are read, up to AHEAD_BYTES."""
        self._ahead_bytes -= sum(letter.read.size for letter in letters)
        while self._waiting and ((letters and letters[-1].reading is None) or self._ahead_bytes < AHEAD_BYTES):
            letter = self._waiting.popleft()
            self._ahead_bytes += letter.read.size
            letter.reading = self._pool.submit(self._read, letter)
        found = [letter.reading.exception() for letter in letters if letter.reading]
        return [error for error in found if error]

    def _read(self, letter: _Letter) -> None:
        if not self._ends.is_set():
            read_batch(self._storage, [replace(letter.read, view=letter.open())], memoryview(b""), self._ends)
