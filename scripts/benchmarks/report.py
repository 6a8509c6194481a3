"""What a run says: tables for the terminal, a small JSON of medians, and README's section made from that JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .frame import LIMIT, OURS, PEER, Outcome, Rounds, Row, Scale, Spread

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
UNITS = {"us": "us per tensor", "wait": "ms"}
"""Of measures that are not in seconds."""
README_TABLES = ("stall", "save", "restore")
"""Suites whose contenders, those of the first table, stand in README below the goals."""


def machine(folder: Path) -> str:
    """One line that says where the figures come from."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    ram_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True).stdout.split()[-1]
    return (
        f"{cpu[1].strip() if cpu else 'unknown CPU'}, {os.cpu_count()} cores, {ram_gib:.0f} GiB RAM, {disk}, "
        f"torch {torch.__version__}, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f} at the start"
    )


# -- the run's document: what --json writes, and all that the tables below are made of


def document(where: str, scale: Scale, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        "machine": where,
        "command": "scripts/bench",
        "scale": asdict(scale),
        "rows": [_row(row) for outcome in outcomes.values() for row in outcome.rows],
        "tables": [
            {"suite": suite, "title": title, "measure": measure, "contenders": _contenders(rounds, measure)}
            for suite, outcome in outcomes.items()
            for title, (rounds, measure) in outcome.tables.items()
        ],
        "curves": [asdict(curve) for outcome in outcomes.values() for curve in outcome.curves],
        "errors": {name: why for outcome in outcomes.values() for name, why in outcome.errors.items()},
    }


def _row(row: Row) -> dict[str, Any]:
    figure = row.figure and _rounded(row.figure)
    goal = None if row.goal is None else float(f"{row.goal:.4g}")
    return asdict(row) | {"figure": figure, "goal": goal, "is_met": row.is_met}


def _contenders(rounds: Rounds, measure: str) -> list[dict[str, Any]]:
    limit, peer = rounds.best(LIMIT, measure), rounds.best(PEER, measure)
    found = []
    for name in (name for kind in (LIMIT, OURS, PEER) for name in rounds.kinds if rounds.kinds[name] == kind):
        if name not in rounds:
            continue
        over_limit, over_peer = rounds.ratio(name, limit, measure), rounds.ratio(name, peer, measure)
        found.append(
            {
                "name": name,
                "kind": rounds.kinds[name],
                "figure": _rounded(rounds.spread(name, measure)),
                "over_limit": over_limit and _rounded(over_limit),
                "over_peer": over_peer and _rounded(over_peer),
            }
        )
    return found


def _rounded(spread: Spread) -> list[float]:
    return [float(f"{value:.4g}") for value in (spread.median, spread.low, spread.high)]


def to_json(run: Mapping[str, Any]) -> str:
    """One line per row: small, and a diff of two runs can be read."""
    lines = []
    for name, value in run.items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(name)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def merged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Runs of different suites on one machine, as one."""
    run = dict(runs[0]) | {"commands": [command for one in runs for command in _commands(one)]}
    for other in runs[1:]:
        for name in ("rows", "tables", "curves"):
            run[name] = [*run[name], *other[name]]
        for name in ("errors", "others_busy_cores"):
            run[name] = run.get(name, {}) | other.get(name, {})
    return run


def _commands(run: Mapping[str, Any]) -> list[list[Any]]:
    """[command, sizes] of what was run."""
    found: list[list[Any]] = run.get("commands") or [[run["command"], run["scale"]]]
    return found


# -- tables


def text(run: Mapping[str, Any]) -> str:
    """All of a run, for a terminal."""
    parts = []
    for suite in dict.fromkeys(row["suite"] for row in run["rows"]):
        parts += [_contender_table(table) for table in run["tables"] if table["suite"] == suite]
    parts.append(goals_table(run["rows"], is_wide=True))
    parts.append(f"cores that all else on the machine kept busy: {_busy(run)}")
    parts += [f"did not run: {name}: {why}" for name, why in run["errors"].items()]
    return "\n\n".join(parts)


def _busy(run: Mapping[str, Any]) -> str:
    """More than some tenths of one make every ratio doubtful; see process.others_cpu_s."""
    return ", ".join(f"{suite} {cores:.2f}" for suite, cores in run.get("others_busy_cores", {}).items()) or "not known"


def goals_table(rows: Iterable[Mapping[str, Any]], *, is_wide: bool) -> str:
    """is_wide: with the seconds behind the figures, and notes."""
    table = [["", "measured", "goal", "met", *(["ours", "limit", "best peer", "note"] if is_wide else [])]]
    for row in rows:
        met = {None: "", True: "yes", False: "**no**"}[row["is_met"]]
        figure = f"{_spread(row['figure'])} {row['unit']}" if row["figure"] else f"not measured: {row['note']}"
        bound = row["bound"].replace("<=", "≤").replace(">=", "≥")
        goal = "" if row["goal"] is None else f"{bound} {row['goal']:.3g} {row['unit']}"
        cells = [row["name"], figure.replace(" x", "x"), goal.replace(" x", "x"), met]
        table.append([*cells, *((row[name] for name in ("ours", "limit", "peer", "note")) if is_wide else ())])
    return _markdown(table)


def _contender_table(table: Mapping[str, Any]) -> str:
    rows = [[table["title"], UNITS.get(table["measure"], "s"), "÷ limit", "÷ best peer"]]
    for one in table["contenders"]:
        name = f"**{one['name']}**" if one["kind"] == OURS else one["name"]
        ratios = [_spread(one[over]) if one[over] else "" for over in ("over_limit", "over_peer")]
        rows.append([name, _spread(one["figure"]), *ratios])
    return f"{table['suite']}:\n" + _markdown(rows)


def _spread(figure: Sequence[float]) -> str:
    median, low, high = (f"{value:.3g}" for value in figure)
    return median if low == high else f"{median} ({low} to {high})"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * max(3, width) for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() + " |" for row in rows
    )


# -- README


def readme_section(run: Mapping[str, Any]) -> str:
    """What stands between the two markers."""
    tables = {table["suite"]: table for table in reversed(run["tables"])}  # the first of each
    made_by = "; ".join(
        f"`{command}` ({scale['num_bytes'] / 1e6:.0f} MB of state, {scale['object_bytes'] / 1e6:.0f} MB on S3, "
        f"{scale['num_tensors']:,} small tensors)"
        for command, scale in _commands(run)
    )
    intro = (
        f"Made by {made_by} on {run['machine']}. Medians, and (least to most), of {run['scale']['rounds']} rounds in "
        "which every contender takes its turn; a ratio is taken within each round. Peers named "
        '"no fsync" return before their bytes are on the disk.'
    )
    details = [
        goals_table(run["rows"], is_wide=True),
        *(_contender_table(tables[suite]).partition("\n")[2] for suite in README_TABLES if suite in tables),
    ]
    if run["errors"]:
        details.append("Did not run: " + "; ".join(f"{name} ({why})" for name, why in run["errors"].items()) + ".")
    return "\n\n".join(
        [
            intro,
            f"Cores that all else on the machine kept busy: {_busy(run)}.",
            goals_table(run["rows"], is_wide=False),
            "<details><summary>The seconds behind it, limits and peers</summary>",
            *details,
            "</details>",
        ]
    )


def into_readme(readme: str, run: Mapping[str, Any]) -> str:
    """The README with its section made anew. ValueError without the markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no section between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{readme_section(run)}\n{END}{after}"
