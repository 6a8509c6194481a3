"""policy.py: which steps are saved and which are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.policy import (
    CommittedStep,
    KeepAny,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepPolicy,
    KeepYounger,
    SaveAny,
    SaveEvery,
    SaveEverySeconds,
    SavePolicy,
    needs_metadata,
    prunable,
    uses_clock,
)


def committed(*numbers: int) -> list[CommittedStep]:
    """Steps committed in this order, one second apart."""
    return [CommittedStep(step, sequence, float(sequence)) for sequence, step in enumerate(numbers)]


def with_loss(**losses: float) -> list[CommittedStep]:
    """Steps "s<number>" with a metric "loss"."""
    return [CommittedStep(int(name[1:]), i, 0.0, {"loss": value}) for i, (name, value) in enumerate(losses.items())]


@st.composite
def histories(draw: st.DrawFn) -> list[CommittedStep]:
    numbers = draw(st.lists(st.integers(0, 50), unique=True, max_size=12))
    value = st.one_of(st.floats(), st.integers(-3, 3))
    return [
        CommittedStep(step, 2 * i, draw(st.floats(0, 100)), draw(st.dictionaries(st.just("loss"), value)))
        for i, step in enumerate(numbers)
    ]


keep_policies: st.SearchStrategy[KeepPolicy] = st.recursive(
    st.one_of(
        st.builds(KeepLast, st.integers(1, 5)),
        st.builds(KeepEvery, st.integers(1, 20)),
        st.builds(KeepBest, st.integers(1, 5), st.just("loss"), st.sampled_from(["min", "max"])),
        st.builds(KeepYounger, st.floats(0.1, 100)),
    ),
    lambda inner: st.builds(lambda a, b: KeepAny(a, b), inner, inner),
    max_leaves=4,
)


class OddSteps:
    """A user's own policy, without the optional attributes."""

    def should_save(self, step: int, last_step: int | None, seconds_since_last: float) -> bool:
        return step % 2 == 1

    def keep(self, steps: Sequence[CommittedStep], now_s: float) -> list[int]:
        return [committed.step for committed in steps if committed.step % 2 == 1]


def test_every_nth_step_is_saved_and_step_zero_is_one_of_them() -> None:
    """As in torch_xla, whose save_interval this is."""
    policy = SaveEvery(3)
    assert [step for step in range(8) if policy.should_save(step, None, 0.0)] == [0, 3, 6]


def test_a_save_by_the_clock_waits_for_its_seconds_whatever_the_step() -> None:
    """The time comes in as an argument; the boundary itself is due."""
    policy = SaveEverySeconds(60)
    assert [policy.should_save(7, None, seconds) for seconds in (0, 59.9, 60, 1e9)] == [False, False, True, True]


def test_save_any_is_due_when_one_of_its_policies_is() -> None:
    """Built by hand or with `|`, also with a policy of the user's own on either side."""
    by_hand = SaveAny(SaveEvery(10), SaveEverySeconds(60))
    assert by_hand == SaveEvery(10) | SaveEverySeconds(60)
    assert [by_hand.should_save(step, 0, s) for step, s in ((10, 0), (11, 61), (11, 1))] == [True, True, False]
    for combined in (SaveEvery(10) | OddSteps(), OddSteps() | SaveEvery(10)):
        assert [step for step in range(9, 14) if combined.should_save(step, 9, 0)] == [9, 10, 11, 13]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SaveEvery(2), False),
        (SaveEverySeconds(2), True),
        (SaveEvery(2) | SaveEvery(3), False),
        (SaveEvery(2) | SaveEverySeconds(3), True),
        (OddSteps(), True),
        (SaveEvery(2) | OddSteps(), True),
    ],
)
def test_a_policy_tells_whether_the_ranks_could_decide_differently(policy: SavePolicy, expected: bool) -> None:
    """Unknown policies may look at a clock, so rank 0 decides for them."""
    assert uses_clock(policy) is expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (KeepLast(2), False),
        (KeepEvery(2), False),
        (KeepLast(2) | KeepEvery(2), False),
        (KeepBest(2, "loss"), True),
        (KeepYounger(2), True),
        (KeepLast(2) | KeepYounger(2), True),
        (OddSteps(), True),
    ],
)
def test_a_policy_tells_whether_manifests_must_be_read_for_it(policy: KeepPolicy, expected: bool) -> None:
    """Step and sequence come from the listing alone."""
    assert needs_metadata(policy) is expected


def test_keep_last_counts_commits_not_step_numbers() -> None:
    """torch_xla's order: 10, 20, 30 and then 10 again keeps 30 and 10."""
    assert KeepLast(2).keep(committed(20, 30, 10), 0.0) == {30, 10}
    assert prunable(committed(20, 30, 10), KeepLast(2), protected=(), now_s=0.0) == [20]


