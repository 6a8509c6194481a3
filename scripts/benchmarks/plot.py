"""Pictures of a run: bars of ratios to the limit, how the goals are met, and how costs grow. Made from its document."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from .frame import LIMIT, OURS, PEER

COLOURS = {LIMIT: "#8a8f98", OURS: "#1565c0", PEER: "#d9a05b"}
WIDTH, BAR = 9.0, 0.34  # inches


def draw(run: Mapping[str, Any], folder: Path) -> list[Path]:
    """One picture per suite with contenders, one of all goals, one of the curves; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, table in enumerate(run["tables"]):
        if all(one["over_limit"] for one in table["contenders"]) and len(table["contenders"]) > 1:
            name = re.sub(r"\W+", "-", f"{number} {table['suite']} {table['title']}")[:60].strip("-")
            found.append(_bars(table, folder / f"{name}.png"))
    goals = [row for row in run["rows"] if row["figure"] and row["goal"]]
    if goals:
        found.append(_goals(goals, folder / "goals.png"))
    curves = [curve for curve in run["curves"] if curve["series"]]
    if curves:
        found.append(_curves(curves, folder / "growth.png"))
    return found


def _bars(table: Mapping[str, Any], path: Path) -> Path:
    """How many times the limit each contender takes; a line from the least to the most of its rounds."""
    rows = sorted(table["contenders"], key=lambda one: one["over_limit"][0], reverse=True)
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + BAR * len(rows)), layout="constrained")
    for place, one in enumerate(rows):
        median, low, high = one["over_limit"]
        axes.barh(place, median, color=COLOURS[one["kind"]], height=0.7)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        axes.annotate(f" {median:.3g}", (max(median, high), place), va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [one["name"] for one in rows], fontsize=9)
    if max(one["over_limit"][0] for one in rows) > 8:
        axes.set_xscale("log")
    axes.axvline(1, color=COLOURS[LIMIT], linewidth=1, linestyle="--")
    axes.margins(x=0.12)
    axes.set_xlabel("times the limit (less is better)")
    axes.set_title(f"{table['suite']}: {table['title']}", loc="left", fontsize=11)
    return _saved(figure, axes, path)


def _goals(rows: list[Mapping[str, Any]], path: Path) -> Path:
    """How far each figure is on the good side of its goal: to the right of 1."""
    figure, axes = plt.subplots(figsize=(WIDTH, 1.2 + BAR * len(rows)), layout="constrained")
    rows = rows[::-1]
    for place, row in enumerate(rows):
        value = max(row["figure"][0], 0.01 * abs(row["goal"]))  # nothing at all would be infinitely good
        ratio = value / row["goal"] if row["bound"] == ">=" else row["goal"] / value
        colour = "#2e7d32" if row["is_met"] else "#c62828"
        axes.plot([1, ratio], [place, place], color=colour, linewidth=7, solid_capstyle="butt")
        said = f"  {row['figure'][0]:.3g} ({row['bound']} {row['goal']:.3g})".replace("<=", "≤").replace(">=", "≥")
        axes.annotate(said, (max(1, ratio), place), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel("times better than the goal (green: met)")
    return _saved(figure, axes, path)


def _curves(curves: list[Mapping[str, Any]], path: Path) -> Path:
    figure, grid = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.6), layout="constrained", squeeze=False)
    for axes, curve in zip(grid[0], curves, strict=True):
        for name, points in curve["series"].items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set_xscale("log")
        if curve["y"].startswith("us"):
            axes.set_yscale("log")
            axes.set_yticks(ticks := (10, 20, 50, 100, 200, 500, 1000), [str(tick) for tick in ticks])
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        longest = max(curve["series"].values(), key=len)
        counts = [count for count, _ in longest]
        axes.set_xticks(counts, [f"{count:,.0f}" for count in counts], fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(curve["x"])
        axes.set_ylabel(curve["y"])
        axes.set_title(curve["title"], loc="left", fontsize=10)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _saved(figure: Any, axes: Axes, path: Path) -> Path:
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
