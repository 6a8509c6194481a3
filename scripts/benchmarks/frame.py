"""Contenders that take turns, ratios paired by round, and the rows they end in.

A round is one measurement of every contender; every other round goes through them in reverse, and the first is a
warm-up that is dropped. Whatever drifts (clock rate, other work on the machine) is then in both sides of a ratio, so a
ratio is taken in each round, and its median over the rounds is the figure. Measures nothing by itself; used by suites.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch.distributed.checkpoint.api import CheckpointException

FAILURES = (Exception, CheckpointException)
"""DCP's is not an Exception, but a BaseException."""
LIMIT, PEER, OURS = "limit", "peer", "ours"
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Scale:
    """How large the suites are. `num_bytes` of tensors in stall, save, restore and memory; the rest by suite."""

    name: str
    rounds: int
    num_bytes: int
    loop_bytes: int
    """stall: AdamW state of the training loop."""
    loop_rounds: int
    object_bytes: int
    stock_bytes: int
    """What slow peers move beside busy Python; no times of theirs are compared."""
    num_tensors: int
    peer_tensors: int
    """tensors: for peers that take half a millisecond on each."""
    num_chunks: int
    num_steps: int
    num_saves: int
    """memory: saves that must not leak."""
    watch_s: float
    """interference: seconds of steps per contender and round."""


