"""What a save costs a training loop: the call, the copy, and what a writer at work takes from the steps beside it.

call    one call. stall: the call, and the wait before the next update of the parameters, where a copy may still run.
loop    AdamW on one compute thread: the time of a loop with one save, less as many steps without. It goes on until the
        save is over, so nothing is left out. Each such loop has a plain one just before it, and plain loops after plain
        ones tell how far two of them differ anyway.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from . import raw
from .contenders import (
    ASYNC_SAVERS,
    BLOCKING,
    BLOCKING_TRAIN_STATE,
    OVERLAPPING,
    Ours,
    Save,
    Saver,
    Training,
    delete,
    finish,
    plain_dict,
)
from .frame import FULL, LIMIT, OURS, PEER, Bench, Outcome, Round, Rounds, Row, Spread, not_measured, ratio_row, timed

LOOP_STEPS, SAVE_AT = 8, 2
PLAIN = "no save"
NOT_IN_LOOPS = (BLOCKING_TRAIN_STATE, "dcp.async_save, BlockingAsyncStager kept")  # each is like another
IN_QUICK_LOOPS = (BLOCKING, OVERLAPPING, "dcp.async_save", "dcp.async_save, DefaultStager in a thread")
MEMCPY = "warm memcpy"


def run(bench: Bench) -> Outcome:
    training = Training(bench.scale.num_bytes)
    outcome = Outcome()
    calls = _calls(bench, training)
    outcome.tables["call, and the wait before the next update"] = (calls, "stall")
    for name in (BLOCKING, BLOCKING_TRAIN_STATE):
        outcome.rows.append(ratio_row("stall", f"stall of {name}", calls, name, MEMCPY, 1.1, measure="stall"))
    outcome.rows.append(
        ratio_row("stall", f"stall of {OVERLAPPING}", calls, OVERLAPPING, MEMCPY, None, measure="stall")
    )
    outcome.rows += _first_saves(bench, training)
    del training
    loops = _loops(bench)
    outcome.tables[f"cost of one save to a loop of AdamW, {bench.scale.loop_bytes / 1e6:.0f} MB"] = (loops, "cost")
    outcome.rows += [*_cost_rows(loops), not_measured("stall", "the same on a GPU", "x", 1.02, "no device was lent")]
    outcome.errors = calls.errors | {f"{name} (loop)": why for name, why in loops.errors.items()}
    return outcome


# -- the call


def _calls(bench: Bench, training: Training) -> Rounds:
    memory = raw.scratch(training.num_bytes)

    @contextmanager
    def rounds_of(name: str, saver: Saver) -> Iterator[Round]:
        folder = bench.folder_of(f"call {name}")
        with saver(folder, training) as save:
            yield partial(_call, training, save, folder)

    savers = {name: (kind, partial(rounds_of, name, saver)) for name, (kind, saver) in ASYNC_SAVERS.items()}
    return bench.take_turns({MEMCPY: (LIMIT, partial(raw.copies, training.tensors, memory)), **savers})


def _call(training: Training, save: Save, folder: Path, number: int) -> Mapping[str, float]:
    started = time.perf_counter()
    pending = save(number)
    call_s = time.perf_counter() - started
    training.forward_backward()
    wait_s = timed(pending.before_update)
    training.optimizer.step()
    finish(pending, folder / str(number))
    return {"call": call_s, "stall": call_s + wait_s}


def _first_saves(bench: Bench, training: Training) -> list[Row]:
    """One contender: a new manager in each round, its first save after `prewarm` against its second."""
    state = plain_dict(training)

    def one_round(_: int) -> Mapping[str, float]:
        folder = bench.folder_of("first")
        with Ours(str(folder)) as ours:
            ours.manager.prewarm(state)
            stalls, durables = [], []
            for step in range(2):
                started = time.perf_counter()
                pending = ours.save_async(step, state)
                stalls.append(time.perf_counter() - started)
                pending.join()
                durables.append(time.perf_counter() - started)
        delete(folder)
        return {"stall": stalls[0] / stalls[1], "durable": durables[0] / durables[1]}

    @contextmanager
    def rounds() -> Iterator[Round]:
        yield one_round

    found = bench.take_turns({"first": (OURS, rounds)})
    if "first" not in found:
        return [not_measured("stall", "first save after prewarm", "x", 1.2, found.errors["first"])]
    return [
        Row("stall", f"first save after prewarm, {what}, over a later one", found.spread("first", measure), "x", 1.2)
        for what, measure in (("stall", "stall"), ("until durable", "durable"))
    ]


# -- the loop


def _loops(bench: Bench) -> Rounds:
    training = Training(bench.scale.loop_bytes, 80, adamw=True)
    num_threads = torch.get_num_threads()

    @contextmanager
    def plain_rounds() -> Iterator[Round]:
        yield lambda _: _costs(_plain_loop(training), _plain_loop(training))

    @contextmanager
    def rounds_of(name: str, saver: Saver) -> Iterator[Round]:
        folder = bench.folder_of(f"loop {name}")
        with saver(folder, training) as save:
            yield lambda number: _costs(_plain_loop(training), _loop_with_save(training, save, folder, number))

    savers = {name: saver for name, saver in ASYNC_SAVERS.items() if name not in NOT_IN_LOOPS}
    left_out = (
        {} if bench.scale is FULL else {name: "only with --full" for name in savers if name not in IN_QUICK_LOOPS}
    )
    torch.set_num_threads(1)
    try:
        found = bench.take_turns(
            {
                PLAIN: (LIMIT, plain_rounds),
                **{
                    name: (kind, partial(rounds_of, name, saver))
                    for name, (kind, saver) in savers.items()
                    if name not in left_out
                },
            },
            rounds=bench.scale.loop_rounds,
        )
        found.errors |= left_out
        return found
    finally:
        torch.set_num_threads(num_threads)


def _step(training: Training) -> None:
    training.forward_backward()
    training.optimizer.step()


def _plain_loop(training: Training) -> list[float]:
    return [timed(partial(_step, training)) for _ in range(LOOP_STEPS)]


def _loop_with_save(training: Training, save: Save, folder: Path, number: int) -> list[float]:
    """Seconds of each step; at least LOOP_STEPS, and as many more as the save takes."""
    steps: list[float] = []
    pending = None
    while len(steps) < LOOP_STEPS or (pending is not None and not pending.is_over()):
        started = time.perf_counter()
        training.forward_backward()
        if pending is not None:
            pending.before_update()
        training.optimizer.step()
        if len(steps) == SAVE_AT:
            pending = save(number)
        steps.append(time.perf_counter() - started)
    assert pending is not None
    finish(pending, folder / str(number))
    return steps


def _costs(plain: list[float], steps: list[float]) -> Mapping[str, float]:
    """cost: seconds lost. longest: step, in median steps of the plain loop just before."""
    return {
        "cost": sum(steps) - len(steps) * statistics.fmean(plain),
        "longest": max(steps) / statistics.median(plain),
        "step": statistics.fmean(plain),
    }


def _cost_rows(loops: Rounds) -> list[Row]:
    if PLAIN not in loops:
        return [not_measured("stall", "cost of a save to a training loop", "s", None, "; ".join(loops.errors.values()))]
    noise = loops.values[PLAIN]["cost"]
    sigma = statistics.stdev(noise) if len(noise) > 1 else float("nan")
    best = loops.best(PEER, "cost")
    half = loops.spread(best, "cost").median / 2 if best else 0.0
    own = loops.spread(PLAIN, "longest").median
    rows = []
    for name in (OVERLAPPING, BLOCKING):
        if name not in loops:
            rows.append(not_measured("stall", f"cost of {name} to a training loop", "s", None, loops.why_not(name)))
            continue
        limit = f"3 sigma of a loop without saves {3 * sigma:.2g} s"
        peer = loops.said(best, "cost")
        step = f"a plain step takes {loops.spread(PLAIN, 'step').median:.3g} s"
        figure = loops.spread(name, "cost")
        rows.append(
            Row("stall", f"cost of {name} to a training loop, per save", figure, "s", max(half, 3 * sigma),
                limit=limit, peer=peer, note=step)
        )  # fmt: skip
        longest = Spread.of(loops.values[name]["longest"])
        rows.append(
            Row("stall", f"longest step of that loop, over a plain one ({name})", longest, "x", 1.3,
                limit=f"without saves {own:.2f} x", peer=loops.said(loops.best(PEER, "longest"), "longest", "x"))
        )  # fmt: skip
    return rows
