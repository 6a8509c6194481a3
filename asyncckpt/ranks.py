"""How the ranks of one run talk to each other: a gloo group of the manager's own, and keys in torch's store.

Knows nothing of checkpoints. Called by the manager and the planners (training thread), the writer (writer thread) and
`SyncPoint` (its watcher). World size 1, or no process group at all, takes the same calls and talks to nobody.

    thread     calls                                                        never
    training   agree, gather_, scatter_, broadcast_, and all below          -
    others     post, collect, announce, await_announcement, ..., close      a collective: two threads on one group hang

Ranks count the members of the joined group by their global rank: the global rank itself, unless that group is only a
part of the world.
"""

from __future__ import annotations

import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

from asyncckpt.errors import CheckpointError

T = TypeVar("T")
Store = Any  # torch.distributed.Store: the stubs of torch 2.13 do not export it, nor know its `clone`

# Of one length, whatever is agreed on: gloo aborts the process of a rank that gets more than it expects, and sends
# nothing at all for a tensor without elements.
_NUM_AGREED = 5
# TCPStore closes the connection on a value above 8 MiB ("Invalid payload size", seen on torch 2.13).
_PART_BYTES = 4 << 20


class Ranks:
    """The ranks that one manager works with. `rank` 0 is the coordinator.

    Every wait ends: at its deadline, and off the training thread also at `close()`. Only a store call whose server
    vanished without closing the connection (a host that lost power) can outlast both: call this from daemon threads.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        store: Store,
        training_store: Store,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
    ) -> None:
        """`join` is the way to get one. store, training_store: two clients of one store, as a client serves one call at
        a time and the training thread must not wait for a writer's transfer."""
        self.rank = rank
        self.world_size = world_size
        self.is_coordinator = rank == 0
        self.timeout_s = timeout_s
        # A check takes the store's one server thread at most 134 us (TCPStore over loopback, 2 cores, torch 2.13):
        # all ranks together take a quarter of its time.
        self.poll_s = max(0.02, world_size / 2000)
        self._group = group
        self._store = store
        self._entered = training_store
        self._num_entered = 0
        self._broken: str | None = None
        self._closed = threading.Event()

    @classmethod
    def join(cls, process_group: dist.ProcessGroup | None = None, *, timeout_s: float = 600.0) -> Ranks:
        """The ranks of `process_group`, or of the world. A collective call: every one of them must make it.

        process_group: only says who takes part; nothing is ever sent over it. timeout_s: for this call and for each
        collective later. Raises CheckpointError naming ranks that did not come, ValueError for a group without us.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout_s!r}")
        members = [0]
        if dist.is_initialized():
            if dist.get_rank(process_group) < 0:
                raise ValueError(
                    f"process_group must contain the calling rank; global rank {dist.get_rank()} is not in it"
                )
            members = sorted(dist.get_process_group_ranks(process_group or dist.group.WORLD))
        if len(members) == 1:
            nobody = HashStore()
            return cls(None, nobody, nobody, rank=0, world_size=1, timeout_s=timeout_s)
        rank = members.index(dist.get_rank())
        store: Store = dist.distributed_c10d._get_default_store()
        # Counts joins with these members: the same number on all of them, unless one is missing.
        entrance = PrefixStore(f"asyncckpt/join/{zlib.crc32(repr(members).encode())}", store)
        arrivals = cls(None, entrance, entrance, rank=rank, world_size=len(members), timeout_s=timeout_s)
        arrivals._num_entered = entrance.add(str(rank), 0)
        with arrivals._phase("constructing the manager (every rank must)"):
            group = _own_group(members, timeout_s)
            name = [uuid.uuid4().hex]  # two managers of one job must not read each other's keys
            dist.broadcast_object_list(name, group=group, group_src=0)
            own, trainers = (PrefixStore(f"asyncckpt/{name[0]}", client) for client in (store.clone(), store))
        return cls(group, own, trainers, rank=rank, world_size=len(members), timeout_s=timeout_s)

    # -- training thread: collectives

    def agree(self, values: Sequence[int], *, phase: str) -> list[list[int]]:
        """Every rank's `values`, by rank: at most 5 of int64, the same number on every rank. One small message.

        Returns when every rank has come. Raises CheckpointError on all of them if one is in another phase.
        """
        if self.world_size == 1:
            return [list(values)]
        code = _phase_code(phase)
        with self._phase(phase):
            mine = torch.tensor([code, *values, *[0] * (_NUM_AGREED - len(values))], dtype=torch.int64, device="cpu")
            theirs = [torch.empty_like(mine) for _ in range(self.world_size)]
            dist.all_gather(theirs, mine, group=self._group)
        rows = [row.tolist() for row in theirs]
        for rank, row in enumerate(rows):
            if row[0] != code:
                raise CheckpointError(
                    f"rank {rank} is in {_phase_name(row[0])!r} while rank {self.rank} is in {phase!r}; neither was "
                    "done. Every rank must make the same calls of the manager, in the same order.",
                    rank=rank,
                )
        return [row[1 : 1 + len(values)] for row in rows]

    def gather_objects(self, value: T, *, phase: str) -> list[T]:
        """Every rank's picklable `value`, by rank, on the coordinator; empty elsewhere."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_coordinator else None
        with self._phase(phase):
            dist.gather_object(value, values, group=self._group, group_dst=0)
        return values or []

    def scatter_objects(self, values: Sequence[T] | None, *, phase: str) -> T:
        """This rank's item of the coordinator's `values` (one per rank; ignored elsewhere)."""
        if self.world_size == 1:
            return cast(Sequence[T], values)[0]
        received: list[Any] = [None]
        with self._phase(phase):
            dist.scatter_object_list(received, cast(Any, values), group=self._group, group_src=0)
        return cast(T, received[0])

    def broadcast_object(self, value: T, *, phase: str) -> T:
        """The coordinator's `value`."""
        if self.world_size == 1:
            return value
        carrier = [value]
        with self._phase(phase):
            dist.broadcast_object_list(carrier, group=self._group, group_src=0)
        return carrier[0]

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        """Around one collective: a failure names the phase and the ranks that did not come.

        After a failure the ranks are out of step for good, so later collectives fail at once instead of hanging.
        """
        if self._closed.is_set():
            raise CheckpointError(f"cannot start {phase}: closed", rank=self.rank)
        if self._broken:
            raise CheckpointError(f"cannot start {phase}: {self._broken}", rank=self.rank)
        self._num_entered += 1
        started = time.monotonic()
        try:
            self._entered.set(str(self.rank), str(self._num_entered))  # sent, not answered: 8 us
            yield
        except Exception as exc:
            took = time.monotonic() - started
            self._broken = f"{phase} failed on rank {self.rank} after {took:.1f} s: {self._who_is_missing()}"
            raise CheckpointError(
                f"{self._broken}. Committed steps are safe. The ranks are out of step: restart the job. Cause: {exc}",
                rank=self.rank,
            ) from exc

    def _who_is_missing(self) -> str:
        missing = list(range(self.world_size))
        deadline = time.monotonic() + min(5.0, self.timeout_s / 10)  # who is merely late gets this long: a guess
        try:
            while missing := [rank for rank in missing if self._entered.add(str(rank), 0) < self._num_entered]:
                if time.monotonic() > deadline or self._closed.wait(self.poll_s):
                    return f"ranks {missing} of {self.world_size} did not take part"
        except RuntimeError:
            return "the store is gone too, so the process that hosts it (often rank 0) has probably died"
        return "all ranks had begun it, so one of them died or lost its connection meanwhile"

    # -- any thread: keys

    def post(self, key: str, data: bytes) -> None:
        """Leave this rank's `data` of any size under `key` for `collect`."""
        self._put(f"{key}/{self.rank}", data)

    def missing(self, key: str) -> list[int]:
        """The ranks that have not posted under `key`. Does not wait."""
        return [rank for rank in range(self.world_size) if not self._has(f"{key}/{rank}")]

    def collect(self, key: str, timeout_s: float) -> list[bytes]:
        """What every rank posted under `key`, by rank. Raises TimeoutError naming the ranks that did not post."""
        deadline = time.monotonic() + timeout_s
        for rank in range(self.world_size):
            if not self._await(f"{key}/{rank}", deadline):
                missing = self.missing(key)
                raise TimeoutError(f"{key!r}: ranks {missing} of {self.world_size} did not report in {timeout_s:g} s")
        return [self._get(f"{key}/{rank}") for rank in range(self.world_size)]

    def announce(self, key: str, data: bytes) -> None:
        """Leave `data` under `key` for every rank. The last one to announce wins."""
        self._put(f"{key}/all", data)

    def announced(self, key: str) -> bytes | None:
        """What was announced under `key`, or None. Does not wait."""
        return self._get(f"{key}/all") if self._has(f"{key}/all") else None

    def await_announcement(self, key: str, timeout_s: float) -> bytes:
        """What was announced under `key`. Raises TimeoutError."""
        if not self._await(f"{key}/all", time.monotonic() + timeout_s):
            raise TimeoutError(f"{key!r}: rank {self.rank} waited {timeout_s:g} s in vain for word from rank 0")
        return self._get(f"{key}/all")

    def forget(self, key: str) -> None:
        """Delete everything under `key` from the store, which lives as long as the job.

        For one rank to call, once every rank has read it: say, when all have posted under a later key.
        """
        with self._reaching_store(key):
            for name in ("all", *range(self.world_size)):
                self._store.delete_key(f"{key}/{name}")
                part = 1
                while self._store.delete_key(f"{key}/{name}/{part}"):
                    part += 1

    def _has(self, name: str) -> bool:
        with self._reaching_store(name):
            return bool(self._store.check([name]))

    def _await(self, name: str, deadline: float) -> bool:
        """Poll, because a blocking wait on the store can be neither interrupted nor shared by two threads."""
        pause = 0.001
        while not self._has(name):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._closed.wait(min(pause, left)):
                raise CheckpointError(f"closed while waiting for {name!r}", rank=self.rank)
            pause = min(2 * pause, self.poll_s)
        return True

    def _put(self, name: str, data: bytes) -> None:
        parts = [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)] or [b""]
        with self._reaching_store(name):
            for number in range(1, len(parts)):
                self._store.set(f"{name}/{number}", parts[number])
            # last, because its presence tells that all parts are there
            self._store.set(name, b"%d\n%b" % (len(parts), parts[0]))

    def _get(self, name: str) -> bytes:
        with self._reaching_store(name):
            num_parts, first = self._store.get(name).split(b"\n", 1)
            return b"".join([first, *(self._store.get(f"{name}/{number}") for number in range(1, int(num_parts)))])

    @contextmanager
    def _reaching_store(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as exc:  # all of torch's store errors
            raise CheckpointError(
                f"the store of torch.distributed failed at {name!r} on rank {self.rank}; the process that hosts it "
                f"(often rank 0) has probably ended. Committed steps are safe. Cause: {exc}",
                rank=self.rank,
            ) from exc

    def close(self) -> None:
        """End every wait of other threads and drop the group; idempotent, and waits for no other rank."""
        if self._closed.is_set():
            return
        self._closed.set()
        # The group of a part of the world stays: torch names it by its members and the number of groups that exist, so
        # the next one would get its name and find its dead addresses in the store (the fifth of a row failed).
        if self._group is not None and dist.is_initialized() and self.world_size == dist.get_world_size():
            with suppress(ValueError):  # it went with the world already
                dist.destroy_process_group(self._group)


def _phase_code(phase: str) -> int:
    return int.from_bytes(phase[:7].encode(), "big")  # fits an int64


def _phase_name(code: int) -> str:
    return code.to_bytes(7, "big").lstrip(b"\0").decode(errors="replace")


def _own_group(members: list[int], timeout_s: float) -> dist.ProcessGroup:
    """A gloo group over `members`, for the manager alone: two users of one group mix up their messages."""
    whole_world = len(members) == dist.get_world_size()
    group = dist.new_group(
        members, timeout=timedelta(seconds=timeout_s), backend="gloo", use_local_synchronization=not whole_world
    )
    return cast(dist.ProcessGroup, group)