TINY = Scale("tiny", 1, 4 * MIB, 2 * MIB, 1, 2 * MIB, MIB, 200, 50, 2_000, 30, 4, 0.1)
QUICK = Scale("quick", 5, GIB // 32, 8 * MIB, 5, 8 * MIB, 2 * MIB, 600, 200, 10_000, 200, 30, 0.05)
FULL = Scale("full", 5, 10**9, 500 * 10**6, 7, 10**9, 128 * MIB, 50_000, 10_000, 1_000_000, 10_000, 200, 3.0)


@dataclass(frozen=True)
class Spread:
    """Of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One line of the table of goals.

    figure: what the goal speaks of; None: not measured, and `note` says why. ours, limit, peer: the same run's absolute
    figures, with their names.
    """

    suite: str
    name: str
    figure: Spread | None
    unit: str
    goal: float | None
    bound: Literal["<=", ">="] = "<="
    ours: str = ""
    limit: str = ""
    peer: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """None: there is no figure, or no goal."""
        if self.figure is None or self.goal is None:
            return None
        return self.figure.median <= self.goal if self.bound == "<=" else self.figure.median >= self.goal


@dataclass
class Rounds:
    """What contenders measured. values: {contender: {measure: one value a round}}, all lists of one length."""

    kinds: dict[str, str]
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return bool(self.values.get(name))

    def best(self, kind: str, measure: str, *, among: Callable[[str], bool] = lambda name: True) -> str | None:
        """The contender of a kind with the smallest median; None: none ran."""
        ran = [name for name in self.values if self.kinds[name] == kind and name in self and among(name)]
        return min(ran, key=lambda name: statistics.median(self.values[name][measure]), default=None)

    def spread(self, name: str, measure: str) -> Spread:
        return Spread.of(self.values[name][measure])

    def ratio(self, name: str | None, other: str | None, measure: str) -> Spread | None:
        """`name` over `other`, paired by round; None where one of them did not run."""
        if name is None or other is None or name not in self or other not in self:
            return None
        pairs = list(zip(self.values[name][measure], self.values[other][measure], strict=True))
        if any(base <= 0 for _, base in pairs):  # a cost that drowned in noise
            return None
        return Spread.of(value / base for value, base in pairs)

    def said(self, name: str | None, measure: str, unit: str = "s") -> str:
        """A contender's own figure in words: "dcp.save 1.90 s"."""
        if name is None or name not in self:
            return ""
        return f"{name} {self.spread(name, measure).median:.3g} {unit}"

    def why_not(self, *names: str | None) -> str:
        """Why a row has no figure."""
        found = [f"{name}: {self.errors[name]}" for name in names if name in self.errors]
        return "; ".join(found) or ("" if all(name and name in self for name in names) else "nothing to compare with")


@dataclass(frozen=True)
class Curve:
    """How a figure grows. series: {contender: [(x, y), ...]}."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]


@dataclass
class Outcome:
    """What a suite found. tables: {title: (its rounds, which measure is compared)}."""

    rows: list[Row] = field(default_factory=list)
    tables: dict[str, tuple[Rounds, str]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


Round = Callable[[int], Mapping[str, float]]
"""One round, by number, and its measures."""
Contender = tuple[str, Callable[[], AbstractContextManager[Round]]]
"""Its kind, and what makes its rounds."""


@dataclass(frozen=True)
class Bench:
    """What every suite is given. folder: empty, on the disk to be measured."""

    scale: Scale
    folder: Path

    def take_turns(self, contenders: Mapping[str, Contender], *, rounds: int | None = None) -> Rounds:
        """All rounds of all contenders. One that fails is out, and its error is kept."""
        rounds = rounds or self.scale.rounds
        found = Rounds({name: kind for name, (kind, _) in contenders.items()})
        with ExitStack() as stack:
            running: dict[str, Round] = {}
            for name, (_, start) in contenders.items():
                try:
                    running[name] = stack.enter_context(start())
                except FAILURES as exc:
                    found.errors[name] = reason(exc)
            gc.freeze()  # what peers import: else each collection below is 0.3 s
            spent = dict.fromkeys(running, 0.0)
            for number in range(rounds + 1):
                self._one_round(number, running, found, spent)
        slowest = sorted(spent, key=lambda name: -spent[name])[:3]
        say("    most time went to " + ", ".join(f"{name} ({spent[name]:.1f} s)" for name in slowest))
        return found

    def _one_round(self, number: int, running: dict[str, Round], found: Rounds, spent: dict[str, float]) -> None:
        for name in list(running) if number % 2 == 0 else reversed(list(running)):
            started = time.perf_counter()
            try:
                measures = running[name](number)
            except FAILURES as exc:
                found.errors[name] = reason(exc)
                found.values.pop(name, None)
                del running[name]
                continue
            finally:
                gc.collect()
                spent[name] += time.perf_counter() - started
            for measure in measures if number else ():
                found.values.setdefault(name, {}).setdefault(measure, []).append(measures[measure])

    def folder_of(self, name: str) -> Path:
        return self.folder / "".join(c if c.isalnum() else "-" for c in name)


def ratio_row(
    suite: str,
    name: str,
    rounds: Rounds,
    over: str | None,
    under: str | None,
    goal: float | None,
    *,
    bound: Literal["<=", ">="] = "<=",
    measure: str = "time",
    note: str = "",
) -> Row:
    """The row whose figure is the paired ratio of contender `over` to contender `under`."""
    figure = rounds.ratio(over, under, measure)
    said = {OURS: "", LIMIT: "", PEER: ""}
    for one in (over, under):
        if one is not None and one in rounds:
            said[rounds.kinds[one]] = rounds.said(one, measure)
    said[LIMIT] = said[LIMIT] or rounds.said(rounds.best(LIMIT, measure), measure)
    said[PEER] = said[PEER] or rounds.said(rounds.best(PEER, measure), measure)
    notes = [part for part in (note, rounds.why_not(over, under) if figure is None else "") if part]
    return Row(suite, name, figure, "x", goal, bound, said[OURS], said[LIMIT], said[PEER], "; ".join(notes))


def not_measured(suite: str, name: str, unit: str, goal: float | None, note: str) -> Row:
    return Row(suite, name, None, unit, goal, note=note)


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def reason(error: BaseException) -> str:
    """One line for the report."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def say(text: str) -> None:
    """Progress, to stderr: the report alone is on stdout."""
    print(text, file=sys.stderr, flush=True)
