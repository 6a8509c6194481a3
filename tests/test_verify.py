"""Verifying a step: what is read and how much of it at a time, what damage is called, and what is none."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from asyncckpt import (
    CheckpointManager,
    DamagedStepError,
    Event,
    Restored,
    RestoreError,
    StepNotFoundError,
    UnsafeObjectError,
)
from asyncckpt.manifest import Manifest, decode_manifest, encode_manifest
from asyncckpt.storage import open_storage
from asyncckpt.testing import FaultyStorage, RecordingStorage
from asyncckpt.verify import PIECE_BYTES, READ_THREADS, find_damage, verify_step
from tests.s3 import Fault, Request, S3Proxy
from tests.states import restored, state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """Step 1: a tensor of three blocks, an aligned one, a small one, an object."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"big": torch.randn(2_500_000), "medium": torch.randn(300_000), "w": torch.ones(3), "o": [1]})
    return tmp_path


def data_file(run: pathlib.Path, step: int = 1) -> pathlib.Path:
    return next((run / str(step)).glob("*/__0_0.distcp"))


def manifest_of(run: pathlib.Path, step: int = 1) -> Manifest:
    return decode_manifest(max((run / str(step)).glob("manifest-*")).read_bytes())


def flip(path: pathlib.Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def damage_of(run: pathlib.Path, step: int = 1) -> str:
    with CheckpointManager(str(run)) as manager, pytest.raises(DamagedStepError) as raised:
        manager.verify(step)
    assert (raised.value.step, raised.value.url) == (step, str(run))
    return str(raised.value)


# -- what is read


def test_it_reads_each_byte_once_in_pieces_of_bounded_size(run: pathlib.Path) -> None:
    """Of a whole step; and each file's in one or more pieces."""
    ranges: list[tuple[str, int, int]] = []

    class Counting(RecordingStorage):
        def read_into(
            self, path: str, wanted: Sequence[tuple[int, memoryview]], filled: Callable[[int], None] | None = None
        ) -> None:
            assert sum(len(view) for _, view in wanted) <= PIECE_BYTES
            ranges.extend((path, start, start + len(view)) for start, view in wanted)
            super().read_into(path, wanted, filled)

    told: list[int] = []
    report = verify_step(Counting(open_storage(str(run))), "1", told.append)
    assert report.num_bytes == sum(told) == sum(stop - start for _, start, stop in ranges)
    ranges.sort()
    assert all(a[0] != b[0] or a[2] == b[1] for a, b in itertools.pairwise(ranges))
    assert (report.num_files, report.checksums) == (3, "manifest")
    assert PIECE_BYTES * READ_THREADS <= 64 << 20


@pytest.mark.s3
def test_it_has_several_requests_in_flight(s3_url: str, s3_options: dict[str, Any]) -> None:
    """One at a time would take a day for what S3 gives in an hour."""
    with CheckpointManager(s3_url, storage_options=s3_options) as manager:
        manager._storage.max_file_bytes = 100_000
        manager.save(1, {f"t{n}": torch.ones(20_000) for n in range(READ_THREADS)})

    together = threading.Barrier(READ_THREADS - 1, timeout=60)

    def hold(request: Request) -> Fault:
        # Of the first ones one is the manifest; seven of the nine files are left.
        if request.operation == "GET object" and request.number > 3:
            together.wait()
        return ""

    with S3Proxy(s3_options["client_kwargs"]["endpoint_url"], hold) as proxy:
        client = {**s3_options["client_kwargs"], "endpoint_url": proxy.endpoint}
        report = verify_step(open_storage(s3_url, {**s3_options, "client_kwargs": client}), "1")
    assert report.num_files == READ_THREADS + 2
    assert not together.broken


def test_files_besides_those_of_the_manifest_are_no_damage(run: pathlib.Path) -> None:
    """The data of a save that died, and what a user left there."""
    (run / "1" / "00000009-abcdef").mkdir()
    (run / "1" / "00000009-abcdef" / "__0_0.distcp").write_bytes(b"half")
    (run / "1" / "notes.txt").write_text("x")
    with CheckpointManager(str(run)) as manager:
        manager.verify(1)


# -- what damage is called


def test_damage_is_named_by_file_key_offset_expected_and_found(run: pathlib.Path) -> None:
    """A block of a payload, the framing of an item, and the zeros between items."""
    path, manifest = data_file(run), manifest_of(run)
    chunks = {chunk.key: chunk for chunk in manifest.chunks}
    big, medium = chunks["big"], chunks["medium"]
    second_block = big.payload_offset + (4 << 20)
    ends = sorted((chunk.offset + chunk.length, chunk.offset) for chunk in manifest.chunks)
    gap = next(end for (end, _), (_, start) in itertools.pairwise(ends) if start > end)
    for at in (second_block + 77, medium.offset + 5, gap):
        flip(path, at)
    text = damage_of(run)
    assert f"{path.relative_to(run)} has CRC32" in text
    crc = big.block_crcs[1]
    assert re.search(
        rf"'big': the 4194304 bytes at offset {second_block} have CRC32 \w+, the manifest says {crc:08x}", text
    )
    assert re.search(rf"'medium': its item at offset {medium.offset}, {medium.length} bytes, has CRC32 \w+", text)
    assert "the payload is whole" in text
    assert f"no item: the byte at offset {gap} is 0x01, it was 0x00" in text
    assert "'w'" not in text


def test_of_many_damaged_items_some_are_named(tmp_path: pathlib.Path) -> None:
    """A million lines help nobody."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {f"k{i}": torch.ones(8) for i in range(50)})
    path = data_file(tmp_path)
    path.write_bytes(bytes(path.stat().st_size))
    lines = damage_of(tmp_path).splitlines()
    assert len(lines) == 23
    assert lines[-1].endswith("and more")


def test_stock_metadata_that_differs_is_told_apart(run: pathlib.Path) -> None:
    """The step restores without it, and says so."""
    flip(run / "1" / ".metadata", 60)
    assert "restores this step without it" in damage_of(run)


def test_a_file_that_vanishes_or_shrinks_while_it_is_read_is_named(run: pathlib.Path) -> None:
    """Words, not an EOFError."""
    path = data_file(run)

    class Shrinking(RecordingStorage):
        def read_into(self, name: str, *args: Any) -> None:
            if name.endswith(".distcp"):
                changes[0]()
            super().read_into(name, *args)

    changes: list[Callable[[], Any]] = [lambda: path.write_bytes(path.read_bytes()[:5000])]
    with pytest.raises(DamagedStepError, match=r"__0_0.distcp went away or was cut short"):
        verify_step(Shrinking(open_storage(str(run))), "1")
    path.write_bytes(bytes(manifest_of(run).files[0].size))
    changes[0] = lambda: path.unlink(missing_ok=True)
    with pytest.raises(DamagedStepError, match=r"__0_0.distcp went away or was cut short"):
        verify_step(Shrinking(open_storage(str(run))), "1")


@pytest.mark.parametrize("again", [False, True])
def test_a_step_that_goes_or_is_saved_anew_meanwhile_is_not_called_damaged(tmp_path: pathlib.Path, again: bool) -> None:
    """A run prunes and saves while another process verifies."""
    with CheckpointManager(str(tmp_path)) as writer:
        writer.save(1, state(1))

        class Changed(RecordingStorage):
            is_new = True

            def read_into(self, *args: Any) -> None:
                if self.is_new:
                    self.is_new = False
                    change()
                super().read_into(*args)

        def change() -> None:
            if again:
                writer.save(1, state(2))
                writer.join()
            else:
                for path in sorted((tmp_path / "1").rglob("*"), key=lambda p: "manifest" not in p.name):
                    path.unlink() if path.is_file() else None

        storage = Changed(open_storage(str(tmp_path)))
        if again:
            assert verify_step(storage, "1").checksums == "manifest"
        else:
            with pytest.raises(StepNotFoundError):
                verify_step(storage, "1")


def test_a_length_that_no_file_has_takes_no_memory(run: pathlib.Path) -> None:
    """A manifest may say anything."""
    path = next((run / "1").glob("manifest-*"))
    manifest = decode_manifest(path.read_bytes())
    (file,) = manifest.files
    files = [dataclasses.replace(file, size=1 << 61)]
    path.write_bytes(encode_manifest(dataclasses.replace(manifest, files=files)))
    assert f"has {file.size} bytes, the manifest says {1 << 61}" in damage_of(run)


def test_storage_that_fails_is_not_called_damage(run: pathlib.Path) -> None:
    """RestoreError says what failed."""
    with CheckpointManager(str(run)) as manager:
        manager._storage = FaultyStorage(manager._storage, "read_into", nth=1)
        with pytest.raises(RestoreError, match=r"step 1 at .* cannot be read: .*injected fault") as raised:
            manager.verify(1)
    assert not isinstance(raised.value, DamagedStepError)


# -- a manifest in a place that is not its own


def two_steps(path: pathlib.Path) -> None:
    with CheckpointManager(str(path)) as manager:
        for step in (1, 2):
            manager.save(step, state(step))


def reencoded(path: pathlib.Path, **head: Any) -> bytes:
    manifest = decode_manifest(path.read_bytes())
    for name, value in head.items():
        object.__setattr__(manifest.head, name, value)
    return encode_manifest(manifest)


def test_a_whole_manifest_of_another_step_or_save_is_damage(tmp_path: pathlib.Path) -> None:
    """Its checksum is right, what it names is whole, and it would restore the wrong state."""
    two_steps(tmp_path)
    first, second = (next((tmp_path / str(step)).glob("manifest-*")) for step in (1, 2))
    whole = second.read_bytes()
    cases = [
        (second.with_name("manifest-00000007.json"), whole),
        (second.with_name("manifest-00000003.json"), first.read_bytes()),
        (second, reencoded(second, step=1)),
        (second, reencoded(second, sequence=9)),
        (second, reencoded(second, attempt="../1")),
        (second, reencoded(second, attempt=decode_manifest(first.read_bytes()).head.attempt)),
    ]
    for path, data in cases:
        second.unlink(missing_ok=True)
        path.write_bytes(data)
        with CheckpointManager(str(tmp_path)) as manager:
            for act in (manager.verify, lambda step: restored(manager, step)):
                with pytest.raises(DamagedStepError, match=r"manifest-\d+.json at .* is damaged: "):
                    act(2)
            assert manager.restore_latest(state(0)) == 1
        path.unlink()
        second.write_bytes(whole)
    with CheckpointManager(str(tmp_path)) as manager:
        manager.verify(2)


def test_a_step_folder_that_was_moved_says_so(tmp_path: pathlib.Path) -> None:
    """Under another number it would be another step of another run's order."""
    two_steps(tmp_path)
    (tmp_path / "2").rename(tmp_path / "5")
    with CheckpointManager(str(tmp_path)) as manager:
        assert manager.all_steps() == [1, 5]
        assert manager.restore_latest(state(0)) == 1
        with pytest.raises(DamagedStepError, match="it is of step 2, and was copied or moved from there"):
            manager.restore(5, state(0))


# -- steps of other writers


@pytest.fixture
def no_zip_crcs() -> Any:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def test_stock_items_without_checksums_are_restored_and_said_to_be_unverified(
    tmp_path: pathlib.Path, no_zip_crcs: None, caplog: pytest.LogCaptureFixture
) -> None:
    """set_crc32_options(False) leaves zeros where the CRC32s would stand."""
    dcp.save({"w": torch.arange(100), "o": [1]}, checkpoint_id=str(tmp_path / "3"))
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), events=[seen.append]) as manager:
        assert manager.verify(3).checksums == "none"
        target = {"w": torch.zeros(100, dtype=torch.int64), "o": [0]}
        manager.restore(3, target)
    assert torch.equal(target["w"], torch.arange(100))
    assert [event.checksums for event in seen if isinstance(event, Restored)] == ["none"]
    assert "not verified, as what was read carries no checksums" in caplog.text


