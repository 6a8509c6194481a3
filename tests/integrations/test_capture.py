"""A trainer's own save code is run for its files: what is kept, what is written, and what others notice."""

from __future__ import annotations

import collections
import pathlib
import threading
from collections.abc import Mapping

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from asyncckpt.files import File
from asyncckpt.integrations.capture import SMALL_BYTES, capture

LARGE = SMALL_BYTES // 4  # floats


def write(files: Mapping[str, File | bytes], folder: pathlib.Path) -> None:
    """As a manager does, later."""
    for name, file in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file if isinstance(file, bytes) else b"".join(file.format(file.value).views()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_saved_in_the_folder_is_kept_and_not_written(tmp_path: pathlib.Path) -> None:
    """Large values stay tensors; the files made of them later are what the savers would have written."""
    inside, later, weights = tmp_path / "inside", tmp_path / "later", {"w": torch.randn(LARGE)}
    inside.mkdir()
    with capture(inside) as captured:
        torch.save({"state": {0: weights["w"]}}, inside / "optimizer.bin")
        save_file(weights, inside / "model.safetensors", metadata={"format": "pt"})
        dcp.save({"model": weights}, storage_writer=dcp.FileSystemWriter(str(inside / "sharded")), no_dist=True)
    assert [path for path in inside.rglob("*") if path.is_file()] == []
    files = captured.files()
    assert files["optimizer.bin"].value["state"][0] is weights["w"]  # type: ignore[union-attr]
    write(files, later)
    assert torch.equal(torch.load(later / "optimizer.bin")["state"][0], weights["w"])
    assert torch.equal(load_file(later / "model.safetensors")["w"], weights["w"])
    read = {"model": {"w": torch.zeros(LARGE)}}
    dcp.load(read, checkpoint_id=later / "sharded", no_dist=True)
    assert torch.equal(read["model"]["w"], weights["w"])


def test_small_files_are_those_that_torch_makes(tmp_path: pathlib.Path) -> None:
    """With every class of container, which a copy to be written later would not have."""
    state = {"seen": collections.Counter(a=2), "state": collections.OrderedDict(w=torch.ones(3))}
    with capture(tmp_path / "inside") as captured:
        torch.save(state, str(tmp_path / "inside/custom.pkl"))
    write(captured.files(), tmp_path)
    read = torch.load(tmp_path / "custom.pkl", weights_only=False)
    assert type(read["seen"]) is collections.Counter
    assert type(read["state"]) is collections.OrderedDict


def test_files_written_by_other_means_come_along(tmp_path: pathlib.Path) -> None:
    """A hook's JSON in a folder of its own, torch.save to an open file."""
    with capture(tmp_path) as captured:
        (tmp_path / "unet").mkdir()
        (tmp_path / "unet/config.json").write_text("{}")
        with open(tmp_path / "open.bin", "wb") as file:
            torch.save(torch.ones(LARGE), file)
    files = captured.files()
    assert files["unet/config.json"] == b"{}"
    assert files["open.bin"] == (tmp_path / "open.bin").read_bytes()


def test_other_paths_and_other_threads_write_as_ever(tmp_path: pathlib.Path) -> None:
    """A metrics thread may save in the same moment, even into the folder."""
    inside, outside = tmp_path / "inside", tmp_path / "outside.bin"
    inside.mkdir()
    with capture(inside) as captured:
        torch.save(1, outside)
        other = threading.Thread(target=torch.save, args=(2, inside / "other.bin"))
        other.start()
        other.join()
    assert torch.load(outside) == 1
    assert torch.load(inside / "other.bin") == 2
    assert set(captured.files()) == {"other.bin"}


def test_afterwards_the_savers_are_the_old_ones(tmp_path: pathlib.Path) -> None:
    """Also where a module had imported one by name, after an error, and when two captures end in any order."""
    before = torch.save, safetensors.torch.save_file, save_file, dcp.FileSystemWriter
    first, second = capture(tmp_path / "a"), capture(tmp_path / "b")
    first.__enter__()
    second.__enter__()
    assert torch.save is not before[0]
    with pytest.raises(ZeroDivisionError), capture(tmp_path / "c"):
        1 / 0  # noqa: B018
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert (torch.save, safetensors.torch.save_file, save_file, dcp.FileSystemWriter) == before
