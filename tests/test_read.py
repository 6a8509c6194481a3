"""Reading load plans: how much is asked of storage, into which memory, and what is verified."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from asyncckpt import DamagedStepError
from asyncckpt.dcp import ShardWriter
from asyncckpt.read_items import read_items
from asyncckpt.restore import OpenStep, open_step
from asyncckpt.storage import open_storage
from asyncckpt.testing import RecordingStorage
from tests.states import every_kind, raw_bytes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Counting(RecordingStorage):
    """Keeps the ranges asked for."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(open_storage(str(path)))
        self.ranges: list[tuple[int, memoryview]] = []

    def read_into(
        self, path: str, ranges: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
    ) -> None:
        self.ranges += ranges
        super().read_into(path, ranges, filled)


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> tuple[Counting, OpenStep, dict[str, Any]]:
    state = every_kind(1) | {"sliced": torch.randn(5000, 1000), **{f"s{i}": torch.randn(100) for i in range(50)}}
    dcp.save(state, storage_writer=ShardWriter(tmp_path))
    storage = Counting(tmp_path)
    return storage, open_step(storage, ""), state


def read(storage: Counting, step: OpenStep, target: dict[str, Any]) -> int:
    planner = DefaultLoadPlanner(allow_partial_load=True)
    planner.set_up_planner(target, step.metadata)
    return read_items(storage, step.data_folder, step.where, planner.create_local_plan().items, planner)


def test_a_large_tensor_is_read_into_its_own_memory(saved: tuple[Counting, OpenStep, dict[str, Any]]) -> None:
    """No buffer between, by address, block by block, and not a byte more than its own."""
    storage, step, state = saved
    target = {"model": {"large": torch.zeros(3000, 1000)}}
    assert read(storage, step, target) == 12_000_000
    start = target["model"]["large"].data_ptr()
    addresses = [torch.frombuffer(view, dtype=torch.uint8).data_ptr() for _, view in storage.ranges]
    assert [address - start for address in addresses] == [0, 4 << 20, 8 << 20]
    assert sum(len(view) for _, view in storage.ranges) == 12_000_000
    assert torch.equal(target["model"]["large"], state["model"]["large"])


def test_many_small_tensors_are_few_reads(saved: tuple[Counting, OpenStep, dict[str, Any]]) -> None:
    """Neighbours come in one range."""
    storage, step, state = saved
    target = {f"s{i}": torch.zeros(100) for i in range(50)}
    read(storage, step, target)
    assert len(storage.ranges) == 1
    assert all(torch.equal(target[key], state[key]) for key in target)


@pytest.mark.parametrize("rows", [(0, 5000), (0, 1), (1100, 2300), (4999, 5000), (2000, 2000)], ids=str)
@pytest.mark.parametrize("columns", [(0, 1000), (17, 900)], ids=str)
def test_a_box_of_a_tensor_costs_its_blocks(
    saved: tuple[Counting, OpenStep, dict[str, Any]], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    """What a rank of another layout asks for: at most one block of 4 MiB more at each end, all of it verified."""
    storage, step, state = saved
    target = torch.zeros(rows[1] - rows[0], columns[1] - columns[0])
    read_box(storage, step, "sliced", target, (rows[0], columns[0]))
    assert torch.equal(target, state["sliced"][rows[0] : rows[1], columns[0] : columns[1]])
    needed = (rows[1] - rows[0]) * 4000
    assert sum(len(view) for _, view in storage.ranges) <= needed + 2 * 4 * 2**20


def test_boxes_of_strided_payloads(saved: tuple[Counting, OpenStep, dict[str, Any]]) -> None:
    """A transposed and a channels-last tensor are stored as they lie in memory."""
    storage, step, state = saved
    target = torch.zeros(3, 2)
    read_box(storage, step, "model.transposed", target, (2, 1))
    assert raw_bytes(target) == raw_bytes(state["model"]["transposed"][2:5, 1:3])
    target = torch.zeros(1, 2, 4, 1)
    read_box(storage, step, "model.channels_last", target, (1, 1, 0, 3))
    assert raw_bytes(target) == raw_bytes(state["model"]["channels_last"][1:2, 1:3, :, 3:4])


def read_box(storage: Counting, step: OpenStep, key: str, target: torch.Tensor, offsets: tuple[int, ...]) -> None:
    index = next(index for index in step.where if index.fqn == key)
    planner = DefaultLoadPlanner()
    planner.set_up_planner({key: target}, step.metadata)
    item = ReadItem(
        LoadItemType.TENSOR, index, torch.Size([0] * target.dim()), index, torch.Size(offsets), target.shape
    )
    storage.ranges.clear()
    read_items(storage, step.data_folder, step.where, [item], planner)


@pytest.mark.parametrize("block", [0, 1, 4])
def test_a_flipped_bit_is_found_by_whoever_reads_its_block(
    saved: tuple[Counting, OpenStep, dict[str, Any]], tmp_path: pathlib.Path, block: int
) -> None:
    """And by nobody else: a slice elsewhere still loads."""
    storage, step, _ = saved
    (chunk,) = (chunk for index, chunk in step.where.items() if index.fqn == "sliced")
    path = tmp_path / step.data_folder / chunk.file
    data = bytearray(path.read_bytes())
    at = chunk.payload_offset + block * 4 * 2**20 + 5
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedStepError, match=r"'sliced' at offset \d+ have CRC32 [0-9a-f]{8}, the manifest says"):
        read(storage, step, {"sliced": torch.zeros(5000, 1000)})
    rows = range(5000 * block // 5, 5000 * (block + 1) // 5)
    elsewhere = 2500 if 2500 not in rows else 100
    read_box(storage, step, "sliced", torch.zeros(10, 1000), (elsewhere, 0))


def test_a_file_cut_short_is_damage(saved: tuple[Counting, OpenStep, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    """So is one that is gone."""
    storage, step, _ = saved
    (path,) = (tmp_path / step.data_folder).iterdir()
    path.write_bytes(path.read_bytes()[:-40_000])
    with pytest.raises(DamagedStepError, match="missing or too short"):
        read(storage, step, {f"s{i}": torch.zeros(100) for i in range(50)} | {"name": ""})
    path.unlink()
    with pytest.raises(DamagedStepError, match="missing or too short"):
        read(storage, step, {"s1": torch.zeros(100)})