def test_a_large_stock_item_is_read_in_pieces(tmp_path: pathlib.Path) -> None:
    """Its zip is checked as it comes, and no piece of it twice but for its directory."""
    dcp.save({"w": torch.arange(5_000_000)}, checkpoint_id=str(tmp_path / "3"))
    sizes: list[int] = []

    class Counting(RecordingStorage):
        def read_into(self, path: str, wanted: Sequence[tuple[int, memoryview]], *arguments: Any) -> None:
            sizes.extend(len(view) for _, view in wanted)
            super().read_into(path, wanted, *arguments)

    assert verify_step(Counting(open_storage(str(tmp_path))), "3").checksums == "zip"
    assert max(sizes) <= PIECE_BYTES
    assert 40_000_000 <= sum(sizes) <= 40_000_000 + 2 * PIECE_BYTES


def test_stock_items_with_checksums_are_said_to_be_verified_by_them(tmp_path: pathlib.Path) -> None:
    """By their zip's."""
    dcp.save({"w": torch.arange(100), "o": [1]}, checkpoint_id=str(tmp_path / "3"))
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), events=[seen.append]) as manager:
        assert manager.verify(3).checksums == "zip"
        manager.restore(3, {"w": torch.zeros(100, dtype=torch.int64), "o": [0]})
    assert [event.checksums for event in seen if isinstance(event, Restored)] == ["zip"]


