"""A run that saves to a folder, and every call by which it touches the disk: killed there, failed, cut short, held up.

One run is rehearsed, which numbers its calls (syscalls.py). An attempt is the same run in a process of its own with one
of them broken; another process then opens the folder afresh and checks all that `assert_survived` says. Where the run
is not killed it must go on by itself: later saves succeed, what it knows is what the disk has, nothing is left over,
and what failed was said once, by a CheckpointError with the operation, the place and the reason. Rows "folder.fsspec"
do the same to a plain fsspec filesystem (fsspec_calls.py).
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from asyncckpt import local_file
from asyncckpt.errors import CheckpointError
from asyncckpt.events import Committed, Event, Failed
from asyncckpt.storage import TEMP_PREFIX
from scripts.campaign.fsspec_calls import PREFIX, numbered
from scripts.campaign.row import Outcome, Row, draws, noted
from scripts.campaign.syscalls import Disk, Fault, Operation
from tests.faults.harness import KEPT, STEPS, Place, assert_survived, messages_of, open_manager, strays
from tests.states import assert_same, target_like

T = TypeVar("T")
NUM_ROWS = 50  # 400 KB in all; with the sizes below, some four writes and eight reads for each file
SIZES = {"BATCH_BYTES": 128 << 10, "BLOCK_BYTES": 64 << 10, "DIRECT_MIN_BYTES": 16 << 10, "READ_BYTES": 64 << 10}
ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "ESTALE")
VERBS = "write|write to|create|replace|read|list|delete at|sweep"


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    folder, plain = _Campaign("folder", scratch, seed), _Campaign("folder.fsspec", scratch, seed, PREFIX)
    yield [*_folder_rows(folder), *_fsspec_rows(plain)]


def _folder_rows(folder: _Campaign) -> list[Row]:
    operations = folder.rehearsal.before_last
    every = list(range(len(operations)))
    changes = _numbers(operations, lambda operation: operation.is_change and not operation.error)
    writes = _numbers(operations, lambda operation: operation.name == "pwritev")
    reads = _numbers(operations, lambda operation: operation.name == "preadv")
    return [
        folder.row("kill", "killed before a call", Fault("kill"), every, 20),
        folder.row("kill-after", "killed after a change", Fault("kill after"), changes, 8, 40),
        folder.row("kill-within", "killed within a write", Fault("kill within"), writes, 5),
        folder.row("fail-EIO", "a call fails, EIO", Fault("fail", error=errno.EIO), every, 6, 200),
        *(
            folder.row(f"fail-{name}", f"a call fails, {name}", Fault("fail", error=getattr(errno, name)), every, 3, 30)
            for name in ERRORS
        ),
        folder.row(
            "fail-after", "a change is made but fails, EIO", Fault("fail after", error=errno.EIO), changes, 4, 60
        ),
        folder.row("cut-write", "a write moves some bytes", Fault("cut"), writes, 3),
        folder.row("cut-read", "a read moves some bytes", Fault("cut"), reads, 3),
        folder.row("cut-full", "... and then ENOSPC", Fault("cut and fail", error=errno.ENOSPC), writes, 3),
        folder.row("remove", "a data folder is removed", Fault("remove"), _removable(operations), 4),
        folder.row("delay", "a call waits for more saves", Fault("delay"), every, 4, 50),
    ]


def _fsspec_rows(plain: _Campaign) -> list[Row]:
    operations = plain.rehearsal.before_last
    every = list(range(len(operations)))
    writes = _numbers(operations, lambda operation: operation.name == "pipe_file" and not operation.error)
    changes = [*writes, *_numbers(operations, lambda operation: operation.name in ("rm_file", "makedirs"))]
    return [
        plain.row("kill", "fsspec: killed before a call", Fault("kill"), every, 6, 40),
        plain.row("kill-within", "fsspec: killed within a write", Fault("kill within"), writes, 6, 40),
        plain.row("fail-EIO", "fsspec: a call fails, EIO", Fault("fail", error=errno.EIO), every, 4, 40),
        plain.row("fail-EACCES", "fsspec: a call fails, EACCES", Fault("fail", error=errno.EACCES), every, 3, 40),
        plain.row(
            "fail-after", "fsspec: a change is made but fails", Fault("fail after", error=errno.EIO), changes, 3, 40
        ),
        plain.row(
            "tear-full", "fsspec: part of a write, then ENOSPC", Fault("tear", error=errno.ENOSPC), writes, 3, 40
        ),
        plain.row("tear-EIO", "fsspec: part of a write, then EIO", Fault("tear", error=errno.EIO), writes, 3, 40),
    ]


@dataclass(frozen=True)
class Done:
    """What a run told. committed: saves, in order. errors: that it raised. num_before_last: how many of its operations
    came before its last save."""

    committed: list[int]
    errors: list[str]
    operations: tuple[Operation, ...]
    num_before_last: int

    @property
    def before_last(self) -> tuple[Operation, ...]:
        return self.operations[: self.num_before_last]


class _Campaign:
    """Rows of faults in one kind of place."""

    def __init__(self, name: str, scratch: Path, seed: int, prefix: str = "") -> None:
        self._prefix = prefix
        self._name = name
        self._scratch = scratch
        self._seed = seed
        self._oracles = scratch / f"{name}-oracles"
        self._oracles.mkdir()
        with self._place("rehearsal") as place:
            place.save_oracles()
            self.rehearsal = _run_to_its_end(place, None)
        assert self.rehearsal.committed == list(range(len(STEPS))), self.rehearsal.committed

    def row(self, name: str, what: str, fault: Fault, numbers: Sequence[int], quick: int, full: int = 0) -> Row:
        """numbers: of operations; each has its turn, in an order drawn from the seed, in a full run if not `full`."""
        key = f"{self._name}.{name}"
        order = draws(self._seed, key, -1).sample(numbers, len(numbers))

        def attempt(number: int) -> Outcome:
            at = order[number % len(order)]
            chosen = fault.at(at, fraction=draws(self._seed, key, number).random())
            with noted(f"{chosen}, {self.rehearsal.operations[at]}"), self._place(key) as place:
                return _kill(place, chosen) if fault.kind.startswith("kill") else _break(place, chosen)

        return Row(key, what, min(quick, len(order)), min(full or len(order), len(order)), attempt)

    @contextmanager
    def _place(self, name: str) -> Iterator[Place]:
        folder = self._scratch / name
        folder.mkdir()
        try:
            url = f"{self._prefix}{folder}/deep/run"
            yield Place(url, {}, NUM_ROWS, str(self._oracles), may_tear=bool(self._prefix))
        finally:
            shutil.rmtree(folder)


def _kill(place: Place, fault: Fault) -> Outcome:
    committed = []
    for kind, value in messages_of(train, place, fault):
        assert kind == "committed", "the run went on to its end"
        committed.append(value)
    return _check(place, committed)


def _break(place: Place, fault: Fault) -> Outcome:
    done = _run_to_its_end(place, fault)
    if fault.kind in ("cut", "delay"):
        assert (done.committed, done.errors) == (list(range(len(STEPS))), []), (done.committed, done.errors)
    _check(place, done.committed)
    return "detected" if done.errors else "survived"


def _run_to_its_end(place: Place, fault: Fault | None) -> Done:
    committed, done = [], None
    for kind, value in messages_of(train, place, fault):
        if kind == "committed":
            committed.append(value)
        else:
            done = value
    assert done is not None, "the run died by itself"
    return Done(committed, *done)


def _check(place: Place, committed: list[int]) -> Outcome:
    assert list(messages_of(_survives, place, committed)) == [("survived", None)], "the check died"
    return "survived"


def _survives(link: Connection, place: Place, committed: Sequence[int]) -> None:
    """In a process of its own."""
    logging.disable()
    disk = Disk(place.url.removeprefix(PREFIX))
    with numbered(disk):
        assert_survived(place, committed)
    link.send(("survived", None))


def train(link: Connection, place: Place, fault: Fault | None) -> None:
    """The run, in a process of its own."""
    torch.set_num_threads(1)
    logging.disable()  # every failure is an event, too
    disk = Disk(place.url.removeprefix(PREFIX), fault)
    with pytest.MonkeyPatch.context() as patch, disk.installed(), numbered(disk):
        for name, size in SIZES.items():
            patch.setattr(local_file, name, size)
        _Run(link, place, disk).to_its_end()


class _Run:
    """The training loop: it saves, restores what is newest, and saves once more. What fails is tried again."""

    def __init__(self, link: Connection, place: Place, disk: Disk) -> None:
        self._link = link
        self._place = place
        self._disk = disk
        self._saves: dict[int, int] = {}  # which save has a sequence number
        self._committed: list[int] = []
        self._errors: list[str] = []

    def to_its_end(self) -> None:
        manager = self._tried(self._open)
        for save, _ in enumerate(STEPS[:-1]):
            self._tried(lambda save=save: self._save(manager, save))
        self._join(manager)
        target = target_like(self._place.state(0, 0))
        self._tried(lambda: manager.restore_latest(target))
        newest = self._committed[-1]
        assert_same(self._place.oracle(STEPS[newest], newest), target)
        self._tried(lambda: manager.verify(STEPS[newest]))
        num_before_last = len(self._disk.operations)
        self._tried(lambda: self._save(manager, len(STEPS) - 1))
        self._join(manager)
        self._check(manager)
        manager.close()
        self._link.send(("done", (self._errors, tuple(self._disk.operations), num_before_last)))

    def _open(self) -> Any:
        # One thread and no more, so that operations have one order; but those that wait should be overtaken.
        is_delayed = self._disk.fault is not None and self._disk.fault.kind == "delay"
        return open_manager(
            self._place, max_to_keep=KEPT, num_of_threads=2 if is_delayed else 1, max_pending_async=3,
            events=[self._hear],
        )  # fmt: skip

    def _hear(self, event: Event) -> None:
        if isinstance(event, Committed):
            self._committed.append(self._saves[event.sequence])
            self._link.send(("committed", self._committed[-1]))
        if isinstance(event, Failed) and event.phase == "prune":
            self._expect(str(event.error))

    def _save(self, manager: Any, save: int) -> None:
        if manager._writer.is_full:
            self._disk.gate.set()
        state = self._place.state(STEPS[save], save)
        self._saves[manager._index._next_sequence] = save
        manager.save_async(STEPS[save], state)

    def _join(self, manager: Any) -> None:
        self._disk.gate.set()
        self._tried(manager.join)

    def _tried(self, work: Callable[[], T]) -> T:
        """What it gives, at the second try at the latest: one operation fails, and that is said once."""
        try:
            return work()
        except CheckpointError as exc:
            self._expect(str(exc), r"Nothing|half overwritten")
            return work()

    def _expect(self, error: str, safe: str = "") -> None:
        """That it says the operation, the place, the reason, and what is safe."""
        fault = self._disk.fault
        assert fault is not None, error
        if fault.kind != "remove":
            assert re.search(rf"\b({VERBS})\b.*{re.escape(self._place.url)}.*{os.strerror(fault.error)}", error), error
        assert re.search(safe, error), error
        self._errors.append(error)

    def _check(self, manager: Any) -> None:
        """What the run knows is what the disk has."""
        on_disk = {int(path.parent.name) for path in Path(self._disk.root).glob("*/manifest-*.json")}
        assert manager.all_steps() == sorted(on_disk), (manager.all_steps(), on_disk)
        left = [path for path in strays(self._place, manager._storage, on_disk) if TEMP_PREFIX not in path]
        assert left == [], left


def _numbers(operations: Sequence[Operation], wanted: Callable[[Operation], bool]) -> list[int]:
    return [number for number, operation in enumerate(operations) if wanted(operation)]


def _removable(operations: Sequence[Operation]) -> list[int]:
    """Operations on data that are being written: from the second one in a data folder to the listing of it that comes
    before the commit."""
    found: list[int] = []
    folder, is_open = "", False
    for number, operation in enumerate(operations):
        if operation.name == "mkdir" and operation.path.count("/") == 1:
            folder, is_open = operation.path, True
        elif is_open and (operation.path == folder or os.path.dirname(operation.path) == folder):
            if os.path.dirname(operation.path) == folder:
                found.append(number)
            is_open = operation.name != "scandir"
    return found
