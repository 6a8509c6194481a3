"""Saves to S3 and restores from it: a real server for correctness of the path, a discarding one for the client's cost.

The real server (Ceph's radosgw, where it is installed) shares the cores with the client. The sink discards, so that
the client is the bottleneck, and can be paced. Where times are compared all move the same bytes: scaled up
from fewer, what each save costs however small it is (0.05 s of FsspecWriter) would be multiplied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch

from scripts.bench_sink import Sink
from tests.servers import best_s3_server

from . import clients
from .contenders import Ours
from .frame import (
    FAILURES,
    GIB,
    LIMIT,
    MIB,
    OURS,
    PEER,
    Bench,
    Contender,
    Outcome,
    Round,
    Rounds,
    Row,
    Spread,
    not_measured,
    ratio_row,
    reason,
)
from .process import PeakRss

SAVE, RESTORE = "save to S3", "restore from S3"
OBSTORE, S3FS = "raw obstore", "raw s3fs"
STOCK_WRITER, STOCK_READER = "dcp.save, FsspecWriter", "dcp.load, FsspecReader"
CONNECTOR_WRITER, CONNECTOR_READER = "dcp.save, s3torchconnector", "dcp.load, s3torchconnector"
PACE_MIB_S, FULL_PACE = 200, 0.95
NO_SAVE = "no save"


def run(bench: Bench) -> Outcome:
    outcome = Outcome()
    with best_s3_server() as server:
        server.make_bucket(clients.BUCKET)
        saves = _saves(bench, server)
        restores = _restores(bench, server)
    with Sink() as sink:
        sunk = _saves(bench, sink)
        outcome.rows += _bytes_fetched(bench, sink)
    with Sink(mib_s=PACE_MIB_S) as sink:
        paced = _paced(bench, sink)
    outcome.tables = {
        f"save to {server.name}": (saves, "time"),
        f"restore from {server.name}": (restores, "time"),
        "save to a sink": (sunk, "time"),
        f"longest wait of a busy thread, saving at {PACE_MIB_S} MiB/s": (paced, "wait"),
    }
    what = f"{bench.scale.object_bytes / 1e6:.0f} MB"
    outcome.rows[:0] = [
        ratio_row("object", f"save to {server.name}, rate of the best raw client", saves,
                  saves.best(LIMIT, "time"), SAVE, 0.9, bound=">=", note=what),
        ratio_row("object", "save to a sink, against FsspecWriter", sunk, STOCK_WRITER, SAVE, 2.0, bound=">="),
        *_cost_rows(sunk),
        *_paced_rows(paced),
        ratio_row("object", f"restore from {server.name}, rate of the best raw client", restores,
                  restores.best(LIMIT, "time"), RESTORE, 0.9, bound=">=", note=what),
        ratio_row("object", f"restore from {server.name}, against FsspecReader", restores, STOCK_READER, RESTORE, 3.0,
                  bound=">="),
    ]  # fmt: skip
    for title, rounds in (("", saves), ("", restores), (" (sink)", sunk), (" (paced)", paced)):
        outcome.errors |= {f"{name}{title}": why for name, why in rounds.errors.items()}
    return outcome


# -- saves


def _saves(bench: Bench, server: clients.Server) -> Rounds:
    num_bytes = bench.scale.object_bytes
    data, state = clients.bytes_of(num_bytes), clients.state_of(num_bytes)

    @contextmanager
    def ours() -> Iterator[Round]:
        with Ours(clients.url("ours"), storage_options=server.storage_options) as manager:
            yield lambda number: _measured(lambda: manager.manager.save(number, state), num_bytes, server, "ours")

    @contextmanager
    def raw(make: Callable[[Any], Any], put: Callable[..., None], name: str) -> Iterator[Round]:
        client = make(server)
        yield lambda _: _measured(lambda: put(client, f"{name}/data", data), num_bytes, server, name)

    @contextmanager
    def peer(save: Callable[..., None], name: str) -> Iterator[Round]:
        yield lambda number: _measured(lambda: save(server, f"{name}/{number}", state), num_bytes, server, name)

    return bench.take_turns(
        {
            OBSTORE: (LIMIT, partial(raw, clients.obstore_store, clients.put_by_obstore, "obstore")),
            S3FS: (LIMIT, partial(raw, clients.filesystem, clients.put_by_s3fs, "s3fs")),
            SAVE: (OURS, ours),
            STOCK_WRITER: (PEER, partial(peer, clients.save_by_fsspec_writer, "stock")),
            CONNECTOR_WRITER: (PEER, partial(peer, clients.save_by_s3torchconnector, "connector")),
        }
    )


def _measured(save: Callable[[], Any], num_bytes: int, server: clients.Server, name: str) -> Mapping[str, float]:
    """time; cpu: seconds of this process per GiB; memory: MiB above what was resident. Deletes what was written."""
    peak = PeakRss()
    started, cpu_started = time.perf_counter(), time.process_time()
    save()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    found = {"time": seconds, "cpu": cpu_s * GIB / num_bytes, "memory": peak.extra_mib()}
    clients.empty(server, name)
    return found


def _cost_rows(sunk: Rounds) -> list[Row]:
    rows = []
    for what, measure, unit, goal in (("CPU", "cpu", "s per GiB", 0.7), ("extra memory", "memory", "MiB", 32.0)):
        name = f"save to a sink, {what}"
        if SAVE not in sunk:
            rows.append(not_measured("object", name, unit, goal, sunk.why_not(SAVE)))
            continue
        limit, peer = (sunk.said(sunk.best(kind, measure), measure, unit) for kind in (LIMIT, PEER))
        note = "with staging and CRC" if measure == "cpu" else ""
        rows.append(Row("object", name, sunk.spread(SAVE, measure), unit, goal, limit=limit, peer=peer, note=note))
    return rows


# -- restores


def _restores(bench: Bench, server: clients.Server) -> Rounds:
    num_bytes = bench.scale.object_bytes
    data, state = clients.bytes_of(num_bytes), clients.state_of(num_bytes)

    @contextmanager
    def ours() -> Iterator[Round]:
        with Ours(clients.url("ours"), storage_options=server.storage_options) as manager:
            manager.manager.save(0, state)
            yield lambda _: _timed(lambda: manager.manager.restore(0, state))
        clients.empty(server, "ours")

    @contextmanager
    def raw(
        make: Callable[[Any], Any], put: Callable[..., None], get: Callable[..., None], path: str
    ) -> Iterator[Round]:
        client = make(server)
        put(client, path, data)
        yield lambda _: _timed(lambda: get(client, path, num_bytes))

    @contextmanager
    def peer(save: Callable[..., None], load: Callable[..., None], name: str) -> Iterator[Round]:
        save(server, name, state)
        yield lambda _: _timed(lambda: load(server, name, state))

    connector = (clients.save_by_s3torchconnector, clients.load_by_s3torchconnector)
    return bench.take_turns(
        {
            OBSTORE: (
                LIMIT,
                partial(raw, clients.obstore_store, clients.put_by_obstore, clients.get_by_obstore, "raw-obstore"),
            ),
            S3FS: (LIMIT, partial(raw, clients.filesystem, clients.put_by_s3fs, clients.get_by_s3fs, "raw-s3fs")),
            RESTORE: (OURS, ours),
            STOCK_READER: (PEER, partial(peer, clients.save_by_fsspec_writer, clients.load_by_fsspec_reader, "stock")),
            CONNECTOR_READER: (PEER, partial(peer, *connector, "connector")),
        }
    )


def _timed(work: Callable[[], Any]) -> Mapping[str, float]:
    started = time.perf_counter()
    work()
    return {"time": time.perf_counter() - started}


def _bytes_fetched(bench: Bench, sink: Sink) -> list[Row]:
    """The sink reads as zeros, so a state of zeros restores from it, checksums and all, and it counts what it sends."""
    state = clients.state_of(bench.scale.object_bytes, zeros=True)
    goals = [
        ("restore from S3, bytes fetched over bytes needed", list(state)),
        ("restore one tensor of 16, bytes fetched over its bytes and the index", ["w3"]),
    ]
    rows = []
    try:
        with Ours(clients.url("fetched"), storage_options=sink.storage_options) as ours:
            ours.manager.save(0, state)
            files = clients.filesystem(sink).find(f"{clients.BUCKET}/fetched", detail=True)
            index_bytes = sum(file["size"] for path, file in files.items() if "manifest-" in path)
            for name, keys in goals:
                part = {key: state[key] for key in keys}
                sink.stats()
                ours.manager.restore(0, part)
                found = sink.stats()
                needed = clients.num_bytes_of(part) + (index_bytes if len(keys) == 1 else 0)
                ratio = Spread.of([found["bytes_out"] / needed])
                note = f"{sum(found['requests'].values())} requests"
                rows.append(Row("object", name, ratio, "x", 1.02, note=note))
    except FAILURES as exc:
        rows += [not_measured("object", name, "x", 1.02, reason(exc)) for name, _ in goals[len(rows) :]]
    return rows


# -- beside a busy thread


def _paced(bench: Bench, sink: Sink) -> Rounds:
    num_bytes = min(4 * bench.scale.object_bytes, 10**9)  # long enough that the commit's small requests do not count
    fewer_bytes = bench.scale.stock_bytes
    state, data = clients.state_of(num_bytes), clients.bytes_of(num_bytes)
    small_state, small = clients.state_of(fewer_bytes), clients.bytes_of(fewer_bytes)

    @contextmanager
    def alone() -> Iterator[Round]:
        def one_round(_: int) -> Mapping[str, float]:
            until = time.perf_counter() + fewer_bytes / MIB / PACE_MIB_S + 0.1
            return {"wait": _longest_wait(lambda: time.perf_counter() > until) * 1e3, "rate": 0.0}

        yield one_round

    @contextmanager
    def ours() -> Iterator[Round]:
        with Ours(clients.url("paced"), storage_options=sink.storage_options) as manager:

            def one_round(number: int) -> Mapping[str, float]:
                pending = manager.save_async(number, state)
                found = _beside(pending.is_over, num_bytes)
                pending.join()
                return found

            yield one_round

    def in_thread(put: Callable[[], None], moved: int) -> Callable[[], Any]:
        @contextmanager
        def rounds() -> Iterator[Round]:
            def one_round(_: int) -> Mapping[str, float]:
                thread = threading.Thread(target=put)
                thread.start()
                found = _beside(lambda: not thread.is_alive(), moved)
                thread.join()
                return found

            yield one_round

        return rounds

    store, fs = clients.obstore_store(sink), clients.filesystem(sink)
    save = clients.save_by_fsspec_writer
    contenders: dict[str, Contender] = {
        NO_SAVE: (LIMIT, alone),
        OBSTORE: (PEER, in_thread(partial(clients.put_by_obstore, store, "o", data), num_bytes)),
        S3FS: (PEER, in_thread(partial(clients.put_by_s3fs, fs, "s", small), fewer_bytes)),
        SAVE: (OURS, ours),
        STOCK_WRITER: (PEER, in_thread(partial(save, sink, "stock", small_state), fewer_bytes)),
    }
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return bench.take_turns(contenders)
    finally:
        torch.set_num_threads(num_threads)


def _beside(is_over: Callable[[], bool], num_bytes: int) -> Mapping[str, float]:
    """wait: the longest that Python code of this thread stood still, in ms; rate: of the bytes, in MiB/s."""
    started = time.perf_counter()
    wait_s = _longest_wait(is_over)
    return {"wait": wait_s * 1e3, "rate": num_bytes / MIB / (time.perf_counter() - started)}


def _longest_wait(is_over: Callable[[], bool]) -> float:
    longest, last = 0.0, time.perf_counter()
    while not is_over():
        now = time.perf_counter()
        if now - last > longest:
            longest = now - last
        last = now
    return longest


def _paced_rows(paced: Rounds) -> list[Row]:
    names: tuple[tuple[str, str, str, float, Literal["<=", ">="]], ...] = (
        ("rate beside a busy thread, server paced at 200 MiB/s", "rate", "MiB/s", PACE_MIB_S * FULL_PACE, ">="),
        ("longest wait of that thread", "wait", "ms", 15.0, "<="),
    )
    rows = []
    for name, measure, unit, goal, bound in names:
        if SAVE not in paced:
            rows.append(not_measured("object", f"save to S3, {name}", unit, goal, paced.why_not(SAVE)))
            continue
        limit = paced.said(NO_SAVE, measure, unit) if measure == "wait" else ""
        peers = ", ".join(paced.said(one, measure, unit) for one in (OBSTORE, S3FS) if one in paced)
        rows.append(
            Row(
                "object", f"save to S3, {name}", paced.spread(SAVE, measure), unit, goal, bound, limit=limit, peer=peers
            )
        )
    return rows
