"""A run whose power goes: at every moment, and what a disk may then hold (disk_model.py), opened by a fresh manager.

A run is recorded once, with all it wrote. An attempt replays it up to some operation, writes down what is found in one
of the ways that the model allows, and checks all that `assert_survived` says: no step that was reported as committed
before that operation is lost. In row "after-kill" the run was begun by one that was killed, so that nobody synced what
that one did last.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from asyncckpt import local_file
from asyncckpt.events import Committed, Event
from scripts.campaign.disk_model import DiskModel, Way, write_tree
from scripts.campaign.row import Outcome, Row, draws, noted
from scripts.campaign.syscalls import Disk, Operation
from tests.faults.harness import KEPT, SCHEDULE, Place, assert_survived, open_manager

NUM_ROWS = 2  # 20 KB in all; with the sizes below, three writes for each file
SIZES = {"BATCH_BYTES": 8192, "BLOCK_BYTES": 8192, "DIRECT_MIN_BYTES": 4096}
WHAT: dict[Way, str] = {
    "synced": "power off: what was synced is there",
    "all": "... and all else",
    "zeros": "... and all names, the files are zeros",
    "empty": "... and all names, the files are empty",
    "nameless": "... and all bytes, without names",
    "mixed": "... and some names, some blocks",
    "journal": "... and names in order, some bytes",
}
NUM_DRAWN = 3  # states of one moment where they are drawn


@dataclass(frozen=True)
class Run:
    """commits: for each commit that was reported, how many operations were over then."""

    operations: tuple[Operation, ...]
    commits: tuple[int, ...]

    def num_committed(self, end: int) -> int:
        """Before operation `end`."""
        return sum(commit <= end for commit in self.commits)

    def moments(self) -> list[int]:
        """Ends of a replay that differ: after each change and each sync."""
        return [
            number + 1
            for number, operation in enumerate(self.operations)
            if (operation.is_change or operation.name == "fsync") and not operation.error
        ]


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    campaign = _Campaign(scratch, seed)
    yield [*(campaign.row(way) for way in get_args(Way)), campaign.after_kill()]


class _Campaign:
    def __init__(self, scratch: Path, seed: int) -> None:
        self._scratch = scratch
        self._seed = seed
        (scratch / "oracles").mkdir()
        self._place(scratch).save_oracles()
        with self._disk({}) as top:
            self._run = self._record(top, first=0)
        assert len(self._run.commits) == len(SCHEDULE)

    def row(self, way: Way) -> Row:
        key = f"power.{way}"
        is_drawn = way in ("mixed", "journal")
        moments = draws(self._seed, key, -1).sample(self._run.moments(), len(self._run.moments()))

        def attempt(number: int) -> Outcome:
            end = moments[number % len(moments)]
            model = self._replayed(end)
            with noted(f"after {end}, {self._run.operations[end - 1]}"):
                return self._check(model, way, draws(self._seed, key, number), self._run.num_committed(end))

        return Row(key, WHAT[way], 20, len(moments) * (NUM_DRAWN if is_drawn else 1), attempt)

    def after_kill(self) -> Row:
        key = "power.after-kill"
        moments = draws(self._seed, key, -1).sample(self._run.moments(), len(self._run.moments()))

        def attempt(number: int) -> Counter[Outcome]:
            """One killed run, one that goes on, and some moments of it."""
            draw, killed = draws(self._seed, key, number), moments[number % len(moments)]
            first = self._run.num_committed(killed)
            model = self._replayed(killed)
            with self._disk(model.found("all", draw)) as top:
                going_on = self._record(top, first)
            with noted(f"killed after {killed}, {self._run.operations[killed - 1]}"):
                return self._check_moments(model, going_on, first, draw)

        return Row(key, "killed, gone on, then power off", 5, len(moments), attempt)

    def _check_moments(self, model: DiskModel, run: Run, first: int, draw: random.Random) -> Counter[Outcome]:
        outcomes = Counter[Outcome]()
        ends = draw.sample(run.moments(), min(NUM_DRAWN, len(run.moments())))
        for end, operation in enumerate(run.operations, start=1):
            model.apply(operation)
            if end in ends:
                way = draw.choice(("synced", "mixed", "mixed", "journal"))
                with noted(f"{way} after {end}, {operation}"):
                    outcomes[self._check(model, way, draw, first + run.num_committed(end))] += 1
        return outcomes

    def _replayed(self, end: int) -> DiskModel:
        model = DiskModel()
        for operation in self._run.operations[:end]:
            model.apply(operation)
        return model

    def _check(self, model: DiskModel, way: Way, draw: random.Random, num_committed: int) -> Outcome:
        with self._disk(model.found(way, draw)) as top, Disk(str(top)).installed():
            assert_survived(self._place(top), range(num_committed))
        return "survived"

    def _record(self, top: Path, first: int) -> Run:
        """A run that makes the saves from number `first` on."""
        disk, commits = Disk(str(top), keep_data=True), list[int]()

        def hear(event: Event) -> None:
            if isinstance(event, Committed):
                commits.append(len(disk.operations))

        with pytest.MonkeyPatch.context() as patch, disk.installed():
            for name, size in SIZES.items():
                patch.setattr(local_file, name, size)
            place = self._place(top)
            with open_manager(place, max_to_keep=KEPT, num_of_threads=1, events=[hear]) as manager:
                for save in range(first, len(SCHEDULE)):
                    manager.save_async(SCHEDULE[save], place.state(SCHEDULE[save], save))
        return Run(tuple(disk.operations), tuple(commits))

    @contextmanager
    def _disk(self, tree: dict[str, object]) -> Iterator[Path]:
        top = self._scratch / "disk"
        write_tree(tree, top)
        try:
            yield top
        finally:
            shutil.rmtree(top)

    def _place(self, top: Path) -> Place:
        return Place(str(top / "deep" / "run"), {}, NUM_ROWS, str(self._scratch / "oracles"))
