"""`asyncckpt ls`: which steps a run has. It never writes, and reads no more than the ends of manifests."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal

from asyncckpt.cli.app import (
    AsJson,
    StorageOptions,
    Url,
    app,
    counted,
    listed,
    metrics_text,
    new_table,
    opened,
    output,
    print_json,
    printable,
    seconds_of,
    time_text,
)
from asyncckpt.overview import Glance, Run, look

NUM_SHOWN = 50
"""So many are read in half a second from a bucket (16 at a time, 100 ms each), and fill a terminal."""


@app.command()
def ls(
    url: Url,
    limit: Annotated[int, typer.Option(min=0, help="Show so many of the newest; 0: all.")] = NUM_SHOWN,
    since: Annotated[str, typer.Option(metavar="7d", help="Only what was committed in the last 30m, 12h, 7d.")] = "",
    storage_option: StorageOptions = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """List a run's steps, the last committed first: size, ranks, time and metrics, and what is partial or foreign.

    A step is committed; damaged, if the listing lacks files of it; foreign, if another writer made it (stock DCP,
    torch_xla); or partial: a save that is under way, or died. `asyncckpt verify` reads the data as well.

    --json: {"url", "total", "total_bytes", "steps": [{"step", "kind", "sequence", "bytes", "unfinished", "holds",
    "damage", "time", "age_s", "world_size", "metrics", "metadata", "torch", "asyncckpt"}]}; "bytes" are those in
    storage, "unfinished" counts saves in the step's folder that are under way or dead, and what is not known is null.

    Exit status: 0: they are listed. 2: wrong usage, no step there, or storage cannot be read. 130: interrupted.
    """
    seconds = seconds_of(since) if since else None
    storage = opened(url, storage_option)
    run = listed(storage, "show")
    now_s = time.time()
    shown = _newest(run, limit or len(run.steps), None if seconds is None else now_s - seconds)
    total_bytes = sum(files.num_bytes for files in run.steps.values())
    if as_json:
        rows = [_row(glance, now_s) for glance in shown]
        print_json({"url": storage.url, "total": len(run.steps), "total_bytes": total_bytes, "steps": rows})
        return
    console = output()
    console.print(storage.url, soft_wrap=True)
    _print(console, shown, now_s)
    left = len(run.steps) - len(shown)
    more = f"; {left:,} of them not shown{'' if seconds else ' (--limit 0: all)'}" if left else ""
    console.print(f"{counted(len(run.steps), 'step')}, {decimal(total_bytes)}{more}")
    for glance in shown:
        if glance.damage:
            console.print(f"step {glance.step}: {glance.damage}", soft_wrap=True)


def _newest(run: Run, limit: int, since_s: float | None) -> list[Glance]:
    """Read in batches, as those before `since_s` need not be."""
    shown: list[Glance] = []
    steps = list(run.steps)[::-1]
    for start in range(0, len(steps), 256):
        seen = look(run, steps[start : start + min(256, limit - len(shown))]).values()
        young = [one for one in seen if since_s is None or (one.head is not None and one.head.time_s >= since_s)]
        shown += young
        is_past = since_s is not None and any(one.head is not None and one.head.time_s < since_s for one in seen)
        if is_past or len(shown) >= limit:
            break
    return shown


def _row(glance: Glance, now_s: float) -> dict[str, Any]:
    head = glance.head
    known = {
        "time": head and head.time,
        "age_s": head and round(now_s - head.time_s, 3),
        "world_size": head and head.world_size,
        "metrics": head and dict(head.metrics),
        "metadata": head and dict(head.metadata),
        "torch": head and head.torch,
        "asyncckpt": head and head.asyncckpt,
    }
    found = {field.name: getattr(glance, field.name) for field in dataclasses.fields(glance)}
    names = {"num_bytes": "bytes", "num_unfinished": "unfinished"}
    return {names.get(name, name): value for name, value in found.items() if name != "head"} | known


def _print(console: Console, shown: Sequence[Glance], now_s: float) -> None:
    table = new_table()
    for heading in ("step", "size", "ranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("committed (UTC)", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("metrics")
    for glance in shown:
        state, style = _state(glance)
        made = ("", "", "")
        if head := glance.head:
            made = str(head.world_size), head.time[:16].replace("T", " "), time_text(max(0, now_s - head.time_s))
        metrics = metrics_text(head.metrics) if head else ""
        table.add_row(str(glance.step), decimal(glance.num_bytes), *made, state, printable(metrics), style=style)
    console.print(table)


def _state(glance: Glance) -> tuple[str, str]:
    """(word, style)"""
    if glance.damage:
        return "damaged", "bold red"
    if glance.kind != "committed":
        return glance.kind, "yellow" if glance.kind == "partial" else "dim"
    holds = {"files": " files", "both": " +files"}.get(glance.holds, "")
    return f"committed{holds}", ""
