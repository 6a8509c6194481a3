"""Which rank writes what: every element once, about the same number of bytes each, and no disagreement unheard."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt import SaveError
from asyncckpt.global_plan import SPREAD_BYTES, Assignment, Box, LocalItems, assign

BIG = SPREAD_BYTES // 4  # elements of float32


def part(
    tensors: dict[str, tuple[tuple[int, ...], list[Box]]], objects: Sequence[str] = (), **digests: int
) -> LocalItems:
    """A rank's items: {key: (shape of the whole tensor, its boxes)}, all of float32."""
    fqns = (*tensors, *objects)
    kinds = tuple(dict.fromkeys(("float32", shape) for shape, _ in tensors.values()))
    kind = (*(kinds.index(("float32", shape)) for shape, _ in tensors.values()), *[-1] * len(objects))
    items = [(number, box) for number, (_, boxes) in enumerate(tensors.values()) for box in boxes]
    items += [(len(tensors) + number, ((), ())) for number in range(len(objects))]
    paths = tuple(tuple(fqn.split(".")) for fqn in fqns)
    return LocalItems(fqns, paths, kinds, kind, tuple(n for n, _ in items), tuple(box for _, box in items), digests)


def whole(*shape: int) -> tuple[tuple[int, ...], list[Box]]:
    return shape, [((0,) * len(shape), shape)]


def written(parts: Sequence[LocalItems], assignment: Assignment) -> list[list[tuple[str, Box]]]:
    """By rank."""
    return [
        [(part.fqns[part.key[number]], part.boxes[number]) for number in numbers.tolist()]
        for part, numbers in zip(parts, assignment.written, strict=True)
    ]


def names(parts: Sequence[LocalItems]) -> list[list[str]]:
    return [[fqn for fqn, _ in rank] for rank in written(parts, assign(parts))]


# -- one writer for each element


