"""A rank's files: offsets, checksums, and no copy of a large payload."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

from asyncckpt.chunks import ChunkTable
from asyncckpt.framing import crc32
from asyncckpt.manifest import FileRecord
from asyncckpt.shard import write_items
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import RecordingStorage
from tests.states import every_kind


def planned(state: dict[str, object]) -> tuple[SavePlan, DefaultSavePlanner]:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    plans, _ = planner.create_global_plan([planner.create_local_plan()])
    return planner.finish_plan(plans[0]), planner


def write(storage: Storage, state: dict[str, object]) -> tuple[ChunkTable, list[FileRecord]]:
    plan, planner = planned(state)
    return write_items(storage, "a", 0, plan.items, planner)


def test_every_checksum_is_that_of_the_bytes_in_the_file(tmp_path: pathlib.Path) -> None:
    """Payload, item, blocks and whole file, all from one pass."""
    state = every_kind(1) | {"blocks": torch.randn(3_000_000), "one block": torch.randn(1_048_576)}
    chunks, files = write(open_storage(str(tmp_path)), state)
    for file in files:
        data = (tmp_path / "a" / file.name).read_bytes()
        assert (len(data), crc32(data)) == (file.size, file.crc32)
    data = (tmp_path / "a" / files[0].name).read_bytes()
    for chunk in chunks:
        item = data[chunk.offset : chunk.offset + chunk.length]
        assert crc32(item) == chunk.item_crc32, chunk.key
    whole = next(chunk for chunk in chunks if chunk.key == "blocks")
    payload = data[whole.payload_offset : whole.payload_offset + 12_000_000]
    assert crc32(payload) == whole.crc32
    assert [crc32(payload[at : at + 4 * 2**20]) for at in range(0, len(payload), 4 * 2**20)] == list(whole.blocks)


def test_a_large_payload_is_handed_to_storage_as_the_tensors_own_memory(tmp_path: pathlib.Path) -> None:
    """Zero copies, by address."""
    tensor = torch.randn(5_000_000)
    seen: list[tuple[int, int]] = []

    class Watching(RecordingStorage):
        def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
            def watched() -> Iterator[memoryview]:
                for view in views:
                    seen.append((np.frombuffer(view, np.uint8).ctypes.data, len(view)))
                    yield view

            super().write_file(path, size, watched())

    write(Watching(open_storage(str(tmp_path))), {"w": tensor, "small": torch.ones(2)})
    start, stop = tensor.data_ptr(), tensor.data_ptr() + 20_000_000
    assert sum(length for address, length in seen if start <= address < stop) == 20_000_000


def test_a_rank_with_nothing_to_write_writes_nothing(tmp_path: pathlib.Path) -> None:
    """Another rank has it all."""
    _, planner = planned({"x": torch.ones(1)})
    storage = RecordingStorage(open_storage(str(tmp_path)))
    chunks, files = write_items(storage, "a", 3, [], planner)
    assert (list(chunks), files) == ([], [])
    assert storage.calls == []


def test_small_storages_get_several_files(tmp_path: pathlib.Path) -> None:
    """An item is never cut; every byte range is used once."""
    storage = RecordingStorage(open_storage(str(tmp_path)))
    storage.max_file_bytes = 100_000
    chunks, files = write(storage, {f"w{i}": torch.randn(10_000) for i in range(10)} | {"big": torch.randn(100_000)})
    assert len(files) > 4
    assert max(file.size for file in files if file.size < 400_000) <= 100_000
    for file in files:
        ranges = sorted((chunk.offset, chunk.offset + chunk.length) for chunk in chunks if chunk.file == file.name)
        assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ranges))
        assert ranges[-1][1] == file.size
