"""Many ranks on one machine: what agreement costs a training thread, whether ranks together write as fast as one, and
what reading once saves a restore.

The ranks are processes of one gloo job, which stay for all rounds; a round is over when the slowest of them is. With
more ranks than cores they wait for each other's turn, which is in all figures but the ratios.
"""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from asyncckpt import CheckpointManager
from scripts.bench_sink import Sink
from tests.servers import best_s3_server

from . import clients
from .frame import MIB, OURS, PEER, Bench, Outcome, Round, Rounds, Row, Spread, not_measured, ratio_row

NUM_RANKS, NUM_TENSORS = 8, 64
TOGETHER = f"save_async, {NUM_RANKS} ranks"
APART = f"save_async, {NUM_RANKS} runs of one rank"
ONE = "save_async, one rank with all bytes"
DCP = f"dcp.save, {NUM_RANKS} ranks"
REPLICA_BYTES = 250 * 10**6
"""At most: each rank holds the state and what it was staged to, more than once."""
EACH, ONCE = "restore, each rank reads", "restore, read_once"
DCP_EACH = "dcp.load, each rank reads"
S3_EACH, S3_ONCE = "restore from S3, each rank reads", "restore from S3, read_once"
PACED_EACH, PACED_ONCE = "restore from paced S3, each rank reads", "restore from paced S3, read_once"
S3_URL, PACED_URL = clients.url("replicas"), clients.url("zeros")
PACE_MIB_S, PACED_BYTES = 200, 32 * MIB


def run(bench: Bench) -> Outcome:
    with (
        best_s3_server() as server,
        Sink(mib_s=PACE_MIB_S) as paced_server,
        _Crew(bench, server.storage_options, paced_server.storage_options) as crew,
    ):
        server.make_bucket(clients.BUCKET)
        kinds = {TOGETHER: OURS, APART: OURS, ONE: OURS, DCP: PEER}
        saves = bench.take_turns({name: (kind, partial(crew.rounds_of, name)) for name, kind in kinds.items()})
        kinds = {EACH: OURS, ONCE: OURS, DCP_EACH: PEER}
        restores = bench.take_turns({name: (kind, partial(crew.rounds_of, name)) for name, kind in kinds.items()})
        kinds = dict.fromkeys((S3_EACH, S3_ONCE), OURS)
        s3 = bench.take_turns({name: (kind, partial(crew.rounds_of, name)) for name, kind in kinds.items()})
        kinds = dict.fromkeys((PACED_EACH, PACED_ONCE), OURS)
        paced = bench.take_turns({name: (kind, partial(crew.rounds_of, name)) for name, kind in kinds.items()})
    paced_name = f"{NUM_RANKS} ranks restore the same from S3 at {PACE_MIB_S} MiB/s for all"
    s3_name = f"{NUM_RANKS} ranks restore the same {_s3_bytes(bench) / 1e6:.0f} MB from {server.name}"
    size, replica = (f"{b / 1e6:.0f} MB" for b in (bench.scale.num_bytes, min(bench.scale.num_bytes, REPLICA_BYTES)))
    rows = [
        _agreement(saves, size),
        ratio_row("ranks", f"durable, {size} in all, one rank over {NUM_RANKS}", saves, ONE, TOGETHER, 0.9, bound=">="),
        ratio_row("ranks", f"durable, {size} in all, dcp.save over ours", saves, DCP, TOGETHER, None),
        _reads(restores, replica),
        ratio_row(
            "ranks", "the same, seconds of each rank reading over those of read_once", restores, EACH, ONCE, None
        ),
        ratio_row("ranks", "the same, seconds of dcp.load over those of read_once", restores, DCP_EACH, ONCE, None),
        ratio_row("ranks", f"{s3_name}, seconds of each rank reading over read_once", s3, S3_EACH, S3_ONCE, None),
        ratio_row("ranks", f"{paced_name}, seconds likewise", paced, PACED_EACH, PACED_ONCE, None),
    ]
    tables = {
        f"{NUM_RANKS} ranks, from the call to durable": (saves, "time"),
        f"{NUM_RANKS} ranks restore the same": (restores, "time"),
        s3_name: (s3, "time"),
        paced_name: (paced, "time"),
    }
    return Outcome(rows, tables, errors=saves.errors | restores.errors | s3.errors | paced.errors)


