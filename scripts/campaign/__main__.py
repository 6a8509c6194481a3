"""The command behind `scripts/torture`.

Each family runs in a process of its own, some at a time: what one leaks, or crashes with, is nothing to the next. It
tells this one in lines of JSON what became of each attempt. An attempt that hangs ends its family, with the stacks of
all threads; and where this process ends, however it does, so do they, with their servers and folders.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rich.console import Console

from scripts.campaign.report import Line, print_losses, print_table
from scripts.campaign.row import Row

FAMILIES = ("folder", "power", "objects", "ranks", "damage", "faults", "runs", "hostile", "fuzz")
LOG_LINES = 100
HANG_S = 300  # of one attempt; all of them have shorter limits of their own


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    if options.family:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)
        return run_family(f"scripts.campaign.{options.family}", options)
    if options.fuzz:
        command = [sys.executable, "-m", "scripts.campaign.fuzz_atheris", str(options.fuzz), str(options.seed)]
        return subprocess.run(_ending_with_us(command), check=False).returncode
    console = Console(width=None if sys.stdout.isatty() else 140)
    families = [name for name in FAMILIES if _may_have(name, options.only)]
    lines: dict[str, Line] = {}
    for message in _messages(families, arguments, options.jobs):
        key = message["key"]
        line = lines.setdefault(key, Line(key, message.get("what", "")))
        if "lost" in message:
            line.lost[message["number"]] = message["lost"]
        else:
            line.tally.update(message["tally"])
        line.seconds += message["seconds"]
        if sys.stderr.isatty() and not options.list:
            done = sum(line.tried for line in lines.values())
            print(f"\r{done:,} tried, last {key:40}", end="", file=sys.stderr, flush=True)
    found = list(lines.values())
    if options.list:
        for line in found:
            console.print(f"{line.key:28} {line.what}", highlight=False)
        return 0
    print_table(found, options.seed, console)
    print_losses(found, options.seed, console)
    if options.json:
        report = {"seed": options.seed, "lines": [line.as_json() for line in found]}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any(line.lost for line in found) or not found else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="a sample of each line (the default)")
    how_much.add_argument("--full", action="store_true", help="all of each line")
    parser.add_argument("--only", action="append", default=[], metavar="KEY", help="lines whose key begins with it")
    parser.add_argument("--attempt", type=int, metavar="N", help="this attempt alone")
    parser.add_argument("--seed", type=int, default=1, help="decides every draw (default: 1)")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, os.cpu_count() or 1)), help="families at a time")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    parser.add_argument("--list", action="store_true", help="the lines there are")
    parser.add_argument("--fuzz", type=float, metavar="SECONDS", help="the parsers under atheris, nothing else")
    parser.add_argument("--family", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _may_have(family: str, only: list[str]) -> bool:
    """Keys begin with their family's name."""
    return not only or any(key.startswith(family) or family.startswith(key) for key in only)


def _messages(families: list[str], arguments: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """What the families tell, as it comes."""
    waiting, told = list(families), queue.SimpleQueue[dict[str, Any] | None]()

    def work() -> None:
        while waiting:
            family = waiting.pop(0)
            command = [sys.executable, "-m", "scripts.campaign", *arguments, "--family", family]
            with (
                tempfile.TemporaryFile("w+", errors="replace") as log,  # by the thousand lines: errors are its trade
                subprocess.Popen(_ending_with_us(command), stdout=subprocess.PIPE, stderr=log, text=True) as process,
            ):
                assert process.stdout is not None
                for line in process.stdout:
                    told.put(json.loads(line))
                if process.wait():
                    log.seek(0)
                    last = "".join(log.readlines()[-LOG_LINES:])
                    lost = f"the family ended with status {process.returncode}; the last it said:\n{last}"
                    told.put({"key": family, "number": None, "lost": lost, "seconds": 0.0})
        told.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for _ in threads:
        yield from iter(told.get, None)


def _ending_with_us(command: list[str]) -> list[str]:
    """It gets TERM when we are gone, where setpriv exists: by KILL, or by `timeout`, too."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else command


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Once: Ctrl-C comes to the whole group, and then TERM, while what is open is being closed."""
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_family(module: str, options: argparse.Namespace) -> int:
    """In a process of its own: every attempt of every row, told on standard output."""
    with open(os.dup(1), "w", buffering=1) as told, tempfile.TemporaryDirectory(prefix="torture-") as scratch:
        os.dup2(2, 1)  # what libraries print is no message

        def tell(**message: Any) -> None:
            told.write(json.dumps(message) + "\n")

        with ExitStack() as stack:
            for row in stack.enter_context(importlib.import_module(module).rows(Path(scratch), options.seed)):
                if not options.only or any(row.key.startswith(key) for key in options.only):
                    run_row(row, _numbers(row, options), tell)
    return 0


def _numbers(row: Row, options: argparse.Namespace) -> range:
    if options.attempt is not None:
        return range(options.attempt, options.attempt + 1)
    return range(0 if options.list else row.full if options.full else row.quick)


def run_row(row: Row, numbers: range, tell: Callable[..., None]) -> None:
    tell(key=row.key, what=row.what, tally={}, seconds=0.0)
    for number in numbers:
        started = time.monotonic()
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            outcome = row.attempt(number)
        except BaseException as exc:
            if isinstance(exc, KeyboardInterrupt):
                raise
            tell(key=row.key, number=number, lost=traceback.format_exc(), seconds=time.monotonic() - started)
        else:
            tally = outcome if isinstance(outcome, Counter) else {outcome: 1}
            tell(key=row.key, tally=tally, seconds=time.monotonic() - started)
        finally:
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
