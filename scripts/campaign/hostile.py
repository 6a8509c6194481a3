"""Checkpoints that were made to do harm, by tests/hostile.py, at every way in: none may run code, open a file outside
of the run, change torch's classes, take much more memory than it has bytes, hang, or raise anything but a
CheckpointError.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from scripts.campaign.row import Outcome, Row, draws
from tests.hostile import CASES, Case, attack, make_base

_ROWS = (
    # cases that begin so, in words, quick, full
    ("metadata-values", "stock metadata says what cannot be", 3, 200),
    ("metadata", "pickle bombs in stock metadata", 5, 150),
    ("object-greedy", "allowed calls with greedy arguments", 3, 150),
    ("object-archive", "zip bombs, zips that lie", 2, 100),
    ("object", "pickle bombs in an object", 5, 150),
    ("stock", "the same in a stock step", 3, 150),
    ("manifest-weird", "a manifest with odd values", 4, 400),
    ("manifest-text", "JSON that is odd or costly", 2, 60),
    ("manifest", "a manifest with one lie", 6, 160),
    ("names", "names that nearly are steps", 1, 60),
    ("links", "files that are links, pipes, devices", 1, 60),
)


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    base, places = scratch / "base", count()
    _in_child(lambda: make_base(base))

    def try_one(cases: Sequence[Case], key: str, number: int) -> Outcome:
        case, place = cases[number % len(cases)], scratch / f"{next(places)}"
        place.mkdir()
        report = attack(case, base, place, draws(seed, key, number))
        shutil.rmtree(place)
        if report.wrong:
            raise AssertionError(f"{case.name}:\n" + "\n".join(report.wrong))
        return "detected" if report.raised["restore"] else "survived"

    left, made = list(CASES), list[Row]()
    for start, what, quick, full in _ROWS:
        cases = [case for case in left if case.name.startswith(start)]
        left = [case for case in left if case not in cases]
        made.append(Row(f"hostile.{start}", what, quick, full, partial(try_one, cases, f"hostile.{start}")))
    assert not left
    yield made


def _in_child(work: Callable[[], None]) -> None:
    """So that this process has no threads when it forks for the attempts."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