def test_keep_best_prefers_the_lowest_or_highest_value() -> None:
    """Infinities are values like others."""
    steps = with_loss(s1=3.0, s2=-math.inf, s3=1.0, s4=math.inf)
    assert KeepBest(2, "loss").keep(steps, 0.0) == {2, 3}
    assert KeepBest(2, "loss", mode="max").keep(steps, 0.0) == {1, 4}


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_missing_or_nan_metric_comes_last_in_both_modes(mode: Any) -> None:
    """A diverged run must not be the best one."""
    steps = [*with_loss(s1=math.nan, s2=5.0, s3=math.nan), CommittedStep(4, 9)]
    assert KeepBest(1, "loss", mode).keep(steps, 0.0) == {2}
    assert KeepBest(2, "loss", mode).keep(steps, 0.0) == {2, 4}


def test_of_equal_values_the_later_commit_is_better() -> None:
    """More training for the same loss."""
    assert KeepBest(1, "loss").keep(with_loss(s1=1.0, s2=1.0), 0.0) == {2}
    assert KeepBest(1, "loss", "max").keep(with_loss(s1=1.0, s2=1.0), 0.0) == {2}


def test_keep_younger_goes_by_age_and_keeps_what_has_none() -> None:
    """A commit from the future (another machine's clock) is young too."""
    steps = [CommittedStep(1, 0, 10.0), CommittedStep(2, 1, 41.0), CommittedStep(3, 2, 200.0), CommittedStep(4, 3)]
    assert KeepYounger(60).keep(steps, 100.0) == {2, 3, 4}
    assert KeepYounger(59).keep(steps, 100.0) == {3, 4}


def test_a_users_policy_combines_with_ours_on_either_side() -> None:
    """`|` needs only one of ours."""
    steps = committed(*range(8))
    assert (KeepEvery(4) | OddSteps()).keep(steps, 0.0) == (OddSteps() | KeepEvery(4)).keep(steps, 0.0)
    assert prunable(steps, OddSteps() | KeepEvery(4), protected=(), now_s=0.0) == [2, 6]


@given(histories(), keep_policies, keep_policies, st.floats(0, 200))
def test_a_union_keeps_exactly_what_its_parts_keep(
    steps: list[CommittedStep], one: Any, other: Any, now_s: float
) -> None:
    """And every policy keeps only steps that exist."""
    kept = (one | other).keep(steps, now_s)
    assert kept == one.keep(steps, now_s) | other.keep(steps, now_s)
    assert kept <= {committed.step for committed in steps}


@given(histories(), keep_policies, st.sets(st.integers(0, 50), max_size=4), st.floats(0, 200))
def test_prunable_is_everything_but_kept_protected_and_newest(
    steps: list[CommittedStep], policy: KeepPolicy, protected: set[int], now_s: float
) -> None:
    """Oldest commit first, so that an interruption loses the least."""
    pruned = prunable(steps, policy, protected=protected, now_s=now_s)
    spared = set(policy.keep(steps, now_s)) | protected | {committed.step for committed in steps[-1:]}
    assert pruned == [committed.step for committed in steps if committed.step not in spared]


@given(histories(), keep_policies, st.floats(0, 200))
def test_pruning_again_finds_nothing_more(steps: list[CommittedStep], policy: KeepPolicy, now_s: float) -> None:
    """The policy's answer on what is left is: all of it."""
    pruned = prunable(steps, policy, protected=(), now_s=now_s)
    left = [committed for committed in steps if committed.step not in pruned]
    assert prunable(left, policy, protected=(), now_s=now_s) == []


@pytest.mark.parametrize(
    ("construct", "value"),
    [
        (lambda: SaveEvery(0), "0"),
        (lambda: SaveEvery(-5), "-5"),
        (lambda: SaveEvery(2.5), "2.5"),  # type: ignore[arg-type]
        (lambda: SaveEvery(True), "True"),
        (lambda: SaveEverySeconds(0), "0"),
        (lambda: SaveEverySeconds(math.nan), "nan"),
        (lambda: SaveEverySeconds(math.inf), "inf"),
        (lambda: SaveAny(), "none"),
        (lambda: KeepLast(0), "0"),
        (lambda: KeepEvery(-1), "-1"),
        (lambda: KeepBest(0, "loss"), "0"),
        (lambda: KeepBest(1, ""), "''"),
        (lambda: KeepBest(1, "loss", "lowest"), "lowest"),  # type: ignore[arg-type]
        (lambda: KeepYounger(-1.0), "-1.0"),
        (lambda: KeepAny(), "none"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_value(construct: Any, value: str) -> None:
    """At construction, long before the first save."""
    with pytest.raises(ValueError, match=value):
        construct()


def test_what_is_no_policy_cannot_be_combined() -> None:
    """Say, a number where a policy belongs."""
    with pytest.raises(TypeError, match="got 3"):
        KeepLast(1) | 3  # type: ignore[operator]
    with pytest.raises(TypeError, match="got KeepLast"):
        SaveEvery(1) | KeepLast(1)  # type: ignore[operator]
