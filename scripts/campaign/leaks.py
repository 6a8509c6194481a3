"""What does not come back when saves fail: one manager saves on and on under faults of all kinds mixed.

The proxy that breaks requests runs in another process, so that nothing of it counts here. Called by faults.py.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncckpt import CheckpointManager, SaveError
from asyncckpt.commit import SWEEP_EVERY
from asyncckpt.events import Event, Written
from asyncckpt.testing import Call, RecordingStorage
from scripts.benchmarks.process import give_back_free_memory, own_bytes
from scripts.campaign.row import Outcome, draws
from tests.faults.harness import Place, state_of, strays
from tests.s3 import MIB
from tests.states import assert_same, target_like

WARM_UP, NUM_SAVES = 5, 50
RATE = 0.05  # of requests that the proxy breaks, of calls of storage that raise, of saves with another fault
# Memory that came back is given to the system only in parts (arenas of every thread, obstore's among them). A snapshot
# that stays is 6 MB, and there are some 15 failures in NUM_SAVES.
SPARE_BYTES = 48 * MIB
# aiohttp, obstore and fsspec keep connections and threads for later, never more than they had in flight.
SPARE_DESCRIPTORS = SPARE_THREADS = 24


class FailingStorage(RecordingStorage):
    """Calls fail, or their answers are lost, at a rate."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.draw = random.Random(0)
        self.rate = 0.0

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        is_lost = self.draw.random() < 0.5
        if self.draw.random() >= self.rate:
            return run()
        if is_lost:
            run()
        raise OSError(self.draw.choice((errno.EIO, errno.EACCES, errno.ETIMEDOUT)), "injected fault")


class Unstageable:
    def state_dict(self) -> Any:
        raise RuntimeError("injected fault")

    def load_state_dict(self, state_dict: Any) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Usage:
    memory: int
    staged: int
    descriptors: int
    threads: int

    @classmethod
    def now(cls, manager: CheckpointManager) -> Usage:
        gc.collect()
        give_back_free_memory()
        descriptors = len(os.listdir("/proc/self/fd"))
        pool = manager._stager._pool  # type: ignore[attr-defined]
        repr(pool)  # takes in what was given back
        staged = pool._lent_bytes
        return cls(own_bytes(), staged, descriptors, threading.active_count())


class Leaks:
    """One line of saves to a place; `rate` is the proxy's."""

    def __init__(self, open_manager: Callable[..., CheckpointManager], place: Place, rate: Any, seed: int) -> None:
        self._open = open_manager
        self._place = place
        self._rate = rate
        self._seed = seed
        self._step = 0
        self._committed: list[int] = []
        self._manager: CheckpointManager | None = None
        self._draw = random.Random(0)

    def attempt(self, number: int) -> Counter[Outcome]:
        """NUM_SAVES saves, after which all is as it was after the first few."""
        if self._manager is None:
            self._start()
        manager, tally = self._manager, Counter[Outcome]()
        assert manager is not None
        self._draw = self._storage.draw = draws(self._seed, "leaks", number)
        self._rate.value = self._storage.rate = RATE
        for _ in range(NUM_SAVES):
            tally[self._save(manager)] += 1
        self._come_to_rest(manager)
        self._compare(self._base, Usage.now(manager))
        return tally

    def _start(self) -> None:
        self._manager = manager = self._open(self._place, events=[self._sink], retry_timeout=5.0)
        manager._storage = manager._saver.committer.storage = self._storage = FailingStorage(manager._storage)
        for _ in range(WARM_UP):
            self._save(manager)
        self._come_to_rest(manager)
        self._base = Usage.now(manager)

    def _save(self, manager: CheckpointManager) -> Outcome:
        self._step += 1
        state = state_of(self._step, self._step)
        if self._draw.random() < self._storage.rate:
            state["broken"] = Unstageable()
        try:
            if self._step % 2:
                manager.save(self._step, state)
            else:
                manager.save_async(self._step, state)
                manager.join()
        except (SaveError, RuntimeError):
            return "detected"
        return "survived"

    def _sink(self, event: Event) -> None:
        if isinstance(event, Written) and self._draw.random() < RATE:
            raise ValueError("injected fault")

    def _come_to_rest(self, manager: CheckpointManager) -> None:
        """Nothing fails, one more save, and the place holds whole steps alone."""
        self._rate.value = self._storage.rate = 0.0
        for _ in range(SWEEP_EVERY):
            assert self._save(manager) == "survived"
            manager.join()
        manager.refresh()
        steps = manager.all_steps()
        assert len(steps) == 2, steps
        assert steps[-1] == self._step
        target = target_like(state_of(0, 0))
        manager.restore(self._step, target)
        assert_same(state_of(self._step, self._step), target)
        assert (left := strays(self._place, manager._storage, steps)) == [], left

    @staticmethod
    def _compare(base: Usage, now: Usage) -> None:
        assert now.staged == base.staged == 0, now
        assert now.memory <= base.memory + SPARE_BYTES, (base, now)
        assert now.descriptors <= base.descriptors + SPARE_DESCRIPTORS, (base, now)
        assert now.threads <= base.threads + SPARE_THREADS, (base, now)
