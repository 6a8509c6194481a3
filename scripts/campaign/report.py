"""The table of a campaign: what was tried, and what became of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass
class Line:
    """One row of the table. lost: what happened, by the number of the attempt; None: the whole family ended."""

    key: str
    what: str
    tally: Counter[str] = field(default_factory=Counter)
    lost: dict[int | None, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        return sum(self.tally.values()) + len(self.lost)

    def as_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "what": self.what,
            "tried": self.tried,
            "survived": self.tally["survived"],
            "detected": self.tally["detected"],
            "lost": len(self.lost),
            "seconds": round(self.seconds, 1),
        }


def print_table(lines: list[Line], seed: int, console: Console) -> None:
    table = Table(title=f"seed {seed}", title_justify="left")
    for heading in ("fault", "key"):
        table.add_column(heading)
    for heading in ("tried", "survived", "detected", "lost", "seconds"):
        table.add_column(heading, justify="right")
    numbers = ("tried", "survived", "detected", "lost", "seconds")
    totals = Counter[str]()
    for line in lines:
        row = line.as_json()
        totals.update({name: row[name] for name in numbers})
        shown = [f"{row[name]:,}" if name != "seconds" else f"{row[name]:.0f}" for name in numbers]
        table.add_row(line.what, line.key, *shown, style="bold red" if line.lost else "")
    table.add_section()
    table.add_row("all", "", *(f"{totals[name]:,}" for name in numbers[:-1]), f"{totals['seconds']:.0f}")
    console.print(table)


def print_losses(lines: list[Line], seed: int, console: Console) -> None:
    """What was lost, and how to see it again."""
    for line in lines:
        for number, what in list(line.lost.items())[:5]:
            again = "" if number is None else f" --attempt {number}"
            console.print(f"\nLOST: scripts/torture --only {line.key}{again} --seed {seed}", style="bold red")
            console.print(what, markup=False, highlight=False, soft_wrap=True)
