"""`asyncckpt copy`: steps from one URL to another, verified on the way."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from fsspec.utils import get_protocol
from rich.filesize import decimal

from asyncckpt.cli.app import (
    DIFFERENT,
    FAILED,
    AsJson,
    Steps,
    StorageOptions,
    app,
    check_known,
    fail,
    listed,
    new_table,
    opened,
    output,
    print_json,
    progress,
)
from asyncckpt.copying import Copied, Copier, CopyError
from asyncckpt.errors import DamagedStepError, StepNotFoundError
from asyncckpt.overview import Run, kind_of, list_run


@app.command()
def copy(
    url: Annotated[str, typer.Argument(metavar="SOURCE", help="The run that is copied from.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The run that is copied to; it may have steps.")],
    steps: Steps = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Take up interrupted copies; only if no other copy to there is under way."),
    ] = False,
    storage_option: StorageOptions = [],  # noqa: B006
    target_option: Annotated[
        list[str],
        typer.Option(metavar="KEY=VALUE", help="The same for TARGET; without any, it gets SOURCE's if it is alike."),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Copy steps to another run, the oldest commit first; the CRC32 of every byte is compared on the way.

    Each is committed at the target as a save is, with a sequence number of its own: a copy that breaks off leaves no
    step that is not whole. Run again, it passes over steps that are there. A committed step is never overwritten.
    Steps of other writers are copied as they are, and compared with the checksums that they carry, if they do.

    --json: {"source", "target", "steps": [{"step", "result", "num_files", "num_bytes", "num_kept", "seconds",
    "checksums", "problem"}]}; "result" is "copied", "there already", "damaged" or "refused", "num_kept" counts files
    that --resume found whole.

    Exit status: 0: all are there. 1: a step is damaged at the source, and was not copied. 2: wrong usage, the target
    has another step of that number, or storage failed. 130: interrupted.
    """
    source = opened(url, storage_option)
    same = get_protocol(url) == get_protocol(target)
    there = opened(target, target_option or (storage_option if same else []))
    run = listed(source, "copy")
    chosen = _chosen(run, steps or [])
    there.check_writable()
    copier = Copier(source, list_run(there), resume)
    results: list[dict[str, Any]] = []
    try:
        with progress("copy", sum(run.steps[step].num_bytes for step in chosen)) as tell:
            results.extend(_copy(copier, step, tell) for step in chosen)
    finally:  # what was copied is told whatever ended it
        if as_json:
            print_json({"source": source.url, "target": there.url, "steps": results})
        elif results:
            _print(results)
    words = {row["result"] for row in results}
    raise typer.Exit(FAILED if "refused" in words else DIFFERENT if "damaged" in words else 0)


def _chosen(run: Run, wanted: list[int]) -> list[int]:
    """In order of commit."""
    check_known(run.storage, run.steps, wanted, "copy")
    whole = [step for step, files in run.steps.items() if kind_of(files) != "partial"]
    if not whole:
        fail(f"no step at {run.storage.url} was ever committed: there is nothing to copy.")
    return [step for step in whole if step in wanted or not wanted]


def _copy(copier: Copier, step: int, tell: Any) -> dict[str, Any]:
    try:
        return dataclasses.asdict(copier.copy(step, tell)) | {"problem": ""}
    except DamagedStepError as exc:
        failed = {"result": "damaged", "problem": str(exc)}
    except (CopyError, StepNotFoundError) as exc:
        failed = {"result": "refused", "problem": str(exc)}
    return dataclasses.asdict(Copied(step, "copied")) | failed


def _print(results: list[dict[str, Any]]) -> None:
    console = output()
    table = new_table()
    for heading in ("step", "files", "bytes", "rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("checksums", "result"):
        table.add_column(heading)
    for row in results:
        rate = f"{row['num_bytes'] / 1e6 / max(row['seconds'], 1e-9):,.0f} MB/s"
        sent = (str(row["num_files"]), decimal(row["num_bytes"]), rate) if row["num_files"] else ("", "", "")
        kept = f", {row['num_kept']} files were there" if row["num_kept"] else ""
        style = "bold red" if row["problem"] else ""
        table.add_row(str(row["step"]), *sent, row["checksums"], f"{row['result']}{kept}", style=style)
    console.print(table)
    for row in results:
        if row["checksums"] == "none":
            console.print(
                f"step {row['step']}: of another writer; some of it carries no checksums to compare with",
                style="yellow",
            )
        if row["problem"]:
            console.print(row["problem"], soft_wrap=True)
