"""The places that conftest.py hands out behave as every other test takes for granted."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import fsspec
import pytest

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


def _write_in_a_fresh_process(server: Server, url: str) -> None:
    """Fresh, as gcsfs reads its environment once, when it is imported."""
    code = "import fsspec, sys; fs, path = fsspec.core.url_to_fs(sys.argv[1]); fs.pipe_file(path, b'x'); fs.rm(path)"
    command = [sys.executable, "-c", code, url]
    done = subprocess.run(command, env={**os.environ, **server.env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
