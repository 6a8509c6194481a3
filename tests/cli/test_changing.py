"""`asyncckpt prune`, `copy` and `watch`: what is deleted, what arrives whole, and what is told of a run."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from asyncckpt import CheckpointManager
from asyncckpt.cli import app
from asyncckpt.copying import Copier
from asyncckpt.overview import list_run
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import FaultyStorage, RecordingStorage
from tests.cli.commands import as_process, options_of, ran, told
from tests.states import state
from tests.test_verify import data_file, flip

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 10 to 50, the best of which is 20; one of stock DCP; a dead save and one that may live."""
    path = tmp_path / "run"
    with CheckpointManager(str(path)) as manager:
        for step in (10, 20, 30, 40, 50):
            manager.save(step, state(step), metrics={"loss": abs(step - 20)})
    dcp.save({"w": torch.ones(9)}, checkpoint_id=str(path / "300"))
    for attempt in ("7/00000002-abcdef", "60/00000009-abcdef"):
        (path / attempt).mkdir(parents=True)
        (path / attempt / "__0_0.distcp").write_bytes(b"half")
    return path


def steps_in(path: pathlib.Path) -> set[int]:
    return {int(folder.name) for folder in path.iterdir()}


def test_prune_shows_and_deletes_what_no_policy_keeps(run: pathlib.Path) -> None:
    """Nothing without a yes; never the newest, nor what another writer made."""
    policy = ["--keep-last", 1, "--keep-best", "loss", "--keep-every", "40"]
    document = told("prune", run, *policy, "--dry-run")
    assert [row["step"] for row in document["dropped"]] == [10, 30]
    assert document["kept"] == [20, 40, 50]
    refused = ran("prune", run, *policy)
    assert refused.exit_code == 2
    assert "add --yes" in refused.output
    assert steps_in(run) == {7, 10, 20, 30, 40, 50, 60, 300}
    assert told("prune", run, *policy, "--yes")["deleted_files"] == 6
    assert steps_in(run) == {7, 20, 40, 50, 60, 300}
    with CheckpointManager(str(run)) as manager:
        assert manager.all_steps() == [20, 40, 50]
        assert manager.verify(20)
    assert ran("prune", run).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "status", "num_left"), [("n", 1, 8), ("y", 0, 4)])
def test_prune_asks_at_a_terminal(run: pathlib.Path, answer: str, status: int, num_left: int) -> None:
    """A real one."""
    ours, theirs = os.openpty()
    os.write(ours, f"{answer}\n".encode())
    with as_process("prune", run, "--keep-last", 1, stdin=theirs) as process:
        out, err = process.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert (process.returncode, err) == (status, "")
    assert "4 steps, " in out
    assert "Delete them? [y/N]" in out
    assert len(steps_in(run)) == num_left


def test_prune_takes_dead_saves_and_leaves_those_that_may_live(run: pathlib.Path) -> None:
    """What a later commit overtook is dead; another is when its grace is over."""
    assert [row["step"] for row in told("prune", run, "--partial", "--yes")["dead"]] == [7]
    assert steps_in(run) == {10, 20, 30, 40, 50, 60, 300}
    assert [row["step"] for row in told("prune", run, "--partial", "--grace", "0s", "--yes")["dead"]] == [60]
    assert steps_in(run) == {10, 20, 30, 40, 50, 300}


def test_a_damaged_step_is_neither_deleted_nor_counted(run: pathlib.Path) -> None:
    """So the newest that is whole stays."""
    data_file(run, 50).unlink()
    document = told("prune", run, "--keep-last", 1, "--yes")
    assert (document["kept"], document["damaged"]) == ([40], [50])
    assert steps_in(run) == {7, 40, 50, 60, 300}


