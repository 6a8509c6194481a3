"""Steps as files of others: what stock libraries load, what stays of an export that failed, and what goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_state_dict_into_shards_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from typer.testing import CliRunner

from asyncckpt import CheckpointManager, DamagedStepError, cli
from asyncckpt.export import _split, export_files, export_safetensors, export_torch
from asyncckpt.lookup import Saved
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import FaultyStorage, RecordingStorage
from tests.crew import Crew
from tests.processes import Link
from tests.states import assert_same, every_kind
from tests.test_verify import data_file, flip

MODEL = {
    "layer.weight": torch.randn(700, 600), "layer.bias": torch.randn(7).to(torch.bfloat16),
    "large": torch.randn(5_000_001), "flipped": torch.randn(40, 50).t(), "none": torch.empty(0, 4),
    "scale": torch.tensor(2.5),
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    """Step 7: the model, and an optimizer with objects."""
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        manager.save(7, {"model": MODEL, "optimizer": {"lr": 0.1, "exp_avg": torch.ones(3)}})
    return open_storage(tmp_path / "run")


@pytest.fixture
def out(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "out")


def loaded(out: Storage, *names: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name in names or [name for name in out.list_files() if name.endswith(".safetensors")]:
        found |= load_file(os.path.join(str(out.url), name))
    return found


def assert_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit, in any order."""
    assert_same(dict(sorted(expected.items())), dict(sorted(found.items())))


def test_a_subtree_becomes_one_file_that_safetensors_loads(run: Storage, out: Storage) -> None:
    """Bit for bit, row-major, the prefix off; the metadata say of which save it is; told of every byte."""
    heard: list[int] = []
    done = export_safetensors(run, "7", out, prefix="model", tell=heard.append)
    assert_tensors(loaded(out), MODEL)
    assert done.files == out.list_files() == {"model.safetensors": sum(heard)}
    with safe_open(os.path.join(str(out.url), "model.safetensors"), "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["asyncckpt.step"] == "7"


def test_several_files_and_an_index_are_as_huggingface_hub_has_them(run: Storage, out: Storage) -> None:
    """The same split, names and index; names by pairs of regular expressions."""
    export_safetensors(run, "7", out, prefix="model", max_shard_size="3MB", rename={r"^layer\.(\w+)": r"h.0.\1"})
    index = json.loads(out.read_file("model.safetensors.index.json"))
    expected = split_state_dict_into_shards_factory(
        {name.replace("layer.", "h.0."): tensor for name, tensor in MODEL.items()},
        get_storage_size=lambda tensor: tensor.nbytes, filename_pattern="model{suffix}.safetensors",
        max_shard_size="3MB",
    )  # fmt: skip
    assert index == {"metadata": expected.metadata, "weight_map": expected.tensor_to_filename}
    assert sorted(out.list_files()) == sorted([*expected.filename_to_tensors, "model.safetensors.index.json"])
    for file, names in expected.filename_to_tensors.items():
        assert sorted(loaded(out, file)) == sorted(names)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=12), st.integers(1, 20))
def test_tensors_are_split_into_files_as_huggingface_hub_splits_them(sizes: list[int], limit: int) -> None:
    """Any sizes, also those above the limit."""
    tensors = {f"t{n}": Saved(f"t{n}", (), (size,), torch.uint8, size, 1) for n, size in enumerate(sizes)}
    expected = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda saved: saved.num_bytes, filename_pattern="m{suffix}", max_shard_size=limit
    )
    assert list(map(list, _split(tensors, limit))) == list(expected.filename_to_tensors.values())


