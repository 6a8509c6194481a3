"""Host memory: the peak of a process that saves in the background, over the same process idle; and whether it leaks.

Each contender is a process of its own (this file, run as a module): some saves of all bytes, whose peak counts, and
many of few bytes, whose growth does.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from .contenders import (
    BLOCKING,
    Save,
    Saver,
    Training,
    asyncckpt_async,
    dcp_async_save,
    delete,
    plain_dict,
    train_state,
)
from .frame import FAILURES, FULL, MIB, Bench, Outcome, Row, Spread, not_measured, reason
from .process import PeakRss, give_back_free_memory, own_bytes

SPARE_MIB = 128
LEAK_BYTES, LEAK_TENSORS = 4 * MIB, 40  # small, so that hundreds of saves are quick
NUM_PEAK_SAVES = 4
SAVES_PER_SAMPLE = 4
NUM_STRETCHES = 10
OVERLAPPING = "save_async, OverlappingAsyncStager"
DCP = "dcp.async_save"


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    state_mib = bench.scale.num_bytes / MIB
    goal = state_mib * 1.05 + SPARE_MIB
    found = {}
    ours = [BLOCKING, OVERLAPPING]
    if bench.scale is not FULL:
        outcome.errors[f"{ours.pop()} (memory)"] = "only with --full"
    for name in (*ours, DCP):
        try:
            found[name] = _process(name, bench.scale.num_bytes, bench.scale.num_saves, bench.folder)
        except FAILURES as exc:
            outcome.errors[name] = reason(exc)
    peer = f"{DCP} {found[DCP]['peak_mib']:.0f} MiB" if DCP in found else ""
    for name in ours:
        titles = f"peak over the idle process, {name}", f"growth per save over {bench.scale.num_saves} saves, {name}"
        if name not in found:
            why = outcome.errors[name]
            outcome.rows += [not_measured("memory", titles[0], "MiB", goal, why)]
            outcome.rows += [not_measured("memory", titles[1], "KiB", None, why)]
            continue
        one = found[name]
        note = f"a state of {state_mib:.0f} MiB"
        outcome.rows.append(Row("memory", titles[0], Spread.of([one["peak_mib"]]), "MiB", goal, peer=peer, note=note))
        note = f"standard error {one['error_kib']:.3g}, of which the goal is 3"
        slope = Spread.of([one["slope_kib"]])
        outcome.rows.append(Row("memory", titles[1], slope, "KiB", max(3 * one["error_kib"], 0.01), note=note))
    return outcome


def _process(name: str, num_bytes: int, num_saves: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "scripts.benchmarks.memory", name, str(num_bytes), str(num_saves), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


# -- the process


def _saver(name: str, **options: Any) -> Saver:
    from stagers import BlockingAsyncStager, OverlappingAsyncStager

    if name == BLOCKING:
        return partial(asyncckpt_async, stager=BlockingAsyncStager, make_state=plain_dict, **options)
    if name == OVERLAPPING:
        return partial(asyncckpt_async, stager=OverlappingAsyncStager, make_state=train_state, **options)
    return dcp_async_save


def _peak_mib(save: Save, training: Training, folder: Path) -> float:
    """Over the idle process, which has its state and all imports."""
    peak = PeakRss()
    for number in range(NUM_PEAK_SAVES):
        _save(save, training, number)
        delete(folder / str(number))
    return peak.extra_mib()


def _growth_kib(save: Save, training: Training, num_saves: int) -> tuple[float, float]:
    """(per save, its standard error), after half as many that fill pools, caches and malloc's arenas.

    What malloc keeps for later is not counted, nor what waits for the garbage collector: each `torch.save` leaves a
    class in a cycle, and in a process of 300,000 objects the oldest generation is looked at once in thousands of saves.
    Nothing else of a save does.
    """
    for number in range(num_saves // 2):
        _save(save, training, number)
    gc.collect()
    gc.freeze()  # else each collection would look at all that torch has imported
    sizes = []
    for number in range(num_saves // 2, num_saves // 2 + num_saves):
        _save(save, training, number)
        if number % SAVES_PER_SAMPLE == 0:
            give_back_free_memory()
            sizes.append(own_bytes() / 1024 / SAVES_PER_SAMPLE)
    return growth_of(sizes)


def _save(save: Save, training: Training, number: int) -> None:
    pending = save(number)
    training.forward_backward()
    pending.before_update()
    training.optimizer.step()
    pending.join()


def growth_of(values: Sequence[float]) -> tuple[float, float]:
    """(growth per value, its standard error), by the medians of ten stretches.

    Memory grows by pages, now and then: neighbours are not independent, and a line fitted through all of them would
    come with an error some times too small.
    """
    length = len(values) // NUM_STRETCHES
    if not length:
        return 0.0, 0.0
    levels = [statistics.median(values[at : at + length]) for at in range(0, NUM_STRETCHES * length, length)]
    steps = [(after - before) / length for before, after in pairwise(levels)]
    return statistics.mean(steps), statistics.stdev(steps) / len(steps) ** 0.5


def main() -> None:
    name, num_bytes, num_saves, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    training, small = Training(num_bytes), Training(LEAK_BYTES, LEAK_TENSORS)
    for one in (training, small):
        one.forward_backward()
        one.optimizer.step()
    with _saver(name)(folder / "peak", training) as save:
        found = {"peak_mib": _peak_mib(save, training, folder / "peak")}
    if name != DCP:
        with _saver(name, max_to_keep=2)(folder / "growth", small) as save:  # a step that is kept is known of: 1 KiB
            found["slope_kib"], found["error_kib"] = _growth_kib(save, small, num_saves)
    print(json.dumps(found))
    for path in (folder / "peak", folder / "growth"):
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
