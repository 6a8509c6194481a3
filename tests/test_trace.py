"""A run's timeline: valid at every moment, in the format that Perfetto reads, with the phases where they happened."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import subprocess
import sys
from collections import defaultdict
from typing import Any

import pytest

from asyncckpt import CheckpointManager, Staged, WriteError
from asyncckpt.testing import FaultyStorage
from asyncckpt.trace import TraceFile
from tests.states import state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
ROOT = pathlib.Path(__file__).parents[1]


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """By the rules of the JSON array format: the closing bracket, and it alone, may be missing."""
    text = path.read_text()
    assert text.startswith("[\n")
    entries = [json.loads(line.removesuffix(",")) for line in text.splitlines()[1:]]
    assert entries == json.loads(text.rstrip().removesuffix(",") + "]")
    return entries


def check_format(entries: list[dict[str, Any]]) -> None:
    """The rules of "Trace Event Format" for the phases used; and complete events of a track nest or are apart."""
    spans = defaultdict(list)
    for entry in entries:
        assert entry["ph"] in ("X", "i", "M"), entry
        assert isinstance(entry["pid"], int)
        assert isinstance(entry["tid"], int)
        assert isinstance(entry["name"], str)
        assert isinstance(entry["args"], dict)
        if entry["ph"] == "M":
            assert entry["name"] in ("process_name", "thread_name")
            assert isinstance(entry["args"]["name"], str)
            continue
        assert isinstance(entry["ts"], int)
        assert entry["ph"] == "X" or entry["s"] in ("g", "p", "t")
        if entry["ph"] == "X":
            assert entry["dur"] > 0
            spans[entry["pid"], entry["tid"]].append((entry["ts"], entry["ts"] + entry["dur"]))
    for track in spans.values():
        for (_, end), (begin, _) in zip(sorted(track), sorted(track)[1:], strict=False):
            assert end <= begin


def names(entries: list[dict[str, Any]], step: int) -> list[str]:
    return [entry["name"] for entry in entries if entry["args"].get("step") == step]


def test_every_phase_of_a_save_is_a_span_on_its_thread(tmp_path: pathlib.Path) -> None:
    """In the order in which they come, with the bytes, and those of a restore and of retention."""
    with CheckpointManager(str(tmp_path / "run"), max_to_keep=1, events=[TraceFile(tmp_path / "t.json")]) as manager:
        for step in (1, 2):
            manager.save_async(step, state(step))
        manager.join()
        manager.restore(2, state(0))
    entries = read(tmp_path / "t-0.json")
    check_format(entries)
    found = names(entries, 2)
    assert [name for name in found if name not in ("wait", "copy")] == [
        "stage", "write", "wait for ranks", "commit", "restore"
    ]  # fmt: skip
    assert "prune" in names(entries, 1)
    tracks = {entry["tid"]: entry["args"]["name"] for entry in entries if entry["name"] == "thread_name"}
    where = {entry["name"]: tracks[entry["tid"]].split()[0] for entry in entries if entry["ph"] == "X"}
    assert (where["stage"], where["write"], where["commit"], where["prune"], where["restore"]) == (
        "training", "writer", "writer", "writer", "training"
    )  # fmt: skip
    assert all(entry["args"]["num_bytes"] > 0 for entry in entries if entry["name"] in ("stage", "write", "restore"))


def test_a_failed_save_is_a_mark(tmp_path: pathlib.Path) -> None:
    """With the phase and the error."""
    with CheckpointManager(str(tmp_path / "run"), events=[TraceFile(tmp_path / "t.json")]) as manager:
        manager.save(1, state(1))
        manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
        with pytest.raises(WriteError, match="injected fault"):
            manager.save(2, state(2))
    entries = read(tmp_path / "t-0.json")
    check_format(entries)
    assert names(entries, 2)[-1] == "write failed"
    assert "injected fault" in entries[-1]["args"]["error"]


KILLED = """
import os, signal, sys, torch
from asyncckpt import CheckpointManager
from asyncckpt.trace import TraceFile
manager = CheckpointManager(sys.argv[1] + "/run", events=[TraceFile(sys.argv[1] + "/t.json")])
for step in range(5):
    manager.save(step, {"w": torch.zeros(10)})
manager.save_async(5, {"w": torch.zeros(10)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_is_whole_after_sigkill_and_goes_on_after_a_restart(tmp_path: pathlib.Path) -> None:
    """Also after a half line, as a full disk leaves it: one timeline."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    check_format(read(tmp_path / "t-0.json"))
    with (tmp_path / "t-0.json").open("a") as file:
        file.write('{"half')
    with CheckpointManager(str(tmp_path / "run"), events=[TraceFile(tmp_path / "t.json")]) as manager:
        manager.save(4, state(4))
    entries = read(tmp_path / "t-0.json")
    check_format(entries)
    assert names(entries, 4).count("commit") == 2


def test_ranks_are_put_together_by_one_line_of_shell(tmp_path: pathlib.Path) -> None:
    """The one in the docstring: a process for each rank."""
    common = {"url": "u", "step": 1, "num_bytes": 9, "wait_s": 0.5, "stage_s": 1.0, "stall_s": 1.5}
    for rank in range(3):
        TraceFile(tmp_path / "trace.json")(Staged(rank=rank, time_s=100.0, **common))
    found = re.search(r"`(\(echo .*)`", TraceFile.__doc__ or "")
    assert found is not None
    subprocess.run(["bash", "-c", found[1]], cwd=tmp_path, check=True)
    entries = read(tmp_path / "all.json")
    check_format(entries)
    spans = [(entry["pid"], entry["name"], entry["ts"], entry["dur"]) for entry in entries if entry["ph"] == "X"]
    times = ("wait", 98_500_000, 500_000), ("stage", 99_000_000, 1_000_000)
    assert spans == [(rank, *span) for rank in range(3) for span in times]
