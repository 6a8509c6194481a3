"""`asyncckpt verify`: every byte of a run's steps. It never writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import typer
from rich.filesize import decimal
from rich.table import Table

from asyncckpt.cli.app import (
    DIFFERENT,
    FAILED,
    INTERRUPTED,
    AsJson,
    Steps,
    StorageOptions,
    Url,
    app,
    check_known,
    fail,
    listed,
    opened,
    output,
    print_json,
    progress,
)
from asyncckpt.errors import CheckpointError, DamagedStepError, StepNotFoundError
from asyncckpt.overview import Kind, kind_of
from asyncckpt.steps import StepFiles
from asyncckpt.storage import Storage, redact
from asyncckpt.verify import find_damage


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Of one step. seconds, files, bytes: that were read. checksums: which ones there were to compare with, as in
    VerifyReport. problems: what is wrong, or why it could not be told."""

    step: int
    kind: Kind
    result: Literal["whole", "damaged", "unreadable", "gone", "not verified"]
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    checksums: str = ""
    problems: tuple[str, ...] = ()


@app.command()
def verify(url: Url, steps: Steps = None, storage_option: StorageOptions = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Read every byte of a run's steps, the newest first, and compare it with its checksums.

    Steps of other writers (stock DCP, torch_xla) are compared with the checksums that they carry, if they do. Saves
    that were never committed are named and not read.

    Exit status: 0: all is whole. 1: a step is damaged. 2: wrong usage, no such step, or storage cannot be read.
    130: interrupted.
    """
    results: list[StepResult] = []
    interrupted = False
    try:
        storage = opened(url, storage_option)
        found = _chosen(storage, listed(storage, "verify").steps, steps or [])
        with progress("verify", sum(files.num_bytes for files in found.values())) as tell:
            for step, files in found.items():
                results.append(_verify(storage, step, files, tell))
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        rows = [dataclasses.asdict(result) for result in results]
        print_json({"url": redact(url), "steps": rows, "interrupted": interrupted})
    elif results:
        _print(redact(url), results)
    if interrupted:
        fail(f"interrupted; {len(results)} steps were verified", INTERRUPTED)
    kinds = {result.result for result in results}
    raise typer.Exit(DIFFERENT if "damaged" in kinds else FAILED if "unreadable" in kinds else 0)


def _chosen(storage: Storage, found: Mapping[int, StepFiles], wanted: list[int]) -> dict[int, StepFiles]:
    """Those wanted, or all: what was committed last first, then foreign ones, then partial ones."""
    check_known(storage, found, wanted, "verify")
    order = sorted(found, key=lambda step: (found[step].sequence or 0, found[step].is_foreign, step), reverse=True)
    return {step: found[step] for step in order if step in wanted or not wanted}


def _verify(storage: Storage, step: int, files: StepFiles, tell: Callable[[int], None]) -> StepResult:
    kind = kind_of(files)
    assert kind is not None
    if kind == "partial":
        return StepResult(step, kind, "not verified", problems=("it was never committed",))
    try:
        report, problems = find_damage(storage, str(step), tell)
    except DamagedStepError as exc:
        return StepResult(step, kind, "damaged", problems=(str(exc),))
    except StepNotFoundError:
        return StepResult(step, kind, "gone", problems=("it was deleted meanwhile",))
    except (CheckpointError, OSError) as exc:
        return StepResult(step, kind, "unreadable", problems=(str(exc),))
    return StepResult(
        step, kind, "damaged" if problems else "whole",
        report.num_files, report.num_bytes, report.seconds, report.checksums, tuple(problems),
    )  # fmt: skip


def _print(url: str, results: list[StepResult]) -> None:
    console = output()
    table = Table(title=url, title_justify="left")
    for heading in ("step", "files", "bytes", "rate"):
        table.add_column(heading, justify="right")
    for heading in ("checksums", "result"):
        table.add_column(heading)
    for row in results:
        read = (str(row.files), decimal(row.bytes), f"{row.bytes / 1e6 / max(row.seconds, 1e-9):,.0f} MB/s")
        told = row.result if row.kind == "committed" else f"{row.result} ({row.kind})"
        style = "bold red" if row.result in ("damaged", "unreadable") else ""
        table.add_row(str(row.step), *(read if row.files else ("", "", "")), row.checksums, told, style=style)
    console.print(table)
    for row in results:
        if row.checksums == "none":
            console.print(
                f"step {row.step}: some of it carries no checksums and was only found to be there", style="yellow"
            )
        for problem in row.problems:
            console.print(f"step {row.step}: {problem}", soft_wrap=True)