def test_items_in_torchs_old_format_are_named_as_such(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save before 1.6, which a writer may still be told to use; it has no checksums and pickles by itself."""
    plain = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *a, **k: plain(*a, **k, _use_new_zipfile_serialization=False))
        dcp.save({"w": torch.arange(100)}, checkpoint_id=str(tmp_path / "3"))
    with CheckpointManager(str(tmp_path)) as manager:
        for act in (manager.verify, lambda step: manager.restore(step, {"w": torch.zeros(100, dtype=torch.int64)})):
            with pytest.raises(DamagedStepError, match=r"format before 1\.6"):
                act(3)


def test_items_in_safetensors_are_named_as_such(tmp_path: pathlib.Path) -> None:
    """Not even torch's own reader takes them from FileSystemWriter."""
    dcp.save({"w": torch.arange(3)}, storage_writer=FileSystemWriter(tmp_path / "3"))
    path = tmp_path / "3" / "__0_0.distcp"
    size = path.stat().st_size
    path.write_bytes((struct.pack("<Q", 60) + b'{"w":{"dtype":"I64"}}').ljust(size))
    with CheckpointManager(str(tmp_path)) as manager:
        for act in (manager.verify, lambda step: manager.restore(step, {"w": torch.zeros(3, dtype=torch.int64)})):
            with pytest.raises(DamagedStepError, match="safetensors"):
                act(3)


def test_every_flip_in_a_stock_item_is_found_or_harmless(tmp_path: pathlib.Path) -> None:
    """The bytes of its zip that no CRC32 covers may be anything; no error but ours comes of them."""
    dcp.save({"w": torch.arange(9.0), "o": [1, 2]}, checkpoint_id=str(tmp_path / "3"))
    path = tmp_path / "3" / "__0_0.distcp"
    whole = bytearray(path.read_bytes())
    storage, found = open_storage(str(tmp_path)), 0
    with CheckpointManager(str(tmp_path), chkpt_on_preemption=False) as manager:
        for at in range(0, len(whole), 29):
            whole[at] ^= 1 << at % 8
            path.write_bytes(whole)
            whole[at] ^= 1 << at % 8
            problems = find_damage(storage, "3")[1]
            target = {"w": torch.zeros(9), "o": [0]}
            try:
                manager.restore(3, target)
            except DamagedStepError:
                found += 1
                assert problems
            except UnsafeObjectError:  # of a field that its reader looks at, and no checksum covers
                found += 1
            else:
                assert torch.equal(target["w"], torch.arange(9.0))
                assert target["o"] == [1, 2]
    assert found


def test_a_stock_index_that_points_outside_its_files_is_damage(tmp_path: pathlib.Path) -> None:
    """Found before anything is allocated or overwritten."""
    dcp.save({"w": torch.ones(1000)}, checkpoint_id=str(tmp_path / "3"))
    path = tmp_path / "3" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    target = {"w": torch.zeros(1000)}
    with CheckpointManager(str(tmp_path)) as manager:
        with pytest.raises(DamagedStepError, match=r"should hold 'w' at offset 0, \d+ bytes, and has \d+"):
            manager.restore(3, target)
        with pytest.raises(DamagedStepError, match="lacks the item 'w'"):
            manager.verify(3)
    assert not target["w"].any()
