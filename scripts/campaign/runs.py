"""Several runs on one path: by mistake, one after the other that has not ended, readers beside a writer, stopped ones.

A schedule is two or three managers, each with a script of its own, that make their calls of storage one at a time, in
an order drawn from the seed; one may stand still for long, or die. Afterwards: whatever was reported as committed is
there, whole, or was dropped by a policy or saved again by a run that knew it; what is listed verifies and restores to
what one of them saved as that step, bit for bit; one more save leaves nothing over. Beside them: a run stopped by
SIGSTOP at any call while its successor works, and processes that end without close().
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import secrets
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from asyncckpt import CheckpointManager, DamagedStepError, Event, Pruned, SaveError, StepNotFoundError
from asyncckpt import manager as manager_module
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import Call, RecordingStorage
from scripts.campaign.row import Outcome, Row, draws
from tests.endings import AT_ONCE, DRAINED, HANGING, assert_as_promised
from tests.faults.harness import Place, strays
from tests.servers import S3Server, best_s3_server
from tests.states import assert_same

KEPT = 2
BUCKET = "torture"
TIMEOUT_S = 120.0
_forks = multiprocessing.get_context("forkserver")


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    _forks.set_forkserver_preload(["torch", "torch.distributed", "numpy", "pytest", "s3fs", __name__])
    logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)  # refusals are what these schedules are about
    with ExitStack() as stack:
        server = _Lazy(stack)

        def folder(number: int) -> Place:
            return Place(str(scratch / secrets.token_hex(6) / "run"), {})

        def memory(number: int) -> Place:
            return Place(f"memory://{secrets.token_hex(6)}/run", {})

        def s3(number: int) -> Place:
            options = server.get().storage_options
            return Place(f"s3://{BUCKET}/{secrets.token_hex(6)}/run", options)

        def schedules(where: str, what: str, place: Callable[[int], Place], kind: Kind, quick: int, full: int) -> Row:
            key = f"runs.{kind}.{where}"
            return Row(key, what, quick, full, lambda n: run_schedule(place(n), kind, draws(seed, key, n)))

        yield [
            schedules("memory", "two or three runs, one path, memory", memory, "writers", 25, 300),
            schedules("folder", "two or three runs, one folder", folder, "writers", 15, 150),
            schedules("s3", "two or three runs, one path, S3", s3, "writers", 2, 20),
            schedules("memory", "readers beside a writer, memory", memory, "readers", 10, 100),
            schedules("folder", "readers beside a writer, folder", folder, "readers", 8, 60),
            schedules("s3", "readers beside a writer, S3", s3, "readers", 1, 10),
            Row(
                "runs.zombie", "a run stopped at a call, its successor works", 2, 30,
                lambda n: stop_and_wake(folder(n), draws(seed, "runs.zombie", n)),
            ),
            Row("runs.exit", "a process ends without close()", 1, len(ENDS), lambda n: end_without_close(folder(n), n)),
        ]  # fmt: skip


class _Lazy:
    """A server that is started by its first user."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._server: S3Server | None = None

    def get(self) -> S3Server:
        if self._server is None:
            self._server = self._stack.enter_context(best_s3_server())
            self._server.make_bucket(BUCKET)
        return self._server


# -- schedules

Kind = Literal["writers", "readers"]


class Killed(BaseException):
    """What a run's calls raise once it is dead."""


