"""Real ranks for tests: processes in one gloo job, driven by the test, and killed with it.

The processes are forked from one server that has imported torch already, so that a job starts in well under a second.
The test process hosts the job's store, as `torchrun` does, so that any rank can be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

_TIMEOUT_S = 60.0  # of a test's own waits: far beyond any that succeeds
# TCPStore looks up the name behind the address of every peer, 127.0.0.1 included; a name server that drops a packet
# costs 5 s by default (seen in one connection of twelve).
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    # torch._dynamo: the first optimizer of a process imports it, 0.8 s of CPU
    ["torch", "torch._dynamo", "torch.distributed", "torch.distributed.fsdp", "numpy", "pytest", "asyncckpt"]
)


class Job:
    """`world_size` processes that each run `body(link, *args)`, a module-level function, after `init_process_group`.

    `tell` and `hear` are the test's end of each rank's `link`. `results` are what the bodies returned.
    store_on_rank_0: it hosts the store, as in a job without `torchrun`.
    """

    def __init__(self, world_size: int, body: Callable[..., Any], *args: Any, store_on_rank_0: bool = False) -> None:
        self._links: list[Connection] = []
        self._processes: list[Any] = []
        port = 0
        if not store_on_rank_0:
            self._store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
            port = self._store.port
        for rank in range(world_size):
            here, there = _forks.Pipe()
            process = _forks.Process(target=_run_rank, args=(rank, world_size, port, there, body, args), daemon=True)
            process.start()
            there.close()
            self._links.append(here)
            self._processes.append(process)
            if port == 0:
                port = self._receive(0, "port")

    def tell(self, rank: int, message: object = None) -> None:
        self._links[rank].send(("message", message))

    def hear(self, rank: int) -> Any:
        """The next message of a rank."""
        return self._receive(rank, "message")

    def signal(self, rank: int, signum: int) -> None:
        os.kill(self._processes[rank].pid, signum)

    def result(self, rank: int) -> Any:
        return self._receive(rank, "result")

    def results(self) -> list[Any]:
        return [self.result(rank) for rank in range(len(self._processes))]

    def exit_code(self, rank: int) -> int | None:
        """Once its body has returned."""
        self._processes[rank].join(_TIMEOUT_S)
        return self._processes[rank].exitcode

    def num_store_keys(self) -> int:
        return self._store.num_keys()

    def end_store(self) -> None:
        """End the process that hosts the store, as far as the ranks can tell."""
        del self._store

    def _receive(self, rank: int, expected: str) -> Any:
        if not self._links[rank].poll(_TIMEOUT_S):
            raise AssertionError(f"rank {rank} said nothing for {_TIMEOUT_S} s, {expected} expected")
        kind, content = self._links[rank].recv()
        assert kind == expected, f"rank {rank} sent {kind}, not {expected}:\n{content}"
        return content

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.join()


class Link:
    """A rank's line to the test."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self._connection = connection
        self.rank = rank

    def send(self, message: object = None) -> None:
        self._connection.send(("message", message))

    def receive(self) -> Any:
        return self._connection.recv()[1]


def _run_rank(
    rank: int, world_size: int, port: int, connection: Connection, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        store = TCPStore("127.0.0.1", port, None, is_master=port == 0, wait_for_workers=False)
        if port == 0:
            connection.send(("port", store.port))
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=_TIMEOUT_S)
        )
        connection.send(("result", body(Link(connection, rank), *args)))
    except BaseException:
        connection.send(("error", traceback.format_exc()))
