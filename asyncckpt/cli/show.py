"""`asyncckpt show`: what is in a step. It never writes; it reads the index, and with --values the objects."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from asyncckpt.cli.app import (
    AsJson,
    Step,
    StorageOptions,
    Url,
    app,
    check_known,
    counted,
    fail,
    listed,
    new_table,
    opened,
    output,
    print_json,
    printable,
    time_text,
)
from asyncckpt.errors import CheckpointError
from asyncckpt.lookup import Saved, read_object, saved_in
from asyncckpt.outline import Line, Outliner, tree
from asyncckpt.overview import Run, kind_of
from asyncckpt.restore import OpenStep, open_step
from asyncckpt.selection import matcher
from asyncckpt.storage import Storage

NUM_LINES = 100
"""Of an outline without --depth: two screens."""
NUM_SIBLINGS = 40
_MAX_VALUE = 200  # letters of an object's value


@app.command()
def show(
    url: Url,
    step: Step = None,
    keys: Annotated[
        list[str],
        typer.Option("--keys", metavar="PATTERN", help="Only these: a key, the start of one, or * ? [...] in it."),
    ] = [],  # noqa: B006
    depth: Annotated[int | None, typer.Option(min=1, help="Levels; without it, as many as fit two screens.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every key on a line of its own.")] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Read the objects too, as restore would, and show them.")
    ] = False,
    storage_option: StorageOptions = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show the tree of a step's keys: shapes, dtypes, bytes, and in how many pieces and by how many ranks it was saved.

    Layers that are alike become one line, which says how many they are; sizes of subtrees are sums. Files that were
    given to save(files=) come last. Nothing that a checkpoint holds is run: --values shows objects of plain types.

    --json: {"url", "step", "kind", "sequence", "time", "world_size", "torch", "asyncckpt", "metrics", "metadata",
    "bytes", "keys": [{"key", "shape", "dtype", "bytes", "chunks", "ranks", "value"}], "files": [{"name", "bytes"}],
    "damage": [text]}; "shape" is null for objects, "ranks" for steps of other writers, "value" without --values.

    Exit status: 0: it is shown. 1: shown, and files of it are missing. 2: wrong usage, no such step, its index is
    damaged, or storage cannot be read. 130: interrupted.
    """
    storage = opened(url, storage_option)
    run = listed(storage, "show")
    number = chosen_step(run, step, "show")
    gc.disable()  # else it looks through a million keys again and again, which takes half as long as all the rest
    try:
        _show(run, number, keys, depth, all_=all_, values=values, as_json=as_json)
    finally:
        gc.enable()


def _show(
    run: Run, number: int, keys: list[str], depth: int | None, *, all_: bool, values: bool, as_json: bool
) -> None:
    storage = run.storage
    open_ = open_step(storage, str(number))
    saved = saved_in(open_)
    if keys:
        matches = matcher(keys)
        saved = [one for one in saved if matches(one.key)]
        if not saved:
            fail(f"none of the {len(open_.keys):,} keys of step {number} matches {' or '.join(keys)}")
    ranks = _num_ranks(open_)
    found = {one.key: _value(storage, open_, one.key) for one in saved if one.dtype is None} if values else {}
    damage = sorted({*open_.lacking.values(), *open_.lost})
    if as_json:
        print_json(_document(storage, number, run, open_, saved, ranks, found) | {"damage": damage})
    else:
        console = output()
        _print_head(console, storage, number, open_)
        _print_tree(console, saved, ranks, depth, all_=all_)
        _print_values(console, found)
        _print_files(console, open_)
        for text in damage:
            console.print(f"damaged: {printable(text)}", style="bold red", soft_wrap=True)
    raise typer.Exit(1 if damage else 0)


def chosen_step(run: Run, step: int | None, purpose: str) -> int:
    """The step asked for, or the one committed last; of foreign ones alone, the highest."""
    if step is not None:
        check_known(run.storage, run.steps, [step], purpose)
        return step
    for kind in ("committed", "foreign"):
        if steps := [number for number, files in run.steps.items() if kind_of(files) == kind]:
            return steps[-1]
    raise fail(f"no step at {run.storage.url} was ever committed: there is nothing to {purpose}.")


def _num_ranks(step: OpenStep) -> Mapping[str, int]:
    """How many ranks wrote chunks of each key; nothing of a foreign step."""
    if step.manifest is None:
        return {}
    place = step.manifest.chunks.placement
    of_file = [int(found[1]) if (found := re.match(r"__([0-9]+)_", name)) else 0 for name in place.files]
    if not of_file:
        return {}
    width = max(of_file) + 1
    pairs = np.unique(step.keys.numbers_of(place) * width + np.array(of_file, np.int64)[place.file])
    counts = np.bincount(pairs // width, minlength=len(step.keys))
    return dict(zip(step.keys.fqns, counts.tolist(), strict=True))


def _value(storage: Storage, step: OpenStep, key: str) -> str:
    try:
        text = repr(read_object(storage, step, key))
    except CheckpointError as exc:
        text = f"not shown: {exc}".splitlines()[0]
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}... ({len(text):,} letters)"