def _agreement(saves: Rounds, size: str) -> Row:
    name = f"stall of save_async on {NUM_RANKS} ranks, {size} in all, above that of {NUM_RANKS} runs of one rank"
    if TOGETHER not in saves or APART not in saves:
        return not_measured("ranks", name, "ms", 20, saves.why_not(TOGETHER, APART))
    pairs = zip(saves.values[TOGETHER]["stall"], saves.values[APART]["stall"], strict=True)
    return Row(
        "ranks", name, Spread.of(1000 * (together - apart) for together, apart in pairs), "ms", 20,
        ours=saves.said(TOGETHER, "stall"), note=saves.said(APART, "stall"),
    )  # fmt: skip


def _reads(restores: Rounds, size: str) -> Row:
    name = f"bytes read when {NUM_RANKS} ranks restore the same {size}, read_once, over {size}"
    if ONCE not in restores or EACH not in restores:
        return not_measured("ranks", name, "x", 1.1, restores.why_not(ONCE, EACH))
    note = f"without: {restores.spread(EACH, 'reads').median:.2f}x"
    return Row("ranks", name, restores.spread(ONCE, "reads"), "x", 1.1, note=note)


class _Crew:
    """The processes, and rounds of them."""

    def __init__(self, bench: Bench, *servers: Mapping[str, Any]) -> None:
        """servers: storage options of the S3 server, and of the paced one."""
        self._bench = bench
        self._servers = servers
        self._stack = ExitStack()
        self._links: list[Connection] = []

    def __enter__(self) -> _Crew:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["asyncckpt", "torch.distributed.tensor"])  # 8 imports of torch would take 20 s
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        self._stack.callback(lambda: store)  # lives until the ranks are gone
        for rank in range(NUM_RANKS):
            here, there = forks.Pipe()
            arguments = (there, rank, store.port, self._servers, self._bench)
            process = forks.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()  # so that a rank that dies ends the wait for its answer
            self._stack.callback(process.join)
            self._links.append(here)
        return self

    def __exit__(self, *error: object) -> None:
        for link in self._links:
            link.send(None)
        self._stack.close()

    @contextmanager
    def rounds_of(self, name: str) -> Iterator[Round]:
        yield lambda number: self._ask(name, number)
        self._ask(name, -1)

    def _ask(self, name: str, number: int) -> Mapping[str, float]:
        """The largest of the ranks' measures; of what they read, the sum."""
        for link in self._links:
            link.send((name, number))
        answers = [link.recv() for link in self._links]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        found = {measure: max(answer[measure] for answer in answers) for measure in answers[0]}
        if "reads" in found:
            found["reads"] = sum(answer["reads"] for answer in answers)
        return found


# -- a rank


def _serve(link: Connection, rank: int, port: int, servers: Sequence[Mapping[str, Any]], bench: Bench) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    makers = {**_CONTENDERS, **_on_s3(bench, *servers)}
    contenders: dict[str, Iterator[Mapping[str, float]]] = {}
    while (order := link.recv()) is not None:
        name, number = order
        try:
            if name not in contenders:
                contenders[name] = makers[name](bench.folder, rank, bench.scale.num_bytes)
            if number < 0:
                contenders[name].close()  # type: ignore[attr-defined]
                link.send({})
            else:
                dist.barrier()
                link.send(next(contenders[name]))
        except Exception as exc:
            link.send(RuntimeError(f"rank {rank}: {exc}"))
    dist.destroy_process_group()


