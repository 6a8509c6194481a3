"""States of very many small tensors: microseconds per tensor, and how the index and the plan grow.

Saves are timed whole, the background with them, and so is their CPU time. Tensors are of 4 KB. Peers that take half a
millisecond on each tensor get fewer of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from stagers import BlockingAsyncStager

from .contenders import Ours, delete
from .frame import (
    FAILURES,
    FULL,
    MIB,
    OURS,
    PEER,
    Bench,
    Curve,
    Outcome,
    Round,
    Rounds,
    Row,
    Spread,
    not_measured,
    reason,
)

TENSOR_BYTES = 4096
PLANNED_TENSORS = 10_000
SAVE, RESTORE, FIRST = "save", "restore", "first save"
TORCH_SAVE, DCP_SAVE, DCP_LOAD = "torch.save", "dcp.save", "dcp.load"


def run(bench: Bench) -> Outcome:
    counts = [max(1, bench.scale.num_tensors // part) for part in (16, 4, 1)]
    largest = _rounds(bench, counts[-1], bench.scale.rounds)
    smaller = {count: _rounds(bench, count, 1) for count in counts[:-1]}
    outcome = Outcome(_rows(largest, counts[-1], min(counts[-1], bench.scale.peer_tensors)), errors=largest.errors)
    outcome.tables[f"{counts[-1]} tensors of 4 KB (DCP: {bench.scale.peer_tensors})"] = (largest, "us")
    outcome.curves.append(_curve(bench, {**smaller, counts[-1]: largest}))
    outcome.rows.append(_plan_row(bench))
    rows, curve = _index(bench)
    outcome.rows += rows
    outcome.curves.append(curve)
    return outcome


def _state(num_tensors: int) -> dict[str, torch.Tensor]:
    memory = torch.rand(num_tensors, TENSOR_BYTES // 4)
    return {f"layer.{number}.weight": memory[number].clone() for number in range(num_tensors)}


def _rounds(bench: Bench, num_tensors: int, rounds: int) -> Rounds:
    state, fewer = _state(num_tensors), _state(min(num_tensors, bench.scale.peer_tensors))

    @contextmanager
    def steady() -> Iterator[Round]:
        folder = bench.folder_of(f"steady {num_tensors}")
        with Ours(str(folder), max_to_keep=1) as ours:
            ours.manager.save(0, state)
            yield lambda number: _per_tensor(lambda: ours.manager.save(number + 1, state), num_tensors)
        delete(folder)

    @contextmanager
    def first() -> Iterator[Round]:
        def one_round(_: int) -> Mapping[str, float]:
            folder = bench.folder_of(f"first {num_tensors}")
            with Ours(str(folder)) as ours:
                ours.manager.prewarm(state)
                found = _per_tensor(lambda: ours.manager.save(0, state), num_tensors)
            delete(folder)
            return found

        yield one_round

    @contextmanager
    def restore() -> Iterator[Round]:
        folder = bench.folder_of(f"restore {num_tensors}")
        with Ours(str(folder)) as ours:
            ours.manager.save(0, state)
            yield lambda _: _per_tensor(lambda: ours.manager.restore(0, state), num_tensors)
        delete(folder)

    @contextmanager
    def peer(save: Callable[[Any], Any], timed: Callable[[Any], Any], count: int, name: str) -> Iterator[Round]:
        path = bench.folder_of(f"{name} {num_tensors}")
        save(path)
        yield lambda _: _per_tensor(lambda: timed(path), count)
        delete(path)

    def dcp_save(path: Any) -> None:
        dcp.save(dict(fewer), checkpoint_id=path)

    def dcp_load(path: Any) -> None:
        dcp.load(dict(fewer), checkpoint_id=path)

    def torch_save(path: Any) -> None:
        torch.save(state, path)

    return bench.take_turns(
        {
            SAVE: (OURS, steady),
            FIRST: (OURS, first),
            RESTORE: (OURS, restore),
            TORCH_SAVE: (PEER, partial(peer, torch_save, torch_save, num_tensors, "torch")),
            DCP_SAVE: (PEER, partial(peer, dcp_save, dcp_save, len(fewer), "dcp")),
            DCP_LOAD: (PEER, partial(peer, dcp_save, dcp_load, len(fewer), "dcp-load")),
        },
        rounds=rounds,
    )


def _per_tensor(work: Callable[[], Any], num_tensors: int) -> Mapping[str, float]:
    """us: microseconds; cpu_us: of all threads."""
    started, cpu_started = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    return {"us": seconds * 1e6 / num_tensors, "cpu_us": cpu_s * 1e6 / num_tensors}


def _rows(rounds: Rounds, num_tensors: int, num_peer_tensors: int) -> list[Row]:
    rows = []
    for name, peer, goal in ((SAVE, DCP_SAVE, 20.0), (RESTORE, DCP_LOAD, 20.0), (FIRST, DCP_SAVE, 100.0)):
        title = f"{name}, {num_tensors} tensors of 4 KB"
        if name not in rounds:
            rows.append(not_measured("tensors", title, "us per tensor", goal, rounds.why_not(name)))
            continue
        said = f"{rounds.said(peer, 'us', 'us per tensor')} of {num_peer_tensors}" if peer in rounds else ""
        note = f"{rounds.spread(name, 'cpu_us').median:.3g} us of CPU"
        rows.append(Row("tensors", title, rounds.spread(name, "us"), "us per tensor", goal, peer=said, note=note))
    return rows


def _curve(bench: Bench, found: Mapping[int, Rounds]) -> Curve:
    names = (SAVE, RESTORE, FIRST, TORCH_SAVE, DCP_SAVE, DCP_LOAD)
    capped = {DCP_SAVE, DCP_LOAD}
    series = {}
    for name in names:
        points = {
            min(count, bench.scale.peer_tensors) if name in capped else count: rounds.spread(name, "us").median
            for count, rounds in found.items()
            if name in rounds
        }
        series[name] = sorted(points.items())
    return Curve("many tensors of 4 KB", "tensors", "us per tensor", series)


# -- the plan


class _TimedStager(BlockingAsyncStager):
    """Keeps the seconds of its last copy."""

    seconds = 0.0

    def snapshot(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = super().snapshot(*args, **kwargs)
        self.seconds = time.perf_counter() - started
        return found


def _plan_row(bench: Bench) -> Row:
    """All that `save_async` does on the training thread but the copy: the plan is a part of it, so this is stricter."""
    num_tensors = min(PLANNED_TENSORS, bench.scale.num_tensors)
    name, goal = "save_async less the copy, 10,000 tensors, plan unchanged", 10.0
    state, stager = _state(num_tensors), _TimedStager()
    values = []
    try:
        folder = bench.folder_of("plan")
        with Ours(str(folder), stager=stager, max_to_keep=1) as ours:
            for number in range(bench.scale.rounds + 2):
                started = time.perf_counter()
                pending = ours.save_async(number, state)
                values.append((time.perf_counter() - started - stager.seconds) * 1e3 * PLANNED_TENSORS / num_tensors)
                pending.join()
    except FAILURES as exc:
        return not_measured("tensors", name, "ms", goal, reason(exc))
    note = "" if num_tensors == PLANNED_TENSORS else f"scaled up from {num_tensors}"
    return Row("tensors", name, Spread.of(values[2:]), "ms", goal, note=note)


# -- the index


def _index(bench: Bench) -> tuple[list[Row], Curve]:
    """In a process of its own, whose peak memory is that of the index alone."""
    parts = (4, 2, 1) if bench.scale is FULL else (1,)
    counts = [max(1, bench.scale.num_chunks // part) for part in parts]
    measures = {
        "write_s": ("written in", "s", 3.0),
        "open_s": ("opened in", "s", 3.0),
        "peak_mib": ("memory", "MiB", 10**9 / MIB),
    }
    names = {measure: f"index of 1,000,000 chunks, {said[0]}" for measure, said in measures.items()}
    series: dict[str, list[tuple[float, float]]] = {"write": [], "open": []}
    try:
        for count in counts:
            found = _index_process(bench.folder / str(count), count)
            series["write"].append((count, found["write_s"]))
            series["open"].append((count, found["open_s"]))
    except FAILURES as exc:
        rows = [not_measured("tensors", names[m], unit, goal, reason(exc)) for m, (_, unit, goal) in measures.items()]
        return rows, Curve("index", "chunks", "s", {})
    factor = 1_000_000 / counts[-1]
    note = "" if factor == 1 else f"scaled up from {counts[-1]:,}"
    rows = [
        Row("tensors", names[measure], Spread.of([found[measure] * factor]), unit, goal, note=note)
        for measure, (_, unit, goal) in measures.items()
    ]
    return rows, Curve("index", "chunks", "s", series if len(counts) > 1 else {})


def _index_process(folder: Path, num_chunks: int) -> dict[str, float]:
    command = [sys.executable, "-m", "scripts.benchmarks.index_process", str(num_chunks), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(ended.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(ended.stdout)
    return found