def _files(step: OpenStep) -> list[dict[str, Any]]:
    opaque = step.manifest.opaque if step.manifest is not None else []
    return [{"name": file.name, "bytes": file.size} for file in opaque]


def _document(
    storage: Storage, number: int, run: Run, step: OpenStep, saved: Sequence[Saved],
    ranks: Mapping[str, int], values: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    head = step.manifest and step.manifest.head
    names = ("time", "world_size", "torch", "asyncckpt", "metrics", "metadata")
    return {
        "url": storage.url,
        "step": number,
        "kind": kind_of(run.steps[number]),
        "sequence": step.sequence,
        **{name: head and getattr(head, name) for name in names},
        "bytes": run.steps[number].num_bytes,
        "keys": [
            {
                "key": one.key,
                "shape": one.shape,
                "dtype": one.dtype and str(one.dtype)[6:],
                "bytes": one.num_bytes,
                "chunks": one.num_chunks,
                "ranks": ranks.get(one.key),
                "value": values.get(one.key),
            }
            for one in saved
        ],
        "files": _files(step),
    }


def _print_head(console: Console, storage: Storage, number: int, step: OpenStep) -> None:
    if step.manifest is None:
        console.print(
            f"{storage.url} step {number}: of another writer, with {counted(len(step.keys), 'key')}", soft_wrap=True
        )
        return
    head = step.manifest.head
    size, files = decimal(step.manifest.num_bytes), counted(len(step.manifest.files), "file")
    age = time_text(max(0, time.time() - head.time_s))
    console.print(f"{storage.url} step {number}", soft_wrap=True)
    console.print(f"{size} in {files} of {counted(head.world_size, 'rank')}, torch {head.torch}")
    console.print(f"committed {head.time[:19].replace('T', ' ')} UTC ({age} ago) by asyncckpt {head.asyncckpt}")
    for name in ("metrics", "metadata"):
        if given := getattr(head, name):
            text = ", ".join(f"{key}={value!r}" for key, value in given.items())
            console.print(printable(f"{name}: {text if len(text) < 1000 else text[:1000] + '...'}"))


def _print_tree(
    console: Console, saved: Sequence[Saved], ranks: Mapping[str, int], depth: int | None, *, all_: bool
) -> None:
    outliner = Outliner(tree(saved), collapse=not all_, most=None if all_ else NUM_SIBLINGS)
    lines = outliner.lines(depth) if all_ or depth else outliner.fitting(NUM_LINES)
    table = new_table()
    table.add_column("key", overflow="fold", min_width=20)
    table.add_column("shape", overflow="fold")
    table.add_column("dtype", no_wrap=True)
    for heading in ("size", "chunks", "ranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*_cells(line, ranks))
    table.add_section()
    num_tensors = sum(one.dtype is not None for one in saved)
    root = outliner.root
    table.add_row("all", counted(num_tensors, "tensor"), "", decimal(root.num_bytes), f"{root.num_chunks:,}", "")
    if num_objects := len(saved) - num_tensors:
        table.add_row("", counted(num_objects, "object"))
    console.print(table)


def _cells(line: Line, ranks: Mapping[str, int]) -> tuple[Text | str, ...]:
    node, indent = line.node, "  " * line.depth
    if line.num_left_out:
        return (
            f"{indent}... {line.num_left_out:,} more",
            Text("--all or --keys shows them", "dim"),
            "",
            "",
            "",
            "",
        )
    key = f"{indent}{printable(line.name)}"
    times = f"{line.count} x " if line.count > 1 else ""
    size, chunks = f"{times}{decimal(node.num_bytes)}", f"{times}{node.num_chunks:,}"
    saved = node.saved
    if saved is None:
        return key, Text(f"{times}{counted(node.num_values, 'value')}", "dim"), "", size, chunks, ""
    rank = str(ranks.get(saved.key, ""))
    if saved.shape is None:
        return key, Text("object", "dim"), "", size, chunks, rank
    shape = " x ".join(map(str, saved.shape)) or "scalar"
    return key, shape, str(saved.dtype)[6:], size, chunks, rank


def _print_values(console: Console, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        console.print(printable(f"{key} = {value}"), soft_wrap=True)


def _print_files(console: Console, step: OpenStep) -> None:
    files = _files(step)
    if not files:
        return
    table = new_table()
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for file in files[:NUM_LINES]:
        table.add_row(file["name"], decimal(file["bytes"]))
    if len(files) > NUM_LINES:
        table.add_row(f"... {len(files) - NUM_LINES:,} more", decimal(sum(file["bytes"] for file in files[NUM_LINES:])))
    console.print(table)
