"""One step at which every rank saves, agreed on while training runs: for SIGTERM and for saves by the clock.

Decides when, never saves. The manager calls `reached` at every step; signal handlers and save policies call `request`.
"""

from __future__ import annotations

import atexit
import json
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from asyncckpt.ranks import Ranks

_STUCK_S = 60.0
"""A watcher thread that has not come back from the store by then is given up for good: a guess. Not less for a short
timeout: on a machine that does much else half a second was too little."""


class SyncPoint:
    """Agreement of all ranks on the next step to save at, asked for by any rank at any time.

    Every rank constructs it and calls `reached` with the same, increasing steps; not every step needs a call. A watcher
    thread does the talking: when it sees a request (its own or another rank's), it posts the last step its training
    thread reached, and `reached` waits until the coordinator has announced the highest of them plus one, a step that
    no rank has passed. As in tsl's PreemptionSyncManager, but a step left out cannot miss the point, and it works again
    and again. `reached` is thus held up for some polls (under 0.3 s up to 200 ranks) once per request.

    A rank that does not answer within `timeout_s` ends the attempt on all ranks: there is no sync point, the request
    is dropped, and `take_failure` says why. The first word on an attempt holds for all, so that a coordinator that
    comes late cannot name a step to save at when the others have given up. A dead watcher (the store is gone) says so
    once and holds up nothing.
    """

    def __init__(self, ranks: Ranks, *, timeout_s: float = 60.0) -> None:
        self.reasons: frozenset[str] = frozenset()
        """Why the latest reached point was asked for; the same on every rank."""
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._asked: set[str] = set()  # changed only by single calls, which are atomic: a signal handler adds to it
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  # the one queue whose put() is reentrant
        self._round = self._num_forgotten = 0
        self._deadline = 0.0
        self._closing = False
        self._state = threading.Condition()  # guards what follows
        self._last_step = -1
        self._in_round = False
        self._points: list[tuple[int, frozenset[str]]] = []
        self._failure: str | None = None
        self._watcher: threading.Thread | None = None
        if ranks.world_size > 1:
            self._watcher = threading.Thread(target=self._watch, name="asyncckpt-sync", daemon=True)
            self._watcher.start()
            # a daemon thread that comes back from a store call into a dying interpreter aborts the process
            atexit.register(self.close)

    def request(self, reason: str) -> None:
        """Ask for a save. Returns at once, takes no lock: for any thread and for signal handlers.

        Requests for the same reason, on any ranks, become one until its step is reached.
        """
        self._asked.add(reason)
        if self._watcher is not None:
            self._wake.put(None)

    def reached(self, step: int) -> bool:
        """True if all ranks save at this step: once per sync point, at the first call with `step` at or past it."""
        if self._watcher is None and self._asked:
            self._poll()
        with self._state:
            if not self._state.wait_for(lambda: not self._in_round, max(2 * self._timeout_s, _STUCK_S)):
                self._closing = True  # its answer, should it still come, is too late
                self._give_up(f"the watcher thread of rank {self._ranks.rank} is stuck in a store call")
            self._last_step = step
            due = [reasons for point, reasons in self._points if point <= step]
            if due:
                self._points = [(point, reasons) for point, reasons in self._points if point > step]
                self.reasons = frozenset().union(*due)
                self._asked.difference_update(self.reasons)
            return bool(due)

    def __repr__(self) -> str:
        with self._state:
            points = [point for point, _ in self._points]
            state = "asking all ranks" if self._in_round else f"saving at {points}" if points else "idle"
            return f"<SyncPoint at step {self._last_step}, {state}>"

    def take_failure(self) -> str | None:
        """Why the latest request came to nothing; told once."""
        with self._state:
            failure, self._failure = self._failure, None
            return failure

    def close(self) -> None:
        """End the watcher; idempotent. Only when every rank is past its last `reached`: the others need our answers."""
        self._closing = True
        self._wake.put(None)
        if self._watcher is not None:
            atexit.unregister(self.close)
            self._watcher.join(timeout=self._timeout_s)

    def _watch(self) -> None:
        idle_s = max(0.1, self._ranks.poll_s)
        try:
            while not self._closing:
                self._poll()
                self._ranks.watch()
                with suppress(queue.Empty):
                    self._wake.get(timeout=self._ranks.poll_s if self._in_round else idle_s)
        except Exception as exc:
            with self._state:
                self._give_up(str(exc))

    def _poll(self) -> None:
        """Take the round as far as it goes without waiting."""
        key = f"sync/{self._round}"
        if not self._in_round:
            with self._state:
                covered = frozenset[str]().union(*(reasons for _, reasons in self._points))
            if self._asked - covered:
                self._ranks.announce(f"{key}/asked", b"")
            if self._ranks.announced(f"{key}/asked") is None:
                return
            self._deadline = time.monotonic() + self._timeout_s
            with self._state:
                self._in_round = True
                mine = {"last_step": self._last_step, "reasons": list(self._asked)}
            self._ranks.post(key, json.dumps(mine).encode())
        verdict = self._verdict(key)
        if verdict is not None:
            # Not over what another rank said first.
            self._settle(**json.loads(self._ranks.claim(key, json.dumps(verdict).encode())))
        elif (word := self._ranks.announced(key)) is not None:
            self._settle(**json.loads(word))

    def _verdict(self, key: str) -> dict[str, Any] | None:
        """What this rank has to say: the coordinator when all have posted or time is up, another one much later."""
        now = time.monotonic()
        if not self._ranks.is_coordinator:
            is_late = now > self._deadline + self._timeout_s / 2
            return {"failure": f"rank 0 did not answer within {1.5 * self._timeout_s:g} s"} if is_late else None
        if not self._ranks.have_all_posted(key) and now <= self._deadline:
            return None
        if missing := self._ranks.missing(key):
            return {"failure": f"ranks {missing} did not answer in {self._timeout_s:g} s"}
        posts = [json.loads(post) for post in self._ranks.collect(key, 0.0)]
        reasons = {reason for post in posts for reason in post["reasons"]}
        return {"step": max(post["last_step"] for post in posts) + 1, "reasons": sorted(reasons)}

    def _settle(self, step: int | None = None, reasons: Sequence[str] = (), failure: str = "") -> None:
        if step is not None:  # all have posted in this round, so all are done with those before
            for number in range(self._num_forgotten, self._round):
                self._ranks.forget(f"sync/{number}")
                self._ranks.forget(f"sync/{number}/asked")
            self._num_forgotten = self._round
        self._round += 1
        with self._state:
            if not self._in_round:
                return  # the training thread did not wait for it
            if step is None:
                self._give_up(failure)
            else:
                self._points.append((step, frozenset(reasons)))
                self._in_round = False
                self._state.notify_all()

    def _give_up(self, why: str) -> None:
        self._asked.clear()
        self._failure = f"no step to save at was agreed on: {why}"
        self._in_round = False
        self._state.notify_all()
