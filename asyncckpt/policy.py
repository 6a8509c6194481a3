"""When to save and what to keep: pure decisions on numbers, combined with `|`.

Nothing here reads a clock, a file or another rank; time comes in as an argument. The manager asks a save policy at
every step, and a keep policy after every commit. Any object with the same methods is a policy.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


class SavePolicy(Protocol):
    """Is this step to be saved?

    An attribute `uses_clock = False` says that the answer depends on `step` alone, so that every rank decides by
    itself. With True, or without the attribute, rank 0 decides for all and a save may fall a step or two later.
    """

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        """last_step: the latest step saved by this run, None before the first. seconds_since_last: since that save was
        taken, or since the run began."""
        ...


@dataclass(frozen=True)
class CommittedStep:
    """One whole checkpoint. sequence: its place in the order of commits, which is not the order of step numbers.

    time_s: `time.time()` of its commit, and metrics: what `save` was given. Both are read from the manifest, and left
    at these defaults for a policy with `needs_metadata = False`.
    """

    step: int
    sequence: int
    time_s: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)


class KeepPolicy(Protocol):
    """Which steps are worth their space?

    An attribute `needs_metadata = False` says that step and sequence numbers suffice, which spares one small read per
    step; True, or without the attribute, `time_s` and `metrics` are filled in.
    """

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> Collection[int]:
        """The step numbers to keep. steps: in order of commit, oldest first. now_s: `time.time()`."""
        ...


def uses_clock(policy: SavePolicy) -> bool:
    return bool(getattr(policy, "uses_clock", True))


def needs_metadata(policy: KeepPolicy) -> bool:
    return bool(getattr(policy, "needs_metadata", True))


def prunable(
    steps: Sequence[CommittedStep], policy: KeepPolicy, *, protected: Collection[int], now_s: float
) -> list[int]:
    """The step numbers to delete, oldest commit first. Never the newest commit, never one in `protected`.

    steps: in order of commit, oldest first.
    """
    if not steps:
        return []
    kept = {steps[-1].step, *protected, *policy.keep(steps, now_s)}
    return [committed.step for committed in steps if committed.step not in kept]


class _Save(SavePolicy, Protocol):
    def __or__(self, other: SavePolicy) -> SaveAny:
        return SaveAny(self, other)

    def __ror__(self, other: SavePolicy) -> SaveAny:
        return SaveAny(other, self)


@dataclass(frozen=True)
class SaveEvery(_Save):
    """Every step that is a multiple of `steps`, 0 included."""

    steps: int
    uses_clock = False

    def __post_init__(self) -> None:
        _check_count("SaveEvery", "steps", self.steps)

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        return step % self.steps == 0


@dataclass(frozen=True)
class SaveEverySeconds(_Save):
    """The first step after `seconds` without a save."""

    seconds: float
    uses_clock = True

    def __post_init__(self) -> None:
        _check_seconds("SaveEverySeconds", self.seconds)

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        return seconds_since_last >= self.seconds


@dataclass(frozen=True, init=False)
class SaveAny(_Save):
    """A step that any of `policies` wants."""

    policies: tuple[SavePolicy, ...]

    def __init__(self, *policies: SavePolicy) -> None:
        _check_policies("SaveAny", policies, "should_save")
        object.__setattr__(self, "policies", policies)

    @property
    def uses_clock(self) -> bool:
        return any(uses_clock(policy) for policy in self.policies)

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        return any(policy.should_save(step, last_step, seconds_since_last) for policy in self.policies)


class _Keep(KeepPolicy, Protocol):
    def __or__(self, other: KeepPolicy) -> KeepAny:
        return KeepAny(self, other)

    def __ror__(self, other: KeepPolicy) -> KeepAny:
        return KeepAny(other, self)


@dataclass(frozen=True)
class KeepLast(_Keep):
    """The `n` steps committed last: a step saved again counts as new, whatever its number."""

    n: int
    needs_metadata = False

    def __post_init__(self) -> None:
        _check_count("KeepLast", "n", self.n)

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> set[int]:
        return {committed.step for committed in steps[-self.n :]}


@dataclass(frozen=True)
class KeepEvery(_Keep):
    """Steps that are a multiple of `n`, 0 included."""

    n: int
    needs_metadata = False

    def __post_init__(self) -> None:
        _check_count("KeepEvery", "n", self.n)

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> set[int]:
        return {committed.step for committed in steps if committed.step % self.n == 0}


@dataclass(frozen=True)
class KeepBest(_Keep):
    """The `n` steps with the lowest (`mode="min"`) or highest (`"max"`) value of `metric`.

    A step without the metric, or with NaN, comes after all others; of equals the later commit is better.
    """

    n: int
    metric: str
    mode: Literal["min", "max"] = "min"
    needs_metadata = True

    def __post_init__(self) -> None:
        _check_count("KeepBest", "n", self.n)
        if not isinstance(self.metric, str) or not self.metric:
            raise ValueError(f"KeepBest: metric must be the name of a metric, got {self.metric!r}")
        if self.mode not in ("min", "max"):
            raise ValueError(f'KeepBest: mode must be "min" or "max", got {self.mode!r}')

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> set[int]:
        return {committed.step for committed in sorted(steps, key=self._rank)[: self.n]}

    def _rank(self, committed: CommittedStep) -> tuple[bool, float, int]:
        value = committed.metrics.get(self.metric, math.nan)
        if math.isnan(value):
            return True, 0.0, -committed.sequence
        return False, value if self.mode == "min" else -value, -committed.sequence


@dataclass(frozen=True)
class KeepYounger(_Keep):
    """Steps committed less than `seconds` ago, and those whose age is not known."""

    seconds: float
    needs_metadata = True

    def __post_init__(self) -> None:
        _check_seconds("KeepYounger", self.seconds)

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> set[int]:
        # "not old" instead of "young": a NaN time compares false, and what is not known is not deleted
        return {committed.step for committed in steps if not now_s - committed.time_s >= self.seconds}


@dataclass(frozen=True, init=False)
class KeepAny(_Keep):
    """What any of `policies` keeps: `KeepLast(3) | KeepEvery(1000)`."""

    policies: tuple[KeepPolicy, ...]

    def __init__(self, *policies: KeepPolicy) -> None:
        _check_policies("KeepAny", policies, "keep")
        object.__setattr__(self, "policies", policies)

    @property
    def needs_metadata(self) -> bool:
        return any(needs_metadata(policy) for policy in self.policies)

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> set[int]:
        return {step for policy in self.policies for step in policy.keep(steps, now_s)}


def _check_count(owner: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} must be a whole number of 1 or more, got {value!r}")


def _check_seconds(owner: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{owner}: seconds must be a finite number above 0, got {value!r}")


def _check_policies(owner: str, policies: Sequence[object], method: str) -> None:
    if not policies:
        raise ValueError(f"{owner}: at least one policy is needed, got none")
    for policy in policies:
        if not callable(getattr(policy, method, None)):
            raise TypeError(f"{owner}: every policy needs a method {method}(), got {policy!r}")
