"""scripts/demo: what it compares, what it shows, and, marked slow, all of it with a tiny model."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from asyncckpt import CheckpointManager, Committed, Event, Restored, Staged, Written
from asyncckpt.storage import open_storage
from tests.servers import GcsEmulator, S3Server

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))  # its files import each other as they do when started from there

import demo_agree  # noqa: E402
import demo_report  # noqa: E402
import demo_run  # noqa: E402
import demo_train  # noqa: E402


def small_run() -> tuple[torch.nn.Module, torch.optim.Optimizer, demo_train.LossHistory]:
    torch.manual_seed(0)
    model = demo_train.GPT(vocabulary=8, max_length=4, width=8, depth=1, num_heads=2, dropout=0.1)
    losses = demo_train.LossHistory()
    losses.append(3.0)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1), losses


def test_fingerprints_of_equal_states_are_equal() -> None:
    """Made twice from one seed."""
    assert demo_train.fingerprints(*small_run()) == demo_train.fingerprints(*small_run())


def test_fingerprints_tell_which_part_differs_in_its_last_bit() -> None:
    """One weight, one option of the optimizer, one loss."""
    expected = demo_train.fingerprints(*small_run())
    model, optimizer, losses = small_run()
    with torch.no_grad():
        weight = model.blocks[0].mlp[1].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    changed = demo_train.fingerprints(model, optimizer, losses)
    assert [part for part in expected if changed[part] != expected[part]] == ["parameters"]
    optimizer.param_groups[0]["lr"] = 0.1 + 2e-17
    losses.append(3.0)
    assert not set(expected.values()) & set(demo_train.fingerprints(model, optimizer, losses).values())


def test_runs_that_ended_differently_are_not_equal() -> None:
    """One part is enough."""
    ends = [{"parameters": "a", "loss history": loss} for loss in "bbc"]
    launches = [demo_report.Launch("run", "url", 0, 1, [{"event": "Finished", "sha256": end}]) for end in ends]
    assert demo_run.compare(launches[0], launches[1])
    assert not demo_run.compare(launches[0], launches[2])


def test_ends_on_other_ranks_agree_within_the_tolerance() -> None:
    """But on as many as before, and in what they went on from, they must be equal."""
    expected = {"parameters": [torch.tensor([3.0, 4.0])], "losses": [torch.tensor([2.0])]}

    def agreement(moved_by: float, is_restored: bool = True) -> demo_agree.Agreement:
        found = {**expected, "parameters": [torch.tensor([3.0, 4.0 + moved_by])]}
        return demo_agree.Agreement("resumed", 40, is_restored, demo_agree.measure(expected, found))

    same, near, far, mixed_up = agreement(0), agreement(2**-12), agreement(0.5), agreement(0, is_restored=False)
    assert far.distances == {"parameters": 0.1, "losses": 0.0}
    assert [end.is_exact for end in (same, near, far, mixed_up)] == [True, False, False, False]
    assert [end.is_within_tolerance for end in (same, near, far, mixed_up)] == [True, True, False, False]

    console = Console(file=io.StringIO(), width=80)
    console.print(demo_agree.agreement_table("uninterrupted", [same, near, mixed_up]))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["SHA-256", "of", "what", "was", "restored", "equal", "equal", "different"] in rows
    assert ["parameters", "equal", "4.9e-05", "apart", "equal"] in rows


def test_ranks_that_a_batch_does_not_divide_by_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is started."""
    monkeypatch.setattr(sys, "argv", ["demo", "--quick", "--ranks", "3"])
    with pytest.raises(SystemExit):
        demo_run.main()
    assert "the batch of 4 must divide by twice as many" in capsys.readouterr().err


