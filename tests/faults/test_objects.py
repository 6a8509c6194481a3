"""A few faults of `scripts/torture --only objects`: one request of a run to S3 or GCS breaks, or the run dies at it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scripts.campaign.object_client import write_oracle
from scripts.campaign.objects import BUCKET, WAYS, Lines
from tests.s3 import Fault
from tests.servers import GcsEmulator, S3Server

S3, S3FS, GS = WAYS


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects") / "oracle"
    write_oracle(folder)
    return folder


@pytest.fixture(scope="module")
def s3(s3_server: S3Server, oracle: Path) -> Lines:
    """In one part each: this server takes no small ones."""
    s3_server.make_bucket(BUCKET)
    return Lines(replace(S3, part_bytes=0), s3_server, oracle)


@pytest.fixture(scope="module")
def s3fs(s3_server: S3Server, s3: Lines, oracle: Path) -> Lines:
    return Lines(replace(S3FS, part_bytes=0), s3_server, oracle)


@pytest.fixture(scope="module")
def gs(gcs_server: GcsEmulator, oracle: Path) -> Lines:
    gcs_server.make_bucket(BUCKET)
    return Lines(GS, gcs_server, oracle)


@pytest.mark.parametrize("number", [0, 3])
def test_a_client_of_s3_that_dies_before_it_hears_the_answer_loses_nothing(s3: Lines, number: int) -> None:
    """`check` raises if what a fresh process finds breaks a promise."""
    assert s3.attempt("kill answered", 1, number) == "survived"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "403", "cut", "half", "drop"])
def test_what_a_run_says_of_a_broken_request_to_s3_is_what_is_there(s3fs: Lines, fault: Fault) -> None:
    """Through s3fs."""
    assert s3fs.attempt(fault, 1, 2) in ("survived", "detected")


def test_a_lost_answer_of_gcs_costs_no_save(gs: Lines) -> None:
    """It is asked again."""
    assert gs.attempt("drop", 1, 1) == "survived"
