"""What was saved under one way to divide training among ranks is restored under every other one, as a table.

A row is the layout that saved, a column the one that restored, "<kind>@<ranks>"; the table is printed at the end. By
default one diagonal of it runs, with 8 ranks nothing; -m slow has the rest.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.crew import Crew
from tests.parallel_runs import Saved, resume, run_and_save, together

SAVED = [
    "whole", "ddp@2", "ddp@3", "fsdp1@2", "fsdp1@4", "fsdp@2", "fsdp@3", "fsdp@4", "hsdp@4", "tp@3", "fsdp+tp@4",
    "ep@4", "experts@3", "fsdp+ep@4", "pp@2", "looped@3", "pp+fsdp@4",
    "fsdp@8", "hsdp@8", "fsdp+tp@8", "ep@8", "pp+fsdp@8",
]  # fmt: skip
"""whole: a process without any process group. ep: the experts are rows of a DTensor. experts: modules of single ranks.
looped: a pipeline whose ranks have every n-th stage."""
RESTORED = [*SAVED, "meta@3"]
"""meta: FSDP2 on a model made on the meta device."""
TOLERANCE = 1e-5  # of a loss; 6e-7 was seen
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Layouts:
    """Runs a function of parallel_runs.py on the ranks of a layout, and keeps what was saved."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.crews: dict[int, Crew] = {}
        self._saved: dict[str, list[Saved]] = {}

    def run(self, body: Any, layout: str, *args: Any) -> list[Any]:
        """What each rank returned."""
        if layout == "whole":
            return [body(None, layout, *args)]
        num_ranks = num_ranks_of(layout)
        return self.crews.setdefault(num_ranks, Crew(num_ranks)).run(body, layout, *args)

    def path(self, layout: str) -> str:
        return str(self.folder / layout)

    def saved(self, layout: str) -> list[Saved]:
        if layout not in self._saved:
            self._saved[layout] = self.run(run_and_save, layout, self.path(layout))
        return self._saved[layout]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layouts]:
    made = Layouts(tmp_path_factory.mktemp("layouts"))
    yield made
    for crew in made.crews.values():
        crew.__exit__(None, None, None)


def num_ranks_of(layout: str) -> int:
    return int(layout.partition("@")[2] or 1)


def sums_of(layout: str) -> str:
    """Layouts of which this is the same add up the same numbers in the same order, so that they agree in every bit.

    All ranks are given the same batch. To average the gradients of 2^n equal replicas loses no bit, of 3 it does. A
    pipeline adds up nothing that one process does not. Tensor and expert parallelism divide sums among ranks.
    """
    kind, num_ranks = layout.partition("@")[0], num_ranks_of(layout)
    if kind in ("pp", "looped", "pp+fsdp"):
        return "whole"
    if kind in ("whole", "ddp", "fsdp1", "fsdp", "hsdp", "meta"):
        return "whole" if num_ranks != 3 else layout.replace("meta", "fsdp")
    return layout


def loss_of(ranks: list[Any]) -> list[float]:
    """Of each step after the checkpoint, from a rank that knows it."""
    return next(one.after.losses for one in ranks if None not in one.after.losses)


def cell(save: str, restore: str) -> Any:
    """Into itself, into the next one, and into one process by default; the rest is slow."""
    small = [layout for layout in RESTORED if num_ranks_of(layout) <= 4]
    following = dict(zip(small, [*small[1:], small[0]], strict=True))
    on_diagonal = save in small and restore in (save, following[save], "whole")
    return pytest.param(save, restore, id=f"{save} -> {restore}", marks=() if on_diagonal else pytest.mark.slow)


@pytest.mark.parametrize(("save", "restore"), [cell(save, restore) for save in SAVED for restore in RESTORED])
def test_what_one_layout_saved_another_restores(
    layouts: Layouts, table: Table, record_property: Any, save: str, restore: str
) -> None:
    """Model, optimizers and scheduler in every bit; then the next steps, bitwise where the sums are the same."""
    saved = layouts.saved(save)
    resumed = layouts.run(resume, restore, layouts.path(save))
    expected, found = together([one.state for one in saved]), together([one.state for one in resumed])
    assert [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)] == []
    assert loss_of(resumed) == pytest.approx(loss_of(saved), rel=TOLERANCE)
    if sums_of(save) == sums_of(restore):
        record_property("mark", "=")
        assert loss_of(resumed) == loss_of(saved)
        assert together([one.end for one in resumed]) == together([one.end for one in saved])
    for rank, one in enumerate(resumed):
        assert len(one.warned) == (rank >= len(saved) or (rank == 0 and len(resumed) < len(saved)))
        if save == restore:
            assert one.after.drawn == saved[rank].after.drawn


# -- the table


class Table:
    """A pytest plugin that gathers the outcomes of the cells and prints them last."""

    def __init__(self) -> None:
        self.marks: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, _, cell = report.nodeid.removesuffix("]").partition("[")
        if not name.endswith(test_what_one_layout_saved_another_restores.__name__):
            return
        save, _, restore = cell.partition(" -> ")
        if report.failed:
            self.marks[save, restore] = "F"
        elif report.when == "call":
            self.marks[save, restore] = dict(report.user_properties).get("mark", "~")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("save layout (rows) x restore layout (columns)")
        for line in self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> list[str]:
        numbers = {layout: number for number, layout in enumerate(RESTORED, 1)}
        lines = [" " * 14 + "".join(f"{number:3}" for number in numbers.values())]
        for layout, number in numbers.items():
            marks = "".join(f"{self.marks.get((layout, restore), '.'):>3}" for restore in RESTORED)
            lines.append(f"{number:2} {layout:11}" + (marks if layout in SAVED else " is restored only"))
        return [
            *lines,
            "=  every bit restored, and the next steps the same in every bit",
            f"~  every bit restored; another order of sums: the losses of the next steps within {TOLERANCE:g}",
            "F  failed      .  not run",
        ]


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Table:
    plugin = Table()
    pytestconfig.pluginmanager.register(plugin)
    return plugin
