"""The demo: one training run as it should be, one that is killed in mid-save and started again, and are they equal?

    scripts/demo [--url URL] [--quick]

Starts demo_train.py three times, looks into storage between the kill and the restart, and shows a table and a picture.
Exit status 0 only if parameters, optimizer state and loss history of both runs have the same SHA-256. Everything is
written to places of this start's own; nothing that was there before is touched.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo_report import Launch, checkpoint_table, draw_timeline
from rich.console import Console
from rich.table import Table

from asyncckpt import CheckpointManager
from asyncckpt.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
KILLED_STEP = 60
# torch's threads spin while they wait for each other, and on two cores take them from the thread that saves, and from
# an object store on this machine: the slowest of 20 steps took 3 to 11 s, and 1.0 to 1.5 s with this (3 runs each).
PATIENT_THREADS = {"OMP_WAIT_POLICY": "passive"}

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """The demo could not show what it is to show."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Kill a training run in mid-save, go on, compare."
    )
    parser.add_argument(
        "--url", help="where checkpoints go: a folder, s3://..., gs://...; default: .demo in the checkout"
    )
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help="for the events and the picture")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the training ends with us
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    out = arguments.out / name
    out.mkdir(parents=True)
    url = f"{(arguments.url or str(arguments.out)).rstrip('/')}/{name}"
    try:
        are_equal = demo(url, out, ["--quick"] if arguments.quick else [])
    except DemoError as exc:
        console.print(f"[bold red]FAILED[/]: {exc}")
        return 1
    return 0 if are_equal else 1


def demo(url: str, out: Path, options: list[str]) -> bool:
    """Whether both runs came to the same end. url, out: fresh."""
    began_s = time.monotonic()
    reference_url, killed_url = f"{url}/uninterrupted", f"{url}/killed"
    console.print("[bold]1. A training run that nothing disturbs[/]")
    reference = launch("uninterrupted", reference_url, out, options, status=0)

    console.print(f"\n[bold]2. The same run, with SIGKILL while step {KILLED_STEP} is being saved[/]")
    kill = ["--kill-while-saving", str(KILLED_STEP)]
    killed = launch("killed", killed_url, out, options + kill, status=-signal.SIGKILL)
    newest = check_storage(killed_url)

    console.print("\n[bold]3. The killed run, started again[/]")
    restarted = launch("restarted", killed_url, out, options, status=0)
    check_restart(killed, restarted, newest)

    console.print()
    console.print(checkpoint_table([reference, killed, restarted]))
    draw_timeline(reference, killed, restarted, out / "timeline.png")
    are_equal = compare(reference, restarted)
    if are_equal:
        clear(reference_url)
    console.print(f"Timeline:    {out / 'timeline.png'}")
    size = sum(open_storage(killed_url).list_files().values()) / 1e6
    console.print(f"Checkpoints: {killed_url} ({size:.0f} MB, yours to look at and to delete)")
    console.print(f"Time:        {time.monotonic() - began_s:.0f} s in all")
    verdict = "[bold green]EQUAL[/]: killed in mid-save and started again, training ended bit for bit as uninterrupted."
    if not are_equal:
        verdict = "[bold red]DIFFERENT[/]: killed in mid-save and started again, training did not end as uninterrupted."
    console.print(verdict)
    return are_equal


def launch(title: str, url: str, out: Path, options: list[str], *, status: int) -> Launch:
    """Run demo_train.py to its end. DemoError unless that is `status`."""
    events = out / f"{title}.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "demo_train.py"), url, "--events", str(events), *options]
    started_s = time.time()
    done = subprocess.run(command, check=False, env={**PATIENT_THREADS, **os.environ})
    ended_s = time.time()
    if done.returncode < 0:  # a progress bar that was killed had no time for this
        console.show_cursor()
        console.print()
    if done.returncode != status:
        raise DemoError(f"training ended with status {done.returncode}, not {int(status)}: {' '.join(command)}")
    return Launch(title, started_s, ended_s, [json.loads(line) for line in events.read_text().splitlines()])


def check_storage(url: str) -> int:
    """Look at what the killed process left, and return the newest whole step."""
    with CheckpointManager(url) as manager:
        whole = manager.all_steps()
    files = open_storage(url).list_files(str(KILLED_STEP))
    if not files or KILLED_STEP in whole or not whole:
        raise DemoError(f"the kill did not hit a save: whole steps {whole}, files of step {KILLED_STEP}: {list(files)}")
    console.print(
        f"Killed while step {KILLED_STEP} was being saved. In storage now: whole steps {whole}; step {KILLED_STEP} is "
        f"partial ({sum(files.values()) / 1e6:.1f} MB of data, no manifest) and ignored."
    )
    return whole[-1]


def check_restart(killed: Launch, restarted: Launch, newest: int) -> None:
    """It went on from the newest whole step, and what it had to do again came out the same."""
    restored, first = list(restarted.of("Restored")), min(restarted.of("Step"))
    if restored != [newest] or first != newest + 1:
        raise DemoError(
            f"step {newest} was to be restored, but it was {restored}, and training went on at step {first}"
        )
    before, after = killed.of("Step"), restarted.of("Step")
    again = sorted(before.keys() & after.keys())
    differing = [step for step in again if before[step]["loss"] != after[step]["loss"]]
    console.print(
        f"Restored step {newest}; steps {again[0]} to {again[-1]} were run a second time, "
        + (f"with other losses at steps {differing}." if differing else "with the same losses.")
    )
    leftover = restarted.of("Pruned").get(KILLED_STEP)
    if leftover is None or leftover["whole"]:
        raise DemoError(f"what the kill left of step {KILLED_STEP} is still in storage")
    console.print(f"What the kill had left of step {KILLED_STEP} was deleted once a newer save was whole.")


def compare(reference: Launch, restarted: Launch) -> bool:
    (expected,), (found,) = (
        [e["sha256"] for e in r.events if e["event"] == "Finished"] for r in (reference, restarted)
    )
    table = Table(title="SHA-256 at the end", title_justify="left")
    for column in ("", "uninterrupted", "killed and started again", ""):
        table.add_column(column)
    for part, digest in expected.items():
        verdict = "[green]equal" if found[part] == digest else "[red]different"
        table.add_row(part, f"{digest[:16]}...", f"{found[part][:16]}...", verdict)
    console.print(table)
    return bool(expected == found)


def clear(url: str) -> None:
    """Delete a run of this demo, the only one that ever wrote there."""
    storage = open_storage(url)
    storage.delete(storage.list_files())


if __name__ == "__main__":
    sys.exit(main())
