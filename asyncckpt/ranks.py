"""How the ranks of one run meet: a gloo group of the manager's own, beside the keys that they leave for each other.

Knows nothing of checkpoints. Called by the manager and the planners (training thread), the writer (writer thread) and
`SyncPoint` (its watcher). World size 1, or no process group at all, takes the same calls and talks to nobody.

    thread     calls                                                        never
    training   agree, gather_, scatter_, broadcast_, and all below          -
    others     post, collect, claim, await_announcement, ..., close         a collective: two threads on one group hang

Every wait has a deadline, and a long one is told of while it lasts: events.Delayed.

Ranks count the members of the joined group by their global rank: the global rank itself, unless that group is only a
part of the world.
"""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore

from asyncckpt import events
from asyncckpt.errors import CheckpointError
from asyncckpt.gloo_group import GlooGroup
from asyncckpt.store_keys import Patience, Store, StoreKeys, tell_nobody

T = TypeVar("T")

# Of one length, whatever is agreed on: gloo aborts the process of a rank that gets more than it expects, and sends
# nothing at all for a tensor without elements.
_NUM_AGREED = 5
_CONSTRUCTING = "constructing the manager (every rank must)"
_BROKEN = "broken"
"""The key of ranks whose collective failed."""


class _Collective(NamedTuple):
    """One that the training thread is in. number: how many this rank has entered."""

    phase: str
    number: int
    started: float
    patience: Patience


