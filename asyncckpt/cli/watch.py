"""`asyncckpt watch`: what happens to a run, as it happens. It never writes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from asyncckpt.cli.app import (
    DIFFERENT,
    FAILED,
    AsJson,
    StorageOptions,
    Url,
    app,
    fail,
    opened,
    output,
    print_json,
    printable,
    seconds_of,
    time_text,
)
from asyncckpt.overview import Glance, Run, list_run, look
from asyncckpt.steps import attempt_sequence

MAX_FAILURES = 5
"""Listings that fail in a row; each was tried again for two minutes."""


@dataclasses.dataclass(frozen=True)
class Change:
    """what: "committed", "damaged", "gone", or "begun": files of a save that is not committed. seconds: since the
    commit before, by the clocks of the ranks; rate: bytes of this step over that time."""

    what: str
    step: int
    bytes: int = 0
    time: str | None = None
    world_size: int | None = None
    metrics: dict[str, float] | None = None
    seconds: float | None = None
    rate: float | None = None
    problem: str = ""


@app.command()
def watch(
    url: Url,
    interval: Annotated[str, typer.Option(metavar="10s", help="Between two looks.")] = "10s",
    until: Annotated[
        int | None, typer.Option(metavar="STEP", help="End when this step, or a later one, is there.")
    ] = None,
    timeout: Annotated[str, typer.Option(metavar="1h", help="End after so long.")] = "",
    storage_option: StorageOptions = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Follow a run: a line for each save that begins, is committed or is deleted, until Ctrl-C.

    The first lines are the steps that are there, at most 10. One listing at each look; a run that has not begun is
    waited for.

    --json: one document on each line: {"what", "step", "bytes", "time", "world_size", "metrics", "seconds", "rate",
    "problem"}; "what" is "committed", "damaged", "begun" or "gone".

    Exit status: 0: --until was reached, or no --until was given and the --timeout is over. 1: the --timeout is over
    before it. 2: wrong usage, or storage cannot be read. 130: Ctrl-C.
    """
    storage = opened(url, storage_option)
    pause, ends = seconds_of(interval), time.monotonic() + seconds_of(timeout) if timeout else None
    before, failures = Run(storage, {}, {}), 0
    is_first, newest = True, None
    console = output()
    while True:
        try:
            run = list_run(storage)
            changes, newest = _changes(before, run, newest, num_first=10 if is_first else None)
        except OSError as exc:
            failures += 1
            if is_first or failures == MAX_FAILURES:
                fail(f"{storage.url} cannot be listed: {exc}. Check the URL and the permissions.", FAILED)
            changes, run = [], before
        else:
            failures, is_first = 0, False
        for change in changes:
            if as_json:
                print_json(dataclasses.asdict(change))
            else:
                console.print(_text(change), soft_wrap=True)
        console.file.flush()
        if until is not None and any(step >= until for step, files in run.steps.items() if files.sequence is not None):
            return
        left = pause if ends is None else min(pause, ends - time.monotonic())
        if left <= 0:
            raise typer.Exit(0 if until is None else DIFFERENT)
        before = run
        time.sleep(left)


def _changes(before: Run, run: Run, newest: Glance | None, num_first: int | None) -> tuple[list[Change], Glance | None]:
    """(in the order of commit, the newest commit that was seen). num_first: of the steps there at the start."""
    new = [
        step
        for step, files in run.steps.items()
        if files.sequence is not None and (step not in before.steps or before.steps[step].sequence != files.sequence)
    ]
    changes = []
    for glance in look(run, new[-num_first:] if num_first else new).values():
        changes.append(_committed(glance, newest))
        newest = glance
    changes += [Change("gone", step) for step in before.steps if step not in run.steps]
    begun = {step for step, _ in _unfinished(run)} if set(_unfinished(run)) - set(_unfinished(before)) else set()
    changes += [Change("begun", step, run.steps[step].num_bytes) for step in sorted(begun) if step not in new]
    return changes, newest


def _unfinished(run: Run) -> Iterator[tuple[int, str]]:
    """Saves that may be under way: newer than every commit."""
    for step, files in run.steps.items():
        for attempt in files.unfinished():
            if attempt_sequence(attempt) > run.newest_sequence:
                yield step, attempt


def _committed(glance: Glance, before: Glance | None) -> Change:
    head = glance.head
    if head is None or glance.damage:
        return Change("damaged", glance.step, glance.num_bytes, problem=glance.damage)
    seconds = head.time_s - before.head.time_s if before is not None and before.head is not None else None
    rate = glance.num_bytes / seconds if seconds is not None and seconds > 0 else None
    return Change(
        "committed", glance.step, glance.num_bytes, head.time, head.world_size, dict(head.metrics), seconds, rate
    )  # fmt: skip


def _text(change: Change) -> str:
    words: list[Any] = [change.time[11:19] if change.time else time.strftime("%H:%M:%S", time.gmtime())]
    words += [f"step {change.step}", change.what]
    words += [decimal(change.bytes)] if change.bytes else []
    words += [f"{time_text(change.seconds)} after the one before"] if change.seconds is not None else []
    words += [f"{decimal(int(change.rate))}/s"] if change.rate is not None else []
    words += [f"{name}={value:.4g}" for name, value in (change.metrics or {}).items()]
    return printable("  ".join([*words, change.problem] if change.problem else words))
