"""Which chunks make up a rank's part of a tensor: whole ones or no answer; nothing is planned where nothing is cut."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from asyncckpt import CheckpointManager
from asyncckpt.boxes import Boxes
from asyncckpt.chunks import Chunk, ChunkTable
from asyncckpt.framing import Layout
from asyncckpt.plan import leaves
from asyncckpt.read_whole import find_whole
from asyncckpt.restore import open_step
from asyncckpt.storage import open_storage
from tests.crew import Crew
from tests.layouts import GRID, LINE, state_of, target_of
from tests.processes import Link


def chunk(key: str, offsets: tuple[int, ...], shape: tuple[int, ...], dtype: str = "float32") -> Chunk:
    stride = torch.empty(shape, device="meta").stride()
    return Chunk(key, offsets, Layout(dtype, shape, stride), 0, "file", 0, 4 * math.prod(shape), 0, 0)


def boxes(*chunks: Chunk) -> Boxes:
    return Boxes(ChunkTable.of(chunks))


def test_a_tensor_saved_in_shards_is_made_up_of_them() -> None:
    """Each piece is the part of its memory where the shard lies; chunks of other keys and empty ones add nothing."""
    found = boxes(
        chunk("w", (0, 0), (3, 4)), chunk("v", (0, 0), (5, 4)), chunk("w", (3, 0), (2, 4)), chunk("w", (5, 0), (0, 4))
    )
    target = torch.zeros(5, 4)
    pieces = [(number, piece) for number, piece in found.pieces_of("w", target) or () if piece.numel()]
    assert [number for number, _ in pieces] == [0, 2]
    for _, piece in pieces:
        piece += 1
    assert [tuple(piece.shape) for _, piece in pieces] == [(3, 4), (2, 4)]
    assert target.eq(1).all()


def test_a_tensor_saved_in_one_piece_is_that_piece_itself() -> None:
    """Not a view of it."""
    target = torch.zeros(2, 3)
    ((number, piece),) = boxes(chunk("w", (0, 0), (2, 3))).pieces_of("w", target) or ()
    assert (number, piece is target) == (0, True)


@pytest.mark.parametrize(
    "saved",
    [
        [],
        [chunk("v", (0, 0), (2, 3))],
        [chunk("w", (0, 0), (1, 3))],
        [chunk("w", (0, 0), (2, 3), dtype="int32")],
        [chunk("w", (0,), (6,))],
        [chunk("w", (0, 0), (1, 3)), chunk("w", (1, 0), (2, 3))],
    ],
)
def test_what_whole_chunks_do_not_make_up_has_no_answer(saved: list[Chunk]) -> None:
    """A part is missing, of another dtype or number of dimensions, or reaches beyond."""
    assert boxes(*saved).pieces_of("w", torch.zeros(2, 3)) is None


def test_unknown_kinds_of_tensors_have_no_answer() -> None:
    """A subclass may hold its values anywhere."""

    class Other(torch.Tensor):
        pass

    assert boxes(chunk("w", (0,), (4,))).pieces_of("w", torch.zeros(4).as_subclass(Other)) is None


@pytest.fixture(scope="module")
def four() -> Iterator[Crew]:
    with Crew(4) as crew:
        yield crew


def save(link: Link, path: str) -> None:
    with CheckpointManager(path, 1) as manager:
        manager.save(1, state_of(3, link.rank, 4))


def keys_that_need_a_plan(link: Link, path: str, turned: bool) -> set[str]:
    step = open_step(open_storage(path), "1")
    target: Any = target_of(link.rank, dist.get_world_size(), turned=turned)
    target[f"mine/rank_{link.rank}"] = target.pop("mine").value
    assert step.manifest is not None
    _, rest = find_whole(step.manifest, step.keys, {fqn: leaf.value for fqn, leaf in leaves(target).items()})
    return {key.removeprefix("sharded.") for key in rest}


def test_ranks_that_restore_what_they_saved_plan_nothing(four: Crew, tmp_path: pathlib.Path) -> None:
    """In every layout; in another one only tensors whose shards are cut differently are planned."""
    path = str(tmp_path)
    four.run(save, path)
    assert four.run(keys_that_need_a_plan, path, False) == [set()] * 4
    for needed in four.run(keys_that_need_a_plan, path, True):
        assert {"large_columns"} <= needed <= LINE.keys() | GRID.keys()
