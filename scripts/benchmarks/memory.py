"""Host memory: the peak of a process that saves in the background, over the same process idle; and whether it leaks.

Each contender is a process of its own (this file, run as a module): some saves of all bytes, whose peak counts, and
many of few bytes, whose growth does.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

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
from .process import PeakRss, pss_bytes

SPARE_MIB = 128
LEAK_BYTES = 8 * MIB  # small, so that two hundred saves are quick
NUM_PEAK_SAVES = 4
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


def _saver(name: str) -> Saver:
    from stagers import BlockingAsyncStager, OverlappingAsyncStager

    if name == BLOCKING:
        return partial(asyncckpt_async, stager=BlockingAsyncStager, make_state=plain_dict)
    if name == OVERLAPPING:
        return partial(asyncckpt_async, stager=OverlappingAsyncStager, make_state=train_state)
    return dcp_async_save


def _peak_mib(save: Save, training: Training, folder: Path) -> float:
    """Over the idle process, which has its state and all imports."""
    peak = PeakRss()
    for number in range(NUM_PEAK_SAVES):
        _save_and_delete(save, training, folder, number)
    return peak.extra_mib()


def _growth_kib(save: Save, training: Training, folder: Path, num_saves: int) -> tuple[float, float]:
    """(per save, its standard error)."""
    sizes = []
    for number in range(num_saves):
        _save_and_delete(save, training, folder, number)
        sizes.append(pss_bytes() / 1024)
    return slope_of(sizes[len(sizes) // 4 :])  # the first ones fill pools and caches


def _save_and_delete(save: Save, training: Training, folder: Path, number: int) -> None:
    pending = save(number)
    training.forward_backward()
    pending.before_update()
    training.optimizer.step()
    pending.join()
    delete(folder / str(number))


def slope_of(values: Sequence[float]) -> tuple[float, float]:
    """(growth per value, its standard error), by least squares."""
    if len(values) < 3:
        return 0.0, 0.0
    slope, start = statistics.linear_regression(range(len(values)), values)
    squares = sum((value - start - slope * number) ** 2 for number, value in enumerate(values))
    spread = sum((number - (len(values) - 1) / 2) ** 2 for number in range(len(values)))
    return slope, (squares / (len(values) - 2) / spread) ** 0.5


def main() -> None:
    name, num_bytes, num_saves, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    training, small = Training(num_bytes), Training(LEAK_BYTES)
    for one in (training, small):
        one.forward_backward()
        one.optimizer.step()
    with _saver(name)(folder / "peak", training) as save:
        found = {"peak_mib": _peak_mib(save, training, folder / "peak")}
    if name != DCP:
        with _saver(name)(folder / "growth", small) as save:
            found["slope_kib"], found["error_kib"] = _growth_kib(save, small, folder / "growth", num_saves)
    print(json.dumps(found))
    for path in (folder / "peak", folder / "growth"):
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
