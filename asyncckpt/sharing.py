"""What several ranks want of a step, and which one of them reads which part of it: pure, and alike on all ranks.

A payload is shared if two ranks or more want all of it. What the same ranks share is cut into parcels, and each is read
by the one of them that has least to read. Nothing here reads or sends: read_once.py does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asyncckpt.chunks import Numbers, Placement
from asyncckpt.framing import BLOCK_BYTES
from asyncckpt.read import COALESCE_GAP_BYTES, starts_run

ROUND_BYTES = 64 << 20
"""What a rank sends and receives between two looks at whether all are well; bounds its buffers. Fewer cost more
agreements, of some ms each on a busy machine."""


@dataclass(frozen=True, eq=False)
class Payloads:
    """Of a step, as columns in the order of the files; what tied tensors have in common is one. of_chunk: the payload
    of each chunk. in_blocks: it is large, and each block of it stands alone."""

    file: Numbers
    start: Numbers
    size: Numbers
    in_blocks: npt.NDArray[np.bool_]
    of_chunk: Numbers

    @classmethod
    def of(cls, place: Placement) -> Payloads:
        columns = np.stack((place.file, place.offset + place.head_bytes, place.payload_bytes, place.layout >= 0))
        order = np.lexsort(columns[::-1])
        columns = columns[:, order]
        is_new = np.ones(len(order), np.bool_)
        is_new[1:] = (columns[:, 1:] != columns[:, :-1]).any(axis=0)
        of_chunk = np.empty(len(order), np.int64)
        of_chunk[order] = np.cumsum(is_new) - 1
        file, start, size, is_tensor = columns[:, is_new]
        return cls(file, start, size, (is_tensor > 0) & (size > COALESCE_GAP_BYTES), of_chunk)

    def __len__(self) -> int:
        return len(self.file)

    def edges(self, wanted: Numbers) -> Numbers:
        """Where runs of wanted payloads begin and end, by turns: few numbers, as ranks want what lies side by side."""
        is_wanted = np.zeros(len(self) + 2, np.bool_)
        is_wanted[wanted + 1] = True
        return np.flatnonzero(is_wanted[1:] != is_wanted[:-1])

    def cut(self, numbers: Numbers) -> Iterator[tuple[int, int, int]]:
        """(file, start, size) of what these payloads are read as: just the reads that read_whole.py makes of them."""
        small, large = numbers[~self.in_blocks[numbers]], numbers[self.in_blocks[numbers]]
        runs = np.flatnonzero(starts_run(self.file[small], self.start[small], self.size[small]))
        starts = self.start[small[runs]]
        stops = np.maximum.reduceat((self.start + self.size)[small], runs) if len(runs) else starts
        count = -(-self.size[large] // BLOCK_BYTES)
        at = BLOCK_BYTES * (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count))
        of = np.repeat(large, count)
        file = np.concatenate((self.file[small[runs]], self.file[of]))
        start = np.concatenate((starts, self.start[of] + at))
        size = np.concatenate((stops - starts, np.minimum(BLOCK_BYTES, self.size[of] - at)))
        order = np.lexsort((start, file))
        return zip(file[order].tolist(), start[order].tolist(), size[order].tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class Parcel:
    """`size` bytes of a file that the first of `ranks` reads, and the others get, in a round of the exchange."""

    file: int
    start: int
    size: int
    ranks: tuple[int, ...]
    round: int


@dataclass(frozen=True, eq=False)
class Sharing:
    """One rank's part. groups: what it shares with the same ranks, the numbers of payloads and the parcels they are cut
    into, both in the order of the files. num_rounds: of all ranks."""

    groups: list[tuple[Numbers, list[Parcel]]]
    num_rounds: int


def share(payloads: Payloads, edges: Sequence[Numbers], rank: int) -> Sharing:
    """edges: of what each rank wants."""
    bounds = np.unique(np.concatenate(edges))  # between two of them no rank's mind changes
    if not len(bounds):
        return Sharing([], 0)
    wants = np.stack([np.searchsorted(one, bounds[:-1], side="right") % 2 == 1 for one in edges])
    before = np.concatenate(([0], np.cumsum(payloads.size)))
    alone = wants.sum(axis=0) == 1
    loads = (wants & alone) @ np.diff(before[bounds])
    clocks = np.zeros(len(edges), np.int64)
    groups, num_rounds = [], 0
    together, of_segment = np.unique(wants, axis=1, return_inverse=True)
    for number, is_member in enumerate(together.T):
        members = np.flatnonzero(is_member)
        if len(members) < 2:
            continue
        segments = np.flatnonzero(of_segment.reshape(-1) == number)
        numbers = np.concatenate([np.arange(bounds[one], bounds[one + 1]) for one in segments])
        circles: dict[int, tuple[int, ...]] = {}
        parcels = []
        for file, start, size in payloads.cut(numbers):
            reader = int(loads[members].argmin())
            loads[members[reader]] += size
            # No two parcels of a rank are at one time, so that no round is larger for it than for all.
            now = int(clocks[members].max())
            clocks[members] = now + size
            if is_member[rank]:
                if reader not in circles:  # the ranks from the reader on, so that all pass on as much
                    circles[reader] = tuple(np.roll(members, -reader).tolist())
                parcels.append(Parcel(file, start, size, circles[reader], now // ROUND_BYTES))
            num_rounds = max(num_rounds, now // ROUND_BYTES + 1)
        if parcels:
            groups.append((numbers, parcels))
    return Sharing(groups, num_rounds)
