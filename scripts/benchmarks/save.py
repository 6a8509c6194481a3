"""Time from the call until a save is durable in a folder, nothing else running."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from . import raw
from .contenders import BLOCKING, DCP_SAVE, NO_FSYNC, SAVE, SAVERS, Save, Saver, Training, finish
from .frame import LIMIT, PEER, Bench, Outcome, Round, ratio_row


def run(bench: Bench) -> Outcome:
    training = Training(bench.scale.num_bytes)
    memory = raw.scratch(training.num_bytes)

    @contextmanager
    def rounds_of(name: str, saver: Saver) -> Iterator[Round]:
        folder = bench.folder_of(name)
        with saver(folder, training) as save:
            yield partial(_until_durable, save, folder)

    savers = {name: (kind, partial(rounds_of, name, saver)) for name, (kind, saver) in SAVERS.items()}
    rounds = bench.take_turns({**raw.writers(memory, bench.folder / "raw"), **savers})
    limit = rounds.best(LIMIT, "time")
    fsyncing = rounds.best(PEER, "time", among=lambda name: NO_FSYNC not in name)
    rows = [
        ratio_row("save", "save to a folder, durable", rounds, SAVE, limit, 1.15),
        ratio_row("save", "save_async and join, durable", rounds, BLOCKING, limit, 1.15),
        ratio_row("save", "save to a folder, against dcp.save", rounds, DCP_SAVE, SAVE, 2.0, bound=">="),
        ratio_row(
            "save", "save to a folder, against the fastest peer that fsyncs", rounds, fsyncing, SAVE, 1.6, bound=">="
        ),
    ]
    return Outcome(rows, {"from the call to durable": (rounds, "time")}, errors=rounds.errors)


def _until_durable(save: Save, folder: Path, number: int) -> Mapping[str, float]:
    started = time.perf_counter()
    pending = save(number)
    pending.join()
    seconds = time.perf_counter() - started
    finish(pending, folder / str(number))
    return {"time": seconds}