def _shards(num_bytes: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    rows = max(1, num_bytes // NUM_RANKS // NUM_TENSORS // 4 // 1024)
    local = [torch.rand(rows, 1024) for _ in range(NUM_TENSORS)]
    return {f"w{n}": DTensor.from_local(one, mesh, [Shard(0)], run_check=False) for n, one in enumerate(local)}


def _whole(num_bytes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # the same on all ranks
    return {f"w{n}": torch.rand(max(1, num_bytes // NUM_TENSORS // 4 // 1024), 1024) for n in range(NUM_TENSORS)}


def _saves(make_manager: Callable[[Path, int], CheckpointManager | None], make_state: Callable[[int], Any]) -> Any:
    def rounds(folder: Path, rank: int, num_bytes: int) -> Iterator[Mapping[str, float]]:
        state = make_state(num_bytes)
        manager = make_manager(folder, rank)
        if manager is None:  # this rank has no part in it
            while True:
                yield {"time": 0.0, "stall": 0.0}
        with manager:
            manager.prewarm(state)
            for step in range(1 << 30):
                started = time.perf_counter()
                manager.save_async(step, state)
                stall = time.perf_counter() - started
                manager._writer.drain()
                took = time.perf_counter() - started
                manager.join()
                yield {"time": took, "stall": stall}

    return rounds


def _together(folder: Path, rank: int) -> CheckpointManager:
    return CheckpointManager(str(folder / "together"), max_to_keep=1)


def _apart(folder: Path, rank: int) -> CheckpointManager:
    groups = [dist.new_group([one]) for one in range(NUM_RANKS)]
    return CheckpointManager(str(folder / f"apart-{rank}"), max_to_keep=1, process_group=groups[rank])


def _one(folder: Path, rank: int) -> CheckpointManager | None:
    group = dist.new_group([0])
    return CheckpointManager(str(folder / "one"), max_to_keep=1, process_group=group) if rank == 0 else None


def _dcp_saves(folder: Path, rank: int, num_bytes: int) -> Iterator[Mapping[str, float]]:
    state = _shards(num_bytes)
    for step in range(1 << 30):
        started = time.perf_counter()
        dcp.save(state, checkpoint_id=folder / "dcp" / str(step))
        took = time.perf_counter() - started
        if rank == 0:
            shutil.rmtree(folder / "dcp" / str(step))
        yield {"time": took, "stall": took}


def _restores(read_once: bool, url: str = "", storage_options: Mapping[str, Any] | None = None) -> Any:
    def rounds(folder: Path, rank: int, num_bytes: int) -> Iterator[Mapping[str, float]]:
        num_bytes, read = min(num_bytes, REPLICA_BYTES), list[int]()
        state = _whole(num_bytes)
        if url == PACED_URL:  # which reads as zeros
            state = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
        events = [lambda event: read.append(getattr(event, "num_bytes", 0))]
        path = f"{url or folder / 'replicas'}-{read_once}"
        with CheckpointManager(path, events=events, read_once=read_once, storage_options=storage_options) as manager:
            manager.save(0, state)
            while True:
                read.clear()
                started = time.perf_counter()
                manager.restore(0, state)
                yield {"time": time.perf_counter() - started, "reads": sum(read) / num_bytes}

    return rounds


def _on_s3(
    bench: Bench, server: Mapping[str, Any], paced: Mapping[str, Any]
) -> dict[str, Callable[[Path, int, int], Any]]:
    """The restores from there, of as many bytes as S3 is to move."""
    num_bytes = {S3_URL: _s3_bytes(bench), PACED_URL: min(8 * bench.scale.object_bytes, PACED_BYTES)}

    def restores(read_once: bool, url: str, options: Mapping[str, Any]) -> Callable[[Path, int, int], Any]:
        return lambda folder, rank, _: _restores(read_once, url, options)(folder, rank, num_bytes[url])

    return {
        S3_EACH: restores(False, S3_URL, server),
        S3_ONCE: restores(True, S3_URL, server),
        PACED_EACH: restores(False, PACED_URL, paced),
        PACED_ONCE: restores(True, PACED_URL, paced),
    }


def _s3_bytes(bench: Bench) -> int:
    return min(bench.scale.object_bytes, PACED_BYTES)


def _dcp_restores(folder: Path, rank: int, num_bytes: int) -> Iterator[Mapping[str, float]]:
    state = _whole(min(num_bytes, REPLICA_BYTES))
    dcp.save(state, checkpoint_id=folder / "dcp-replicas")
    while True:
        started = time.perf_counter()
        dcp.load(state, checkpoint_id=folder / "dcp-replicas")
        yield {"time": time.perf_counter() - started, "reads": 1.0}


_CONTENDERS: Mapping[str, Callable[[Path, int, int], Any]] = {
    TOGETHER: _saves(_together, _shards),
    APART: _saves(_apart, lambda num_bytes: _whole(num_bytes // NUM_RANKS)),
    ONE: _saves(_one, _whole),
    DCP: _dcp_saves,
    EACH: _restores(False),
    ONCE: _restores(True),
    DCP_EACH: _dcp_restores,
}