class Turns:
    """Lets one call of storage at a time through; which one is drawn. Between two calls at most one run does anything.

    Each run has a weight, drawn anew now and then, so that one may stand still while others do much.
    """

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._changed = threading.Condition()
        self._num_busy = 0
        self._waiting: dict[str, str] = {}
        self._turn = ""
        self._dying: dict[str, int] = {}
        self.log: list[str] = []

    def begin(self, run: str, dies_after: int | None) -> None:
        self._num_busy += 1
        if dies_after is not None:
            self._dying[run] = dies_after

    def end(self) -> None:
        with self._changed:
            self._num_busy -= 1
            self._changed.notify_all()

    def take(self, run: str, call: str) -> None:
        """Wait for the turn of `run`, on the one thread of it that is at work."""
        with self._changed:
            if run in self._dying and (left := self._dying[run]) <= 0:
                raise Killed(run)
            if run in self._dying:
                self._dying[run] = left - 1
            assert run not in self._waiting, f"{run} makes two calls at once"
            self._waiting[run] = call
            self._num_busy -= 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._turn == run, TIMEOUT_S), self.log
            self._turn = ""
            self._num_busy += 1

    def direct(self) -> None:
        """Until all runs have ended."""
        weights: dict[str, float] = {}
        left = 0
        while True:
            with self._changed:
                assert self._changed.wait_for(lambda: not self._num_busy and not self._turn, TIMEOUT_S), self.log
                if not self._waiting:
                    return
                if left == 0:
                    left = self._draw.randint(1, 12)
                    weights = {run: self._draw.choice((0.0, 0.02, 1.0, 1.0)) for run in "abcr"}
                left -= 1
                names = sorted(self._waiting)
                some = [weights[name] for name in names]
                name = self._draw.choices(names, some if any(some) else None)[0]
                self.log.append(f"{name}: {self._waiting.pop(name)}")
                self._turn = name
                self._changed.notify_all()


class TurnStorage(RecordingStorage):
    """Each call waits for its turn, each file of a `delete` for one of its own."""

    def __init__(self, inner: Storage, turns: Turns, run: str) -> None:
        super().__init__(inner)
        self._turns = turns
        self._run = run

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        self._turns.take(self._run, f"{call.verb} {' '.join(call.paths)}")
        return run()

    def delete(self, paths: Iterable[str]) -> None:
        for path in list(paths):
            super().delete([path])


def state_of(step: int, save: str) -> dict[str, Any]:
    """save: whose, and which, so that no two are alike."""
    seed = random.Random(f"{step} {save}").randrange(1 << 30)
    return {"w": torch.arange(600, dtype=torch.int32) + seed, "step": step, "save": save}


def target() -> dict[str, Any]:
    return {"w": torch.zeros(600, dtype=torch.int32), "step": -1, "save": ""}


@dataclass
class Save:
    """knew: whether the run knew the step to be there when it began. is_told: it was reported as committed."""

    run: str
    step: int
    save: str
    knew: bool
    is_told: bool = False
    time_s: float = field(default_factory=time.time)


@dataclass
class Run:
    """One manager and its script, on a thread of its own; what it did, and what went wrong."""

    name: str
    place: Place
    turns: Turns
    journal: list[Save | Pruned]
    script: list[Callable[[Run], None]]
    arguments: dict[str, Any]
    num_refused: int = 0
    is_dead: bool = False
    error: BaseException | None = None
    manager: CheckpointManager = field(init=False)
    _num_saves: int = 0

    def work(self) -> None:
        try:
            self.manager = CheckpointManager(
                self.place.url, storage_options=self.place.options, chkpt_on_preemption=False,
                events=[self.note], **self.arguments,
            )  # fmt: skip
            for act in self.script:
                act(self)
            self.manager.close()
        except Killed:
            self.is_dead = True
        except BaseException as exc:
            self.error = exc
        finally:
            self.turns.end()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def note(self, event: Event) -> None:
        if isinstance(event, Pruned) and event.whole:
            self.journal.append(event)

    def save(self, step: int) -> None:
        self._num_saves += 1
        save = Save(self.name, step, f"{self.name}{self._num_saves}", step in self.manager.all_steps())
        self.journal.append(save)
        try:
            self.manager.save(step, state_of(step, save.save))
        except SaveError as exc:
            assert "two runs must not write to one path" in str(exc), exc  # noqa: PT017 - there is no other reason
            self.num_refused += 1
        else:
            save.is_told = True
        self.manager.join()

    def refresh(self) -> None:
        self.manager.refresh()

    def restore(self) -> None:
        """The newest step it knows."""
        found = target()
        try:
            step = self.manager.restore_latest(found)
        except (StepNotFoundError, DamagedStepError) as exc:
            assert isinstance(exc, StepNotFoundError) or "is gone" in str(exc), exc  # noqa: PT017
            self.num_refused += 1
            return
        if step is not None:
            assert found["step"] == step
            assert_same(state_of(step, found["save"]), found)