def test_tied_weights_are_written_once_and_load_into_the_model(tmp_path: Path, out: Storage) -> None:
    """As safetensors.torch.save_model has them; load_model ties them."""
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(5, 5, False), "head": torch.nn.Linear(5, 5, False)})
    model["head"].weight = model["embed"].weight
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        manager.save(1, {"model": model.state_dict()})
    export_safetensors(open_storage(tmp_path / "run"), "1", out, prefix="model")
    assert list(loaded(out)) == ["embed.weight"]
    other = torch.nn.ModuleDict({"embed": torch.nn.Linear(5, 5, False), "head": torch.nn.Linear(5, 5, False)})
    other["head"].weight = other["embed"].weight
    assert load_model(other, os.path.join(str(out.url), "model.safetensors")) == (set(), [])
    assert torch.equal(other["head"].weight, model["head"].weight)


def test_a_whole_step_becomes_one_file_that_torch_loads_mapped_and_without_running_code(
    tmp_path: Path, out: Storage
) -> None:
    """Every dtype, nesting, objects; what was tied is tied."""
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        manager.save(3, every_kind(3))
    export_torch(open_storage(tmp_path / "run"), "3", out, "deep/state.pt")
    state = torch.load(tmp_path / "out" / "deep" / "state.pt", weights_only=True, mmap=True)
    assert_same(state, every_kind(3))
    assert state["model"]["tied.a"].data_ptr() == state["model"]["tied.b"].data_ptr()
    with pytest.raises(FileExistsError, match=r"holds deep/state\.pt already"):
        export_torch(open_storage(tmp_path / "run"), "3", out, "deep/state.pt")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_step_of_stock_dcp_is_exported_too(tmp_path: Path, out: Storage) -> None:
    """A foreign one, to both formats."""
    dcp.save({"model": MODEL, "n": 3}, checkpoint_id=tmp_path / "run" / "5", no_dist=True)
    run = open_storage(tmp_path / "run")
    export_safetensors(run, "5", out, prefix="model")
    assert_tensors(loaded(out), MODEL)
    export_torch(run, "5", out, "all.pt")
    state = torch.load(tmp_path / "out" / "all.pt", weights_only=True)
    assert_tensors(state["model"], MODEL)
    assert state["n"] == 3


