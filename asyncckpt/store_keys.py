"""What the ranks of one run leave for each other in torch's store: a post of each, or one word for all, under keys.

Knows nothing of checkpoints or collectives; ranks.py adds those. For any thread. World size 1 takes the same calls.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

from asyncckpt.errors import CheckpointError

T = TypeVar("T")
_Asked: TypeAlias = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
Store = Any  # torch.distributed.Store: the stubs of torch 2.13 do not export it, nor know its `clone`

# TCPStore closes the connection on a value above 8 MiB ("Invalid payload size", seen on torch 2.13).
_PART_BYTES = 4 << 20
# For one request about many keys. More at once take longer: 4,096 keys 39 ms to check in one request, 16 ms in 16;
# 16,384 keys 2.1 s (TCPStore over loopback, torch 2.13).
_KEYS_AT_ONCE = 256


def tell_nobody(*what: Any, **values: Any) -> None:
    pass


class Patience:
    """When to speak of a wait: after a sixteenth of its timeout (a guess), and each time that has doubled."""

    def __init__(self, timeout_s: float) -> None:
        self._next_s = timeout_s / 16

    def is_over(self, waited_s: float) -> bool:
        if waited_s < self._next_s:
            return False
        self._next_s = 2 * waited_s
        return True


class StoreKeys:
    """Every call ends: a wait at its deadline and at `close()`, anything else when the store has not answered for half
    of `timeout_s` (5 s at least): if its host is stopped, or lost its power, no connection breaks."""

    def __init__(self, store: Store, *, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.is_coordinator = rank == 0
        self.timeout_s = timeout_s
        # A check takes the store's one server thread at most 134 us (TCPStore over loopback, 2 cores, torch 2.13):
        # all ranks together take a quarter of its time.
        self.poll_s = max(0.02, world_size / 2000)
        self._store = store
        self._num_parts: dict[str, int] = {}  # of what took more than one
        self._closed = threading.Event()
        self._lost: str | None = None
        self._calls: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._start = threading.Lock()
        self._caller: threading.Thread | None = None

    def post(self, key: str, data: bytes) -> None:
        """Leave this rank's `data` of any size under `key` for `collect`."""
        self._put(f"{key}/{self.rank}", data)

    def posted(self, key: str, rank: int) -> bytes | None:
        """What a rank has posted under `key`, or None. Does not wait."""
        return self._peek(f"{key}/{rank}")

    def has_posted(self, key: str, rank: int) -> bool:
        return self._have([f"{key}/{rank}"])

    def have_all_posted(self, key: str) -> bool:
        return all(self._have(names) for names in self._posts(key))

    def missing(self, key: str) -> list[int]:
        """The ranks that have not posted under `key`. Does not wait."""
        return [int(name.rpartition("/")[2]) for names in self._posts(key) for name in self._lacking(names)]

    def collect(
        self, key: str, timeout_s: float, *, unless: str = "", on_wait: Callable[[float], None] = tell_nobody
    ) -> list[bytes]:
        """What every rank posted under `key`, by rank. Raises TimeoutError naming the ranks that did not post; with
        `unless` also as soon as there is word under that key.

        on_wait: called with the seconds waited, after a sixteenth of the timeout and each time that has doubled.
        """

        def ask() -> bool | None:
            if self.have_all_posted(key):
                return True
            return False if unless and self._have([f"{unless}/all"]) else None

        if not self._await(key, ask, timeout_s, on_wait):
            missing = self.missing(key)
            raise TimeoutError(f"{key!r}: ranks {missing} of {self.world_size} did not report in {timeout_s:g} s")
        return [data for names in self._posts(key) for data in self._get(names)]

    def announce(self, key: str, data: bytes) -> None:
        """Leave `data` under `key` for every rank. The last one to announce wins."""
        self._put(f"{key}/all", data)

    def claim(self, key: str, data: bytes, *, over: bytes = b"") -> bytes:
        """Announce `data` unless there is word already, other than `over`. The word that holds, the same for all.

        data, over: text, of less than 4 MiB.
        """
        name = f"{key}/all"
        before = _framed([over]).decode() if over else ""
        return self._whole(name, self._ask(self._store.compare_set, name, before, _framed([data]).decode()))

    def announced(self, key: str) -> bytes | None:
        """What was announced under `key`, or None. Does not wait."""
        return self._peek(f"{key}/all")

    def await_announcement(
        self, key: str, timeout_s: float, *, beyond: bytes = b"", on_wait: Callable[[float], None] = tell_nobody
    ) -> bytes:
        """What was announced under `key`, if it is not `beyond`. Raises TimeoutError. on_wait: as for `collect`."""

        def ask() -> bytes | None:
            word = self.announced(key)
            return None if beyond and word == beyond else word

        word = self._await(f"{key}/all", ask, timeout_s, on_wait)
        if word is None:
            raise TimeoutError(f"{key!r}: rank {self.rank} waited {timeout_s:g} s in vain for word from rank 0")
        return word

    def forget(self, key: str) -> None:
        """Delete what this rank has posted under `key`, and on the coordinator also what was announced there, from the
        store, which lives as long as the job.

        For each rank to call, once nobody will read it: when all have posted under a later key, all have heard.
        """
        for name in (f"{key}/{self.rank}", f"{key}/all")[: 1 + self.is_coordinator]:
            parts = [f"{name}/{number}" for number in range(1, self._num_parts.pop(name, 1))]
            for each in (name, *parts):
                self._ask(self._store.delete_key, each)

    def _posts(self, key: str) -> list[list[str]]:
        return _portions([f"{key}/{rank}" for rank in range(self.world_size)])

    def _peek(self, name: str) -> bytes | None:
        return self._get([name])[0] if self._have([name]) else None

    def _have(self, names: list[str]) -> bool:
        """Whether all are there."""
        return bool(self._ask(self._store.check, names))

    def _lacking(self, names: list[str]) -> list[str]:
        """By halves: few are missing, as a rule."""
        if self._have(names):
            return []
        if len(names) == 1:
            return names
        middle = len(names) // 2
        return self._lacking(names[:middle]) + self._lacking(names[middle:])

    def _await(
        self, key: str, ask: Callable[[], T | None], timeout_s: float, on_wait: Callable[[float], None]
    ) -> T | None:
        """The answer, or None after `timeout_s`. Polls, because a blocking wait on the store can be neither interrupted
        nor shared by two threads."""
        started, pause, patience = time.monotonic(), 0.001, Patience(timeout_s)
        while (answer := ask()) is None and (waited_s := time.monotonic() - started) < timeout_s:
            if patience.is_over(waited_s):
                on_wait(waited_s)
            if self._closed.wait(min(pause, timeout_s - waited_s)):
                raise CheckpointError(f"closed while waiting for {key!r}", rank=self.rank)
            pause = min(2 * pause, self.poll_s)
        return answer

    def _put(self, name: str, data: bytes) -> None:
        parts = [data[start : start + _PART_BYTES] for start in range(0, len(data), _PART_BYTES)] or [b""]
        for number in range(1, len(parts)):
            self._ask(self._store.set, f"{name}/{number}", parts[number])
        self._ask(self._store.set, name, _framed(parts))  # last, because its presence tells that all parts are there
        if len(parts) > 1:
            self._num_parts[name] = len(parts)

    def _get(self, names: list[str]) -> list[bytes]:
        values = self._ask(self._store.multi_get, names)
        return [self._whole(name, value) for name, value in zip(names, values, strict=True)]

    def _whole(self, name: str, value: bytes) -> bytes:
        num_parts, first = value.split(b"\n", 1)
        names = [f"{name}/{number}" for number in range(1, int(num_parts))]
        return b"".join([first, *(self._ask(self._store.get, name) for name in names)])

    def _counts(self, names: list[str]) -> list[int]:
        """What the store's counters say."""
        counts: list[int] = []
        for some in _portions(names):
            if self._have(some):
                counts += map(int, self._ask(self._store.multi_get, some))
            else:  # adding makes those that are not there
                counts += [self._ask(self._store.add, name, 0) for name in some]
        return counts

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """The answer to a call of the store, made on a thread of its own, which can be left alone with it."""
        if self.world_size == 1:
            return call(*args)
        if self._lost:
            raise CheckpointError(self._lost, rank=0)
        answer = Future[Any]()
        with self._start:
            if self._caller is None:
                self._caller = threading.Thread(target=self._call, name="asyncckpt-store", daemon=True)
                self._caller.start()
        self._calls.put((answer, call, args))
        limit_s = max(5.0, self.timeout_s / 2)
        try:
            return answer.result(limit_s)
        except TimeoutError as exc:
            error = self._failed(args, f"did not answer for {limit_s:g} s", "is stopped, or its machine is gone.")
            self._lost = str(error)
            raise error from exc
        except RuntimeError as exc:  # all of torch's store errors
            raise self._failed(args, "failed", f"has probably ended. Cause: {exc}") from exc

    def _failed(self, args: tuple[Any, ...], how: str, host: str) -> CheckpointError:
        name = args[0] if isinstance(args[0], str) else args[0][0]
        return CheckpointError(
            f"the store of torch.distributed {how} at {name!r} on rank {self.rank}. Committed steps are safe; restart "
            f"the job. The process that hosts the store (often rank 0) {host}",
            rank=0,
        )

    def _call(self) -> None:
        while (asked := self._calls.get()) is not None:
            answer, call, args = asked
            try:
                answer.set_result(call(*args))
            except Exception as exc:
                answer.set_exception(exc)

    def close(self) -> None:
        """End every wait of other threads. The store stays."""
        self._closed.set()
        self._calls.put(None)


def _portions(names: list[str]) -> list[list[str]]:
    """As many at a time as one request should ask for."""
    return [names[start : start + _KEYS_AT_ONCE] for start in range(0, len(names), _KEYS_AT_ONCE)]


def _framed(parts: Sequence[bytes]) -> bytes:
    return b"%d\n%b" % (len(parts), parts[0])
