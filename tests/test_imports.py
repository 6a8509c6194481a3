"""Files of others as steps: safetensors and torch.save, read by manager.restore and stock dcp.load."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from asyncckpt import CheckpointManager, DamagedStepError, SaveError, UnsafeObjectError
from asyncckpt.export import export_safetensors
from asyncckpt.imports import import_safetensors, import_torch
from asyncckpt.storage import Storage, open_storage
from asyncckpt.verify import verify_step
from tests.crew import Crew
from tests.processes import Link
from tests.states import assert_same, every_kind, target_like

WEIGHTS = {
    "layer.weight": torch.randn(700, 600), "layer.bias": torch.randn(7).to(torch.bfloat16),
    "large": torch.randn(5_000_001), "mask": torch.ones(3, dtype=torch.bool), "none": torch.empty(0, 4),
    "scale": torch.tensor(2.5),
}  # fmt: skip


def zeros_like(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def restored(run: Path, step: int, state: Any) -> Any:
    with CheckpointManager(str(run), 1) as manager:
        manager.restore(step, state)
    return state


def folders(tmp_path: Path) -> tuple[Storage, Storage]:
    return open_storage(tmp_path), open_storage(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_safetensors_file_becomes_a_step_that_the_manager_and_stock_dcp_read(tmp_path: Path) -> None:
    """Bit for bit, below a prefix; verified, listed, its metadata the user's."""
    source, run = folders(tmp_path)
    save_file(WEIGHTS, tmp_path / "model.safetensors", {"format": "pt"})
    heard: list[int] = []
    done = import_safetensors(source, "model.safetensors", run, 5, prefix="model", tell=heard.append)
    num_bytes = sum(tensor.nbytes for tensor in WEIGHTS.values())
    assert (done.step, done.num_tensors, done.num_objects, done.num_bytes, sum(heard)) == (
        5,
        6,
        0,
        num_bytes,
        num_bytes,
    )
    assert_same(restored(tmp_path / "run", 5, {"model": zeros_like(WEIGHTS)}), {"model": WEIGHTS})
    target = {"model": zeros_like(WEIGHTS)}
    dcp.load(target, checkpoint_id=tmp_path / "run" / "5", no_dist=True)
    assert_same(target, {"model": WEIGHTS})
    verify_step(run, "5")


@pytest.mark.parametrize("path", ["", "model.safetensors.index.json"])
def test_sharded_safetensors_with_an_index_become_one_step(tmp_path: Path, path: str) -> None:
    """As exported here, from a folder or from its index; and back under the old names."""
    source, run = folders(tmp_path)
    other = open_storage(tmp_path / "hub")
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    import_safetensors(source, "model.safetensors", run, 1, prefix="model")
    export_safetensors(run, "1", other, prefix="model", rename={r"^layer\.": "net.layers.0."}, max_shard_size="3MB")
    assert (
        "net.layers.0.bias"
        in json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_bytes())["weight_map"]
    )
    import_safetensors(other, path, run, 2, prefix="model", rename={r"^net\.layers\.0\.": "layer."})
    assert_same(restored(tmp_path / "run", 2, {"model": zeros_like(WEIGHTS)}), {"model": WEIGHTS})


def test_names_that_an_export_left_out_as_tied_are_tied_again(tmp_path: Path) -> None:
    """Stored once, restored under both."""
    tied = torch.randn(100, 100)
    with CheckpointManager(str(tmp_path / "run"), 1) as manager:
        manager.save(1, {"model": {"embed": tied, "head": tied, "other": torch.ones(2)}})
    run, other = open_storage(tmp_path / "run"), open_storage(tmp_path / "hub")
    export_safetensors(run, "1", other, prefix="model")
    done = import_safetensors(other, "", run, 2, prefix="model")
    assert (done.num_tensors, done.num_bytes) == (3, tied.nbytes + 8)
    target = {"embed": torch.zeros(100, 100), "head": torch.zeros(100, 100)}
    state = restored(tmp_path / "run", 2, {"model": target})
    assert torch.equal(state["model"]["embed"], tied)
    assert torch.equal(state["model"]["head"], tied)


def test_a_torch_save_file_of_every_kind_becomes_a_step(tmp_path: Path) -> None:
    """Every dtype and layout, tied tensors, views of a base, nesting, objects."""
    source, run = folders(tmp_path)
    state = every_kind(3)
    torch.save(state, tmp_path / "state.pt")
    import_torch(source, "state.pt", run, 1)
    assert_same(restored(tmp_path / "run", 1, target_like(state)), every_kind(3))
    verify_step(run, "1")


def test_tensors_within_objects_come_along(tmp_path: Path) -> None:
    """A tuple is one object, as the manager saves it."""
    source, run = folders(tmp_path)
    torch.save({"pair": (1, torch.arange(4)), "p": torch.nn.Parameter(torch.ones(2))}, tmp_path / "state.pt")
    import_torch(source, "state.pt", run, prefix="deep")
    state = restored(tmp_path / "run", 0, {"deep": {"pair": None, "p": torch.zeros(2)}})
    assert torch.equal(state["deep"]["pair"][1], torch.arange(4))
    assert torch.equal(state["deep"]["p"], torch.ones(2))