def save_sharded(link: Link, url: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    full = torch.arange(600 * 700, dtype=torch.float32).view(600, 700)
    state = {f"by_{dim}": distribute_tensor(full, mesh, [Shard(dim)]) for dim in (0, 1)}
    with CheckpointManager(url, 1) as manager:
        manager.save(1, state | {"uneven": distribute_tensor(torch.arange(5.0), mesh, [Shard(0)])})


@pytest.mark.slow
def test_a_step_that_ranks_saved_in_shards_becomes_whole_tensors(tmp_path: Path, out: Storage) -> None:
    """By rows, by columns, and of uneven shares."""
    with Crew(2) as crew:
        crew.run(save_sharded, str(tmp_path / "run"))
    export_safetensors(open_storage(tmp_path / "run"), "1", out)
    full = torch.arange(600 * 700, dtype=torch.float32).view(600, 700)
    assert_tensors(loaded(out), {"by_0": full, "by_1": full, "uneven": torch.arange(5.0)})


def test_what_safetensors_cannot_hold_is_refused_in_words_and_nothing_is_written(run: Storage, out: Storage) -> None:
    """Objects, unless they are to be left out; two values of one name; no such key."""
    with pytest.raises(ValueError, match=r"1 values are no tensors.*'optimizer\.lr'"):
        export_safetensors(run, "7", out)
    with pytest.raises(ValueError, match="would both be named"):
        export_safetensors(run, "7", out, prefix="model", rename=lambda name: "x")
    with pytest.raises(KeyError, match="mode"):
        export_safetensors(run, "7", out, prefix="mode")
    assert not out.list_files()
    assert list(export_safetensors(run, "7", out, only_tensors=True).left_out) == ["optimizer.lr"]


def test_damage_in_the_source_is_an_error_and_leaves_no_file_that_looks_whole(run: Storage, out: Storage) -> None:
    """A flipped bit of the last tensor: files before it are whole, the index is not there."""
    data = data_file(Path(str(run.url)), 7)
    flip(data, data.stat().st_size - 3_000_000)
    for size in ("5GB", "1MB"):
        with pytest.raises(DamagedStepError, match="have CRC32"):
            export_safetensors(run, "7", out, prefix="model", max_shard_size=size)
        assert not {"model.safetensors", "model.safetensors.index.json"} & out.list_files().keys()
    with pytest.raises(DamagedStepError, match="have CRC32"):
        export_torch(run, "7", out, "all.pt")
    assert "all.pt" not in out.list_files()


def test_an_export_that_failed_goes_on_where_it_was(run: Storage, out: Storage) -> None:
    """A shard file that is there, whole, of this save, is not written again."""
    faulty = FaultyStorage(out, "replace_file", nth=2)
    with pytest.raises(OSError, match="injected"):
        export_safetensors(run, "7", faulty, prefix="model", max_shard_size="1MB")
    assert list(out.list_files()) == ["model-00001-of-00003.safetensors"]
    recording = RecordingStorage(out)
    done = export_safetensors(run, "7", recording, prefix="model", max_shard_size="1MB")
    assert done.kept == ["model-00001-of-00003.safetensors"]
    assert recording.count("replace_file") == 2
    assert_tensors(loaded(out), MODEL)
    assert len(export_safetensors(run, "7", out, prefix="model", max_shard_size="1MB").kept) == 3


def test_another_step_of_the_same_shapes_is_never_taken_for_what_is_there(
    tmp_path: Path, run: Storage, out: Storage
) -> None:
    """Refused, or with overwrite replaced, the old index first."""
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        manager.save(8, {"model": {name: tensor + 1 for name, tensor in MODEL.items()}})
    export_safetensors(run, "7", out, prefix="model", max_shard_size="1MB")
    with pytest.raises(FileExistsError, match="holds another export"):
        export_safetensors(run, "8", out, prefix="model", max_shard_size="1MB")
    recording = RecordingStorage(out)
    export_safetensors(run, "8", recording, prefix="model", overwrite=True)
    deleted = [call.paths for call in recording.calls if call.verb == "delete"]
    assert deleted[0] == ("model.safetensors.index.json",)
    assert list(out.list_files()) == ["model.safetensors"]
    assert torch.equal(loaded(out)["scale"], MODEL["scale"] + 1)


def test_verify_finds_a_file_that_changed_and_writes_it_again(run: Storage, out: Storage) -> None:
    """Its size and header are right."""
    export_safetensors(run, "7", out, prefix="model")
    file = Path(str(out.url)) / "model.safetensors"
    flip(file, file.stat().st_size - 5)
    assert export_safetensors(run, "7", out, prefix="model").kept == ["model.safetensors"]
    export_safetensors(run, "7", out, prefix="model", verify=True)
    assert_tensors(loaded(out), MODEL)


KILLED = """
import os, signal, sys
from asyncckpt.export import export_safetensors
from asyncckpt.storage import open_storage
told = []
def tell(num_bytes):
    told.append(num_bytes)
    if sum(told) > 15_000_000:
        os.kill(os.getpid(), signal.SIGKILL)
source, target = map(open_storage, sys.argv[1:])
export_safetensors(source, "7", target, prefix="model", max_shard_size="1MB", tell=tell)
"""


@pytest.mark.slow
def test_killed_in_the_middle_it_leaves_whole_files_and_no_index_and_goes_on(run: Storage, out: Storage) -> None:
    """SIGKILL while the large file is written."""
    killed = subprocess.run([sys.executable, "-c", KILLED, run.url, out.url], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(out.list_files()) == ["model-00001-of-00003.safetensors"]
    done = export_safetensors(run, "7", out, prefix="model", max_shard_size="1MB")
    assert done.kept == ["model-00001-of-00003.safetensors"]
    assert_tensors(loaded(out), MODEL)


def test_files_that_a_step_was_given_become_a_folder_again(tmp_path: Path, out: Storage) -> None:
    """Each compared with its CRC32, the index of a sharded checkpoint last; damage leaves no file of that name."""
    given = {"a/.metadata": b"m", "a/__0_0.distcp": b"0" * 100, "model.safetensors.index.json": b"{}", "x.bin": b""}
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        manager.save(1, {}, files=given)
    run, recording = open_storage(tmp_path / "run"), RecordingStorage(out)
    export_files(run, "1", recording)
    assert {name: out.read_file(name) for name in out.list_files()} == given
    written = [call.paths[0] for call in recording.calls if call.verb == "replace_file"]
    assert sorted(written[2:]) == ["a/.metadata", "model.safetensors.index.json"]
    assert sorted(export_files(run, "1", out).kept) == sorted(given)
    (damaged,) = (tmp_path / "run" / "1").glob("*/a/__0_0.distcp")
    damaged.write_bytes(b"1" * 100)
    with pytest.raises(DamagedStepError, match="has CRC32"):
        export_files(run, "1", other := open_storage(tmp_path / "other"))
    assert "a/__0_0.distcp" not in other.list_files()


@pytest.mark.slow
def test_from_s3_to_s3_nothing_is_written_here(s3_url: str, s3_options: dict[str, Any]) -> None:
    """Tensors put together from ranges, sent in parts."""
    with CheckpointManager(f"{s3_url}/run", 1, storage_options=s3_options) as manager:
        manager.save(7, {"model": MODEL})
    run, out = open_storage(f"{s3_url}/run", s3_options), open_storage(f"{s3_url}/out", s3_options)
    export_safetensors(run, "7", out, prefix="model", max_shard_size="10MB", verify=True)
    export_torch(run, "7", out, "all.pt", prefix="model")
    data = out.read_file("all.pt")
    assert_same(torch.load(io.BytesIO(data), weights_only=True), MODEL)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app.app, [*arguments])


def test_the_command_exports_and_imports_and_answers_in_json(tmp_path: Path, run: Storage, out: Storage) -> None:
    """To a folder, to a file, and back into another run."""
    there = str(out.url)
    told = invoke("export", run.url, "7", there, "--prefix", "model", "--rename", "^=net.", "--json")
    assert json.loads(told.stdout)["files"] == dict(out.list_files())
    assert "net.scale" in loaded(out)
    assert invoke("export", run.url, f"{there}/all.pt").exit_code == 0
    assert torch.load(tmp_path / "out" / "all.pt", weights_only=True)["optimizer"]["lr"] == 0.1
    back = str(tmp_path / "back")
    told = invoke(
        "import", f"{there}/model.safetensors", back, "4", "--prefix", "model", "--rename", "^net\\.=", "--json"
    )
    assert json.loads(told.stdout)["tensors"] == len(MODEL)
    state = {"model": {name: torch.zeros_like(tensor) for name, tensor in MODEL.items()}}
    with CheckpointManager(back, 1) as manager:
        manager.restore(4, state)
    assert torch.equal(state["model"]["large"], MODEL["large"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "RUN", "9", "OUT"], "no step 9"),
        (["export", "RUN", "x", "OUT"], "a step, which is a number"),
        (["export", "RUN", "OUT"], "are no tensors"),
        (["export", "RUN", "OUT", "--rename", "x"], "FROM=TO"),
        (["export", "RUN", "OUT", "--format", "files"], "no files that were given"),
        (["import", "OUT", "RUN"], "0 files of safetensors"),
    ],
)
def test_the_command_refuses_in_words_with_status_2(
    run: Storage, out: Storage, arguments: list[str], words: str
) -> None:
    """And writes nothing."""
    told = invoke(*({"RUN": str(run.url), "OUT": str(out.url)}.get(word, word) for word in arguments))
    assert told.exit_code == 2
    assert words in told.stderr
    assert not out.list_files()
