"""`asyncckpt prune`: delete steps that a retention policy does not keep, and dead saves. It asks first."""

from __future__ import annotations

import dataclasses
import functools
import operator
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal

from asyncckpt.cli.app import (
    DIFFERENT,
    AsJson,
    StorageOptions,
    Url,
    app,
    counted,
    fail,
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
from asyncckpt.overview import Glance, Run
from asyncckpt.policy import KeepAny, KeepBest, KeepEvery, KeepLast, KeepPolicy, KeepYounger
from asyncckpt.pruning import Plan, find_dead, plan_steps
from asyncckpt.pruning import prune as carry_out


@app.command()
def prune(
    url: Url,
    keep_last: Annotated[int | None, typer.Option(min=1, help="Keep the N committed last.", metavar="N")] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Keep multiples of N.", metavar="N")] = None,
    keep_best: Annotated[
        list[str],
        typer.Option(
            metavar="METRIC[:min|max[:N]]",
            help="Keep the N (1) best by a metric, lowest or highest. May be repeated.",
        ),
    ] = [],  # noqa: B006
    keep_younger: Annotated[str, typer.Option(metavar="7d", help="Keep what was committed in the last 12h, 7d.")] = "",
    partial: Annotated[bool, typer.Option("--partial", help="Delete dead saves too, or alone.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="1d", help="With --partial: how long a save that may live got no new file.")
    ] = "1d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    storage_option: StorageOptions = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Delete the committed steps that none of the --keep options keeps, after showing them and asking.

    Never deleted: the step committed last, steps that do not read, and those of other writers (stock DCP, torch_xla).
    The run may go on meanwhile; a step that it saves again stays. --partial deletes saves that never committed: those
    that a later commit has overtaken, and others when they got no file for the --grace, by the clock of the storage.

    --json: {"url", "dry_run", "dropped": [{"step", "sequence", "bytes", "time", "metrics"}], "kept": [step],
    "damaged": [step], "dead": [{"step", "attempt", "num_files", "num_bytes", "age_s"}], "deleted_files", "bytes"};
    it needs --yes or --dry-run.

    Exit status: 0: done, or there was nothing to do. 1: the answer was no. 2: wrong usage, or something could not be
    deleted. 130: interrupted.
    """
    policy = _policy(keep_last, keep_every, keep_best, keep_younger)
    grace_s = seconds_of(grace)
    if policy is None and not partial:
        fail("say what to keep (--keep-last, --keep-every, --keep-best, --keep-younger), or --partial")
    if not (yes or dry_run) and (as_json or not sys.stdin.isatty()):
        fail("nobody is there to be asked: add --yes to delete, or --dry-run to see what would go")
    storage = opened(url, storage_option)
    run = listed(storage, "prune")
    plan = plan_steps(run, policy) if policy is not None else Plan()
    if partial:
        plan = dataclasses.replace(plan, dead=find_dead(run, grace_s))
    document = _document(run, plan, dry_run=dry_run)
    console = output()
    if not as_json:
        _print_plan(console, run, plan, policy)
    num_deleted = 0
    if (plan.drop or plan.dead) and not dry_run:
        if not yes and not typer.confirm("Delete them?"):
            raise typer.Exit(DIFFERENT)
        num_deleted = sum(pruned.num_files for pruned in carry_out(run, plan))
        if not as_json:
            console.print(f"deleted {counted(num_deleted, 'file')}")
    if as_json:
        print_json(document | {"deleted_files": num_deleted})


def _policy(last: int | None, every: int | None, best: Sequence[str], younger: str) -> KeepPolicy | None:
    policies: list[Any] = [KeepLast(last)] if last else []
    policies += [KeepEvery(every)] if every else []
    policies += [_best(text) for text in best]
    policies += [KeepYounger(seconds_of(younger))] if younger else []
    return functools.reduce(operator.or_, policies[1:], policies[0]) if policies else None


def _best(text: str) -> KeepBest:
    """A metric's name may hold a colon, too."""
    metric, n, mode = text, 1, "min"
    head, _, tail = metric.rpartition(":")
    if head and tail.isdecimal():
        metric, n = head, int(tail)
        head, _, tail = metric.rpartition(":")
    if head and tail in ("min", "max"):
        metric, mode = head, tail
    return KeepBest(n, metric, "max" if mode == "max" else "min")


def _document(run: Run, plan: Plan, *, dry_run: bool) -> dict[str, Any]:
    dropped = [
        {
            "step": one.step,
            "sequence": one.sequence,
            "bytes": one.num_bytes,
            "time": one.head and one.head.time,
            "metrics": one.head and dict(one.head.metrics),
        }
        for one in plan.drop
    ]
    return {
        "url": run.storage.url,
        "dry_run": dry_run,
        "dropped": dropped,
        "kept": [one.step for one in plan.keep],
        "damaged": [one.step for one in plan.damaged],
        "dead": [dataclasses.asdict(save) for save in plan.dead],
        "bytes": _num_bytes(plan),
    }


def _num_bytes(plan: Plan) -> int:
    return sum(one.num_bytes for one in plan.drop) + sum(save.num_bytes for save in plan.dead)


def _print_plan(console: Console, run: Run, plan: Plan, policy: KeepPolicy | None) -> None:
    if policy is not None:
        told = " | ".join(map(str, policy.policies)) if isinstance(policy, KeepAny) else str(policy)
        console.print(f"{run.storage.url}: of {counted(len(plan.keep) + len(plan.drop), 'step')} {told} keeps", end=" ")
        console.print(f"{len(plan.keep):,}: {_numbers(plan.keep)}", soft_wrap=True)
    for one in plan.damaged:
        console.print(f"step {one.step} stays: {one.damage}", style="yellow", soft_wrap=True)
    if not plan.drop and not plan.dead:
        console.print("there is nothing to delete")
        return
    table = new_table()
    for heading in ("goes", "size", "age"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why")
    for one in plan.drop:
        age = time_text(max(0, time.time() - one.head.time_s)) if one.head else ""
        metrics = metrics_text(one.head.metrics) if one.head else ""
        table.add_row(str(one.step), decimal(one.num_bytes), age, printable(f"not kept {metrics}"))
    for save in plan.dead:
        age = "" if save.age_s is None else time_text(save.age_s)
        table.add_row(str(save.step), decimal(save.num_bytes), age, f"never committed: {save.attempt}")
    console.print(table)
    gone = [counted(len(plan.drop), "step")] * bool(plan.drop) + [counted(len(plan.dead), "dead save")] * bool(
        plan.dead
    )
    console.print(f"{' and '.join(gone)}, {decimal(_num_bytes(plan))}")


def _numbers(steps: Sequence[Glance]) -> str:
    shown = ", ".join(str(one.step) for one in steps[-20:])
    return f"..., {shown}" if len(steps) > 20 else shown
