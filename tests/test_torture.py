"""scripts/torture: what its table says of a family that survives, detects, loses or ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from scripts.campaign import __main__ as campaign
from scripts.campaign.report import Line, print_losses, print_table
from scripts.campaign.row import Row, draws


def three_ways(number: int) -> Any:
    if number == 2:
        raise AssertionError("step 7 is gone")
    return "survived" if number else Counter(detected=5)


ROW = Row("sample-three", "three ways", quick=2, full=3, attempt=three_ways)


def told_by(row: Row, numbers: range) -> Line:
    line = Line(row.key, row.what)

    def tell(**message: Any) -> None:
        if "lost" in message:
            line.lost[message["number"]] = message["lost"]
        else:
            line.tally.update(message["tally"])

    campaign.run_row(row, numbers, tell)
    return line


def test_what_an_attempt_tells_is_counted_and_what_it_raises_is_a_loss():
    """One attempt may stand for many tries."""
    line = told_by(ROW, range(3))
    assert (line.tried, line.tally) == (7, Counter(detected=5, survived=1))
    assert list(line.lost) == [2]
    assert "step 7 is gone" in line.lost[2]


def test_the_table_gives_the_command_that_repeats_a_loss():
    """With the seed."""
    out = StringIO()
    console = Console(file=out, width=120)
    print_table([told_by(ROW, range(3))], 9, console)
    print_losses([told_by(ROW, range(3))], 9, console)
    assert "scripts/torture --only sample-three --attempt 2 --seed 9" in out.getvalue()
    (row,) = [line for line in out.getvalue().splitlines() if "three ways" in line]
    assert row.replace("│", " ").split()[2:7] == ["sample-three", "7", "1", "5", "1"]


def test_an_attempt_draws_the_same_from_the_same_seed_and_number():
    """And something else from any other."""
    assert draws(1, "a", 2).random() == draws(1, "a", 2).random()
    assert len({draws(seed, key, n).random() for seed in (1, 2) for key in "ab" for n in (1, 2)}) == 8


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    module = ModuleType("sample_family")

    @contextmanager
    def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
        yield [ROW, Row("sample-other", "another", 1, 1, lambda number: os.write(1, b"chatter") and "survived")]

    module.rows = rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quick"], {"sample-three": 6, "sample-other": 1}),
        (["--full"], {"sample-three": 6, "sample-other": 1}),
        (["--only", "sample-o"], {"sample-other": 1}),
        (["--only", "sample-three", "--attempt", "1"], {"sample-three": 1}),
        (["--list"], {"sample-three": 0, "sample-other": 0}),
    ],
)
def test_a_family_runs_what_was_asked_for(
    family: str, arguments: list[str], expected: dict[str, int], capfd: pytest.CaptureFixture[str]
):
    """It tells of it in lines of JSON, whatever else is printed."""
    standard_output = os.dup(1)
    try:
        assert campaign.run_family(family, campaign._parse(arguments)) == 0
    finally:
        os.dup2(standard_output, 1)
        os.close(standard_output)
    tried = Counter[str]()
    for line in capfd.readouterr().out.splitlines():
        message = json.loads(line)
        tried[message["key"]] += sum(message.get("tally", {}).values())
    assert dict(tried) == expected


def test_every_family_is_there():
    """As a module with `rows`; the table of `scripts/torture` is made of all of them."""
    for family in campaign.FAMILIES:
        source = (Path(campaign.__file__).parent / f"{family}.py").read_text()
        assert "\ndef rows(" in source, family


WAITING = """
import signal, sys, types
from contextlib import contextmanager
from scripts.campaign import __main__ as campaign
from scripts.campaign.row import Row

@contextmanager
def rows(scratch, seed):
    def wait(number):
        print(scratch, file=sys.stderr, flush=True)
        signal.pause()
    yield [Row("sample", "waits", 1, 1, wait)]

sys.modules["scripts.campaign.sample"] = types.SimpleNamespace(rows=rows)
campaign.main(["--family", "sample"])
"""
STARTS_IT = """
import subprocess, sys
from scripts.campaign import __main__ as campaign

subprocess.run(campaign._ending_with_us([sys.executable, "-c", sys.argv[1]]))
"""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="nothing else tells a process that its parent is gone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_family_ends_with_the_command_and_leaves_no_folder(number: signal.Signals):
    """However the command ends."""
    command = [sys.executable, "-c", STARTS_IT, WAITING]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stderr is not None
        scratch = Path(process.stderr.readline().strip())
        assert scratch.is_dir()
        process.send_signal(number)
        process.stderr.read()  # until the family is gone, too
    assert not scratch.exists()
