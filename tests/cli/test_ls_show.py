"""`asyncckpt ls` and `asyncckpt show`: what a run has, and what is in a step."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from asyncckpt import CheckpointManager
from asyncckpt.cli import app
from asyncckpt.lookup import Saved
from asyncckpt.outline import Outliner, tree
from asyncckpt.storage import open_storage
from asyncckpt.testing import RecordingStorage
from tests.cli.commands import options_of, ran, told
from tests.states import state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 1, 2 and 3, of which 2 lacks its data; one of stock DCP; one that was never committed."""
    path = tmp_path / "run"
    with CheckpointManager(str(path)) as manager:
        for step in (1, 3, 2):
            manager.save(step, state(step), metrics={"loss": 1 / step}, metadata={"note": "\x1b[31mred"})
    dcp.save({"w": torch.ones(9)}, checkpoint_id=str(path / "30"))
    (path / "7" / "00000004-abcdef").mkdir(parents=True)
    (path / "7" / "00000004-abcdef" / "__0_0.distcp").write_bytes(b"half")
    next((path / "2").glob("*/__0_0.distcp")).unlink()
    return path


def test_ls_tells_each_step_apart(run: pathlib.Path) -> None:
    """The last commit first."""
    document = told("ls", run)
    assert [(row["step"], row["kind"], bool(row["damage"]), row["unfinished"]) for row in document["steps"]] == [
        (7, "partial", False, 1), (2, "committed", True, 0), (3, "committed", False, 0), (1, "committed", False, 0),
        (30, "foreign", False, 0),
    ]  # fmt: skip
    assert "1 of 1 files are missing or cut" in document["steps"][1]["damage"]
    one = document["steps"][3]
    assert (one["world_size"], one["metrics"], one["holds"]) == (1, {"loss": 1.0}, "tensors")
    assert document["total_bytes"] == sum(row["bytes"] for row in document["steps"])
    lines = ran("ls", run).output.splitlines()
    assert [line.split()[0] for line in lines[2:7]] == ["7", "2", "3", "1", "30"]
    assert "loss=0.3333" in lines[4]
    assert lines[7].startswith("5 steps, ")


def test_ls_shows_the_newest_or_the_youngest_and_says_what_it_leaves_out(run: pathlib.Path) -> None:
    """--limit and --since."""
    assert [row["step"] for row in told("ls", run, "--limit", 2)["steps"]] == [7, 2]
    assert "3 of them not shown (--limit 0: all)" in ran("ls", run, "--limit", 2).output
    assert [row["step"] for row in told("ls", run, "--since", "1h")["steps"]] == [2, 3, 1]
    assert ran("ls", run, "--since", "1x").exit_code == 2


@pytest.mark.slow
def test_ls_of_ten_thousand_steps_lists_once_and_reads_what_it_shows(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small read for each step that is shown."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(0, {"w": torch.ones(3)})
    data = (tmp_path / "0" / "manifest-00000001.json").read_bytes()
    for step in range(1, 10_000):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / f"manifest-{step + 1:08d}.json").write_bytes(data)
    opened: list[RecordingStorage] = []

    def recording(*arguments: Any) -> RecordingStorage:
        opened.append(RecordingStorage(open_storage(*arguments)))
        return opened[-1]

    monkeypatch.setattr(app, "open_storage", recording)
    document = told("ls", tmp_path)
    assert (document["total"], len(document["steps"])) == (10_000, 50)
    assert document["steps"][0]["damage"].startswith("its manifest is of step 0")
    assert [call.verb for call in opened[0].calls].count("list_files") == 1
    assert len(opened[0].calls) == 51
    assert len(told("ls", tmp_path, "--limit", 0)["steps"]) == 10_000


