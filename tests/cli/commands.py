"""Runs commands of `asyncckpt` in this process, which has imported torch, or as processes of their own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from typer.testing import CliRunner

from asyncckpt.cli.app import app

ROOT = pathlib.Path(__file__).parents[2]


def ran(*arguments: object, answer: str = "") -> Any:
    """The result of a command in this process; an exception that gets out of it is raised here."""
    return CliRunner().invoke(app, list(map(str, arguments)), input=answer, catch_exceptions=False)


def told(*arguments: object, status: int = 0) -> Any:
    """Its one JSON document."""
    done = ran(*arguments, "--json")
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


def as_process(*arguments: object, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """On pipes, with the packages of this checkout."""
    return subprocess.Popen(
        [sys.executable, "-m", "asyncckpt", *map(str, arguments)],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def options_of(options: Mapping[str, Any], name: str = "--storage-option") -> list[str]:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [word for key, text in texts.items() for word in (name, f"{key}={text}")]