class Ranks(StoreKeys):
    """The ranks that one manager works with. `rank` 0 is the coordinator."""

    def __init__(
        self,
        group: GlooGroup | None,
        store: Store,
        training_store: Store,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        tell: Callable[..., None] = tell_nobody,
    ) -> None:
        """`join` is the way to get one. store, training_store: two clients of one store, as a client serves one call at
        a time and the training thread must not wait for a writer's transfer."""
        super().__init__(store, rank=rank, world_size=world_size, timeout_s=timeout_s)
        self.step = -1
        """What the training thread's collectives are about, for reports; -1: no step."""
        self._group = group
        self._training_store = training_store
        self._num_entered = 0
        self._collective: _Collective | None = None
        self._tell = tell
        self._broken: str | None = None

    @classmethod
    def join(
        cls,
        process_group: dist.ProcessGroup | None = None,
        *,
        timeout_s: float = 600.0,
        tell: Callable[..., None] = tell_nobody,
    ) -> Ranks:
        """The ranks of `process_group`, or of the world. A collective call: every one of them must make it.

        process_group: only says who takes part; nothing is ever sent over it. timeout_s: for this call and for each
        collective later. tell: called with events.Delayed or events.Failed and the values of one, but for url and time;
        kept by a thread. Raises CheckpointError naming ranks that did not come, ValueError for a group without us.
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
        at = {"rank": members.index(dist.get_rank()), "world_size": len(members)}
        store: Store = dist.distributed_c10d._get_default_store()
        entrance = StoreKeys(
            PrefixStore(f"asyncckpt/join/{zlib.crc32(repr(members).encode())}", store), **at, timeout_s=timeout_s
        )
        try:
            name = _own_name(entrance)
            own, trainers = (PrefixStore(f"asyncckpt/{name}", client) for client in (store.clone(), store))
            ranks = cls(None, own, trainers, **at, timeout_s=timeout_s, tell=tell)
            with ranks._phase(_CONSTRUCTING):
                if ranks.is_coordinator:
                    ranks._welcome(entrance, name)
                ranks._group = GlooGroup(PrefixStore("group", own), **at, timeout_s=timeout_s)
        finally:
            entrance.close()
        return ranks

    def _welcome(self, entrance: StoreKeys, name: str) -> None:
        """Answer every rank that comes with the name, until all have it."""
        answered: dict[int, str] = {}

        def answer() -> bool | None:
            late = self._behind(1)
            for rank in late:
                if (word := entrance.posted("hello", rank)) and answered.get(rank) != word.decode():
                    answered[rank] = word.decode()
                    entrance.announce(f"welcome/{answered[rank]}", name.encode())
            return None if late else True

        self._await(
            _CONSTRUCTING,
            answer,
            self.timeout_s,
            lambda waited_s: self._tell_delay(_CONSTRUCTING, self._behind(1), waited_s),
        )
        for word in answered.values():
            entrance.forget(f"welcome/{word}")
        if late := self._behind(1):
            raise TimeoutError(f"ranks {late} did not come")

    # -- training thread: collectives

    def agree(self, values: Sequence[int], *, phase: str) -> list[list[int]]:
        """Every rank's `values`, by rank: at most 5 of int64, the same number on every rank. Small messages.

        Returns when every rank has come. Raises CheckpointError on all of them if one is in another phase.
        """
        if self._group is None:
            return [list(values)]
        code = _phase_code(phase)
        with self._phase(phase):
            mine = torch.tensor([code, *values, *[0] * (_NUM_AGREED - len(values))], dtype=torch.int64, device="cpu")
            rows = self._told(self._group, self._group.gather(mine)).tolist()
        for rank, row in enumerate(rows):
            if row[0] != code:
                raise CheckpointError(
                    f"rank {rank} is in {_phase_name(row[0])!r} while rank {self.rank} is in {phase!r}; neither was "
                    "done. Every rank must make the same calls of the manager, in the same order.",
                    rank=rank,
                )
        return [row[1 : 1 + len(values)] for row in rows]

    def _told(self, group: GlooGroup, rows: torch.Tensor) -> torch.Tensor:
        """Rank 0's `rows` for all. Those of the other ranks are nearly always the same, and then go as one: all of them
        to all ranks would grow with the square of their number.

        Not all_gather, a ring that takes each rank's turn: 16 ranks on 2 cores 46 ms, gather and broadcast 12 ms.
        """
        head = torch.empty((3, rows.shape[1]), dtype=torch.int64, device="cpu")
        if self.is_coordinator:
            head[0] = bool((rows[1:] == rows[1]).all())
            head[1:] = rows[:2]
        if group.broadcast(head)[0, 0]:
            return torch.cat((head[1:2], head[2:].expand(self.world_size - 1, -1)))
        return group.broadcast(rows)

    def gather_objects(self, value: T, *, phase: str) -> list[T]:
        """Every rank's picklable `value`, by rank, on the coordinator; empty elsewhere."""
        if self._group is None:
            return [value]
        with self._phase(phase):
            return self._group.gather_objects(value)

    def scatter_objects(self, values: Sequence[T] | None, *, phase: str) -> T:
        """This rank's item of the coordinator's `values` (one per rank; ignored elsewhere)."""
        if self._group is None:
            return cast(Sequence[T], values)[0]
        with self._phase(phase):
            return cast(T, self._group.scatter_objects(values if self.is_coordinator else None))

    def broadcast_object(self, value: T, *, phase: str) -> T:
        """The coordinator's `value`."""
        if self._group is None:
            return value
        with self._phase(phase):
            return cast(T, self._group.broadcast_object(value))

    def gather_numbers(self, values: npt.NDArray[np.int64], *, phase: str) -> list[npt.NDArray[np.int64]]:
        """Every rank's `values`, int64 and as many as it has, by rank. Two messages; of one length for all."""
        lengths = [length for (length,) in self.agree([len(values)], phase=phase)]
        mine = torch.zeros(max(lengths), dtype=torch.int64, device="cpu")
        mine[: len(values)] = torch.from_numpy(values)
        if self._group is None or not len(mine):
            return [mine.numpy() for _ in lengths]
        with self._phase(phase):
            theirs = self._group.all_gather(mine)
        return [numbers[:length].numpy() for numbers, length in zip(theirs, lengths, strict=True)]

    def pass_on(
        self, letters: Sequence[tuple[Sequence[int], memoryview]], arrived: Callable[[int], None], *, phase: str
    ) -> None:
        """Bring each letter, (ranks, memory), from the first of its ranks to the others, who help to spread it.

        A collective call. Every rank gives the letters that name it, in an order that all follow. Bytes go from memory
        to memory, which must stay as it is until this returns. arrived: called with a letter's place here as soon as
        its bytes are, in order; must not raise.
        """
        group, timeout = self._group, timedelta(seconds=self.timeout_s)
        assert group is not None
        with self._phase(phase):
            routes = [_route(ranks, self.rank) for ranks, _ in letters]
            tensors = [torch.frombuffer(memory, dtype=torch.uint8) for _, memory in letters]
            awaited = [
                None if source is None else group.receive(tensor, source)
                for tensor, (source, _) in zip(tensors, routes, strict=True)
            ]
            sent: list[Any] = []
            for number, (tensor, (_, targets)) in enumerate(zip(tensors, routes, strict=True)):
                if (work := awaited[number]) is not None:
                    work.wait(timeout)
                sent += [group.send(tensor, target) for target in targets]
                if work is not None:
                    arrived(number)
            for work in sent:
                work.wait(timeout)

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
        self._collective = _Collective(phase, self._num_entered, started, Patience(self.timeout_s))
        try:
            self._training_store.set(str(self.rank), str(self._num_entered))  # sent, not answered: 8 us
            yield
        except Exception as exc:
            error = self._broken_off(phase, time.monotonic() - started, exc)
            self._tell(events.Failed, step=self.step, rank=self.rank, phase=phase, error=error)
            raise error from exc
        finally:
            self._collective = None

    def _broken_off(self, phase: str, took_s: float, cause: Exception) -> CheckpointError:
        """What the first rank to give up finds holds for all: others may come later, or be in a later phase."""
        of_step = f" of step {self.step}" if self.step >= 0 else ""
        failed = f"{phase}{of_step} failed on rank {self.rank} after {took_s:.1f} s"
        to_blame: list[int] = []
        try:
            to_blame, found = self._who_is_missing(took_s)
            word = json.dumps([to_blame, f"{failed}: {found}"]).encode()
            first_to_blame, first = json.loads(self.claim(_BROKEN, word))
            if first_to_blame and first_to_blame != to_blame:
                to_blame, found = first_to_blame, f"it had been given up: {first}"
        except CheckpointError:
            to_blame, found = [0], "the store is gone too: its host (often the process of rank 0) died or is stopped"
        self._broken = f"{failed}: {found}"
        return CheckpointError(
            f"{self._broken}. Committed steps are safe. The ranks are out of step: restart the job. Cause: {cause}",
            step=None if self.step < 0 else self.step, rank=to_blame[0] if to_blame else self.rank,
        )  # fmt: skip

    def _who_is_missing(self, took_s: float) -> tuple[list[int], str]:
        """(ranks, what of them) in the collective that failed, if it shows. Where a connection broke, who is merely
        late gets some time to come, and everybody to answer: a guess."""
        grace_s = min(5.0, self.timeout_s / 10)
        self.post(_BROKEN, b"")
        late = self._after_grace(lambda: self._behind(self._num_entered), min(grace_s, self.timeout_s - took_s))
        if late:
            return late, f"ranks {late} of {self.world_size} did not take part"
        if self._group is not None:  # else nobody watches yet
            self.announce(f"{_BROKEN}/who", b"")
            silent = self._after_grace(self._silent, grace_s)
            if silent:
                return silent, f"ranks {silent} of {self.world_size} took part, but died or were stopped meanwhile"
        return [], "all ranks had begun it, so one of them lost its connection"

    def _after_grace(self, who: Callable[[], list[int]], grace_s: float) -> list[int]:
        deadline = time.monotonic() + grace_s
        while (ranks := who()) and time.monotonic() < deadline and not self._closed.wait(self.poll_s):
            pass
        return ranks

    def _behind(self, number: int) -> list[int]:
        """The ranks that have not entered that many collectives."""
        entered = self._counts([str(rank) for rank in range(self.world_size)])
        return [rank for rank, count in enumerate(entered) if count < number]

    def _silent(self) -> list[int]:
        """The ranks that neither are done with the collective that failed nor answer."""
        missing = self.missing(_BROKEN)
        return sorted(set(missing) & set(self._behind(self._num_entered + 1))) if missing else []

    def watch(self) -> None:
        """For another thread to call, again and again: tell of ranks that keep the training thread waiting in a
        collective (of several ranks that wait the lowest tells), and answer those whose collective failed."""
        waiting = self._collective
        if waiting is None:
            return
        if self.announced(f"{_BROKEN}/who") is not None:
            self.post(_BROKEN, b"")
        if not waiting.patience.is_over(waited_s := time.monotonic() - waiting.started):
            return
        if any(self._counts([str(lower)])[0] >= waiting.number for lower in range(self.rank)):
            return
        late = self._behind(waiting.number)
        if self._collective is waiting:
            self._tell_delay(waiting.phase, late, waited_s)

    def _tell_delay(self, phase: str, late: Sequence[int], waited_s: float) -> None:
        if late:
            self._tell(
                events.Delayed, step=self.step, rank=self.rank, phase=phase, ranks=tuple(late), waited_s=waited_s
            )

    def close(self) -> None:
        """End every wait of other threads and drop the group; idempotent, and waits for no other rank."""
        if self._closed.is_set():
            return
        super().close()
        if self._group is not None:
            self._group.close()