def test_ls_reads_the_ends_of_a_large_manifest(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranges, which say the same as all of it."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {f"w{i}": torch.ones(1) for i in range(2000)}, metrics={"loss": 2.0})
    assert next((tmp_path / "1").glob("manifest-*")).stat().st_size > 64 << 10
    opened: list[RecordingStorage] = []
    monkeypatch.setattr(
        app, "open_storage", lambda *arguments: opened.append(RecordingStorage(open_storage(*arguments))) or opened[-1]
    )
    (row,) = told("ls", tmp_path)["steps"]
    assert (row["metrics"], row["holds"], row["damage"]) == ({"loss": 2.0}, "tensors", "")
    assert [call.verb for call in opened[0].calls] == ["list_files", "read_into"]


def test_show_is_a_tree_in_which_layers_that_are_alike_are_one_line(tmp_path: pathlib.Path) -> None:
    """Sums, shapes, dtypes; and a line each with --all."""
    layers = {f"layers.{i}.{name}": torch.ones(4, 2) for i in range(12) for name in ("wq", "wk")}
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(5, {"model": {**layers, "head": torch.ones(3, dtype=torch.bfloat16)}, "lr": 0.5})
    rows = [line.split() for line in ran("show", tmp_path).output.splitlines()]
    assert ["layers.0..11", "12", "x", "2", "values", "12", "x", "64", "bytes", "12", "x", "2"] in rows
    assert ["wq", "4", "x", "2", "float32", "32", "bytes", "1", "1"] in rows
    assert ["head", "3", "bfloat16", "6", "bytes", "1", "1"] in rows
    assert next(row for row in rows if row[0] == "model")[1:5] == ["25", "values", "774", "bytes"]
    every = ran("show", tmp_path, "--all").output
    assert every.count("wq") == 12
    assert "layers" not in ran("show", tmp_path, "--depth", 1).output


def test_show_gives_what_is_asked_for(run: pathlib.Path) -> None:
    """By pattern; values of objects; the file of another writer; nothing that a terminal obeys."""
    document = told("show", run, 3)
    with_values = told("show", run, 3, "--values")
    assert {row["key"] for row in document["keys"]} == {row["key"] for row in with_values["keys"]}
    objects = {row["key"]: row["value"] for row in with_values["keys"] if row["shape"] is None}
    assert objects
    assert all(value is not None for value in objects.values())
    assert [row["key"] for row in told("show", run, 3, "--keys", "w")["keys"]] == ["w"]
    assert told("show", run, 30)["keys"][0]["shape"] == [9]
    assert "\x1b" not in ran("show", run, 3).output
    done = ran("show", run, 3, "--keys", "nothing*")
    assert done.exit_code == 2
    assert "matches nothing*" in done.output
    assert told("show", run, 2, status=1)["damage"]
    assert "never committed" in ran("show", run, 7).output


def test_show_lists_files_that_were_given(tmp_path: pathlib.Path) -> None:
    """With their sizes; ls says that they are there."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"w": torch.ones(1)}, files={"config/a.json": b"{}"})
        manager.save(2, {}, files={"b": b"123"})
    assert told("show", tmp_path, 1)["files"] == [{"name": "config/a.json", "bytes": 2}]
    assert "config/a.json" in ran("show", tmp_path, 1).output
    assert [row["holds"] for row in told("ls", tmp_path)["steps"]] == ["files", "both"]


def test_an_outline_keeps_apart_what_differs() -> None:
    """Layers of another shape end a run; siblings beyond the most are counted."""

    def saved(key: str, *shape: int) -> Saved:
        return Saved(key, (key,), shape, torch.float32, 4, 1)

    values = [saved(f"l.{i}.w", 2 if i < 3 else 5) for i in range(10)] + [saved(f"x{i}", 1) for i in range(5)]
    lines = Outliner(tree(values), most=3).lines()
    assert [(line.depth, line.name, line.count, line.num_left_out) for line in lines] == [
        (0, "l", 1, 0), (1, "0..2.w", 3, 0), (1, "3..9.w", 7, 0), (0, "x0", 1, 0), (0, "x1", 1, 0), (0, "...", 1, 3),
    ]  # fmt: skip
    assert sum(line.node.num_bytes for line in Outliner(tree(values)).lines(1)) == tree(values).num_bytes == 60
    assert [line.name for line in Outliner(tree([saved("a.b.c", 1)])).fitting(1)] == ["a.b.c"]


@pytest.mark.s3
def test_ls_and_show_on_s3(s3_url: str, s3_options: dict[str, Any]) -> None:
    """With the options given."""
    with CheckpointManager(s3_url, storage_options=s3_options) as manager:
        manager.save(4, state(4))
    options = options_of(s3_options)
    assert told("ls", s3_url, *options)["steps"][0]["step"] == 4
    assert json.loads(ran("show", s3_url, "--json", *options).stdout)["step"] == 4
