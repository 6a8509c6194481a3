"""`asyncckpt diff`: two steps compared. It never writes."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.text import Text

from asyncckpt.cli.app import (
    DIFFERENT,
    FAILED,
    AsJson,
    StorageOptions,
    app,
    counted,
    fail,
    listed,
    new_table,
    opened,
    output,
    print_json,
    printable,
    progress,
)
from asyncckpt.cli.show import chosen_step
from asyncckpt.differing import Difference, Side, bytes_to_read, compare
from asyncckpt.restore import open_step
from asyncckpt.selection import matcher

NUM_LINES = 200


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A[@STEP]", help="A run and which step, or the one committed last.")],
    b: Annotated[str, typer.Argument(metavar="B[@STEP]", help="Another, or @STEP: another step of the same run.")],
    keys: Annotated[
        list[str],
        typer.Option("--keys", metavar="PATTERN", help="Only these: a key, the start of one, or * ? [...] in it."),
    ] = [],  # noqa: B006
    all_: Annotated[bool, typer.Option("--all", help="All lines, and equal keys too.")] = False,
    storage_option: StorageOptions = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Compare two steps: keys, shapes, dtypes, and how far values differ.

    What both saved in the same pieces with the same checksums is equal and is not read; of the rest one tensor of each
    is in memory at a time, bytes are compared, and "max |A-B|" is the largest difference of two elements.

    --json: {"a": {"url", "step"}, "b": {...}, "equal", "different", "read", "unknown", "keys": [{"key", "result", "a",
    "b", "was_read", "elements", "bytes", "max_abs", "detail"}]}; "keys" has those that are not equal, with --all all;
    "result" is "only in A", "only in B", "shape", "dtype", "kind", "differs", "unknown" or "equal"; "max_abs" is a
    number, "inf", or null.

    Exit status: 0: equal. 1: different. 2: wrong usage, no such step, a step is damaged, storage cannot be read, or an
    object could not be compared and all else is equal. 130: interrupted.
    """
    sides = _opened(a, b, storage_option)
    matches = matcher(keys) if keys else None
    found: list[Difference] = []
    num_equal = num_read = 0
    with progress("compare", bytes_to_read(*sides, matches)) as tell:
        for one in compare(*sides, matches, tell):
            num_equal += one.result == "equal"
            num_read += one.was_read
            if all_ or one.result != "equal":
                found.append(one)
    unknown = sum(one.result == "unknown" for one in found)
    different = sum(one.result not in ("equal", "unknown") for one in found)
    if not num_equal + unknown + different and keys:
        fail(f"no key of either matches {' or '.join(keys)}")
    names = [{"url": side.storage.url, "step": int(side.step.folder)} for side in sides]
    if as_json:
        counts = {"equal": num_equal, "different": different, "read": num_read, "unknown": unknown}
        print_json({"a": names[0], "b": names[1], **counts, "keys": [_row(one) for one in found]})
    else:
        _print(names, found if all_ else found[:NUM_LINES], len(found))
        told = f"{counted(num_equal, 'key')} equal, {different:,} different"
        unsure = f", {unknown:,} could not be compared" if unknown else ""
        output().print(f"{told}{unsure}; {num_read:,} were read, checksums told of the rest", soft_wrap=True)
    raise typer.Exit(DIFFERENT if different else FAILED if unknown else 0)


def _opened(a: str, b: str, options: list[str]) -> tuple[Side, Side]:
    (first, step), (second, other) = _parse(a), _parse(b)
    sides = []
    for url, number in (first, step), (second or first, other):
        storage = opened(url, options)
        sides.append(Side(storage, open_step(storage, str(chosen_step(listed(storage, "show"), number, "compare")))))
    return sides[0], sides[1]


def _parse(text: str) -> tuple[str, int | None]:
    found = re.fullmatch(r"(.*)@([0-9]{1,18})", text, re.DOTALL)
    return (found[1], int(found[2])) if found else (text, None)


def _row(one: Difference) -> dict[str, Any]:
    return {
        "key": one.key,
        "result": one.result,
        "a": one.a,
        "b": one.b,
        "was_read": one.was_read,
        "elements": one.num_elements,
        "bytes": one.num_bytes,
        "max_abs": "inf" if one.max_abs == math.inf else one.max_abs,
        "detail": one.detail,
    }


def _print(names: list[dict[str, Any]], found: list[Difference], total: int) -> None:
    console = output()
    for letter, name in zip("AB", names, strict=True):
        console.print(f"{letter}: {name['url']} step {name['step']}", soft_wrap=True)
    if not found:
        return
    table = new_table()
    table.add_column("key", overflow="fold", min_width=20)
    table.add_column("what", no_wrap=True)
    for heading in ("elements", "bytes", "max |A-B|"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("A -> B", overflow="fold")
    for one in found:
        size = (f"{one.num_elements:,}", decimal(one.num_bytes)) if one.num_bytes else ("", "")
        largest = "" if one.max_abs is None else f"{one.max_abs:.4g}"
        style = {"differs": "yellow", "equal": "dim"}.get(one.result, "bold red")
        what = one.detail or (one.a if one.a == one.b else f"{one.a or 'none'} -> {one.b or 'none'}")
        table.add_row(printable(one.key), Text(one.result, style), *size, largest, printable(what))
    console.print(table)
    if total > len(found):
        console.print(f"... {total - len(found):,} more (--all)")
