"""What ranks share and who reads it: every byte once, by one of those who want it, and alike on all ranks."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.chunks import Placement
from asyncckpt.framing import BLOCK_BYTES, Layout
from asyncckpt.read import COALESCE_GAP_BYTES
from asyncckpt.sharing import ROUND_BYTES, Parcel, Payloads, Sharing, share

KIB, MIB = 1 << 10, 1 << 20
HEAD_BYTES = 700


def placement(sizes: list[int], num_files: int = 1, ties: int = 0) -> Placement:
    """Tensors of so many bytes, dealt to files; the last `ties` have the place of the first ones."""
    layouts = tuple((Layout("uint8", (size,), (1,)), HEAD_BYTES) for size in sizes)
    file = np.arange(len(sizes)) * num_files // max(1, len(sizes))
    length = np.array(sizes, np.int64) + HEAD_BYTES + 300
    offset = np.zeros(len(sizes), np.int64)
    for one in range(num_files):
        offset[file == one] = np.cumsum(length[file == one]) - length[file == one]
    key = np.arange(len(sizes))
    columns = [np.concatenate((column, column[:ties])) for column in (key, file, offset, length)]
    key, file, offset, length = columns
    names = tuple(str(number) for number in range(num_files))
    fqns = tuple(map(str, range(len(sizes))))
    return Placement(fqns, key, [(0,)] * len(key), layouts, key, names, file, offset, length)


def shares(payloads: Payloads, wants: list[list[int]]) -> list[Sharing]:
    """What each rank comes to."""
    edges = [payloads.edges(np.array(sorted(set(want)), np.int64)) for want in wants]
    return [share(payloads, edges, rank) for rank in range(len(wants))]


class Seen(NamedTuple):
    parcel: Parcel
    payloads: tuple[int, ...]


def seen_by(payloads: Payloads, sharing: Sharing) -> list[Seen]:
    """Each parcel and the payloads that bytes of it are of."""
    seen = []
    for numbers, parcels in sharing.groups:
        for parcel in parcels:
            start, stop = payloads.start[numbers], (payloads.start + payloads.size)[numbers]
            is_in = (
                (start < parcel.start + parcel.size) & (stop > parcel.start) & (payloads.file[numbers] == parcel.file)
            )
            seen.append(Seen(parcel, tuple(numbers[is_in].tolist())))
    return seen


SIZES = st.one_of(
    st.integers(1, 3000), st.sampled_from([COALESCE_GAP_BYTES, 200 * KIB, MIB, BLOCK_BYTES, 21 * MIB + 5])
)


@given(data=st.data(), sizes=st.lists(SIZES, max_size=30), num_ranks=st.integers(2, 6), num_files=st.integers(1, 4))
def test_every_shared_byte_is_read_once_by_one_of_those_who_want_it(
    data: st.DataObject, sizes: list[int], num_ranks: int, num_files: int
) -> None:
    """And comes to all of them in the same round, after the same others."""
    payloads = Payloads.of(placement(sizes, num_files))
    numbers = st.lists(st.integers(0, len(sizes) - 1)) if sizes else st.just([])
    wants = [data.draw(numbers) for _ in range(num_ranks)]
    found = [seen_by(payloads, sharing) for sharing in shares(payloads, wants)]
    for rank, seen in enumerate(found):
        read = Counter[int]()
        for parcel, of in seen:
            assert set(parcel.ranks) == {other for other, want in enumerate(wants) if of[0] in want}
            assert len(parcel.ranks) > 1
            for number in of:
                start, stop = payloads.start[number], payloads.start[number] + payloads.size[number]
                read[number] += min(stop, parcel.start + parcel.size) - max(start, parcel.start)
        shared = {one for one in wants[rank] if any(one in want for other, want in enumerate(wants) if other != rank)}
        assert read == {number: payloads.size[number] for number in shared}
    for one in found:
        for other in found:
            common = [
                [seen.parcel for seen in a if seen.parcel in {s.parcel for s in b}]
                for a, b in ((one, other), (other, one))
            ]
            assert common[0] == common[1]


@given(sizes=st.lists(SIZES, min_size=1, max_size=40), num_ranks=st.integers(2, 8))
def test_what_all_want_is_dealt_out_evenly_in_bounded_rounds(sizes: list[int], num_ranks: int) -> None:
    """No rank reads more than its part and one parcel; no round is larger than a round and one parcel."""
    payloads = Payloads.of(placement(sizes))
    sharing = shares(payloads, [list(range(len(sizes)))] * num_ranks)[0]
    ((_, parcels),) = sharing.groups
    largest = max(parcel.size for parcel in parcels)
    loads, rounds = Counter[int](), Counter[int]()
    for parcel in parcels:
        loads[parcel.ranks[0]] += parcel.size
        rounds[parcel.round] += parcel.size
    assert max(loads.values()) <= sum(loads.values()) / num_ranks + largest
    assert max(rounds.values()) <= ROUND_BYTES + largest
    assert sharing.num_rounds == max(rounds) + 1


def test_a_rank_with_much_of_its_own_reads_less_of_what_is_shared() -> None:
    """As in FSDP with a few replicated tensors."""
    payloads = Payloads.of(placement([MIB] * 24))
    sharing = shares(payloads, [list(range(24)), list(range(8))])[0]
    ((_, parcels),) = sharing.groups
    assert {parcel.ranks[0] for parcel in parcels} == {1}


def test_groups_that_want_different_things_exchange_at_the_same_time() -> None:
    """As in HSDP: two pairs need as many rounds as one."""
    payloads = Payloads.of(placement([4 * MIB] * 64))
    one, two = list(range(32)), list(range(32, 64))
    assert shares(payloads, [one, two, one, two])[0].num_rounds == 2


@pytest.mark.parametrize("wants", [[[], []], [[0, 1], []], [[0], [1]]])
def test_what_one_rank_alone_wants_is_not_shared(wants: list[list[int]]) -> None:
    """There is nothing to exchange then."""
    for sharing in shares(Payloads.of(placement([MIB, MIB])), wants):
        assert (sharing.groups, sharing.num_rounds) == ([], 0)


def test_tied_tensors_are_one_payload() -> None:
    """Whichever of them a rank asks for."""
    payloads = Payloads.of(placement([100, 200, 300], ties=2))
    assert len(payloads) == 3
    assert payloads.of_chunk.tolist() == [0, 1, 2, 0, 1]


def test_small_neighbours_are_one_parcel_and_large_payloads_are_blocks() -> None:
    """As they are read without sharing."""
    payloads = Payloads.of(placement([1000, 2000, 9 * MIB, 500]))
    sharing, _ = shares(payloads, [[0, 1, 2, 3]] * 2)
    ((_, parcels),) = sharing.groups
    assert [parcel.size for parcel in parcels] == [1000 + HEAD_BYTES + 300 + 2000, 4 * MIB, 4 * MIB, MIB, 500]
