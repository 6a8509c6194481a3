"""A few of the faults of `scripts/torture --only ranks`: a rank is killed, stopped or fails at a storage call."""

from __future__ import annotations

import pytest

from scripts.campaign.rank_job import RankFault, write_oracle
from scripts.campaign.ranks import Runs
from tests.faults.harness import Place


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    scratch = tmp_path_factory.mktemp("ranks")
    write_oracle(scratch / "oracle")
    return Runs("folder", lambda name: Place(str(scratch / name / "run"), {}), scratch / "oracle")


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_at_a_storage_call_is_named_and_nothing_is_lost(runs: Runs, number: int) -> None:
    """The job that looks afterwards has another number of ranks; `check_all` raises there."""
    assert runs.run("kill", 1, number) == "detected"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["stop", "fail", "lose all"])
def test_nothing_is_lost_with_a_rank_that_comes_back_late_fails_or_takes_all_with_it(
    runs: Runs, fault: RankFault
) -> None:
    """At a call that the seed chooses."""
    assert runs.run(fault, 1, 0) in ("survived", "detected")
