"""Files in a step: given beside tensors or alone, copied at the call, committed with it, and brought back whole."""

from __future__ import annotations

import json
import pathlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from asyncckpt import (
    CheckpointManager,
    DamagedStepError,
    Event,
    Restored,
    RestoreError,
    Staged,
    StepNotFoundError,
    WriteError,
)
from asyncckpt.commit import mend_step
from asyncckpt.fetch import fetch_files
from asyncckpt.files import BytesFile, File, FileContent
from asyncckpt.manifest import FileRecord, Manifest, ManifestError, check_file_name, decode_manifest, encode_manifest
from asyncckpt.shard import payload_view
from asyncckpt.state import num_bytes_of
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import Call, FaultyStorage, GatedStorage, RecordingStorage
from asyncckpt.verify import PIECE_BYTES
from stagers import OverlappingAsyncStager
from tests.crew import Crew
from tests.faults.harness import KilledStorage, KillPoint, Place, messages_of, open_manager
from tests.processes import Link
from tests.test_ranks_in_step import Raised, attempt
from tests.test_verify import flip

CONFIG = b'{"hidden": 8}'


class TensorFile:
    """A format: the tensors of a dict as they lie, and an object."""

    def __init__(self, value: dict[str, Any]) -> None:
        self._views = [payload_view(v) for v in value.values() if isinstance(v, torch.Tensor)]
        self._views.append(
            memoryview(json.dumps({k: v for k, v in value.items() if isinstance(v, int | list)}).encode())
        )
        self.size = sum(map(len, self._views))

    def views(self) -> Iterator[memoryview]:
        return iter(self._views)


def bytes_of(value: dict[str, Any]) -> bytes:
    return b"".join(TensorFile(value).views())


def optimizer(seed: float = 1.0) -> dict[str, Any]:
    return {
        "momentum": torch.full((1000,), 1.0 * seed),
        "large": torch.full((600_000,), 1.0 * seed),
        "groups": [0, 1],
        "step": 3,
    }


def some_files() -> dict[str, File | bytes]:
    return {
        "optimizer.bin": File(optimizer(), TensorFile),
        "rank 0/~(x),@+=.pkl": b"\x80\x04N.",
        "dist/.metadata": b"",
        "config.json": CONFIG,
    }


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Everything below a folder, hidden or not."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if not path.is_dir()}


def attempt_of(run: pathlib.Path, step: int) -> pathlib.Path:
    return next(path for path in (run / str(step)).iterdir() if path.is_dir())


def manifest_of(run: pathlib.Path, step: int = 1) -> Manifest:
    return decode_manifest(max((run / str(step)).glob("manifest-*")).read_bytes())


# -- there and back


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_the_stock_index_is_made_again_from_the_manifest(tmp_path: pathlib.Path) -> None:
    """Byte for byte, as of a step without files: a writer that is killed may leave it to the next one."""
    with CheckpointManager(str(tmp_path), max_to_keep=1) as manager:
        manager.save(1, {"w": torch.ones(5), "o": [1]}, files=some_files())
    before = (tmp_path / "1" / ".metadata").read_bytes()
    mend_step(open_storage(str(tmp_path)), "1")
    assert (tmp_path / "1" / ".metadata").read_bytes() == before


