"""Checkpoints that were made to do harm: no code runs, nothing outside of the run is opened, memory and time stay
small, and every error is a CheckpointError. scripts/campaign/hostile.py and fuzz.py go on from here."""

from __future__ import annotations

import contextlib
import pathlib
import pickle
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from asyncckpt import CheckpointManager, SaveError, ShardReader, UnsafeObjectError
from asyncckpt.chunks import Chunk, ChunkTable, Key
from asyncckpt.dcp_metadata import unpickle_metadata
from asyncckpt.framing import Layout, encode_object
from asyncckpt.index import RunIndex
from asyncckpt.manifest import (
    FileRecord,
    Head,
    Manifest,
    ManifestError,
    decode_manifest,
    decode_records,
    encode_manifest,
)
from asyncckpt.objects import load_object
from asyncckpt.steps import MAX_NUMBER, manifest_name, read_listing, summarise
from scripts.campaign.fuzz import TARGETS
from tests import hostile

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["metadata", "object", "stock", "manifest", "names", "links"])
def test_no_hostile_checkpoint_gets_anywhere(tmp_path: pathlib.Path, start: str) -> None:
    """Each kind once, at every way in, in a process of its own with a limit on memory and a deadline."""
    code = f"""
import json, logging, pathlib, random, warnings
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
from tests.hostile import CASES, attack
from scripts.campaign.hostile import _in_child, make_base
place = pathlib.Path({str(tmp_path)!r})
_in_child(lambda: make_base(place / "base"))
for case in CASES:
    if case.name.startswith({start!r}):
        (place / case.name).mkdir()
        report = attack(case, place / "base", place / case.name, random.Random(case.name))
        assert not report.wrong, (case.name, report.wrong)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


@pytest.mark.parametrize("name", list(TARGETS))
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**64))
def test_a_parser_returns_or_raises_its_own_error(name: str, seed: int) -> None:
    """Inputs that nearly are right; a million of them are the campaign's."""
    target = TARGETS[name]
    with contextlib.suppress(*target.refused):
        target.run(target.make(random.Random(seed)))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_a_parser_takes_any_bytes(data: bytes) -> None:
    """None of which is right."""
    for parse, refused in (
        (decode_manifest, ManifestError),
        (decode_records, ManifestError),
        (unpickle_metadata, (ValueError, UnsafeObjectError)),
        (lambda data: load_object(data, (), "key"), UnsafeObjectError),
    ):
        with pytest.raises(refused):
            parse(data)


@pytest.mark.parametrize("kind", list(hostile.PICKLES))
def test_a_pickle_bomb_does_nothing(kind: str) -> None:
    """Some of each kind, as stock metadata and as an object."""
    for number in range(4):
        data = hostile.PICKLES[kind](random.Random(number))
        with pytest.raises((ValueError, UnsafeObjectError)):
            unpickle_metadata(data)
        with contextlib.suppress(UnsafeObjectError):
            load_object(hostile.archive(data), (), "key")


def test_an_allowed_call_takes_no_memory_that_its_arguments_do_not_have() -> None:
    """A bytearray of any length, text encoded fifty times, a tensor larger than its storage."""
    for number in range(40):
        with pytest.raises(UnsafeObjectError, match="'key'"):
            load_object(hostile.archive(hostile.greedy(random.Random(number))), (), "key")


def test_a_zip_bomb_is_not_inflated() -> None:
    """Fifty megabytes in fifty kilobytes."""
    bomb = hostile.archive(b"\x80\x02N.", packed=True, **{"data/0": bytes(50_000_000)})
    assert len(bomb) < 100_000
    with pytest.raises(UnsafeObjectError, match="packed"):
        load_object(bomb, (), "key")


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 2.5, None, True]}, (1, "ü", b"", b"\xff", bytearray(b"\xff"), 10**30), {1, "a"}, complex(1, 2),
        torch.Size([1, 2]), torch.device("cpu"), torch.bfloat16, torch.strided,
    ],
)  # fmt: skip
def test_plain_values_load_as_they_were(value: Any) -> None:
    """Also empty bytes, which torch's own `weights_only` refuses."""
    assert load_object(encode_object(value), (), "key") == value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(), torch.ones(3).expand(4, 3), torch.ones(0), torch.tensor(1),
        torch.ones(5)[2:],
        torch.nn.Parameter(torch.ones(2)), torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64).conj(),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about the kinds of tensors
