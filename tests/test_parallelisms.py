"""What was saved under one way to divide training among ranks is restored under every other one, as a table.

A row is the layout that saved, a column the one that restored, "<kind>@<ranks>"; the table is printed at the end. By
default one diagonal of it runs, on up to four ranks, with -m slow all of it.
"""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from torch.distributed.checkpoint.state_dict import StateDictOptions

from tests.crew import Crew
from tests.parallel_runs import Saved, resume, resume_plain, run_and_save, run_and_save_plain
from tests.pieces import together

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

    All ranks are given the same batch. The average over 2 or 4 replicas, or 2 x 4, is then the gradient of one process;
    over 3 or 8 the sums on the way round (seen with gloo, torch 2.13). A pipeline adds up nothing that one process does
    not. Tensor and expert parallelism divide sums among ranks.
    """
    kind, num_ranks = layout.partition("@")[0].replace("meta", "fsdp"), num_ranks_of(layout)
    if kind in ("whole", "hsdp", "pp", "looped", "pp+fsdp"):
        return "whole"
    if kind in ("ddp", "fsdp1", "fsdp") and num_ranks in (2, 4):
        return "whole"
    return f"{kind}@{num_ranks}"


def loss_of(ranks: list[Any]) -> list[float]:
    """Of each step after the checkpoint, from a rank that knows it."""
    return next(one.after.losses for one in ranks if None not in one.after.losses)


def cells(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    return [pytest.param(save, restore, id=f"{save} -> {restore}") for save, restore in pairs]


SMALL = [layout for layout in RESTORED if num_ranks_of(layout) <= 4]
DIAGONAL = dict.fromkeys(
    (save, restore) for save, following in itertools.pairwise(SMALL) for restore in (save, following, "whole")
)
"""Each layout into itself, into the next one, and into one process."""


@pytest.mark.parametrize(("save", "restore"), cells(DIAGONAL))
def test_what_a_layout_saved_the_next_one_restores(
    layouts: Layouts, table: Table, record_property: Any, save: str, restore: str
) -> None:
    """The diagonal."""
    record_property("mark", restored(layouts, save, restore))


@pytest.mark.slow
@pytest.mark.parametrize(("save", "restore"), cells(itertools.product(SAVED, RESTORED)))
def test_what_any_layout_saved_any_other_restores(
    layouts: Layouts, table: Table, record_property: Any, save: str, restore: str
) -> None:
    """All of the table."""
    record_property("mark", restored(layouts, save, restore))


def restored(layouts: Layouts, save: str, restore: str) -> str:
    """The cell's mark. Model, optimizers and schedulers are the same in every bit; then the next steps, bitwise where
    the sums are the same."""
    saved = layouts.saved(save)
    resumed = layouts.run(resume, restore, layouts.path(save))
    expected, found = state_of(saved), state_of(resumed)
    assert [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)] == []
    for rank, one in enumerate(resumed):
        assert len(one.warned) == (rank >= len(saved) or (rank == 0 and len(resumed) < len(saved)))
        if save == restore:
            assert one.after.drawn == saved[rank].after.drawn
    if sums_of(save) != sums_of(restore):
        assert loss_of(resumed) == pytest.approx(loss_of(saved), rel=TOLERANCE)
        return "~"
    assert loss_of(resumed) == loss_of(saved)
    assert together([one.end for one in resumed]) == together([one.end for one in saved])
    return "="


# -- StateDictOptions

FULL_ON_0 = StateDictOptions(full_state_dict=True, cpu_offload=True)
OPTIONS = {
    "full on rank 0": FULL_ON_0,
    "full": StateDictOptions(full_state_dict=True),
    "offloaded": StateDictOptions(cpu_offload=True),
    "broadcast": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "not strict": StateDictOptions(strict=False),
}


def state_of(ranks: list[Any]) -> dict[str, Any]:
    return together([one.state for one in ranks])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if OPTIONS[name] is FULL_ON_0 else pytest.mark.slow) for name in OPTIONS]
)
def test_what_is_saved_with_options_is_restored_with_others(layouts: Layouts, name: str) -> None:
    """Under FSDP2: the options say how the state passes through DCP, not what is in the checkpoint."""
    path = layouts.path(name)
    saved = layouts.run(run_and_save, "fsdp@2", path, OPTIONS[name])
    for options in (OPTIONS[name], None):
        resumed = layouts.run(resume, "fsdp@2", path, options)
        assert state_of(resumed) == state_of(saved)
        assert loss_of(resumed) == loss_of(saved)
    plain = layouts.saved("fsdp@2")
    resumed = layouts.run(resume, "fsdp@2", layouts.path("fsdp@2"), OPTIONS[name])
    assert state_of(resumed) == state_of(plain)
    assert loss_of(resumed) == loss_of(plain)


@pytest.mark.slow
def test_frozen_parameters_may_be_left_out(layouts: Layouts) -> None:
    """Of the model; what the optimizer has is restored."""
    options = StateDictOptions(ignore_frozen_params=True)
    saved = layouts.run(run_and_save, "fsdp@2", layouts.path("frozen"), options)
    assert "model.frozen.weight" not in state_of(saved)
    assert "adam.param_groups.frozen.weight.lr" in state_of(saved)
    assert state_of(layouts.run(resume, "fsdp@2", layouts.path("frozen"), options)) == state_of(saved)


# -- without a TrainState, and without options


@pytest.mark.parametrize("restore", ["fsdp@3", "whole", pytest.param("fsdp@2", marks=pytest.mark.slow), "meta@3"])
def test_a_plain_dict_of_dtensors_is_restored_on_other_ranks(layouts: Layouts, restore: str) -> None:
    """model.state_dict() and optimizers as they are, of FSDP2 on four ranks."""
    saved = layouts.run(run_and_save_plain, "fsdp@4", layouts.path("plain"))
    resumed = layouts.run(resume_plain, restore, layouts.path("plain"))
    assert state_of(resumed) == state_of(saved)
    assert loss_of(resumed) == pytest.approx(loss_of(saved), rel=TOLERANCE)


@pytest.mark.parametrize("save", ["experts@3", "pp@2"])
def test_ranks_with_parameters_of_their_own_come_back_from_a_nested_checkpoint(layouts: Layouts, save: str) -> None:
    """Without the option for flat optimizer state, groups are the same few keys on all ranks, one rank's in the end.
    A rank that shares no parameter with that one goes by the number of the group, and says so."""
    path, nested = layouts.path(f"{save} nested"), StateDictOptions()
    saved = layouts.run(run_and_save, save, path, nested)
    for restore in (save, "whole"):
        resumed = layouts.run(resume, restore, path, nested)
        assert state_of(resumed) == state_of(saved)
        said = [[text for text in one.warned if "which parameter group" in text] for one in resumed]
        assert [bool(texts) for texts in said] == [save == restore == "pp@2" and rank == 1 for rank in range(len(said))]


# -- the table


class Table:
    """A pytest plugin that gathers the outcomes of the cells and prints them last."""

    def __init__(self) -> None:
        self.marks: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        save, arrow, restore = report.nodeid.removesuffix("]").rpartition("[")[2].partition(" -> ")
        if not arrow or __name__.rpartition(".")[2] not in report.nodeid:
            return
        if report.failed:
            self.marks[save, restore] = "F"
        elif report.when == "call":
            self.marks[save, restore] = dict(report.user_properties)["mark"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("save layout (rows) x restore layout (columns)")
        for line in self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> list[str]:
        met = {layout for pair in self.marks for layout in pair}
        numbers = {layout: number for number, layout in enumerate(RESTORED, 1) if layout in met}
        lines = [" " * 14 + "".join(f"{number:3}" for number in numbers.values())]
        for layout, number in numbers.items():
            marks = "".join(f"{self.marks.get((layout, restore), '.'):>3}" for restore in numbers)
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