def test_files_come_back_as_they_were_given(any_url: tuple[str, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    """On every kind of storage, beside tensors; the tensors, too."""
    url, options = any_url
    target = tmp_path / "made" / "here"
    expected = {
        "optimizer.bin": bytes_of(optimizer()), "rank 0/~(x),@+=.pkl": b"\x80\x04N.", "dist/.metadata": b"",
        "config.json": CONFIG,
    }  # fmt: skip
    with CheckpointManager(url, storage_options=options) as manager:
        manager.save(1, {"w": torch.ones(5)}, files=some_files())
        manager.verify(1)
    with CheckpointManager(url, storage_options=options) as manager:
        assert manager.files(1) == {name: len(data) for name, data in expected.items()}
        manager.fetch(1, target)
        assert contents(target) == expected
        state = {"w": torch.zeros(5)}
        manager.restore(1, state, strict=True)
        assert state["w"].tolist() == [1] * 5


def test_a_step_may_hold_files_alone(any_url: tuple[str, dict[str, Any]], tmp_path: pathlib.Path) -> None:
    """Saved with an empty state dict, and restored into one; also when it is saved again with other files."""
    url, options = any_url
    with CheckpointManager(url, storage_options=options) as manager:
        manager.save_async(7, {}, files={"a/model.bin": b"one", "b": b"two"})
        manager.save_async(7, {}, files={"a": b"three"}, force=True)
        manager.join()
        assert manager.files(7) == {"a": 5}
        assert manager.restore_latest({}) == 7
        assert manager.fetch_latest(tmp_path / "to") == 7
        manager.verify(7)
        names = list(open_storage(url, options).list_files())
    assert contents(tmp_path / "to") == {"a": b"three"}
    assert sorted(name.rpartition("/")[2] for name in names) == [".metadata", "a", "manifest-00000002.json"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_stock_dcp_reads_a_step_with_files(tmp_path: pathlib.Path) -> None:
    """Its tensors, and of a step with files alone nothing."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"w": torch.arange(5.0)}, files=some_files())
        manager.save(2, {}, files=some_files())
    state = {"w": torch.zeros(5)}
    dcp.load(state, checkpoint_id=str(tmp_path / "1"))
    dcp.load({}, checkpoint_id=str(tmp_path / "2"))
    assert state["w"].tolist() == [0, 1, 2, 3, 4]


# -- copied at the call


@pytest.mark.parametrize("stager", [None, OverlappingAsyncStager], ids=["blocking", "overlapping"])
def test_what_changes_after_the_call_is_not_in_the_file(
    tmp_path: pathlib.Path, stager: Callable[[], Any] | None
) -> None:
    """Neither tensors nor objects: they are copied with the state."""
    value = optimizer(1.0)
    gate: list[GatedStorage] = []

    def wrap(storage: Storage) -> Storage:
        gate.append(GatedStorage(storage, "write_file"))
        return gate[0]

    with open_manager(Place(str(tmp_path / "run"), {}), wrap, stager=stager and stager()) as manager, gate[0]:
        manager.save_async(1, {}, files={"optimizer.bin": File(value, TensorFile)})
        manager.wait_staged()
        value["large"].fill_(9), value["groups"].append(5)
        gate[0].open()
        manager.join()
        manager.fetch(1, tmp_path / "to")
    assert (tmp_path / "to" / "optimizer.bin").read_bytes() == bytes_of(optimizer(1.0))


def test_a_synchronous_save_writes_large_values_whole(tmp_path: pathlib.Path) -> None:
    """Which are copied while it is written."""
    value = {"large": torch.randn(5_000_000), "step": 1}
    with CheckpointManager(str(tmp_path / "run")) as manager:
        manager.save(1, {"w": torch.randn(3_000_000)}, files={"x": File(value, TensorFile)})
        manager.fetch(1, tmp_path / "to")
    assert (tmp_path / "to" / "x").read_bytes() == bytes_of(value)


def test_a_tensor_in_the_state_and_in_a_file_is_staged_once(tmp_path: pathlib.Path) -> None:
    """And bytes are held as they are; both count as staged."""
    events: list[Event] = []
    seen: list[Any] = []
    weights, data = torch.ones(1000), b"x" * 77

    def as_given(value: bytes) -> FileContent:
        seen.append(value)
        return BytesFile(value)

    files: dict[str, File | bytes] = {"w": File({"w": weights}, TensorFile), "b": File(data, as_given), "c": data}
    with CheckpointManager(str(tmp_path), events=[events.append]) as manager:
        manager.save(1, {"w": weights}, files=files)
    assert [event.num_bytes for event in events if isinstance(event, Staged)] == [4000 + 2 * 77]
    assert seen[0] is data


def test_files_of_the_same_structure_cost_no_new_plan(tmp_path: pathlib.Path) -> None:
    """A save plans when the structure of state or files changed, not when values did."""
    planned = []

    class Planner(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            planned.append(1)
            return super().create_local_plan()

    with CheckpointManager(str(tmp_path), save_planner=Planner()) as manager:
        for step in range(4):
            manager.save(step, {"w": torch.ones(5)}, files={"o": File(optimizer(step), TensorFile), "b": b"x" * step})
        assert len(planned) == 1
        manager.save(4, {"w": torch.ones(5), "v": torch.ones(5)}, files={"o": b""})
    assert len(planned) == 2


def test_prewarm_takes_files_too(tmp_path: pathlib.Path) -> None:
    """So that the first save allocates and plans nothing."""
    stager = OverlappingAsyncStager()
    with CheckpointManager(str(tmp_path), stager=stager) as manager:
        manager.prewarm({"w": torch.ones(5)}, files=some_files())
        before = repr(stager)
        manager.save(1, {"w": torch.ones(5)}, files=some_files())
        assert repr(stager) == before
        assert len(manager.files(1)) == 4


# -- names


GOOD = ["a", "a/b", "pytorch_model_fsdp_0/__0_0.distcp", "epoch=0-step=10.ckpt", ".hidden", "...", "a..b", "x" * 200]
BAD: list[Any] = [
    "", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.", "__0_0.distcp", "__12_3.distcp/x", "dead",
    "dead/x", ".tmp-1", "a/.tmp-1", "a\\b", "a\0", "a\n", "\u00e4", "a*", "a?b", "a[0]", "a%20b", "x" * 201,
    "a/" * 300 + "a", None, 1, b"a",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD, ids=lambda name: repr(name)[:20])
def test_a_bad_name_is_refused_before_anything_is_staged(tmp_path: pathlib.Path, name: Any) -> None:
    """At the call, and the next save is as usual."""
    with CheckpointManager(str(tmp_path / "run")) as manager:
        with pytest.raises(ValueError, match="is no name for a file"):
            manager.save_async(1, {"w": torch.ones(1)}, files={name: b"x"})
        assert contents(tmp_path) == {}
        assert manager.save(1, {"w": torch.ones(1)})


def test_names_that_are_folders_of_others_and_values_that_are_no_files_are_refused(tmp_path: pathlib.Path) -> None:
    """In words, at the call."""
    with CheckpointManager(str(tmp_path / "run")) as manager:
        with pytest.raises(ValueError, match=r"'a/b' is a file, and 'a/b/c' lies in a folder of that name"):
            manager.save(1, {}, files={"a/b/c": b"x", "a/b": b"y"})
        with pytest.raises(TypeError, match=r"the file 'a' is a str: give a File, or bytes\. Nothing was written"):
            manager.save(1, {}, files={"a": "text"})  # type: ignore[dict-item]
        assert manager.all_steps() == []


PARTS = st.text("abcXYZ019_.=+@,()~ -", min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.lists(PARTS, min_size=1, max_size=3).map("/".join), st.binary(max_size=20), max_size=4))
def test_every_name_that_is_taken_comes_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    """And one that is not taken leaves nothing behind."""
    folder = tmp_path_factory.mktemp("names")
    with CheckpointManager(str(folder / "run")) as manager:
        try:
            manager.save(1, {}, files=files)
        except ValueError:
            assert contents(folder) == {}
            return
        manager.fetch(1, folder / "to")
    assert contents(folder / "to") == files


def with_names(made: Manifest, *names: str) -> Manifest:
    """The manifest with opaque files of these names."""
    return replace(made, files=[made.files[0], *(FileRecord(name, 1, 0) for name in names)])


@pytest.mark.parametrize("name", [*GOOD, "rank 0/~(x),@+=.pkl"])
def test_good_names_are_good_in_a_manifest(name: str) -> None:
    """Which a reader checks by the same rule."""
    assert check_file_name(name) == name


@pytest.mark.parametrize("name", [name for name in BAD if isinstance(name, str)], ids=lambda name: repr(name)[:20])
def test_a_manifest_with_a_hostile_name_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    """So that a file can never leave the folder that it is fetched into."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"w": torch.ones(1)}, files={"x": b"1"})
    hostile = with_names(manifest_of(tmp_path), name)
    with pytest.raises(ManifestError):
        decode_manifest(encode_manifest(hostile))


def test_a_manifest_in_which_a_name_is_anothers_folder_is_refused(tmp_path: pathlib.Path) -> None:
    """No folder could hold both."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"w": torch.ones(1)}, files={"x": b"1", "y/z": b"2"})
    made = manifest_of(tmp_path)
    assert [file.name for file in made.opaque] == ["x", "y/z"]
    assert decode_manifest(encode_manifest(with_names(made, "b", "a/b"))).opaque[1].name == "a/b"
    with pytest.raises(ManifestError, match="'x' is a file"):
        decode_manifest(encode_manifest(with_names(made, "x", "x/y")))
    with pytest.raises(ManifestError, match="stands there twice"):
        decode_manifest(encode_manifest(with_names(made, "x", "x")))


# -- failures, and what is over


def test_a_file_that_cannot_be_made_fails_the_save_in_words(tmp_path: pathlib.Path) -> None:
    """Nothing of it stays, its buffers are free again, and the next save is as usual."""
    stager = OverlappingAsyncStager()

    def fail(value: Any) -> FileContent:
        raise KeyError("no such format")

    with CheckpointManager(str(tmp_path / "run"), stager=stager) as manager:
        manager.save_async(1, {"w": torch.ones(5)}, files={"a/b": File(optimizer(), fail), "c": b"x"})
        with pytest.raises(WriteError, match=r"the file 'a/b' could not be made: KeyError: 'no such format'"):
            manager.join()
        assert contents(tmp_path / "run") == {}
        assert manager.save(2, {"w": torch.ones(5)}, files={"a/b": File(optimizer(), TensorFile)})
        assert "0 lent" in repr(stager)
        assert manager.all_steps() == [2]


def test_storage_that_fails_on_a_file_fails_the_save_and_nothing_of_it_stays(tmp_path: pathlib.Path) -> None:
    """Neither tensors nor other files, nor folders."""

    def wrap(storage: Storage) -> Storage:
        return FaultyStorage(storage, "write_file", matches=lambda call: call.path.endswith("/deep/b"), nth=1)

    with open_manager(Place(str(tmp_path / "run"), {}), wrap) as manager:
        manager.save_async(1, {"w": torch.ones(5)}, files={"a": b"1", "deep/b": b"2", "deep/c": b"3"})
        with pytest.raises(WriteError):
            manager.join()
        assert list((tmp_path / "run").rglob("*")) == []
        assert manager.save(1, {"w": torch.ones(5)}, files={"deep/b": b"2"})
        assert manager.files(1) == {"deep/b": 1}


def test_a_file_of_another_size_than_announced_fails_the_save(tmp_path: pathlib.Path) -> None:
    """The manifest would say what is not there."""

    class Wrong(BytesFile):
        @property
        def size(self) -> int:
            return 5

    with CheckpointManager(str(tmp_path)) as manager:
        with pytest.raises(WriteError, match="announced"):
            manager.save(1, {}, files={"a": File(b"1234567", Wrong)})
        assert manager.all_steps() == []


def test_files_are_pruned_with_their_step(any_url: tuple[str, dict[str, Any]]) -> None:
    """Those in folders, too, also by a later run that only listed them; and folders that are left empty go."""
    url, options = any_url
    files = {"a/b/c": b"1", "d": b"2"}
    with CheckpointManager(url, max_to_keep=2, storage_options=options) as manager:
        manager.save(1, {"w": torch.ones(2)}, files=files)
        manager.save(2, {"w": torch.ones(2)}, files=files)
    with CheckpointManager(url, max_to_keep=2, storage_options=options) as manager:
        manager.save(3, {"w": torch.ones(2)}, files=files)
        manager.save(4, {}, files=files)
        manager.save(5, {}, files=files)
    assert {name.split("/")[0] for name in open_storage(url, options).list_files()} == {"4", "5"}
    if "://" not in url and not url.startswith("memory:"):
        assert sorted(path.name for path in pathlib.Path(url).iterdir()) == ["4", "5"]


# -- damage


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 1 and 2, each with a tensor, a file of three pieces, and a small one in a folder."""
    folder = tmp_path / "run"
    with CheckpointManager(str(folder)) as manager:
        for step in (1, 2):
            large = random.Random(step).randbytes(2 * PIECE_BYTES + 5)
            manager.save(step, {"w": torch.full((3,), float(step))}, files={"large": large, "x/small": b"%d" % step})
    return folder


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [(lambda path: path.unlink(), "is missing"), (cut, "has"), (lambda path: flip(path, 5_000_000), "has CRC32")]
damages = pytest.mark.parametrize(("damage", "text"), DAMAGES, ids=["missing", "cut", "flipped"])


@damages
def test_verify_names_a_damaged_file(run: pathlib.Path, damage: Callable[[pathlib.Path], None], text: str) -> None:
    """One that was given, as the others."""
    damage(attempt_of(run, 2) / "large")
    with CheckpointManager(str(run)) as manager:
        manager.verify(1)
        with pytest.raises(DamagedStepError) as raised:
            manager.verify(2)
    assert f"{attempt_of(run, 2).name}/large {text}" in str(raised.value)
    assert ("which has no parts" in str(raised.value)) == (text == "has CRC32")
    assert "no item" not in str(raised.value)


@damages
def test_fetch_of_a_damaged_file_changes_nothing(
    run: pathlib.Path, tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None], text: str
) -> None:
    """Neither that file nor another; what can be fetched without it can."""
    damage(attempt_of(run, 2) / "large")
    target = tmp_path / "to"
    with CheckpointManager(str(run)) as manager:
        manager.fetch(1, target)
        before = contents(target)
        with pytest.raises(DamagedStepError, match=rf"/large {text}.*Nothing was changed") as raised:
            manager.fetch(2, target)
        assert (raised.value.step, raised.value.url) == (2, str(run))
        assert contents(target) == before
        assert sorted(path.name for path in target.iterdir()) == ["large", "x"]
        manager.fetch(2, target, lambda name: name.startswith("x/"))
    assert contents(target) == before | {"x/small": b"2"}


@damages
def test_fetch_latest_goes_back_to_the_newest_whole_step(
    run: pathlib.Path, tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None], text: str
) -> None:
    """And an event says which steps it passed over, and why."""
    damage(attempt_of(run, 2) / "large")
    events: list[Event] = []
    with CheckpointManager(str(run), events=[events.append]) as manager:
        assert manager.fetch_latest(tmp_path / "to") == 1
    assert contents(tmp_path / "to")["x/small"] == b"1"
    (event,) = (event for event in events if isinstance(event, Restored))
    assert (event.step, event.skipped_steps, event.num_bytes) == (1, (2,), 2 * PIECE_BYTES + 6)
    assert text in event.skip_reasons[0]


def test_fetch_latest_passes_over_a_step_that_lacks_tensors(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Whatever is selected: it is the newest whole step that it takes."""
    (attempt_of(run, 2) / "__0_0.distcp").unlink()
    with CheckpointManager(str(run)) as manager:
        assert manager.fetch_latest(tmp_path / "to", lambda name: name == "x/small") == 1
        (attempt_of(run, 1) / "large").unlink()
        with pytest.raises(DamagedStepError, match=r"no step at .* is whole, tried \[2, 1\]. Nothing was changed"):
            manager.fetch_latest(tmp_path / "to")
    assert contents(tmp_path / "to") == {"x/small": b"1"}


def test_restore_latest_passes_over_a_step_that_lacks_a_file(run: pathlib.Path) -> None:
    """What was saved together is resumed from together; `restore` of that step reads its tensors all the same."""
    (attempt_of(run, 2) / "x/small").unlink()
    with CheckpointManager(str(run)) as manager:
        state = {"w": torch.zeros(3)}
        assert manager.restore_latest(state) == 1
        manager.restore(2, state)
    assert state["w"].tolist() == [2, 2, 2]


def test_without_steps_fetch_latest_is_none(tmp_path: pathlib.Path) -> None:
    """And makes no folder."""
    with CheckpointManager(str(tmp_path / "run")) as manager:
        assert manager.fetch_latest(tmp_path / "to") is None
    assert contents(tmp_path) == {}


# -- into a folder


def test_fetch_keeps_what_is_there_already_and_replaces_what_differs(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """So a fetch that was interrupted goes on where it was; other files of the folder stay."""
    target = tmp_path / "to"
    storage = RecordingStorage(open_storage(str(run)))
    read: list[int] = []
    assert fetch_files(storage, "2", target, tell=read.append) == sum(read) == 2 * PIECE_BYTES + 6
    (target / "x/small").write_bytes(b"?")
    (target / "mine").write_bytes(b"!")
    kept = (target / "large").stat().st_ino
    storage.calls.clear()
    assert fetch_files(storage, "2", target) == 1
    assert [call.path for call in storage.calls if call.verb == "read_into"] == [f"2/{attempt_of(run, 2).name}/x/small"]
    assert (target / "large").stat().st_ino == kept
    assert contents(target).keys() == {"large", "x/small", "mine"}
    assert (target / "x/small").read_bytes() == b"2"


def test_a_folder_that_cannot_be_written_to_is_an_error_in_words(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A file in its place, or in that of one of its folders; a URL is a wrong argument."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "x").write_bytes(b"mine")
    with CheckpointManager(str(run)) as manager:
        with pytest.raises(RestoreError, match=r"file cannot be written to: .*Nothing was changed"):
            manager.fetch(1, tmp_path / "file")
        with pytest.raises(RestoreError, match=r"to cannot be written to: .*fetch them again"):
            manager.fetch(1, tmp_path / "to", lambda name: name == "x/small")
        with pytest.raises(ValueError, match="s3://b/to is a URL"):
            manager.fetch(1, "s3://b/to")
    assert contents(tmp_path / "to") == {"x": b"mine"}


def test_a_step_saved_again_while_it_is_fetched_comes_in_its_new_form(
    run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """By another run, which deletes the files that are being read."""
    again: list[str] = []

    class SavedAgain(RecordingStorage):
        def _around(self, call: Call, run_call: Callable[[], Any]) -> Any:
            if call.verb == "read_into" and not again:
                again.append(call.path)
                with CheckpointManager(str(run), chkpt_on_preemption=False) as other:
                    other.save(2, {}, files={"x/small": b"again"})
            return super()._around(call, run_call)

    storage = SavedAgain(open_storage(str(run)))
    assert fetch_files(storage, "2", tmp_path / "to") == 5
    assert contents(tmp_path / "to") == {"x/small": b"again"}


def fetch_until_killed(link: Any, url: str, folder: str, number: int) -> None:
    fetch_files(KilledStorage(open_storage(url), KillPoint("call", number, "after")), "2", folder)
    link.send(("done", None))


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 4, 6])
def test_a_fetch_that_is_killed_leaves_no_half_file(run: pathlib.Path, tmp_path: pathlib.Path, number: int) -> None:
    """After any of its four reads; the next fetch does not mind what it left."""
    target = tmp_path / "to"
    with CheckpointManager(str(run)) as manager:
        manager.fetch(1, target)
        before = contents(target)
        assert list(messages_of(fetch_until_killed, str(run), str(target), number)) == []
        left = contents(target)
        assert {name: left[name] for name in before} == before
        assert {name.split("/")[0][:5] for name in left.keys() - before.keys()} == {".tmp-"}
        manager.fetch(2, target)
    assert contents(target)["x/small"] == b"2"


def test_what_files_would_take_is_told_beforehand(tmp_path: pathlib.Path) -> None:
    """By which a save after SIGTERM is judged."""
    state = {"w": torch.ones(10)}
    assert num_bytes_of(state, {"o": File({"w": state["w"], "v": torch.ones(5)}, TensorFile), "b": b"xx"}, 0) == 60


# -- steps that are not there, and others' checkpoints


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_files_of_an_unknown_or_foreign_step_are_not_found(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The error lists the steps there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2)}, checkpoint_id=str(run / "9"))
    with CheckpointManager(str(run)) as manager:
        for call in (manager.files, lambda step: manager.fetch(step, tmp_path / "to")):
            with pytest.raises(StepNotFoundError, match="no whole step 5") as unknown:
                call(5)
            with pytest.raises(StepNotFoundError, match=r"step 9 .* is a checkpoint of another writer") as foreign:
                call(9)
            assert unknown.value.known == foreign.value.known == [1, 2]
        with pytest.raises(ValueError, match="step must be"):
            manager.files(-1)
    with pytest.raises(StepNotFoundError, match="another writer"):
        fetch_files(open_storage(str(run)), "9", tmp_path / "to")


# -- on several ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


def save_own_files(link: Link, path: str, target: str) -> Any:
    rank = dist.get_rank()
    with CheckpointManager(path, max_to_keep=2) as manager:
        for step in range(3):
            state = {"w": torch.full((4,), float(step))} if step else {}
            files: dict[str, Any] = {f"rank_{rank}/optimizer": File(optimizer(step + rank), TensorFile)}
            if rank == 0 or step:
                files[f"random_{rank}"] = b"%d %d" % (step, rank)
            manager.save_async(step, state, files=files)
        manager.join()
        named = manager.files(2)
        latest = manager.fetch_latest(
            f"{target}/{rank}", lambda name: name.startswith((f"rank_{rank}", f"random_{rank}"))
        )
        manager.fetch(1, f"{target}/all_{rank}")
        manager.verify(2)
        return named, latest, manager.all_steps()


def test_every_rank_gives_files_and_fetches_the_ones_it_wants(two: Crew, tmp_path: pathlib.Path) -> None:
    """All are in one manifest; the step is the same on all ranks."""
    seen = two.run(save_own_files, str(tmp_path / "run"), str(tmp_path))
    names = ["random_0", "random_1", "rank_0/optimizer", "rank_1/optimizer"]
    assert seen[0] == seen[1]
    assert sorted(seen[0][0]) == names
    assert seen[0][1:] == (2, [1, 2])
    for rank in range(2):
        own = {f"random_{rank}": b"2 %d" % rank, f"rank_{rank}/optimizer": bytes_of(optimizer(2.0 + rank))}
        assert contents(tmp_path / str(rank)).items() == own.items()
        assert sorted(contents(tmp_path / f"all_{rank}")) == names
        assert contents(tmp_path / f"all_{rank}")["rank_1/optimizer"] == bytes_of(optimizer(2.0))
    assert [file.name for file in manifest_of(tmp_path / "run", 2).opaque] == [
        "rank_0/optimizer", "random_0", "rank_1/optimizer", "random_1",
    ]  # fmt: skip


def save_clashing(link: Link, path: str) -> list[Any]:
    rank = dist.get_rank()
    with CheckpointManager(path) as manager:
        seen = [
            attempt(lambda: manager.save(0, {}, files={f"own_{rank}": b"x"})),
            attempt(lambda: manager.save(1, {}, files={"config.json": b"x", f"own_{rank}": b"y"})),
            attempt(lambda: manager.save(2, {}, files={"a": b"x"} if rank else {"a/b": b"y"})),
            attempt(lambda: manager.save(3, {}, files={"../a": b"x"} if rank else {})),
            attempt(lambda: manager.save(4, {}, files={f"own_{rank}": b"x"})),
        ]
        return [*seen, manager.all_steps(), sorted(manager._storage.list_files(str(1)))]


def test_two_ranks_that_give_one_name_hear_it_at_the_call(two: Crew, tmp_path: pathlib.Path) -> None:
    """Both, naming both; so for a name that is the other's folder. Nothing is written, and the next is as usual."""
    seen = two.run(save_clashing, str(tmp_path))
    for rank, (first, same, folder, bad, after, steps, left) in enumerate(seen):
        assert first is after is True
        assert same == Raised(
            "SaveError", "ranks 0 and 1 both give the file 'config.json'. Nothing was written. Give each rank's files "
            "names of their own.", None, 1,
        )  # fmt: skip
        assert "of the files of all ranks 'a' is a file, and 'a/b' lies in a folder of that name" in folder.text
        assert bad.kind == ("ValueError" if rank else "SaveError")
        assert (steps, left) == ([0, 4], [])


def fetch_after_damage(link: Link, path: str, target: str, step: int) -> Any:
    rank = dist.get_rank()
    events: list[Event] = []
    with CheckpointManager(path, events=[events.append]) as manager:
        found = attempt(lambda: manager.fetch_latest(target, lambda name: name.endswith(str(rank))))
    return found, [event.skipped_steps for event in events if isinstance(event, Restored)]


def save_two_steps(link: Link, path: str) -> None:
    rank = dist.get_rank()
    with CheckpointManager(path) as manager:
        for step in (1, 2):
            manager.save(step, {}, files={f"file_{rank}": b"%d" % step})


def test_damage_that_one_rank_finds_sends_all_back(two: Crew, tmp_path: pathlib.Path) -> None:
    """And no rank's part of the damaged step gets into the folder, though it was whole."""
    run = tmp_path / "run"
    two.run(save_two_steps, str(run))
    flip(attempt_of(run, 2) / "file_1", 0)
    seen = two.run(fetch_after_damage, str(run), str(tmp_path / "to"), 2)
    assert seen == [(1, [(2,)])] * 2
    assert contents(tmp_path / "to") == {"file_0": b"1", "file_1": b"1"}


def fetch_where_one_cannot_write(link: Link, path: str, target: str) -> Any:
    folder = f"{target}/{'file' if dist.get_rank() else 'to'}"
    with CheckpointManager(path) as manager:
        return attempt(lambda: manager.fetch_latest(folder))


def test_a_rank_that_cannot_write_ends_the_fetch_on_all(two: Crew, tmp_path: pathlib.Path) -> None:
    """It is no damage, so no older step is taken."""
    two.run(save_two_steps, str(tmp_path / "run"))
    (tmp_path / "file").write_bytes(b"")
    seen = two.run(fetch_where_one_cannot_write, str(tmp_path / "run"), str(tmp_path))
    assert [one.kind for one in seen] == ["RestoreError"] * 2
    assert "rank 1 could not restore, see its error" in seen[0].text
    assert "file cannot be written to" in seen[1].text
    assert contents(tmp_path / "to") == {}
