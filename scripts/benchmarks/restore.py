"""Restores from a folder into live tensors, in place: files in the page cache, and files that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import raw
from .contenders import DCP_LOAD, RESTORERS, Restorer, Training
from .frame import LIMIT, Bench, Outcome, Round, Rounds, ratio_row, timed

COLD_PEERS = (DCP_LOAD, "torch.load, mmap")


def run(bench: Bench) -> Outcome:
    training = Training(bench.scale.num_bytes)
    warm = _rounds(bench, training, "warm", lambda path: None, list(RESTORERS))
    cold = _rounds(bench, training, "cold", raw.drop_from_cache, ["restore", *COLD_PEERS])
    rows = [
        ratio_row(
            "restore", "restore from a folder, warm cache, verified", warm, "restore", warm.best(LIMIT, "time"), 1.4
        ),
        ratio_row("restore", "the same, into a TrainState", warm, "restore, TrainState", warm.best(LIMIT, "time"), 1.4),
        ratio_row(
            "restore", "restore from a folder, warm, against dcp.load", warm, DCP_LOAD, "restore", 3.0, bound=">="
        ),
        ratio_row(
            "restore", "restore from a folder, cold cache, verified", cold, "restore", cold.best(LIMIT, "time"), 1.1
        ),
    ]
    tables = {"warm cache; ours verify, peers do not": (warm, "time"), "cold cache": (cold, "time")}
    return Outcome(rows, tables, errors=warm.errors | {f"{name} (cold)": why for name, why in cold.errors.items()})


def _rounds(bench: Bench, training: Training, title: str, before: Callable[[Path], None], names: list[str]) -> Rounds:
    memory = raw.scratch(training.num_bytes)

    @contextmanager
    def rounds_of(name: str, restorer: Restorer) -> Iterator[Round]:
        folder = bench.folder_of(f"{title} {name}")
        with restorer(folder, training) as restore:

            def one_round(_: int) -> dict[str, float]:
                before(folder)
                return {"time": timed(restore)}

            yield one_round

    restorers = {name: (RESTORERS[name][0], partial(rounds_of, name, RESTORERS[name][1])) for name in names}
    return bench.take_turns({**raw.readers(memory, bench.folder / f"raw {title}", before), **restorers})
