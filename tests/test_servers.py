"""The places that conftest.py hands out behave as every other test takes for granted."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests import servers
from tests.servers import GcsEmulator, S3Server, Server


def test_every_place_holds_what_is_written(any_url: tuple[str, dict[str, Any]]) -> None:
    """A file written under the URL is listed and read back."""
    url, options = any_url
    fs, root = fsspec.core.url_to_fs(url, **options)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/file", b"bytes")
    assert fs.cat_file(f"{root}/file") == b"bytes"
    assert [path.rpartition("/")[2] for path in fs.find(root)] == ["file"]


def test_the_s3_server_is_reached_through_the_environment(s3_server: S3Server, s3_url: str) -> None:
    """s3fs needs no options when a user has set what `env` names."""
    _write_in_a_fresh_process(s3_server, s3_url)


def test_the_gcs_server_is_reached_through_the_environment(gcs_server: GcsEmulator, gs_url: str) -> None:
    """gcsfs needs no options when a user has set what `env` names."""
    _write_in_a_fresh_process(gcs_server, gs_url)


def test_the_s3_server_checks_signatures(s3_server: S3Server, s3_url: str) -> None:
    """A wrong secret is refused, as it is in production."""
    if s3_server.name == "moto":
        pytest.skip("moto takes any key")
    fs = fsspec.filesystem("s3", **{**s3_server.storage_options, "secret": "wrong"})
    with pytest.raises(PermissionError):
        fs.pipe_file(f"{s3_url}/file", b"bytes")


def test_serve_runs_a_command_against_its_servers_and_returns_its_status() -> None:
    """`scripts/serve gs -- COMMAND` is enough to run anything against a store."""
    code = "import os, sys; print(os.environ['STORAGE_EMULATOR_HOST']); sys.exit(7)"
    command = [sys.executable, "-P", servers.__file__, "gs", "--", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    announced, seen_by_the_command = done.stdout.splitlines()
    assert f"{seen_by_the_command}, empty: gs://asyncckpt/run" in announced


@pytest.mark.skipif(not shutil.which("setpriv"), reason="only setpriv ties a child's life to ours")
def test_servers_do_not_outlive_a_killed_owner(tmp_path: Path) -> None:
    """A suite that is killed leaves no daemon behind."""
    command = [sys.executable, "-P", servers.__file__, "gs"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # its files do outlive it
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        port = int(owner.stdout.readline().split(",")[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            owner.kill()
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def _write_in_a_fresh_process(server: Server, url: str) -> None:
    """Fresh, as gcsfs reads its environment once, when it is imported."""
    code = "import fsspec, sys; fs, path = fsspec.core.url_to_fs(sys.argv[1]); fs.pipe_file(path, b'x'); fs.rm(path)"
    command = [sys.executable, "-c", code, url]
    done = subprocess.run(command, env={**os.environ, **server.env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
