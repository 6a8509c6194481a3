"""What every command shares: the options, opening and listing a run, how an error ends it, tables and progress.

A command is a function with `@app.command()`. It exits with 0, or by `fail`; what it raises ends it with words and
status 2, never with a traceback. With --json it prints one document by `print_json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from typer.core import TyperGroup

from asyncckpt.errors import CheckpointError
from asyncckpt.overview import Run, kind_of, list_run
from asyncckpt.steps import StepFiles, read_step_files
from asyncckpt.storage import Storage, open_storage, redact
from asyncckpt.version import __version__

DIFFERENT, FAILED, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit statuses: the answer is no (damaged, different); it could not be told; as a shell has it of SIGINT, SIGPIPE."""
MAX_COMPLETED = 1000  # more would only scroll by


class _Commands(TyperGroup):
    """Ends every command in words."""

    def invoke(self, ctx: Any) -> None:
        try:
            super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe is still ours to answer for
        except (KeyboardInterrupt, typer.Abort):
            fail("interrupted", INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush
            raise typer.Exit(BROKEN_PIPE) from None
        except (CheckpointError, OSError, ValueError) as exc:
            fail(redact(str(exc)))


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"asyncckpt {__version__}")
        raise typer.Exit


@app.callback()
def _asyncckpt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Look at a run's checkpoints and move them about.

    Only prune and copy, and the commands that say so, change anything.
    """


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
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document in place of the table.")]


def _known_steps(ctx: typer.Context, incomplete: str) -> list[str]:
    """For the shell: the numbers of a local folder. It asks no other storage, as a key press should not."""
    url = ctx.params.get("url") or ""
    with contextlib.suppress(OSError):
        if "://" not in url:
            names = [entry.name for entry in os.scandir(url or ".") if entry.is_dir() and entry.name.isdecimal()]
            return [name for name in sorted(names, key=int) if name.startswith(incomplete)][:MAX_COMPLETED]
    return []


Step = Annotated[
    int | None,
    typer.Argument(
        metavar="STEP",
        help="Without it, the one committed last.",
        show_default=False,
        autocompletion=_known_steps,
    ),
]
Steps = Annotated[
    list[int] | None,
    typer.Argument(metavar="STEP", help="Without any, all.", show_default=False, autocompletion=_known_steps),
]


def opened(url: str, options: list[str]) -> Storage:
    pairs = [option.partition("=") for option in options]
    if not all(key and equals for key, equals, _ in pairs):
        fail("--storage-option takes KEY=VALUE")  # not shown: it may be a secret
    try:
        return open_storage(url, {key: _value(text) for key, _, text in pairs})
    except (ValueError, TypeError, ImportError, OSError) as exc:
        fail(redact(f"{redact(url)} cannot be opened: {exc}"))


def _value(text: str) -> Any:
    """A key or a secret may look like a number, and is none."""
    if text[:1] in ("{", "[") or text in ("true", "false", "null"):
        try:
            return json.loads(text)
        except ValueError:
            fail("the value of a --storage-option begins like JSON and is none")
    return text


def listed(storage: Storage, command: str) -> Run:
    """What one listing says; it fails where there is no step. command: for the text that says how to give a step."""
    try:
        run = list_run(storage)
    except OSError as exc:
        fail(f"{storage.url} cannot be listed: {exc}. Check the URL, that the bucket exists, and the permissions.")
    if not run.steps and (one := read_step_files(run.sizes)) and (one.manifests or one.is_foreign):
        folder, _, step = storage.url.rstrip("/").rpartition("/")
        fail(
            f"{storage.url} is the folder of one step. Give the run's and the step: asyncckpt {command} {folder} {step}"
        )
    if not run.steps:
        fail(f"there is no step at {storage.url}.")
    return run


def check_known(storage: Storage, found: Mapping[int, StepFiles], wanted: list[int], purpose: str) -> None:
    """That all of them are there, and were committed. purpose: what there is nothing to do of otherwise."""
    if unknown := [step for step in wanted if step not in found]:
        fail(f"there is no step {', '.join(map(str, unknown))} at {storage.url}; there are {_some(sorted(found))}.")
    if partial := [step for step in wanted if kind_of(found[step]) == "partial"]:
        fail(
            f"step {', '.join(map(str, partial))} at {storage.url} was never committed: there is nothing to {purpose}."
        )


def _some(steps: list[int]) -> str:
    return str(steps) if len(steps) <= 40 else f"{len(steps)}, from {steps[0]} to {steps[-1]}"


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds_of(text: str) -> float:
    """ "90s", "5m", "12h", "7d", "2w" in seconds."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no time: a number and s, m, h, d or w, as in 12h or 7d")
    return float(found[1]) * _SECONDS[found[2]]


def time_text(seconds: float) -> str:
    """A length of time in a few letters."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@contextlib.contextmanager
def progress(verb: str, num_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, with rate and time left; what it gives is told of bytes. num_bytes: None: not known."""
    columns = TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("", total=num_bytes)
        yield lambda count: bar.advance(task, count)


class _Output(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def output() -> Console:
    """Standard output. No markup: a path may hold brackets. Into a file or a pipe lines are wide: nobody's eyes wrap
    them, and `grep` finds the whole of one."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    return _Output(markup=False, highlight=False, width=width)


def new_table() -> Table:
    """Columns and nothing between them, so that much fits 80 letters."""
    return Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold underline")


def counted(number: int, noun: str) -> str:
    """ "1 file", "2,000 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def metrics_text(metrics: Mapping[str, float]) -> str:
    """In one line of a table."""
    return " ".join(f"{name}={value:.4g}" for name, value in metrics.items())


def printable(text: str) -> str:
    """What a checkpoint says, without what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_json(document: Any) -> None:
    print(json.dumps(document, allow_nan=False))


def fail(message: str, status: int = FAILED) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(status)
