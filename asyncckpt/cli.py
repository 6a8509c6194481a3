"""The command `asyncckpt`: parse, call, print. It reads storage by the functions that a manager uses, makes no manager,
and never writes. What a command finds is a dataclass, which is printed as a table or as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.table import Table
except ImportError as exc:
    print(f"the command asyncckpt needs one more package ({exc.name}): pip install 'asyncckpt[cli]'", file=sys.stderr)
    raise SystemExit(2) from None

from asyncckpt.errors import CheckpointError, DamagedStepError, StepNotFoundError
from asyncckpt.steps import StepFiles, read_listing, read_step_files
from asyncckpt.storage import Storage, open_storage, redact
from asyncckpt.verify import find_damage

DAMAGED, FAILED, INTERRUPTED = 1, 2, 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Url = Annotated[
    str, typer.Argument(metavar="URL", help="A run: a folder, or s3://, gs:// and every other URL that fsspec knows.")
]
StorageOptions = Annotated[
    list[str],
    typer.Option(
        "--storage-option",
        metavar="KEY=VALUE",
        help="Given to the fsspec filesystem: text, or a JSON object, list, true, false or null. May be repeated.",
    ),
]


def main() -> None:
    """Runs the command line and exits with its status."""
    app(prog_name="asyncckpt")


@app.callback()
def _asyncckpt() -> None:
    """What is in a run's checkpoints. Nothing here ever writes."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """Of one step. seconds, files, bytes: that were read. checksums: which ones there were to compare with, as in
    VerifyReport. problems: what is wrong, or why it could not be told."""

    step: int
    kind: Literal["committed", "foreign", "partial"]
    result: Literal["whole", "damaged", "unreadable", "gone", "not verified"]
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0
    checksums: str = ""
    problems: tuple[str, ...] = ()


Steps = Annotated[list[int] | None, typer.Argument(metavar="STEP", help="Without any, all.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document in place of the table.")]


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
        storage = _open(url, storage_option)
        found = _chosen(storage, _listing(storage), steps or [])
        with _progress(sum(files.num_bytes for files in found.values())) as tell:
            for step, files in found.items():
                results.append(_verify(storage, step, files, tell))
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        rows = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"url": redact(url), "steps": rows, "interrupted": interrupted}))
    elif results:
        _print(redact(url), results)
    if interrupted:
        _fail(f"interrupted; {len(results)} steps were verified", INTERRUPTED)
    kinds = {result.result for result in results}
    raise typer.Exit(DAMAGED if "damaged" in kinds else FAILED if "unreadable" in kinds else 0)


def _open(url: str, options: list[str]) -> Storage:
    pairs = [option.partition("=") for option in options]
    if not all(key and equals for key, equals, _ in pairs):
        _fail("--storage-option takes KEY=VALUE")  # not shown: it may be a secret
    try:
        return open_storage(url, {key: _value(text) for key, _, text in pairs})
    except (ValueError, TypeError, ImportError, OSError) as exc:
        _fail(redact(f"{redact(url)} cannot be opened: {exc}"))


def _value(text: str) -> Any:
    """A key or a secret may look like a number, and is none."""
    if text[:1] in ("{", "[") or text in ("true", "false", "null"):
        try:
            return json.loads(text)
        except ValueError:
            _fail("the value of a --storage-option begins like JSON and is none")
    return text


def _listing(storage: Storage) -> dict[int, StepFiles]:
    try:
        files = storage.list_files()
    except OSError as exc:
        _fail(f"{storage.url} cannot be listed: {exc}. Check the URL, that the bucket exists, and the permissions.")
    steps = {step: found for step, found in read_listing(files).items() if _kind(found)}
    if not steps and (one := read_step_files(files)) and (one.manifests or one.is_foreign):
        run, _, step = storage.url.rstrip("/").rpartition("/")
        _fail(f"{storage.url} is the folder of one step. Give the run's and the step: asyncckpt verify {run} {step}")
    if not steps:
        _fail(f"there is no step at {storage.url}.")
    return steps


def _kind(files: StepFiles) -> Literal["committed", "foreign", "partial"] | None:
    if files.sequence is not None:
        return "committed"
    return "foreign" if files.is_foreign else "partial" if files.attempts else None


def _chosen(storage: Storage, found: Mapping[int, StepFiles], wanted: list[int]) -> dict[int, StepFiles]:
    """Those wanted, or all: what was committed last first, then foreign ones, then partial ones."""
    if unknown := [step for step in wanted if step not in found]:
        _fail(f"there is no step {', '.join(map(str, unknown))} at {storage.url}; there are {sorted(found)}.")
    if partial := [step for step in wanted if _kind(found[step]) == "partial"]:
        _fail(f"step {', '.join(map(str, partial))} at {storage.url} was never committed: there is nothing to verify.")
    order = sorted(found, key=lambda step: (found[step].sequence or 0, found[step].is_foreign, step), reverse=True)
    return {step: found[step] for step in order if step in wanted or not wanted}


def _verify(storage: Storage, step: int, files: StepFiles, tell: Callable[[int], None]) -> StepResult:
    kind = _kind(files)
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


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, with rate and time left; what it gives is told of bytes."""
    columns = TextColumn("verify"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda count: progress.advance(task, count)


def _print(url: str, results: list[StepResult]) -> None:
    console = Console(markup=False, highlight=False)  # a path may hold brackets
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


def _fail(message: str, status: int = FAILED) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(status)
