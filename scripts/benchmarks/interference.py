"""What a save in flight does to a step that is bound by Python: many small operations, each of which needs the GIL.

A step's seconds are counted while a save is in flight, against steps of the same round without any. The call itself is
not among them: that is the suite `stall`. A new save starts whenever one is over, for as long as steps are watched.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from scripts.bench_sink import Sink

from . import clients
from .contenders import Ours, Pending
from .frame import OURS, PEER, Bench, Contender, Outcome, Round, Rounds, Row, not_measured

NUM_TENSORS, TENSOR_BYTES = 8000, 4096
OPERATIONS = 300  # of a step: about 1 ms
MIN_STEPS = 20
SERVER_MIB_S = 200.0  # unpaced, the server and the kernel would take both cores from the step, save or not
OURS_ASYNC = "save_async"
DCP_THREAD = "dcp.async_save"

Start = Callable[[int], Pending]


def run(bench: Bench) -> Outcome:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small = _small_tensors(bench)
        with Sink(mib_s=SERVER_MIB_S) as sink:
            large = _to_s3(bench, sink)
    finally:
        torch.set_num_threads(num_threads)
    num_tensors = min(NUM_TENSORS, bench.scale.num_tensors)
    found = {
        f"{num_tensors} x 4 KB to a folder": small,
        f"{bench.scale.object_bytes / 1e6:.0f} MB to S3 at {SERVER_MIB_S:.0f} MiB/s": large,
    }
    outcome = Outcome()
    for title, rounds in found.items():
        outcome.rows += _rows(title, rounds)
        outcome.tables[f"p99 of a step while {title}, over one without"] = (rounds, "p99")
        outcome.errors |= {f"{name} ({title})": why for name, why in rounds.errors.items()}
    return outcome


def _small_tensors(bench: Bench) -> Rounds:
    memory = torch.rand(min(NUM_TENSORS, bench.scale.num_tensors), TENSOR_BYTES // 4)
    state = {f"w{number}": row.clone() for number, row in enumerate(memory)}
    fewer = dict(list(state.items())[: bench.scale.peer_tensors])  # DCP takes milliseconds on each beside busy Python
    folder = bench.folder_of("small")

    @contextmanager
    def ours() -> Iterator[Start]:
        with Ours(str(folder / "ours"), max_to_keep=1) as manager:
            yield lambda number: manager.save_async(number, state)

    @contextmanager
    def thread() -> Iterator[Start]:
        yield lambda number: _dcp_async(fewer, checkpoint_id=str(folder / "dcp" / str(number)))
        shutil.rmtree(folder / "dcp", ignore_errors=True)

    return _rounds(bench, ours, thread)


def _to_s3(bench: Bench, sink: Sink) -> Rounds:
    state, small = clients.state_of(bench.scale.object_bytes), clients.state_of(bench.scale.stock_bytes)

    @contextmanager
    def ours() -> Iterator[Start]:
        with Ours(clients.url("ours"), storage_options=sink.storage_options, max_to_keep=1) as manager:
            yield lambda number: manager.save_async(number, state)

    @contextmanager
    def thread() -> Iterator[Start]:
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

        def start(number: int) -> Pending:
            writer = FsspecWriter(clients.url(f"dcp/{number}"), **sink.storage_options)
            return _dcp_async(small, storage_writer=writer)

        yield start

    return _rounds(bench, ours, thread)


def _dcp_async(state: Mapping[str, torch.Tensor], **where: Any) -> Pending:
    saving: Any = dcp.async_save(dict(state), **where)
    return Pending(saving.result, is_over=saving.done)


def _rounds(bench: Bench, ours: Callable[[], Any], thread: Callable[[], Any]) -> Rounds:
    @contextmanager
    def rounds_of(make: Callable[[], Any]) -> Iterator[Round]:
        with make() as start:
            numbers = iter(range(1 << 30))
            yield lambda _: _one_round(start, numbers, bench.scale.watch_s)

    contenders: dict[str, Contender] = {
        OURS_ASYNC: (OURS, partial(rounds_of, ours)),
        DCP_THREAD: (PEER, partial(rounds_of, thread)),
    }
    return bench.take_turns(contenders)


def _one_round(start: Start, numbers: Iterator[int], seconds: float) -> Mapping[str, float]:
    """p50, p99: of steps beside a save, over those without."""
    without = _steps(seconds / 2, lambda: True)
    beside: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(beside) < MIN_STEPS:
        pending = start(next(numbers))
        while not pending.is_over():
            beside.append(_step())
        pending.join()
    return {
        "p50": _quantile(beside, 0.5) / _quantile(without, 0.5),
        "p99": _quantile(beside, 0.99) / _quantile(without, 0.99),
        "p99_ms": _quantile(beside, 0.99) * 1e3,
    }


def _steps(seconds: float, go_on: Callable[[], bool]) -> list[float]:
    until = time.perf_counter() + seconds
    found: list[float] = []
    while len(found) < MIN_STEPS or (time.perf_counter() < until and go_on()):
        found.append(_step())
    return found


_A, _B = torch.rand(16, 16), torch.rand(16, 16)


def _step() -> float:
    started = time.perf_counter()
    total, seen = _A, 0
    for number in range(OPERATIONS):
        total = total * 0.5 + _B
        seen += number % 3
    return time.perf_counter() - started


def _quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def _rows(title: str, rounds: Rounds) -> list[Row]:
    rows = []
    for measure, goal in (("p50", 1.05), ("p99", 1.5)):
        name = f"{measure} of a Python-bound step, {title}"
        if OURS_ASYNC not in rounds:
            rows.append(not_measured("interference", name, "x", goal, rounds.why_not(OURS_ASYNC)))
            continue
        figure, peer = rounds.spread(OURS_ASYNC, measure), rounds.said(DCP_THREAD, measure, "x")
        note = f"p99 {rounds.spread(OURS_ASYNC, 'p99_ms').median:.3g} ms"
        rows.append(Row("interference", name, figure, "x", goal, peer=peer, note=note))
    return rows
