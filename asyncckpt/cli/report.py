"""`asyncckpt report`: a run as one HTML page. What it tells is report.py's, how it looks report_page.py's affair."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from dataclasses import asdict
from typing import Annotated

import typer

from asyncckpt.cli.app import AsJson, StorageOptions, Url, app, fail, opened, print_json, progress
from asyncckpt.report import findings, look_at
from asyncckpt.report_page import page


@app.command()
def report(
    url: Url,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="A local file.")] = "report.html",
    events: Annotated[
        list[str], typer.Option(metavar="URL", help="Where more files of an EventFile lie. May be repeated.")
    ] = [],  # noqa: B006
    storage_option: StorageOptions = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Write a page about a run: whether its checkpoints are in order, what they cost, when the last good save was.

    It needs no network to be looked at. Storage tells which steps there are; of waiting, times and faults tells an
    EventFile, if the run has one among its sinks: CheckpointManager(url, events=[EventFile(url)]).

    --json: {"url", "output", "health": "bad", "look" or "good", "findings": [{"level", "text"}], "last_good_step",
    "committed", "saves", "faults"}; the page is written as well.

    Exit status: 0: it is written, whatever it says. 2: wrong usage, nothing there, or storage cannot be read. 130:
    interrupted.
    """
    storage = opened(url, storage_option)
    others = [opened(other, storage_option) for other in events]
    with progress("read events", None) as tell:
        found = look_at(storage, others, now_s=time.time(), tell=tell)
    if not found.steps and not found.has_events:
        fail(f"there is no step at {storage.url}, and no events. Nothing was written. Check the URL.")
    judged = findings(found)
    _write(output, page(found))
    levels = [finding.level for finding in judged if finding.level != "note"]
    health = levels[0] if levels else "good"
    if as_json:
        good = found.last_good
        print_json({
            "url": storage.url, "output": output, "health": health, "findings": [asdict(finding) for finding in judged],
            "last_good_step": good and good.step, "committed": len(found.committed), "saves": len(found.saves),
            "faults": len(found.faults),
        })  # fmt: skip
        return
    for finding in judged:
        print(finding.text, file=sys.stderr)
    print(f"{output}: {len(found.committed)} steps, {len(found.saves)} saves, {len(found.faults)} faults")


def _write(path: str, text: str) -> None:
    """At once: who has the page open, or is interrupted, keeps a whole one."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=".report-", suffix=".html")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