def run_schedule(place: Place, kind: Kind, draw: random.Random) -> Outcome:
    turns, journal = Turns(draw), list[Save | Pruned]()
    runs = [
        Run(name, place, turns, journal, script, {"max_to_keep": kept})
        for name, script, kept in (_writers(draw) if kind == "writers" else _readers(draw))
    ]
    _prepare(place, draw)
    by_thread: dict[int, str] = {}

    def opened(*args: Any, **kwargs: Any) -> Storage:
        return TurnStorage(open_storage(*args, **kwargs), turns, by_thread[threading.get_ident()])

    def begin(run: Run) -> None:
        by_thread[threading.get_ident()] = run.name
        run.work()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "open_storage", opened)
        threads = [threading.Thread(target=begin, args=(run,), daemon=True) for run in runs]
        for run, thread in zip(runs, threads, strict=True):
            turns.begin(run.name, draw.randint(3, 60) if draw.random() < 0.15 else None)
            thread.start()
        turns.direct()
        for thread in threads:
            thread.join(TIMEOUT_S)
    try:
        for run in runs:
            run.raise_error()
        assert_nothing_lost(place, journal, {run.name: run.arguments["max_to_keep"] for run in runs if run.is_dead})
    except BaseException as exc:
        exc.add_note("\n".join(turns.log))
        raise
    return "detected" if any(run.num_refused for run in runs) else "survived"


Scripts = list[tuple[str, list[Callable[[Run], None]], int]]


def _writers(draw: random.Random) -> Scripts:
    """Runs that save some of the same few steps, and now and then look or restore."""

    def script() -> list[Callable[[Run], None]]:
        steps = sorted(draw.choices(range(1, 7), k=draw.randint(2, 5)))
        saves: list[Callable[[Run], None]] = [partial(Run.save, step=step) for step in steps]
        return [draw.choice((save, save, Run.refresh, Run.restore)) for save in saves]

    return [(name, script(), draw.choice((0, KEPT, KEPT, 1))) for name in "abc"[: draw.choice((2, 2, 3))]]


def _readers(draw: random.Random) -> Scripts:
    """A run that saves, some steps again, and drops all but one; two that follow it."""
    steps = [step if draw.random() < 0.7 else max(1, step - 1) for step in range(1, 6)]
    saves: list[Callable[[Run], None]] = [partial(Run.save, step=step) for step in steps]
    follow: list[Callable[[Run], None]] = [Run.refresh, Run.restore] * 3
    return [("a", saves, draw.choice((1, 1, 2))), ("b", list(follow), 0), ("r", list(follow), 0)]


def _prepare(place: Place, draw: random.Random) -> None:
    """What an earlier run left: nothing, or a step or two."""
    with CheckpointManager(place.url, storage_options=place.options, chkpt_on_preemption=False) as manager:
        for step in range(1, draw.choice((1, 1, 2, 3))):
            manager.save(step, state_of(step, f"0{step}"))


def assert_nothing_lost(place: Place, journal: list[Save | Pruned], died: dict[str, int]) -> None:
    """died: the runs that died, and how many steps they kept."""
    arguments: dict[str, Any] = {"storage_options": place.options, "chkpt_on_preemption": False}
    with CheckpointManager(place.url, **arguments) as manager:
        found = {step: _restored(manager, step) for step in manager.all_steps()}
        manager.save(98, state_of(98, "y"))
        manager.join()  # what a run that died left half done is done
        for step in [*found, 98]:
            manager.verify(step)
    with CheckpointManager(place.url, max_to_keep=KEPT, **arguments) as manager:
        for number, entry in enumerate(journal):
            if isinstance(entry, Save) and entry.is_told:
                later = [one for one in journal[number + 1 :] if one.step == entry.step]
                is_dropped = any(isinstance(one, Pruned) for one in later) or _was_being_dropped(entry, journal, died)
                again = {one.save for one in later if isinstance(one, Save) and (one.run == entry.run or one.knew)}
                assert is_dropped or found.get(entry.step) in {entry.save, *again}, (entry, found, journal)
        assert manager.restore_latest(target()) == 98
        manager.save(99, state_of(99, "z"))
        manager.join()
        manager.refresh()
        kept = manager.all_steps()
        assert kept == [98, 99]
        left = strays(place, manager._storage, kept)
        assert left == [], left
        for step in kept:
            manager.verify(step)


