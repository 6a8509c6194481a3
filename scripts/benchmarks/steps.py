"""Runs that keep very many steps in a bucket: what opening one costs, and what a save costs with all of them there.

On the discarding server, which keeps small files, lists as S3 does (1,000 names a page) and counts requests. The steps
are committed by their manifests; a run of ours would have two or three more files in each, so as many more pages.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

from asyncckpt.steps import manifest_name
from scripts.bench_sink import Sink

from . import clients
from .contenders import Ours
from .frame import Bench, Curve, Outcome, Row, Spread

FEW = 10
NAMES_PER_PAGE = 1000


def run(bench: Bench) -> Outcome:
    counts = [FEW, max(FEW, bench.scale.num_steps // 10), bench.scale.num_steps]
    with Sink() as sink:
        for count in counts:
            _commit(sink, f"{count}", count)
        opened = {count: _open(sink, f"{count}", bench.scale.rounds if count == counts[-1] else 2) for count in counts}
        saved = _save(sink, counts, bench.scale.rounds)
    most = counts[-1]
    seconds, lists, others = opened[most]
    pages = -(-most // NAMES_PER_PAGE)
    ratios = [a / b for a, b in zip(saved[most][1], saved[FEW][1], strict=True)]
    opening, saving = f"CheckpointManager(...), {most} steps in a bucket", f"a save with {most} steps kept"
    rows = [
        Row("steps", f"{opening}: requests that are not lists", Spread.of([others]), "", 0.0, note=f"{seconds:.2f} s"),
        Row("steps", f"{opening}: list requests over pages", Spread.of([lists / pages]), "x", 2.0,
            note=f"{lists:.0f} requests for {pages} pages"),
        Row("steps", f"{saving}, over one with {FEW}", Spread.of(ratios), "x", 1.1,
            ours=f"{saved[most][0]:.3g} s", note="1.1 for noise"),
        Row("steps", f"{saving}, more requests than with {FEW}", Spread.of([saved[most][2] - saved[FEW][2]]), "", 0.0,
            note=f"{saved[most][2]:.0f} requests"),
    ]  # fmt: skip
    curves = [
        Curve(
            "opening a run in a bucket", "steps kept", "s", {"ours": [(count, opened[count][0]) for count in counts]}
        ),
        Curve("one save", "steps kept", "s", {"ours": [(count, saved[count][0]) for count in counts]}),
    ]
    return Outcome(rows, curves=curves)


def _commit(sink: Sink, name: str, num_steps: int) -> None:
    """Committed by name alone: a constructor reads no manifest."""
    import obstore

    store = clients.obstore_store(sink)

    def commit(step: int) -> Any:
        return obstore.put(store, f"{name}/{step}/{manifest_name(step + 1)}", b"{}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(commit, range(num_steps)))


def _open(sink: Sink, name: str, rounds: int) -> tuple[float, float, float]:
    """(median seconds, list requests, other requests) of a constructor."""
    seconds = []
    for _ in range(rounds + 1):
        sink.stats()
        started = time.perf_counter()
        with Ours(clients.url(name), storage_options=sink.storage_options) as ours:
            seconds.append(time.perf_counter() - started)
            requests = sink.stats()["requests"]
            assert len(ours.manager.all_steps()) == int(name)
    lists = sum(count for what, count in requests.items() if "list" in what.lower())
    return statistics.median(seconds[1:]), lists, sum(requests.values()) - lists


def _save(sink: Sink, counts: list[int], rounds: int) -> dict[int, tuple[float, list[float], float]]:
    """{steps kept: (median seconds, all seconds, requests)} of a save of little, in turns."""
    state = {"weight": torch.zeros(1024)}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    requests: dict[int, float] = {}
    with ExitStack() as stack:
        runs = {
            count: stack.enter_context(Ours(clients.url(str(count)), storage_options=sink.storage_options))
            for count in counts
        }
        for number in range(2 * rounds + 1):
            for count, ours in runs.items():
                sink.stats()
                started = time.perf_counter()
                ours.manager.save(1_000_000 + number, state)
                if number:
                    seconds[count].append(time.perf_counter() - started)
                requests[count] = sum(sink.stats()["requests"].values())
    return {count: (statistics.median(seconds[count]), seconds[count], requests[count]) for count in counts}
