"""What holds for every command: its help, how it ends, and what it tells a shell."""

from __future__ import annotations

import json
import pathlib
import signal

import pytest
import typer.main

from asyncckpt import CheckpointManager, __version__
from asyncckpt.cli.app import app
from tests.cli.commands import as_process, ran
from tests.states import state

COMMANDS = sorted(typer.main.get_command(app).commands)
READERS = ["ls", "show", "verify", "watch", "prune"]


def test_every_command_that_the_issue_names_is_there() -> None:
    """And the help of all names each."""
    assert set(COMMANDS) >= {"ls", "show", "verify", "diff", "prune", "copy", "export", "import", "watch", "report"}
    assert all(f"  {name} " in ran("--help").output for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_what_it_does_its_json_and_its_exit_status(name: str) -> None:
    """Within 80 columns."""
    done = ran(name, "--help")
    assert done.exit_code == 0
    text = " ".join(done.output.split())
    assert "--json" in text
    assert "Exit status: 0: " in text
    assert max(map(len, done.output.splitlines())) <= 80


@pytest.mark.parametrize("name", READERS)
def test_a_place_without_a_run_or_a_store_that_is_none_is_status_2_in_one_line(
    name: str, tmp_path: pathlib.Path
) -> None:
    """No traceback, and what to do."""
    extra = ["--keep-last", "1", "--yes"] if name == "prune" else ["--timeout", "0s"] if name == "watch" else []
    if name != "watch":  # which waits for a run to begin
        done = ran(name, tmp_path / "nowhere", *extra)
        assert done.exit_code == 2
        assert "there is no step at" in done.output
    done = ran(name, "nosuch://bucket/run", *extra)
    assert done.exit_code == 2
    assert "unknown protocol 'nosuch'" in done.output
    assert len(done.stderr.splitlines()) == 1


def test_the_version_and_completion_are_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step numbers of a folder complete; a bucket is not asked at a key press."""
    assert ran("--version").output == f"asyncckpt {__version__}\n"
    for step in ("7", "71", "9", "x"):
        (tmp_path / step).mkdir()
    monkeypatch.setenv("_ASYNCCKPT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"asyncckpt show {tmp_path} 7")
    monkeypatch.setenv("COMP_CWORD", "3")
    done = typer.testing.CliRunner().invoke(app, [], prog_name="asyncckpt")
    assert done.output.split() == ["7", "71"]


@pytest.mark.slow
def test_a_closed_pipe_and_ctrl_c_end_it_quietly(tmp_path: pathlib.Path) -> None:
    """141 and 130, as a shell has them, without a traceback."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state(1))
    with as_process("watch", tmp_path, "--interval", "1h", "--json") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["step"] == 1
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "interrupted\n")
        assert process.returncode == 130
    with as_process("show", tmp_path, "--all") as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 141
