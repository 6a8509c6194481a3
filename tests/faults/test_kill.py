"""SIGKILL during a save of tensors and files, at moments drawn from seeds: what was committed stays, what was not is
never seen.

`ASYNCCKPT_KILLS=500 scripts/test -m "slow or not slow" tests/faults/test_kill.py` tries more moments than the 50 for
each kind of storage; a failure names its seed and where the run died.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.conftest import BUCKET
from tests.faults.harness import Place, Rehearsal, assert_survived, rehearse, run_until_killed
from tests.servers import S3Server

NUM_KILLS = int(os.environ.get("ASYNCCKPT_KILLS", "50"))
NUM_QUICK = 4  # in the default suite, one of each kind: `scripts/torture`, which CI runs too, has them by the hundred

seeds = pytest.mark.parametrize(
    "seed", [*range(NUM_QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(NUM_QUICK, NUM_KILLS))]
)


@pytest.fixture(scope="module")
def folder_rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return rehearse(Place(str(tmp_path_factory.mktemp("rehearsal") / "run"), {}, has_files=True))


@pytest.fixture(scope="module")
def s3_rehearsal(s3_server: S3Server) -> Rehearsal:
    return rehearse(_s3_place(s3_server))


@seeds
def test_a_run_killed_while_it_saves_to_a_folder(seed: int, tmp_path: Path, folder_rehearsal: Rehearsal) -> None:
    """Keeps every promise of `assert_survived`."""
    _kill_and_check(Place(str(tmp_path / "run"), {}, has_files=True), folder_rehearsal, seed)


@seeds
def test_a_run_killed_while_it_saves_to_s3(seed: int, s3_server: S3Server, s3_rehearsal: Rehearsal) -> None:
    """Keeps every promise of `assert_survived`."""
    _kill_and_check(_s3_place(s3_server), s3_rehearsal, seed)


def _kill_and_check(place: Place, rehearsal: Rehearsal, seed: int) -> None:
    point = rehearsal.kill_point(seed)
    print(f"seed {seed}: {point}", rehearsal.calls[point.number] if point.kind == "call" else "")  # seen if it fails
    committed = run_until_killed(place, point)
    print(f"saves reported as committed: {committed}")
    assert_survived(place, committed)


def _s3_place(server: S3Server) -> Place:
    return Place(f"s3://{BUCKET}/{secrets.token_hex(4)}/run", server.storage_options, has_files=True)
