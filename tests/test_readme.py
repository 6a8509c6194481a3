"""README.md says nothing that does not run or is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer.main

import asyncckpt
import stagers
from asyncckpt import CheckpointError, Event
from asyncckpt.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python_blocks() -> list[str]:
    """The Python snippets, each behind as many empty lines as precede it, so that a traceback tells README's lines."""
    blocks = re.finditer(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return ["\n" * README.count("\n", 0, block.start(1)) + block[1] for block in blocks]


def is_of_a_trainer(block: str) -> bool:
    """Those run by themselves: tests/integrations/test_readme.py."""
    return re.search(r"^(?:import|from) (?:accelerate|transformers|lightning)\b", block, re.MULTILINE) is not None


def shell_lines() -> list[str]:
    """Indented lines that begin with a command of ours or pip, without the words beside it."""
    return re.findall(r"^    ((?:scripts/|pip ).*?)(?:  .*)?$", README, re.MULTILINE)


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.fixture
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_in_tmp_path")
def test_the_quickstart_run_twice_goes_on_where_it_stood_and_ends_the_same():
    """Three checkpoints, then a resume in mid-epoch to the very same weights."""
    first = run(python_blocks()[0], {})
    assert first["manager"].all_steps() == [0, 50, 100]
    second = run(python_blocks()[0].replace("for step, (", "first_step = state.step\n    for step, ("), {})
    assert second["first_step"] == 101
    for name, weight in first["model"].state_dict().items():
        assert torch.equal(weight, second["model"].state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # stock dcp.save and load, alone
@pytest.mark.usefixtures("_in_tmp_path")
def test_every_snippet_runs_after_those_above_it(monkeypatch: pytest.MonkeyPatch):
    """As a reader would paste them, one after the other into one session; a job of ranks has one rank here."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    names: dict[str, Any] = {}
    try:
        for block in python_blocks():
            if not is_of_a_trainer(block):
                run(block, names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.slow
def test_the_snippet_for_ranks_runs_under_torchrun_and_resumes(tmp_path: Path):
    """Two ranks for one epoch, then for the rest of two."""
    (block,) = [block for block in python_blocks() if "DistributedSampler" in block]
    header = "import torch\nfrom asyncckpt import CheckpointManager, TrainState\n"
    script = tmp_path / "train.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for epochs, first_step, next_step in ((1, 0, 8), (2, 6, 16)):
        run_for = re.sub(r"epochs=\d", f"epochs={epochs}", block)
        run_for = run_for.replace("restore_latest(state)", "restore_latest(state); first_step = state.step")
        script.write_text(f"{header}{run_for}\nprint(first_step, state.step)\n")
        ended = subprocess.run(torchrun, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.split("\n")[:2] == [f"{first_step} {next_step}"] * 2
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == ["0", "10", "15", "5"]


def test_every_command_is_there():
    """Scripts can be run, extras can be installed, markers exist."""
    lines = shell_lines()
    assert {"scripts/demo", "scripts/test", "scripts/bench --help"} <= set(lines)
    for line in lines:
        if line.startswith("scripts/"):
            assert os.access(ROOT / line.split()[0], os.X_OK), line
        for extra in re.findall(r"'\.\[(.*?)\]'", line):
            assert extra in PROJECT["project"]["optional-dependencies"], line
    markers = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"-m (\w+)", README)) <= markers


def test_every_command_of_the_shell_is_there():
    """In the section of its own."""
    for name in typer.main.get_command(app).commands:
        assert f"    asyncckpt {name} " in README, name


def test_every_file_and_test_that_is_named_is_there():
    """Links lead somewhere, and a test that is named beside a link stands in that file."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for anchor in re.findall(r"\]\(#(.*?)\)", README):
        headings = [re.sub(r"[^\w -]", "", line).strip().replace(" ", "-").lower() for line in README.splitlines()]
        assert anchor in headings, anchor
    for row in README.splitlines():
        for name in re.findall(r"`(test_\w+)`", row):
            (path,) = re.findall(r"\]\((tests/.*?)\)", row)
            assert f"def {name}(" in (ROOT / path).read_text(), name


def test_every_error_policy_and_event_is_explained():
    """And every name in the tables is one that can be imported."""
    public = {name: getattr(asyncckpt, name) for name in asyncckpt.__all__} | {"StagingError": stagers.StagingError}
    for name, value in public.items():
        if isinstance(value, type) and (
            issubclass(value, (CheckpointError, Event)) or name.startswith(("Save", "Keep"))
        ):
            assert re.search(rf"`{name}\b", README) or name in ("Event", "SavePolicy", "KeepPolicy"), name
    for name in re.findall(r"^\|? ?`([A-Z]\w+)", README, re.MULTILINE):
        assert name in public or hasattr(stagers, name), name


def test_the_changelog_keeps_its_form():
    """Keep a Changelog: unreleased changes first, under its own kinds of change."""
    headings = re.findall(r"^#+ .*", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["# Changelog", "## [Unreleased]"]
    assert {h for h in headings if h.startswith("###")} <= {
        f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
    }