def test_tensors_in_objects_load_as_they_were(tensor: torch.Tensor) -> None:
    """Every layout that torch writes."""
    found = load_object(encode_object([tensor, tensor]), (), "key")
    assert found[0] is found[1]
    assert type(found[0]) is type(tensor)
    assert tensor.is_sparse or found[0].stride() == tensor.stride()
    assert torch.equal(found[0].to_dense(), tensor.to_dense())


def manifest_with(*chunks: Chunk) -> Manifest:
    head = Head(1, 1, hostile.ATTEMPT, "id", 1, "2", "0")
    files = [FileRecord("f", 10**6, 1)]
    return Manifest(head, {"w": Key(("w",), "float32", (6, 4))}, ChunkTable.of(chunks), files, 1, 1)


def piece(start: int, rows: int, dtype: str = "float32", columns: int = 4) -> Chunk:
    return Chunk("w", (start, 0), Layout(dtype, (rows, columns), (columns, 1)), 704, "f", start * 1000, 1000, 1, 2)


@pytest.mark.parametrize(
    "chunks",
    [
        (piece(0, 3),), (piece(0, 3), piece(0, 3)), (piece(0, 3), piece(4, 3)), (piece(1, 6),), (piece(0, 7),),
        (piece(0, 4), piece(2, 4)), (piece(0, 6, "int32"),), (piece(0, 6), piece(0, 6)), (piece(0, 6, columns=3),),
        (piece(0, 3), piece(0, 3), piece(3, 3)),
    ],
)  # fmt: skip
def test_chunks_that_do_not_make_up_their_tensor_are_neither_committed_nor_restored(chunks: tuple[Chunk, ...]) -> None:
    """A hole would leave what the target held before."""
    with pytest.raises(ValueError, match="'w'"):
        encode_manifest(manifest_with(*chunks))


def test_chunks_that_make_up_their_tensor_are_taken_in_any_order() -> None:
    """Empty ones, too."""
    for chunks in ((piece(0, 6),), (piece(4, 2), piece(0, 1), piece(1, 3)), (piece(0, 6), piece(6, 0))):
        assert len(decode_manifest(encode_manifest(manifest_with(*chunks))).chunks) == len(chunks)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_shard_reader_opens_neither_links_nor_files_outside(tmp_path: pathlib.Path) -> None:
    """It read what a link stood for, and said ValueError of a path that leads out."""
    outside = tmp_path / "outside"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=str(tmp_path / "run"), no_dist=True)
    data = tmp_path / "run" / "__0_0.distcp"
    data.rename(outside)
    data.symlink_to(outside)
    step = tmp_path / "run" / ".metadata"
    for change in (lambda info: None, lambda info: setattr(info, "relative_path", str(outside))):
        metadata = pickle.loads(step.read_bytes())
        for info in metadata.storage_data.values():
            change(info)
        step.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointException, match="none at all"):
            dcp.load({"w": torch.zeros(3)}, storage_reader=ShardReader(tmp_path / "run"), no_dist=True)


def test_names_with_more_digits_than_the_ranks_can_tell_each_other_are_no_steps() -> None:
    """Nor do they stop a manager from opening the run."""
    for digits in ("9" * 19, "9" * 5000, str(2**63)):
        assert not read_listing({f"{digits}/{manifest_name(1)}": 1})
        assert summarise(read_listing({f"7/manifest-{digits}.json": 1})).next_sequence == 1
    for name in ("manifest-1.json", "manifest-000000001.json"):  # a second name for number 1
        assert not read_listing({f"7/{name}": 1})[7].manifests


def test_a_planted_last_number_is_said_and_loses_nothing() -> None:
    """No larger one has a name."""
    index = RunIndex()
    index.load(summarise(read_listing({f"7/{manifest_name(MAX_NUMBER)}": 1})), {})
    for _ in range(2):
        with pytest.raises(SaveError, match="Remove it"):
            index.take_sequence()


def test_empty_bytes_in_a_state_come_back(tmp_path: pathlib.Path) -> None:
    """They were saved without a word, and could not be restored."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, {"b": b"", "c": [b""]})
        target: dict[str, Any] = {"b": None, "c": [None]}
        manager.restore(1, target)
    assert target == {"b": b"", "c": [b""]}
