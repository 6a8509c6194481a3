"""scripts/bench: what its figures are made of, README's section, and, marked slow, all suites with next to no bytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from scripts.benchmarks import report
from scripts.benchmarks.__main__ import SUITES
from scripts.benchmarks.frame import (
    LIMIT,
    OURS,
    PEER,
    QUICK,
    TINY,
    Bench,
    Contender,
    Outcome,
    Round,
    Row,
    Spread,
    ratio_row,
)
from scripts.benchmarks.memory import growth_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "bench_results.json"


def contender(kind: str, values: list[float], order: list[str] | None = None) -> Contender:
    """Gives one value a round, the warm-up's first; the number of values is that of the rounds."""

    @contextmanager
    def rounds() -> Iterator[Round]:
        def one_round(number: int) -> Mapping[str, float]:
            if order is not None:
                order.append(f"{kind} {number}")
            return {"time": values[number]}

        yield one_round

    return kind, rounds


def test_a_ratio_is_taken_within_each_round(tmp_path: Path):
    """The machine slows down by ten in the last round: both sides of the ratio do."""
    bench = Bench(QUICK, tmp_path)
    rounds = bench.take_turns(
        {"plain": contender(LIMIT, [9, 1, 1, 10]), "ours": contender(OURS, [9, 2, 3, 20])}, rounds=3
    )
    assert rounds.ratio("ours", "plain", "time") == Spread(2, 2, 3)


def test_contenders_take_turns_and_the_warm_up_is_dropped(tmp_path: Path):
    """Every other round in reverse."""
    order: list[str] = []
    found = Bench(QUICK, tmp_path).take_turns(
        {"a": contender(LIMIT, [7, 1, 2], order), "b": contender(OURS, [7, 3, 4], order)}, rounds=2
    )
    assert order == ["limit 0", "ours 0", "ours 1", "limit 1", "limit 2", "ours 2"]
    assert found.values == {"b": {"time": [3, 4]}, "a": {"time": [1, 2]}}


def test_a_contender_that_fails_is_named_with_its_error(tmp_path: Path):
    """At its start or in a later round; the others go on."""

    @contextmanager
    def absent() -> Iterator[Round]:
        raise ModuleNotFoundError("no such peer", name="peer")
        yield

    found = Bench(QUICK, tmp_path).take_turns(
        {"absent": (PEER, absent), "short": contender(PEER, [1, 1]), "ours": contender(OURS, [1, 1, 1])}, rounds=2
    )
    assert found.errors == {"absent": "peer is not installed", "short": "IndexError: list index out of range"}
    assert list(found.values) == ["ours"]
    row = ratio_row("save", "against absent", found, "absent", "ours", 2.0, bound=">=")
    assert (row.figure, row.is_met, row.note) == (None, None, "absent: peer is not installed")


@pytest.mark.parametrize(("bound", "goal", "is_met"), [("<=", 1.5, True), ("<=", 1.4, False), (">=", 1.5, True)])
def test_a_goal_is_met_by_the_median(bound: str, goal: float, is_met: bool):
    """Which way, the row says."""
    assert Row("save", "x", Spread(1.5, 1.0, 9.0), "x", goal, bound).is_met is is_met


def test_growth_comes_with_its_standard_error():
    """A straight line has none; a page leaked in four saves is found; one jump and noise are within three of them."""
    assert growth_of([2.0 * number for number in range(50)]) == (2.0, 0.0)
    for values, is_leak in [
        ([4.0 * (number // 4) for number in range(200)], True),
        ([64.0 * (number > 90) for number in range(200)], False),
        ([math.sin(number * 7) for number in range(200)], False),
    ]:
        growth, error = growth_of(values)
        assert (growth > 3 * error) == is_leak


def test_readme_has_what_its_results_make():
    """`scripts/bench --readme scripts/bench_results.json` changes nothing."""
    readme = (ROOT / "README.md").read_text()
    assert report.into_readme(readme, json.loads(RESULTS.read_text())) == readme


def test_a_run_survives_its_json(tmp_path: Path):
    """What is printed from the file is what was printed from the run."""
    rounds = Bench(QUICK, tmp_path).take_turns(
        {"plain": contender(LIMIT, [1.0] * 6), "ours": contender(OURS, [2.0] * 6), "peer": contender(PEER, [3.0] * 6)}
    )
    rows = [ratio_row("save", "ours", rounds, "ours", "plain", 1.1)]
    run = report.document("here", QUICK, {"save": Outcome(rows, {"title": (rounds, "time")})})
    assert report.text(json.loads(report.to_json(run))) == report.text(run)
    assert "| ours | 2x" in report.text(run)


@pytest.mark.slow
def test_every_suite_runs(tmp_path: Path):
    """End to end, with pictures; a peer may be missing, a row of ours may not."""
    command = [sys.executable, "-m", "scripts.benchmarks", "--tiny", "--json", tmp_path / "run.json"]
    subprocess.run([*command, "--plot", tmp_path / "plots", "--dir", tmp_path / "bench"], cwd=ROOT, check=True)
    run = json.loads((tmp_path / "run.json").read_text())
    assert list(dict.fromkeys(row["suite"] for row in run["rows"])) == list(SUITES)
    missing = {row["name"]: row["note"] for row in run["rows"] if not row["figure"]}
    assert set(missing) <= {"the same on a GPU", "restore from a folder, cold cache, verified"}  # a tmpfs is never cold
    assert run["scale"]["name"] == TINY.name
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"goals.png", "growth.png"}
