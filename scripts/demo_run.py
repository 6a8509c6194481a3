"""The demo: one training run as it should be, one that is killed in mid-save and started again, and are they equal?

    scripts/demo [--url URL] [--quick] [--ranks N]

Starts demo_train.py, looks into storage between the kill and the restart, and shows tables and, for one process, a
picture. Exit status 0 only if parameters, optimizer state and loss history of both runs have the same SHA-256. With
ranks one of them is killed, and the run goes on three times: on as many ranks, to the same bits, on one and on twice as
many, within a tolerance. Everything is written to places of this start's own; nothing that was there before is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

from demo_agree import TOLERANCE, agreement_table, compare_ends
from demo_report import Launch, checkpoint_table, draw_timeline
from demo_train import FULL, QUICK, Size
from rich.console import Console
from rich.table import Table

from asyncckpt import CheckpointManager
from asyncckpt.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
KILLED_STEP = 60
TORCHRUN_FAILED = 1
"""Its status when it has ended a job because a rank died."""
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
    parser.add_argument("--ranks", type=int, default=1, help="train under FSDP2 on so many, started by torchrun")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    if arguments.ranks < 1 or (arguments.ranks > 1 and size.batch % (2 * arguments.ranks)):
        parser.error(f"--ranks: the batch of {size.batch} must divide by twice as many, on which the run is resumed")
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the training ends with us
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    out = arguments.out / name
    out.mkdir(parents=True)
    url = f"{(arguments.url or str(arguments.out)).rstrip('/')}/{name}"
    try:
        options = ["--quick"] if arguments.quick else []
        if arguments.ranks == 1:
            are_equal = demo(url, out, options)
        else:
            are_equal = demo_of_ranks(url, out, options, size, arguments.ranks)
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


def demo_of_ranks(url: str, out: Path, options: list[str], size: Size, num_ranks: int) -> bool:
    """Whether the run killed on `num_ranks` came to the same end on as many, on one, and on twice as many."""
    began_s = time.monotonic()
    options = [*options, "--comparable"]
    os.environ["OMP_NUM_THREADS"] = "1"  # in all runs, so that they differ in nothing but the number of ranks
    console.print(f"[bold]1. A training run on {num_ranks} ranks that nothing disturbs[/]")
    reference = launch("uninterrupted", f"{url}/uninterrupted", out, options, status=0, num_ranks=num_ranks)

    console.print(f"\n[bold]2. The same run, with SIGKILL of rank {num_ranks - 1} while step {KILLED_STEP} is saved[/]")
    kill = ["--kill-while-saving", str(KILLED_STEP)]
    killed = launch("killed", f"{url}/killed", out, options + kill, status=TORCHRUN_FAILED, num_ranks=num_ranks)
    if failed := killed.of("Failed").get(KILLED_STEP):
        console.print(f"Rank 0 said: {failed['error']}")
    newest = check_storage(killed.url)

    resumed = []
    for number, count in enumerate([num_ranks, 1, 2 * num_ranks], start=3):
        console.print(f"\n[bold]{number}. What it left, resumed on {count}[/]")
        copy_files(killed.url, f"{url}/resumed-on-{count}")
        title = f"resumed on {count}"
        resumed.append(launch(title, f"{url}/resumed-on-{count}", out, options, status=0, num_ranks=count))
        check_restart(killed, resumed[-1], newest)

    console.print()
    console.print(checkpoint_table([reference, killed, *resumed]))
    agreements = compare_ends(reference, resumed, size)
    console.print(agreement_table(reference.title, agreements))
    # On as many ranks every sum is taken as it was, so there the bits must be the same.
    agree = agreements[0].is_exact and all(agreement.is_within_tolerance for agreement in agreements)
    if agree:
        for launched in [reference, *resumed]:
            clear(launched.url)
    console.print(f"Checkpoints: {killed.url} (as the kill left them, yours to look at and to delete)")
    console.print(f"Time:        {time.monotonic() - began_s:.0f} s in all")
    verdict = "[bold red]DIFFERENT[/]: resumed on other ranks, training did not end as uninterrupted."
    if agree:
        verdict = (
            f"[bold green]EQUAL[/]: on {num_ranks} ranks again bit for bit; on 1 and {2 * num_ranks}, where sums are "
            f"taken in another order, within {TOLERANCE:g}."
        )
    console.print(verdict)
    return agree


def launch(title: str, url: str, out: Path, options: list[str], *, status: int, num_ranks: int = 1) -> Launch:
    """Run demo_train.py to its end, on several ranks by torchrun. DemoError unless that is `status`.

    What a run that is to fail says of it goes to a file: torchrun and every rank print a traceback.
    """
    name = title.replace(" ", "-")
    events, log = out / f"{name}.jsonl", out / f"{name}.log"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [
        sys.executable, *(torchrun if num_ranks > 1 else []),
        str(ROOT / "scripts" / "demo_train.py"), url, "--events", str(events), *options,
    ]  # fmt: skip
    started_s = time.time()
    with log.open("w") if status else contextlib.nullcontext() as errors:
        ended = run(command, errors)
    ended_s = time.time()
    if ended < 0:  # a progress bar that was killed had no time for this
        console.show_cursor()
        console.print()
    if ended != status:
        where = f" (see {log})" if status else ""
        raise DemoError(f"training ended with status {ended}, not {int(status)}{where}: {' '.join(command)}")
    return Launch(title, url, started_s, ended_s, [json.loads(line) for line in events.read_text().splitlines()])


def run(command: list[str], errors: TextIO | None) -> int:
    """Its status. errors: in place of our stderr."""
    with subprocess.Popen(command, env={**PATIENT_THREADS, **os.environ}, stderr=errors) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # and not kill: torchrun would leave its ranks behind
            raise


def copy_files(source_url: str, target_url: str) -> None:
    """Every file of a run, so that each that goes on from there has it for itself."""
    source, target = open_storage(source_url), open_storage(target_url)
    for path, size in source.list_files().items():
        target.write_file(path, size, iter([memoryview(source.read_file(path))]))


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
    apart = max(abs(after[step]["loss"] / before[step]["loss"] - 1) for step in again)
    losses = f"with losses up to {apart:.1e} apart" if apart else "with the same losses"
    console.print(f"Restored step {newest}; steps {again[0]} to {again[-1]} were run a second time, {losses}.")
    leftover = restarted.of("Pruned").get(KILLED_STEP)
    if leftover is None or leftover["whole"]:
        raise DemoError(f"what the kill left of step {KILLED_STEP} is still in storage")
    console.print(f"What the kill had left of step {KILLED_STEP} was deleted once a newer save was whole.")


def compare(reference: Launch, restarted: Launch) -> bool:
    expected, found = reference.sha256, restarted.sha256
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
