"""Fixtures that give a test a place to write: a folder, memory, or a bucket on a server started at its first use.

S3 is Ceph's radosgw. Where it is not installed moto stands in and the report says so; with CI=true that is a failure,
unless ASYNCCKPT_ALLOW_MOTO=1.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from tests.servers import GcsEmulator, MotoServer, RadosGateway, S3Server, Server, best_s3_server

# Read by gcsfs when it is first imported; see GcsEmulator.env.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
pytest.register_assert_rewrite("asyncckpt.testing")  # before the first test module that imports it

BUCKET = "asyncckpt-tests"
_servers_used = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts what is in the background so
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_servers_used] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever asks for a server is marked for it; `any_url` marks its own parameters."""
    for item in items:
        for fixture, mark in (("s3_server", pytest.mark.s3), ("gcs_server", pytest.mark.gcs)):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)


def pytest_report_header() -> str:
    reason = RadosGateway.missing()
    return f"WARNING: S3 tests run on the mock moto, radosgw is {reason}" if reason else "s3 server: radosgw"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Last, so that it is read: which servers the results speak of."""
    used = config.stash[_servers_used]
    if used:
        terminalreporter.write_line(f"servers used: {', '.join(used)}")
    if MotoServer.name in used:
        terminalreporter.section(f"WARNING: the S3 tests ran on a mock, radosgw is {RadosGateway.missing()}", red=True)


@pytest.fixture(scope="session")
def s3_server(pytestconfig: pytest.Config) -> Iterator[S3Server]:
    """A running S3 server with the bucket `BUCKET`."""
    reason = RadosGateway.missing()
    if reason and os.environ.get("CI") == "true" and os.environ.get("ASYNCCKPT_ALLOW_MOTO") != "1":
        pytest.fail(f"CI must test on radosgw, and it is {reason}; ASYNCCKPT_ALLOW_MOTO=1 accepts the mock")
    with best_s3_server() as server:
        _prepare(server, pytestconfig)
        yield server


@pytest.fixture(scope="session")
def gcs_server(pytestconfig: pytest.Config) -> Iterator[GcsEmulator]:
    """A running GCS emulator with the bucket `BUCKET`."""
    with GcsEmulator() as server:
        _prepare(server, pytestconfig)
        yield server


def _prepare(server: Server, config: pytest.Config) -> None:
    server.make_bucket(BUCKET)
    config.stash[_servers_used].append(server.name)


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    """A prefix in a bucket that no other test uses; goes with `s3_options`."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/run"


@pytest.fixture
def s3_options(s3_server: S3Server) -> dict[str, Any]:
    return s3_server.storage_options


@pytest.fixture
def gs_url(gcs_server: GcsEmulator) -> str:
    """A prefix in a bucket that no other test uses; goes with `gs_options`."""
    return f"gs://{BUCKET}/{secrets.token_hex(4)}/run"


@pytest.fixture
def gs_options(gcs_server: GcsEmulator) -> dict[str, Any]:
    return gcs_server.storage_options


@pytest.fixture
def memory_url() -> Iterator[str]:
    """A place of one's own in fsspec's memory filesystem, which is one per process; emptied afterwards."""
    name = f"/{secrets.token_hex(4)}"
    yield f"memory:/{name}/run"
    memory = fsspec.filesystem("memory")
    if memory.exists(name):
        memory.rm(name, recursive=True)


@pytest.fixture(
    params=["folder", "memory", pytest.param("s3", marks=pytest.mark.s3), pytest.param("gs", marks=pytest.mark.gcs)]
)
def any_url(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """(url, storage_options) of an empty place, once for each kind of storage."""
    if request.param == "folder":
        return str(request.getfixturevalue("tmp_path") / "run"), {}
    if request.param == "memory":
        return request.getfixturevalue("memory_url"), {}
    return request.getfixturevalue(f"{request.param}_url"), request.getfixturevalue(f"{request.param}_options")
