"""The disk of scripts/campaign/power.py: what of a run may be there after the power went, and what must."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import get_args

import pytest

from asyncckpt.storage_local import LocalStorage
from scripts.campaign.disk_model import BLOCK_BYTES, DiskModel, Tree, Way, write_tree
from scripts.campaign.syscalls import Disk, Operation

WAYS: tuple[Way, ...] = get_args(Way)
DRAWS = [random.Random(seed) for seed in range(40)]


def disk_after(*operations: str, data: bytes = b"new") -> DiskModel:
    """Words: the call, then its paths. Files are written at 0."""
    disk = DiskModel()
    for words in operations:
        name, *paths = words.split()
        flags = os.O_CREAT if name == "open" else 0
        disk.apply(Operation(name, *paths, flags=flags, data=data if name == "pwritev" else b""))
    return disk


def found(disk: DiskModel, way: Way) -> list[Tree]:
    """Every state that was drawn."""
    states: list[Tree] = []
    for draw in DRAWS:
        state = disk.found(way, draw)
        if state not in states:
            states.append(state)
    return states


def test_what_is_not_synced_may_be_lost_or_kept() -> None:
    """The name and the bytes each by itself."""
    disk = disk_after("open a", "pwritev a")
    assert found(disk, "synced") == found(disk, "nameless") == [{}]
    assert found(disk, "all") == [{"a": b"new"}]
    assert found(disk, "zeros") == [{"a": b"\0\0\0"}]
    assert found(disk, "empty") == [{"a": b""}]
    assert {"a": b"new"} in found(disk, "mixed")
    assert {} in found(disk, "mixed")


def test_a_sync_of_a_file_keeps_its_bytes_and_not_its_name() -> None:
    """And one of its folder the other way round."""
    assert found(disk_after("open a", "pwritev a", "fsync a"), "synced") == [{}]
    assert found(disk_after("open a", "pwritev a", "fsync ."), "synced") == [{"a": b""}]
    both = disk_after("open a", "pwritev a", "fsync a", "fsync .")
    assert all(found(both, way) == [{"a": b"new"}] for way in WAYS)


def test_a_name_is_the_old_or_the_new_file() -> None:
    """Never none of both, in whichever way; the old name of the new file may stay."""
    disk = disk_after("open a", "fsync a", "open b", "pwritev b", "fsync b", "fsync .", "replace b a")
    states = [state for way in WAYS for state in found(disk, way)]
    assert {state["a"] for state in states} == {b"", b"new"}  # type: ignore[arg-type]
    assert {"a": b"new", "b": b"new"} in states


def test_a_link_is_one_file_with_two_names() -> None:
    """What is found of its bytes is found under both."""
    disk = disk_after("open a", "pwritev a", "link a b")
    assert all(state["a"] == state["b"] for state in found(disk, "mixed") if len(state) == 2)


def test_a_folder_whose_name_is_lost_is_lost_with_what_was_synced_in_it() -> None:
    """Until the folder above is synced."""
    inside = ("mkdir d", "open d/a", "pwritev d/a", "fsync d/a", "fsync d")
    assert found(disk_after(*inside), "synced") == [{}]
    assert found(disk_after(*inside, "fsync ."), "synced") == [{"d": {"a": b"new"}}]


def test_what_is_deleted_comes_back_unless_its_folder_was_synced() -> None:
    """With the bytes it had."""
    whole = ("mkdir d", "open d/a", "pwritev d/a", "fsync d/a", "fsync d", "fsync .")
    gone = (*whole, "unlink d/a", "rmdir d")
    assert found(disk_after(*gone), "synced") == [{"d": {"a": b"new"}}]
    assert {"d": {}} in found(disk_after(*gone), "mixed")
    assert found(disk_after(*gone, "fsync ."), "mixed") == [{}]


def test_a_journal_keeps_names_in_their_order_and_all_before_a_sync() -> None:
    """Of anything."""
    states = found(disk_after("open a", "open b", "fsync b", "open c", "open d"), "journal")
    assert sorted(map(list, states), key=len) == [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]]


def test_blocks_that_are_not_synced_are_old_new_or_zeros() -> None:
    """And the size is the old or the new one."""
    disk = disk_after("open a", "pwritev a", "fsync a", "fsync .", data=b"o" * 2 * BLOCK_BYTES)
    disk.apply(Operation("pwritev", "a", data=b"n" * 3 * BLOCK_BYTES))
    contents = [state["a"] for state in found(disk, "mixed")]
    assert {len(content) for content in contents} == {2 * BLOCK_BYTES, 3 * BLOCK_BYTES}
    assert {content[:BLOCK_BYTES] for content in contents} == {byte * BLOCK_BYTES for byte in (b"o", b"n", b"\0")}  # type: ignore[index]


def test_all_that_a_storage_did_is_what_the_folder_holds(tmp_path: Path) -> None:
    """The calls that are recorded leave nothing out."""
    (tmp_path / "top").mkdir()
    disk, model = Disk(str(tmp_path / "top"), keep_data=True), DiskModel()
    storage = LocalStorage(str(tmp_path / "top" / "deep" / "run"))
    data = random.Random(0).randbytes(300_000)
    with disk.installed():
        storage.check_writable()
        storage.write_file("1/a/data", len(data), iter([memoryview(data[:7]), memoryview(data[7:])]))
        storage.create("1/manifest", b"manifest")
        for content in (b"longer", b"short"):
            storage.replace("1/.metadata", content)
        storage.write_file("2/a/data", 1, iter([memoryview(b"x")]))
        storage.delete(["2/a/data"])
    for operation in disk.operations:
        model.apply(operation)
    assert model.found("all", random.Random(0)) == _tree_of(tmp_path / "top")
    write_tree(model.found("synced", random.Random(0)), tmp_path / "again")
    assert _tree_of(tmp_path / "again" / "deep" / "run" / "1") == _tree_of(tmp_path / "top" / "deep" / "run" / "1")


def _tree_of(folder: Path) -> Tree:
    return {path.name: _tree_of(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_one_state(way: Way) -> None:
    """So that a line of the table can be repeated."""
    disk = disk_after("open a", "pwritev a", "open b", "open c", data=bytes(range(256)) * 100)
    assert disk.found(way, random.Random(7)) == disk.found(way, random.Random(7))
