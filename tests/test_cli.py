"""The command `asyncckpt`, mostly as a process of its own: what it prints, how it exits, and that it never writes."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

from asyncckpt import CheckpointManager, cli
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import FaultyStorage, RecordingStorage
from tests.states import state
from tests.test_verify import data_file, flip, manifest_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
ROOT = pathlib.Path(__file__).parents[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "asyncckpt", *arguments],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def ran(*arguments: str) -> Any:
    """In this process, which has imported torch."""
    return CliRunner().invoke(cli.app.app, ["verify", *arguments])


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    """Steps 1 and 2, of which 1 was committed last, one of stock DCP, and one that was never committed."""
    path = tmp_path / "run"
    with CheckpointManager(str(path)) as manager:
        for step in (1, 2, 1):
            manager.save(step, state(step))
    dcp.save({"w": torch.ones(9)}, checkpoint_id=str(path / "30"))
    (path / "7" / "00000004-abcdef").mkdir(parents=True)
    (path / "7" / "00000004-abcdef" / "__0_0.distcp").write_bytes(b"half")
    return path


def tree(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in path.rglob("*")}


def damage(run: pathlib.Path, step: int) -> None:
    chunk = next(chunk for chunk in manifest_of(run, step).chunks if chunk.key == "w")
    flip(data_file(run, step), chunk.payload_offset)


def test_a_whole_run_is_a_table_and_status_0(run: pathlib.Path) -> None:
    """Every step with what it was compared with, the newest first; nothing is written."""
    before = tree(run)
    done = command("verify", str(run))
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert [(c[0], c[1], c[4], c[5]) for c in cells] == [
        ("1", "3", "manifest", "whole"),
        ("2", "3", "manifest", "whole"),
        ("30", "1", "zip", "whole (foreign)"),
        ("7", "", "", "not verified (partial)"),
    ]
    assert "step 7: it was never committed" in done.stdout
    assert done.stderr == ""  # no bar where there is no terminal
    assert tree(run) == before


def test_damage_is_named_and_status_1(run: pathlib.Path) -> None:
    """In the other steps it goes on; and a path may hold what rich takes for markup."""
    (run.parent / "r[").mkdir()
    run = run.rename(run.parent / "r[" / "]")
    damage(run, 2)
    done = ran(str(run))
    assert done.exit_code == 1
    assert re.search(r"step 2: 2/\S+/__0_0.distcp has CRC32 \w+, the manifest says \w+", done.output)
    assert re.search(r"'w': the 4000 bytes at offset \d+ have CRC32", done.output)
    assert done.output.count("whole") == 2
    assert ran(str(run), "1").exit_code == 0


def test_json_says_the_same(run: pathlib.Path) -> None:
    """One document on standard output."""
    damage(run, 2)
    next((run / "1").glob("manifest-*")).write_bytes(b"")
    done = ran(str(run), "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert (document["url"], document["interrupted"]) == (str(run), False)
    found = {row["step"]: row for row in document["steps"]}
    assert [(step, row["kind"], row["result"]) for step, row in found.items()] == [
        (1, "committed", "damaged"), (2, "committed", "damaged"), (30, "foreign", "whole"),
        (7, "partial", "not verified"),
    ]  # fmt: skip
    assert "manifest" in found[1]["problems"][0]
    assert found[30]["problems"] == []
    assert found[30]["bytes"] == (run / "30" / "__0_0.distcp").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "5"], r"no step 5 at .*; there are \[1, 2, 7, 30\]"),
        (["{run}", "7"], r"step 7 at .* was never committed"),
        (["{run}/1"], r"is the folder of one step\. .*asyncckpt verify \S*/run 1"),
        (["{run}/nowhere"], r"there is no step at .*nowhere"),
        (["nosuch://bucket/run"], r"unknown protocol 'nosuch'"),
        (["{run}", "--storage-option", "hunter2"], r"takes KEY=VALUE"),
        (["{run}", "--storage-option", "a={hunter2"], r"begins like JSON and is none"),
        (["{run}", "one"], r"valid integer"),
        ([], r"Missing argument 'URL'"),
    ],
    ids=str,
)
def test_what_cannot_be_verified_is_status_2(run: pathlib.Path, arguments: list[str], words: str) -> None:
    """With words that help, and no secret."""
    done = ran(*(argument.replace("{run}", str(run)) for argument in arguments))
    assert done.exit_code == 2
    assert re.search(words, done.output)
    assert "hunter2" not in done.output


def test_storage_that_fails_is_status_2_and_reads_are_all_it_does(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable is not damaged; the next steps are tried."""
    opened: list[RecordingStorage] = []

    def open_faulty(*arguments: Any) -> Storage:
        opened.append(FaultyStorage(open_storage(*arguments), "read_into", nth=1))
        return opened[-1]

    monkeypatch.setattr(cli.app, "open_storage", open_faulty)
    done = ran(str(run))
    assert done.exit_code == 2
    assert "step 1: " in done.output
    assert "injected fault" in done.output
    assert done.output.count("whole") == 2
    assert {call.verb for call in opened[0].calls} == {"list_files", "read_file", "read_into"}