@st.composite
def meshes(draw: st.DrawFn) -> list[LocalItems]:
    """Ranks on a mesh; each tensor is cut, unevenly, along some of the mesh's dimensions and the same along others."""
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    tensors: list[dict[str, tuple[tuple[int, ...], list[Box]]]] = [{} for _ in range(math.prod(mesh))]
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
        dim_of = [draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh]
        dim_of = [dim if dim not in dim_of[:at] else None for at, dim in enumerate(dim_of)]
        for rank, place in enumerate(itertools.product(*map(range, mesh))):
            start, size = [0] * len(shape), list(shape)
            for dim, index, count in zip(dim_of, place, mesh, strict=True):
                if dim is not None:  # as torch.chunk cuts: equal parts, a smaller one, empty ones
                    step = -(-shape[dim] // count)
                    start[dim] = min(shape[dim], index * step)
                    size[dim] = min(shape[dim], start[dim] + step) - start[dim]
            tensors[rank][f"t{number}"] = shape, [(tuple(start), tuple(size))]
    return [part(of_rank, ["note"]) for of_rank in tensors]


@settings(deadline=None)
@given(meshes())
def test_every_element_of_every_tensor_is_written_once(parts: list[LocalItems]) -> None:
    """However many replicas there are, and however unevenly it is cut; what is empty is not written in parts."""
    assignment = assign([LocalItems.decode(one.encode()) for one in parts])
    times = {
        fqn: np.zeros(assignment.keys[fqn].shape, np.int64) for fqn in assignment.keys if fqn != "note"
    }  # fmt: skip
    rows = list(itertools.chain.from_iterable(written(parts, assignment)))
    for fqn, (start, size) in rows:
        if fqn != "note":
            times[fqn][tuple(slice(at, at + length) for at, length in zip(start, size, strict=True))] += 1
            assert math.prod(size) or not times[fqn].size
    assert all((count == 1).all() for count in times.values())
    assert {fqn for fqn, _ in rows} == set(assignment.keys)
    assert len(rows) == len(set(rows))
    assert [fqn for fqn, _ in rows].count("note") == 1


def test_the_keys_are_those_of_all_ranks_in_their_order() -> None:
    """The stages of a pipeline have different ones."""
    parts = [part({"a.x": whole(3), "b": whole(2, 2)}, ["n"]), part({"b": whole(2, 2), "c": whole(3)})]
    keys = assign(parts).keys
    assert list(keys) == ["a.x", "b", "n", "c"]
    assert (keys["a.x"].path, keys["b"].shape, keys["n"].dtype) == (("a", "x"), (2, 2), None)
    assert names(parts) == [["a.x", "b", "n"], ["c"]]


def test_a_rank_without_items_writes_nothing() -> None:
    """Nor does a job without any."""
    assert names([part({}), part({"a": whole(3)})]) == [[], ["a"]]
    assert names([part({}), part({})]) == [[], []]


def test_an_item_that_a_rank_has_twice_is_written_once() -> None:
    """A mesh of devices in one process holds replicas of a shard side by side; torch_xla's planner loses both."""
    shape, boxes = whole(4)
    assert names([part({"a": (shape, boxes * 2)})]) == [["a"]]


# -- who


def test_replicas_are_spread_by_their_bytes() -> None:
    """By those of the part, not of the tensor it is a part of, and after what a rank alone can write."""
    box: Box = ((0,), (BIG,))
    huge = (10 * BIG,), [((BIG,), (9 * BIG,))]
    parts = [
        part({"only": whole(4 * BIG), "shared": ((10 * BIG,), [box]), "b": whole(BIG), "c": whole(2 * BIG)}),
        part({"shared": ((10 * BIG,), [box]), "b": whole(BIG), "c": whole(2 * BIG)}),
        part({"shared": huge}),
    ]
    assert names(parts) == [["only"], ["shared", "b", "c"], ["shared"]]


@settings(deadline=None)
@given(st.lists(st.integers(BIG, 50 * BIG), min_size=1, max_size=40), st.integers(1, 8))
def test_no_rank_writes_much_more_than_another(sizes: list[int], num_ranks: int) -> None:
    """At most one tensor more, as for any greedy choice, the largest first."""
    tensors = {f"t{number}": whole(size) for number, size in enumerate(sizes)}
    parts = [part(tensors)] * num_ranks
    load = [sum(math.prod(size) for _, (_, size) in rank) for rank in written(parts, assign(parts))]
    assert sum(load) == sum(sizes)
    assert max(load) - min(load) <= max(sizes)


def test_small_replicas_are_the_lowest_ranks() -> None:
    """Not mixed from several: BatchNorm's statistics, say, which differ."""
    tensors = {f"t{number}": whole(7) for number in range(10)}
    assert names([part({}), part(tensors, ["note"]), part(tensors, ["note"])]) == [[], [*tensors, "note"], []]


# -- what ranks do not agree on


def test_values_that_differ_are_named() -> None:
    """All but those that only one rank has, or nobody could compare."""
    parts = [part({}, ["a", "b", "c"], a=1, b=2), part({}, ["a", "b", "c"], a=1, b=3, c=4), part({}, ["d"], d=9)]
    assert assign(parts).differing == ("b",)


@pytest.mark.parametrize("other", [part({"x": whole(3)}), part({}, ["x"])])
def test_one_key_for_two_things_is_refused(other: LocalItems) -> None:
    """By their shapes, or a tensor and an object; DCP takes the first."""
    with pytest.raises(SaveError, match=r"'x' is torch.float32 \(4,\) on rank 0 and .* on rank 2.*PerRank"):
        assign([part({"x": whole(4)}), part({}), other])


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([((0, 0), (2, 4))], "8 elements are missing"),
        ([((0, 0), (2, 4)), ((1, 0), (3, 4))], "overlap"),
        ([((0, 0), (2, 4)), ((2, 0), (3, 4))], "reaches beyond"),
        ([((0, 0), (4, 0))], "16 elements are missing"),
        ([((0, 0), (2, 2)), ((2, 2), (2, 2)), ((0, 2), (2, 2))], "4 elements are missing"),
    ],
)
def test_parts_that_do_not_make_up_a_tensor_are_refused(boxes: list[Box], problem: str) -> None:
    """A mesh that is not the same on all ranks."""
    with pytest.raises(SaveError, match=f"'x', .* do not make it up: .*{problem}"):
        assign([part({"x": ((4, 4), [box])}) for box in boxes])


def test_parts_in_no_order_of_rows_and_columns_are_fine() -> None:
    """Flat parameters end anywhere."""
    boxes: list[Box] = [((0, 0), (1, 4)), ((1, 0), (3, 1)), ((1, 1), (1, 3)), ((2, 1), (2, 3))]
    assert names([part({"x": ((4, 4), [box])}) for box in boxes]) == [["x"]] * 4