def test_a_step_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    """Refused in words, before anything is written."""
    source, run = folders(tmp_path)
    save_file(WEIGHTS, tmp_path / "m.safetensors")
    import_safetensors(source, "m.safetensors", run, 1)
    before = run.list_files()
    with pytest.raises(SaveError, match="there is a step 1"):
        import_safetensors(source, "m.safetensors", run, 1)
    assert run.list_files() == before


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """No pickle from storage is run."""
    source, run = folders(tmp_path)
    torch.save({"evil": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UnsafeObjectError, match=r"os\.mkdir|posix\.mkdir"):
        import_torch(source, "evil.pt", run)
    assert not run.list_files()
    assert not (tmp_path / "pwned").exists()


class _Evil:
    def __reduce__(self) -> Any:
        import os

        return os.mkdir, ("pwned",)


def test_damage_in_a_torch_file_is_found_by_its_zip_and_leaves_no_step(tmp_path: Path) -> None:
    """One flipped bit of a large tensor."""
    source, run = folders(tmp_path)
    torch.save({"a": torch.zeros(2_000_000), "b": torch.ones(10)}, tmp_path / "state.pt")
    data = bytearray((tmp_path / "state.pt").read_bytes())
    data[4_000_000] ^= 1
    (tmp_path / "state.pt").write_bytes(data)
    with pytest.raises(DamagedStepError, match="'a' have CRC32"):
        import_torch(source, "state.pt", run)
    assert not run.list_files()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[:-1], "bytes, and by its header"),
        (lambda data: data[:50], "header"),
        (lambda data: b"\xff" * 8 + data[8:], "header would have"),
        (lambda data: data.replace(b'"shape":[10]', b'"shape":[11]'), "a tensor of shape"),
        (lambda data: data.replace(b'"F32"', b'"X32"'), "no dtype 'X32'"),
        (lambda data: data.replace(b"[0,40]", b"[4,44]"), "leave out bytes"),
        (lambda data: b"", "header|too short|ends"),
    ],
)
def test_what_is_no_whole_safetensors_file_is_refused_in_words(tmp_path: Path, change: Any, why: str) -> None:
    """Cut, or a header that lies."""
    source, run = folders(tmp_path)
    save_file({"a": torch.ones(10)}, tmp_path / "m.safetensors")
    path = tmp_path / "m.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=why):
        import_safetensors(source, "m.safetensors", run)
    assert not run.list_files()


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps({"a": 1}), b"x" * 1000])
def test_what_is_no_torch_file_is_refused_in_words(tmp_path: Path, content: bytes) -> None:
    """Also torch's format before 1.6, which is one pickle."""
    source, run = folders(tmp_path)
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        import_torch(source, "state.pt", run)


def test_an_index_that_points_outside_or_at_what_is_not_there_is_refused(tmp_path: Path) -> None:
    """Nothing outside of the source is opened."""
    source, run = folders(tmp_path / "in")
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "in" / "x.safetensors")
    for file, name in (("../out.safetensors", "a"), ("x.safetensors", "b")):
        (tmp_path / "in" / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {name: file}}))
        with pytest.raises(ValueError, match=r"no index|lacks 'b'"):
            import_safetensors(source, "m.safetensors.index.json", run)
    assert not run.list_files()


@pytest.mark.slow
def test_a_torch_file_on_s3_is_imported_by_ranges(s3_url: str, s3_options: dict[str, Any]) -> None:
    """From URL to URL; nothing goes through a local file."""
    source, run = open_storage(s3_url, s3_options), open_storage(f"{s3_url}/run", s3_options)
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    data = buffer.getvalue()
    source.write_file("state.pt", len(data), iter([memoryview(data)]))
    import_torch(source, "state.pt", run, 3)
    with CheckpointManager(f"{s3_url}/run", 1, storage_options=s3_options) as manager:
        state = zeros_like(WEIGHTS)
        manager.restore(3, state)
    assert_same(state, WEIGHTS)


class Model(torch.nn.Module):
    """16 MiB of weights, and 4 MiB that no rank shards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(1024, 4096)
        self.register_buffer("table", torch.randn(1024, 1024))


def restore_sharded(link: Link, url: str) -> dict[str, Any]:
    """On every rank: an FSDP2 model takes in a file's step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from asyncckpt import Restored

    model = Model()
    fully_shard(model.inner, mesh=init_device_mesh("cpu", (2,)))
    events: list[Any] = []
    state = {"model": model.state_dict()}
    with CheckpointManager(url, 1, read_once=True, events=(events.append,)) as manager:
        manager.restore(0, state)
    full = {
        name: float((value.full_tensor() if isinstance(value, DTensor) else value).double().sum())
        for name, value in state["model"].items()
    }
    return {"model": full, "read": sum(event.num_bytes for event in events if isinstance(event, Restored))}


@pytest.mark.slow
def test_a_torch_file_restores_into_a_sharded_model_and_no_byte_is_read_by_all(tmp_path: Path) -> None:
    """What DCP's BroadcastingTorchSaveReader and DynamicMetaLoadPlanner are for: import, then restore, where each rank
    reads its shard, and one for all what is not sharded."""
    source, run = folders(tmp_path)
    state = Model().state_dict()
    torch.save(state, tmp_path / "model.pt")
    done = import_torch(source, "model.pt", run, prefix="model")
    with Crew(2) as crew:
        results = crew.run(restore_sharded, str(tmp_path / "run"))
    for result in results:
        assert result["model"] == {name: float(tensor.double().sum()) for name, tensor in state.items()}
    assert sum(result["read"] for result in results) < 1.05 * done.num_bytes