def test_options_reach_the_filesystem_as_text_or_json(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that looks like a number stays text."""
    given: list[Any] = []
    monkeypatch.setattr(cli.app, "open_storage", lambda url, options: given.append(options) or open_storage(url))
    options = ["key=0123", "secret=a=b", 'client_kwargs={"endpoint_url": "http://h:1"}', "anon=true", "x=null"]
    assert ran(str(run), *(word for option in options for word in ("--storage-option", option))).exit_code == 0
    expected = {"key": "0123", "secret": "a=b", "client_kwargs": {"endpoint_url": "http://h:1"}, "anon": True}
    assert given == [{**expected, "x": None}]


@pytest.mark.s3
def test_a_run_on_s3_is_verified_with_the_options_given(s3_url: str, s3_options: dict[str, Any]) -> None:
    """And without them it is status 2, and no key is shown."""
    with CheckpointManager(s3_url, storage_options=s3_options) as manager:
        manager.save(1, state(1))
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in s3_options.items()}
    options = [word for key, text in texts.items() for word in ("--storage-option", f"{key}={text}")]
    assert ran(s3_url, "--json", *options).exit_code == 0
    storage = open_storage(s3_url, s3_options)
    path = next(path for path in storage.list_files("1") if path.endswith(".distcp"))
    storage.replace(path, storage.read_file(path)[:-9])
    done = ran(s3_url, *options)
    assert done.exit_code == 1
    assert f"{path} has" in done.output
    done = ran(f"{s3_url}-none", *options)
    assert done.exit_code == 2
    assert s3_options["secret"] not in done.output


def test_a_step_that_goes_meanwhile_is_no_failure(run: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on, and prunes."""

    class Pruned(RecordingStorage):
        def read_into(self, path: str, *arguments: Any) -> None:
            if path.startswith("1/"):
                for file in (run / "2").glob("manifest-*"):
                    file.unlink()
            super().read_into(path, *arguments)

    monkeypatch.setattr(cli.app, "open_storage", lambda *arguments: Pruned(open_storage(*arguments)))
    done = ran(str(run))
    assert done.exit_code == 0
    assert "step 2: it was deleted meanwhile" in done.output


SLOW_READ = """
import signal, sys, threading
import asyncckpt.cli as cli, asyncckpt.storage_local as local

interrupted = threading.Event()

def interrupt(*arguments):
    interrupted.set()
    signal.default_int_handler(*arguments)

signal.signal(signal.SIGINT, interrupt)
plain = local.LocalStorage.read_into
def read_into(self, path, *arguments):
    if path.startswith("1/") and path.endswith(".distcp"):
        print("reading", flush=True)
        interrupted.wait(60)
    plain(self, path, *arguments)
local.LocalStorage.read_into = read_into
cli.main()
"""


def test_ctrl_c_ends_it_with_what_it_knows(tmp_path: pathlib.Path) -> None:
    """Status 130, no traceback; a read under way is waited for."""
    with CheckpointManager(str(tmp_path)) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_READ, "verify", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert err == "interrupted; 1 steps were verified\n"
    assert re.search(r"│ +2 │.*whole", out)


def test_help_tells_the_exit_status() -> None:
    """Of the command, and what commands there are."""
    assert "130: interrupted" in " ".join(ran("--help").output.split())
    assert "verify" in CliRunner().invoke(cli.app.app, []).output


def test_without_the_extra_it_says_what_to_install(tmp_path: pathlib.Path) -> None:
    """asyncckpt itself needs neither typer nor rich."""
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    done = command("verify", "run", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "the command asyncckpt needs one more package (typer): pip install 'asyncckpt[cli]'\n"