def _was_being_dropped(entry: Save, journal: list[Save | Pruned], died: dict[str, int]) -> bool:
    """By a run that died at it, so that no event tells."""
    later = [one.run for one in journal[journal.index(entry) + 1 :] if isinstance(one, Save) and one.step != entry.step]
    return any(0 < kept <= later.count(run) for run, kept in died.items())


def _restored(manager: CheckpointManager, step: int) -> str:
    """Whose save a step holds, which it must hold bit for bit."""
    found = target()
    manager.restore(step, found, strict=True)
    assert_same(state_of(step, found["save"]), found)
    return str(found["save"])


# -- stopped, and woken


def stop_and_wake(place: Place, draw: random.Random) -> Outcome:
    """A run is stopped before one of its calls, another one works in its place, and the first wakes up."""
    here, there = _forks.Pipe()
    process = _forks.Process(target=_be_stopped, args=(there, place, draw.randrange(2, 45)), daemon=True)
    process.start()
    there.close()
    journal: list[Save | Pruned] = []
    try:
        pid, is_stopped = _hear(here)
        if is_stopped:
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)
            successor = Run("b", place, Turns(draw), journal, [], {"max_to_keep": KEPT})
            with CheckpointManager(
                place.url, max_to_keep=KEPT, chkpt_on_preemption=False, events=[successor.note]
            ) as successor.manager:
                for step in sorted(draw.choices(range(1, 7), k=3)):
                    successor.save(step)
            os.kill(pid, signal.SIGCONT)
        theirs, num_refused, error = _hear(here)
    finally:
        process.kill()
        process.join()
        here.close()
    assert not error, error
    assert_nothing_lost(place, sorted([*journal, *theirs], key=lambda entry: entry.time_s), {})
    return "detected" if num_refused else "survived"


def _hear(link: Connection) -> Any:
    assert link.poll(TIMEOUT_S), "the stopped run says nothing"
    return link.recv()


class StoppingStorage(RecordingStorage):
    """Says so and stops this process before one of its calls."""

    def __init__(self, inner: Storage, link: Connection, number: int) -> None:
        super().__init__(inner)
        self._link = link
        self._number = number

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        if len(self.calls) == self._number:
            self._link.send((os.getpid(), True))
            os.kill(os.getpid(), signal.SIGSTOP)
        return super()._around(call, run)


def _be_stopped(link: Connection, place: Place, number: int) -> None:
    """The process."""
    storages: list[StoppingStorage] = []

    def opened(*args: Any, **kwargs: Any) -> Storage:
        storages.append(StoppingStorage(open_storage(*args, **kwargs), link, number))
        return storages[0]

    run = Run("a", place, Turns(random.Random(0)), [], [partial(Run.save, step=n) for n in (1, 2, 2, 3, 5)], {})
    run.arguments["max_to_keep"] = KEPT
    logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "open_storage", opened)
        run.work()
    if len(storages[0].calls) <= number:
        link.send((os.getpid(), False))
    link.send((run.journal, run.num_refused, "".join(traceback.format_exception(run.error)) if run.error else ""))


# -- ended without close()

ENDS = (*DRAINED, *AT_ONCE, *HANGING)


def end_without_close(place: Place, number: int) -> Outcome:
    kind = ENDS[number % len(ENDS)]
    assert_as_promised(kind, place.url)
    return "survived" if kind in DRAINED else "detected"