def test_a_step_that_is_saved_again_meanwhile_stays(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another run, between the listing and the deletion."""

    class SavedAgain(RecordingStorage):
        def list_files(self, prefix: str = "") -> Any:
            if prefix == "10" and not self.count("list_files") > 1:
                with CheckpointManager(str(run)) as manager:
                    manager.save(10, state(99), force=True)
            return super().list_files(prefix)

    monkeypatch.setattr(app, "open_storage", lambda *arguments: SavedAgain(open_storage(*arguments)))
    assert ran("prune", run, "--keep-last", 4, "--yes").exit_code == 0
    with CheckpointManager(str(run)) as manager:
        assert 10 in manager.all_steps()
        manager.verify(10)


def test_copy_brings_every_step_in_order_and_once(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Values, times and metrics as they were; those of other writers, too."""
    target = tmp_path / "target"
    document = told("copy", run, target)
    assert [(row["step"], row["result"]) for row in document["steps"]] == [
        (step, "copied") for step in (300, 10, 20, 30, 40, 50)
    ]
    assert {row["checksums"] for row in document["steps"]} == {"manifest", "zip"}
    assert ran("verify", target).exit_code == 0
    for step in (10, 50):
        assert told("diff", f"{run}@{step}", f"{target}@{step}")["read"] == 0
    first, second = (told("ls", path)["steps"] for path in (run, target))
    known = ("step", "time", "metrics")
    assert [[row[name] for name in known] for row in first if row["kind"] == "committed"] == [
        [row[name] for name in known] for row in second if row["kind"] == "committed"
    ]
    assert {row["result"] for row in told("copy", run, target)["steps"]} == {"there already"}
    with CheckpointManager(str(target)) as manager:
        manager.save(60, state(60))
        assert manager.latest_step() == 60


def test_copy_overwrites_nothing_and_commits_nothing_damaged(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Status 2 and 1."""
    target = tmp_path / "target"
    with CheckpointManager(str(target)) as manager:
        manager.save(10, state(1))
    before = data_file(target, 10).read_bytes()
    flip(data_file(run, 20), 5000)
    (row,) = told("copy", run, target, 20, status=1)["steps"]
    assert row["result"] == "damaged"
    assert "has CRC32" in row["problem"]
    (row,) = told("copy", run, target, 10, status=2)["steps"]
    assert "is another save, and nothing overwrites it" in row["problem"]
    assert data_file(target, 10).read_bytes() == before
    assert steps_in(target) == {10}


def test_a_copy_that_broke_off_is_taken_up(tmp_path: pathlib.Path) -> None:
    """Files that are whole at the target are not sent again; one that is not is."""
    with CheckpointManager(str(tmp_path / "a")) as manager:
        manager.save(1, {"w": torch.randn(1000)}, files={f"f{i}": bytes([i]) * 1000 for i in range(6)})
    source, target = open_storage(tmp_path / "a"), open_storage(tmp_path / "b")
    broken: Storage = FaultyStorage(target, "write_file", matches=lambda call: call.path.endswith("f5"))
    with pytest.raises(OSError, match="injected"):
        Copier(source, list_run(broken)).copy(1)
    (half,) = (tmp_path / "b").glob("1/*/f3")
    half.write_bytes(bytes(1000))
    recording = RecordingStorage(target)
    copied = Copier(source, list_run(recording), resume=True).copy(1)
    sent = {call.path.rpartition("/")[2] for call in recording.calls if call.verb == "write_file"}
    assert {"f3", "f5"} <= sent
    assert (copied.num_kept, copied.num_files) == (7 - len(sent), len(sent))
    assert copied.num_kept >= 3
    with CheckpointManager(str(tmp_path / "b")) as manager:
        manager.verify(1)


@pytest.mark.s3
def test_copy_and_prune_on_s3(run: pathlib.Path, s3_url: str, s3_options: dict[str, Any]) -> None:
    """From a folder to a bucket."""
    told("copy", run, s3_url, 40, 50, *options_of(s3_options, "--target-option"))
    options = options_of(s3_options)
    assert told("verify", s3_url, *options)["steps"][0]["result"] == "whole"
    assert [row["step"] for row in told("prune", s3_url, "--keep-last", 1, "--yes", *options)["dropped"]] == [40]
    assert [row["step"] for row in told("ls", s3_url, *options)["steps"]] == [50]


def test_watch_tells_what_is_there_and_ends_as_it_was_asked_to(run: pathlib.Path) -> None:
    """0 when the step is there; 1 when the time is over before."""
    done = ran("watch", run, "--until", 50)
    assert done.exit_code == 0
    assert [line.split("  ")[1:3] for line in done.output.splitlines()][-2:] == [
        ["step 50", "committed"], ["step 60", "begun"],
    ]  # fmt: skip
    assert ran("watch", run, "--until", 70, "--timeout", "0s").exit_code == 1
    assert ran("watch", run, "--timeout", "0s").exit_code == 0


@pytest.mark.slow
def test_watch_follows_commits_and_prunes(tmp_path: pathlib.Path) -> None:
    """As they come."""
    with CheckpointManager(str(tmp_path), max_to_keep=1) as manager:
        manager.save(1, state(1))
        with as_process("watch", tmp_path, "--interval", "0.1s", "--until", 3) as process:
            assert process.stdout is not None
            assert "step 1  committed" in process.stdout.readline()
            manager.save(3, state(3))
            out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "step 3  committed" in out