def test_table_and_picture_show_a_save_that_was_killed(tmp_path: Path) -> None:
    """Beside one that was committed, and one of the run that went on."""
    common: Any = {"url": "x", "rank": 0}
    first, second, again = (
        [Staged(step=step, time_s=at, num_bytes=10, wait_s=0, stage_s=0.1, stall_s=0.1, **common),
         Written(step=step, time_s=at + 1, num_bytes=2_000_000, num_files=1, copy_s=0, write_s=0.9, **common),
         Committed(step=step, time_s=at + 2, sequence=1, num_bytes=2_000_000, stall_s=0.1, durable_s=2, **common)]
        for step, at in ((0, 3), (1, 8), (1, 23))
    )  # fmt: skip
    restored = Restored(step=0, time_s=20, num_bytes=10, restore_s=1, **common)
    reference = launch("uninterrupted", 0, 12, [*first, *second])
    killed = launch("killed", 0, 9.5, [*first, *second[:2]])
    restarted = launch("restarted", 10, 30, [restored, *again])

    console = Console(file=io.StringIO(), width=80)
    console.print(demo_report.checkpoint_table([reference, killed, restarted]))
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    outcomes = [(row[0], row[1], row[-1]) for row in rows if row and row[-1] in ("committed", "killed")]
    assert outcomes == [
        ("uninterrupted", "0", "committed"),
        ("uninterrupted", "1", "committed"),
        ("killed", "0", "committed"),
        ("killed", "1", "killed"),
        ("restarted", "1", "committed"),
    ]

    demo_report.draw_timeline(reference, killed, restarted, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def launch(title: str, started_s: float, ended_s: float, events: list[Event]) -> demo_report.Launch:
    """With a training step just before each save."""
    steps = [
        {
            "event": "Step", "rank": 0, "step": event.step, "loss": 1.0,
            "started_s": event.time_s - 1, "time_s": event.time_s - 0.2,
        }
        for event in events
        if isinstance(event, Staged)
    ]  # fmt: skip
    return demo_report.Launch(
        title, "url", started_s, ended_s, steps + [{"event": type(e).__name__, **vars(e)} for e in events]
    )


def test_a_kill_that_hit_no_save_fails_the_demo(tmp_path: Path) -> None:
    """It would show nothing: the step is to be there in part."""
    with pytest.raises(demo_run.DemoError, match="the kill did not hit a save"):
        demo_run.check_storage(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_a_training_that_does_not_start_fails_the_demo(tmp_path: Path) -> None:
    """With the status and the command in the message."""
    with pytest.raises(demo_run.DemoError, match=r"status 2, not 0: .*demo_train.py"):
        demo_run.launch("run", str(tmp_path / "run"), tmp_path, ["--no-such-option"], status=0)


@pytest.mark.slow
def test_demo_in_a_folder_ends_equal(tmp_path: Path) -> None:
    """And the default URL is the folder where the picture is."""
    check_demo([], str(tmp_path), {}, {}, tmp_path)


@pytest.mark.slow
def test_demo_on_s3_needs_nothing_but_the_environment(s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    """What scripts/serve exports."""
    check_demo(["--url", s3_url], s3_url, s3_server.env, s3_server.storage_options, tmp_path)


@pytest.mark.slow
def test_demo_on_gcs_needs_nothing_but_the_environment(gcs_server: GcsEmulator, gs_url: str, tmp_path: Path) -> None:
    """What scripts/serve exports."""
    check_demo(["--url", gs_url], gs_url, gcs_server.env, gcs_server.storage_options, tmp_path)


@pytest.mark.slow
def test_demo_of_ranks_in_a_folder_ends_equal(tmp_path: Path) -> None:
    """Two ranks, of which one is killed, resumed on two, one and four."""
    check_demo_of_ranks([], str(tmp_path), {}, {}, tmp_path)


@pytest.mark.slow
def test_demo_of_ranks_on_s3_ends_equal(s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    """torchrun hands the environment on."""
    check_demo_of_ranks(["--url", s3_url], s3_url, s3_server.env, s3_server.storage_options, tmp_path)


def check_demo(options: list[str], url: str, env: dict[str, str], storage_options: dict[str, Any], out: Path) -> None:
    said = run_demo([*options, "--out", str(out)], env)
    assert said[-1].startswith("EQUAL: ")
    assert any("whole steps [0, 20, 40]; step 60 is partial" in line for line in said)
    (picture,) = out.glob("*/timeline.png")
    name = picture.parent.name
    assert steps_at(f"{url}/{name}/killed", storage_options) == [60, 80, 100]
    assert open_storage(f"{url}/{name}/uninterrupted", storage_options).list_files() == {}


def check_demo_of_ranks(
    options: list[str], url: str, env: dict[str, str], storage_options: dict[str, Any], out: Path
) -> None:
    said = run_demo(["--ranks", "2", *options, "--out", str(out)], env)
    assert said[-1].startswith("EQUAL: on 2 ranks again bit for bit; on 1 and 4, ")
    assert any(line.startswith("Rank 0 said: step 60 ") and "rank 1 failed to write" in line for line in said)
    assert any("whole steps [0, 20, 40]; step 60 is partial" in line for line in said)
    rows = [line.split() for line in said]
    assert ["restored", "step", "40", "40", "40"] in rows
    assert ["SHA-256", "of", "what", "was", "restored", "equal", "equal", "equal"] in rows
    (events,) = out.glob("*/killed.jsonl")
    name = events.parent.name
    assert steps_at(f"{url}/{name}/killed", storage_options) == [0, 20, 40]
    for run in ("uninterrupted", "resumed-on-2", "resumed-on-1", "resumed-on-4"):
        assert open_storage(f"{url}/{name}/{run}", storage_options).list_files() == {}


def run_demo(options: list[str], env: dict[str, str]) -> list[str]:
    """The lines that it prints."""
    command = [sys.executable, str(SCRIPTS / "demo_run.py"), "--quick", *options]
    # One thread: two per process wait for each other when the cores are shared.
    done = subprocess.run(command, env={**os.environ, **env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def steps_at(url: str, storage_options: dict[str, Any]) -> list[int]:
    with CheckpointManager(url, storage_options=storage_options) as manager:
        return manager.all_steps()