def _route(ranks: Sequence[int], rank: int) -> tuple[int | None, list[int]]:
    """Whom a rank gets a letter from, and to whom it passes it on. With each step twice as many have it."""
    place = ranks.index(rank)
    step = 1 << place.bit_length()  # the first in which this place sends
    source = ranks[place - step // 2] if place else None
    targets = []
    while place + step < len(ranks):
        targets.append(ranks[place + step])
        step *= 2
    return source, targets


def _own_name(entrance: StoreKeys) -> str:
    """What no other manager of the job is called, nor any of an earlier launch: where torchrun starts the ranks again,
    it keeps the store, and in it all that the last ones left, some of them more than others (torch 2.13). So nothing in
    it is believed but an answer to a word that is new."""
    word, name = uuid.uuid4().hex, uuid.uuid4().hex
    entrance.post("hello", word.encode())
    if entrance.is_coordinator:
        return name
    try:
        return entrance.await_announcement(f"welcome/{word}", entrance.timeout_s).decode()
    except TimeoutError as exc:
        raise CheckpointError(
            f"{_CONSTRUCTING} failed on rank {entrance.rank} after {entrance.timeout_s:g} s: ranks [0] of "
            f"{entrance.world_size} did not take part. Committed steps are safe.",
            rank=0,
        ) from exc


def _phase_code(phase: str) -> int:
    return int.from_bytes(phase[:7].encode(), "big")  # fits an int64


def _phase_name(code: int) -> str:
    return code.to_bytes(7, "big").lstrip(b"\0").decode(errors="replace")
