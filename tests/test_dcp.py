"""Interoperation: an unmodified torch reads what we write, and we read what it writes."""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from asyncckpt import CheckpointManager, DamagedStepError, SaveError, ShardReader, ShardWriter, UnsafeObjectError
from asyncckpt.manifest import Manifest, decode_manifest
from tests.states import assert_same, every_kind, target_like

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized",  # DCP says so at each call without a group
    "ignore:TypedStorage is deprecated",  # dcp_to_torch_save of torch 2.13
)


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run with step 7, saved by the manager."""
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        manager.save_async(7, every_kind(1))
    return tmp_path / "run"


def manifest_of(step: pathlib.Path) -> Manifest:
    (path,) = step.glob("manifest-*.json")
    return decode_manifest(path.read_bytes())


def test_stock_dcp_load_reads_our_steps_bitwise(saved: pathlib.Path) -> None:
    """Every dtype, layout, nesting and object."""
    target = target_like(every_kind(1))
    dcp.load(target, checkpoint_id=str(saved / "7"))
    assert_same(every_kind(1), target)


def test_stock_fsspec_reader_reads_our_steps_from_s3(s3_url: str, s3_options: dict[str, Any]) -> None:
    """The same over HTTP, through torch's own reader."""
    with CheckpointManager(s3_url, 1, storage_options=s3_options) as manager:
        manager.save_async(7, every_kind(2))
    target = target_like(every_kind(2))
    dcp.load(target, storage_reader=FsspecReader(f"{s3_url}/7", **s3_options))
    assert_same(every_kind(2), target)


def test_dcp_to_torch_save_converts_our_steps(saved: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The nesting comes back, too."""
    dcp_to_torch_save(str(saved / "7"), str(tmp_path / "whole.pt"))
    assert_same(every_kind(1), torch.load(tmp_path / "whole.pt", weights_only=True))


def test_we_restore_what_stock_dcp_saved(tmp_path: pathlib.Path) -> None:
    """A foreign step is restored, not listed, and verified by its zip checksums."""
    dcp.save(every_kind(3), checkpoint_id=str(tmp_path / "30"))
    with CheckpointManager(str(tmp_path), 1, max_to_keep=1) as manager:
        assert manager.all_steps() == []
        target = target_like(every_kind(3))
        manager.restore(30, target)
        assert_same(every_kind(3), target)
        assert manager.verify(30).checksums == "zip"
        manager.save(31, every_kind(4))
        manager.save(32, every_kind(5))
        with pytest.raises(SaveError, match="another writer"):
            manager.save(30, every_kind(4))
    assert (tmp_path / "30" / ".metadata").exists()
    assert not (tmp_path / "31").exists()


def test_containers_that_old_writers_kept_whole_come_back(tmp_path: pathlib.Path) -> None:
    """torch_xla, and torch before 2.4, write a dict or list without tensors as one object; a lr may be a tensor now."""
    old = {"optim.state.0.step": torch.tensor(3.0), "optim.param_groups": [{"lr": 0.5, "params": [0]}], "n": {"a": 1}}
    dcp.save(old, checkpoint_id=str(tmp_path / "3"), planner=DefaultSavePlanner(flatten_state_dict=False))
    groups = [{"lr": torch.tensor(0.0), "params": [0]}]
    target = {"optim": {"state": {0: {"step": torch.tensor(0.0)}}, "param_groups": groups}, "n": {"b": {}}}
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.restore(3, target, strict=True)
    assert target == {"optim": {"state": {0: {"step": 3}}, "param_groups": old["optim.param_groups"]}, "n": old["n"]}


def test_a_damaged_stock_step_is_reported_by_its_zip_checksum(tmp_path: pathlib.Path) -> None:
    """torch itself loads the flipped byte without a word."""
    dcp.save({"w": torch.arange(1000)}, checkpoint_id=str(tmp_path / "3"))
    data = tmp_path / "3" / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[1500] ^= 1
    data.write_bytes(raw)
    with CheckpointManager(str(tmp_path), 1) as manager, pytest.raises(DamagedStepError, match="'w' at offset 0"):
        manager.restore(3, {"w": torch.zeros(1000, dtype=torch.int64)})


def test_shard_writer_and_reader_work_under_stock_save_and_load(any_url: tuple[str, dict[str, Any]]) -> None:
    """On every storage; saving again replaces the first save."""
    url, options = any_url
    for seed in (1, 2):
        dcp.save(every_kind(seed), storage_writer=ShardWriter(f"{url}/5", storage_options=options))
        target = target_like(every_kind(seed))
        dcp.load(target, storage_reader=ShardReader(f"{url}/5", storage_options=options))
        assert_same(every_kind(seed), target)
    with CheckpointManager(url, 1, storage_options=options) as manager:
        assert manager.all_steps() == [5]
        manager.verify(5)


def test_shard_writer_takes_the_checkpoint_id_of_dcp(tmp_path: pathlib.Path) -> None:
    """As stock writers do."""
    dcp.save({"x": torch.ones(3)}, storage_writer=ShardWriter(), checkpoint_id=str(tmp_path / "9"))
    target = {"x": torch.zeros(3)}
    dcp.load(target, storage_reader=ShardReader(), checkpoint_id=str(tmp_path / "9"))
    assert torch.equal(target["x"], torch.ones(3))


def test_shard_reader_reads_stock_steps(tmp_path: pathlib.Path) -> None:
    """Through the restricted unpickler."""
    dcp.save(every_kind(6), checkpoint_id=str(tmp_path))
    target = target_like(every_kind(6))
    dcp.load(target, storage_reader=ShardReader(tmp_path))
    assert_same(every_kind(6), target)


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def test_shard_reader_hands_no_foreign_pickle_to_dcps_planner(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock dcp.load would run the object's code."""
    monkeypatch.chdir(tmp_path)
    dcp.save({"x": Bomb()}, checkpoint_id=str(tmp_path / "3"))
    with pytest.raises(dcp.CheckpointException, match="does not load without running code"):
        dcp.load({"x": 0}, storage_reader=ShardReader(tmp_path / "3"))
    with CheckpointManager(str(tmp_path), 1) as manager, pytest.raises(UnsafeObjectError, match="'x'"):
        manager.restore(3, {"x": 0})
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_bomb_in_stock_metadata_does_not_go_off(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restricted unpickler knows torch's classes only."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with CheckpointManager(str(tmp_path), 1) as manager, pytest.raises(UnsafeObjectError, match="Nothing was run"):
        manager.restore(3, {"x": 0})
    assert not (tmp_path / "exploded").exists()


def test_every_stored_item_is_a_valid_zip_with_right_checksums(saved: pathlib.Path) -> None:
    """What `python -m zipfile --test` checks, item by item."""
    manifest = manifest_of(saved / "7")
    assert len(manifest.chunks) > 30
    for chunk in manifest.chunks:
        data = (saved / "7" / manifest.head.attempt / chunk.file).read_bytes()
        with zipfile.ZipFile(io.BytesIO(data[chunk.offset : chunk.offset + chunk.length])) as archive:
            assert archive.testzip() is None, chunk.key


def test_tied_weights_are_stored_once_and_large_payloads_are_aligned(saved: pathlib.Path) -> None:
    """4 KiB alignment is what direct I/O needs."""
    chunks = {chunk.key: chunk for chunk in manifest_of(saved / "7").chunks}
    assert chunks["model.tied.a"].offset == chunks["model.tied.b"].offset
    assert chunks["model.large"].payload_offset % 4096 == 0
    assert chunks["model.tied.a"].payload_offset % 4096 == 0
