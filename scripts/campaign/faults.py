"""Storage that fails at random, for good, or for a while: S3 through obstore and through s3fs, and GCS.

The line of "objects" breaks one chosen request of a run; here requests fail at a rate while a run saves, prunes and
restores, and whole servers fail until they are mended. A proxy stands between a real client and a real server.
Deadlines of requests are a tenth of the library's, so that an attempt takes seconds. The last row saves for long under
faults of all kinds and looks for what does not come back: memory, descriptors, threads, uploads, files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from asyncckpt import CheckpointManager, SaveError, client_requests, s3_settings
from asyncckpt.events import Event, Failed
from scripts.campaign.breaking_proxy import breaking_proxy
from scripts.campaign.leaks import NUM_SAVES, Leaks
from scripts.campaign.row import Outcome, Row, draws
from tests.faults.harness import S3_PART_BYTES, Place, state_of, strays
from tests.s3 import MIB, Fault, GcsProxy, Request, S3Proxy
from tests.servers import GcsEmulator, Server, best_s3_server
from tests.states import assert_same, target_like

BUCKET = "faults"
PASSING: dict[Fault, str] = {
    "503": "503, slow down",
    "429": "429, too many requests",
    "500": "500",
    "502": "502",
    "reset": "reset in the middle of a body",
    "half": "half of a body came",
    "drop": "the answer is lost",
    "cut": "half of an answer came",
    "short": "an answer of the wrong length",
    "garbage": "an answer that is none",
    "stall": "no answer, the connection stays",
    "trickle": "an answer of 20 bytes a second",
}
LASTING: dict[Fault, tuple[str, str]] = {
    "503": ("503", "reduce your request rate"),
    "500": ("500", "InternalError|internal error"),
    "403": ("403", "AccessDenied|Forbidden|Access Denied"),
    "expired": ("expired credentials", "ExpiredToken.*nothing renews|expired"),
    "skew": ("clocks that differ", "RequestTimeTooSkewed.*this machine's clock|difference between"),
    "reset": ("resets", "write|list|replace|create"),
    "drop": ("lost answers", "write|list|replace|create"),
    "stall": ("no answers, connections stay", "write|list|replace|create"),
    "garbage": ("answers that are none", "write|list|replace|create"),
}
"""{fault: (in words, what the error must say)}"""
QUICK = ("503", "403", "skew", "stall")
"""Of the lasting ones, as each waits for its deadlines."""
UNREADABLE = ("short", "garbage")
RATES = (0.05, 0.2)
NUM_STEPS, NEXT_STEP = 3, 99
RETRY_S = 60.0  # beyond any row of bad luck


@dataclass(frozen=True)
class Way:
    """To a server."""

    name: str
    server: Server
    transfer: str = "auto"

    def place(self, name: str, endpoint: str | None = None) -> Place:
        options = self.server.storage_options
        scheme = "gs" if isinstance(self.server, GcsEmulator) else "s3"
        if endpoint and scheme == "gs":
            options["endpoint_url"] = endpoint
        elif endpoint:
            options["client_kwargs"]["endpoint_url"] = endpoint
        if scheme == "s3":
            options["config_kwargs"] |= {"connect_timeout": 2, "read_timeout": 2}
        return Place(f"{scheme}://{BUCKET}/{self.name}-{name}/run", options)

    def proxy(self, fault: Callable[[Request], Fault]) -> S3Proxy:
        kind = GcsProxy if isinstance(self.server, GcsEmulator) else S3Proxy
        return kind(self.server.endpoint, fault)

    def open(self, place: Place, **arguments: Any) -> CheckpointManager:
        manager = CheckpointManager(
            place.url, max_to_keep=2, storage_options=place.options, transfer=self.transfer, **arguments
        )
        if hasattr(manager._storage, "part_bytes"):
            manager._storage.part_bytes = S3_PART_BYTES
        return manager


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # see GcsEmulator.env
    client_requests.ANSWER_S, client_requests.STALL_S, s3_settings.REQUEST_S = 5.0, 1.0, 5.0
    client_requests.MIN_RATE, client_requests.GCS_READ_BYTES = 4 * MIB, 4 * MIB
    with ExitStack() as stack:
        s3, gs = stack.enter_context(best_s3_server()), stack.enter_context(GcsEmulator())
        endpoint, rate = stack.enter_context(breaking_proxy(s3.endpoint, seed))
        for server in (s3, gs):
            server.make_bucket(BUCKET)
        ways = (Way("s3", s3), Way("s3fs", s3, "fsspec"), Way("gs", gs))
        leaks = Leaks(ways[0].open, ways[0].place("leaks", endpoint), rate, seed)
        some = [
            Row(f"faults-some-{kind}", f"5 and 20 % of requests: {what}", 1, 9, partial(some_fail, turn, kind, seed))
            for first, (kind, what) in enumerate(PASSING.items())
            for turn in [ways[first % 3 :] + ways[: first % 3]]  # so that the first attempts take every way
        ]
        lasting = [
            Row(
                f"faults-all-{kind}",
                f"all of a save, until mended: {what}",
                int(kind in QUICK),
                3,
                partial(all_fail, turn, kind, seed),
            )
            for first, (kind, (what, _)) in enumerate(LASTING.items())
            for turn in [ways[first % 3 :] + ways[: first % 3]]
        ]
        yield [
            *some,
            *lasting,
            Row("faults-delete", "403 on every delete, until mended", 1, 3, partial(deletes_fail, ways, seed)),
            Row("faults-leaks", f"{NUM_SAVES} saves under faults of all kinds leave nothing", 1, 20, leaks.attempt),
        ]


# -- some requests fail


def some_fail(ways: tuple[Way, ...], kind: Fault, seed: int, number: int) -> Outcome:
    """Everything succeeds: a fault of a request is not one of a save. But for answers that obstore cannot read, which
    it does not ask for again."""
    draw, way, rate = draws(seed, kind, number), ways[number % 3], RATES[number // 3 % 2]
    name, saved = f"{kind}-{seed}-{number}", []
    with (
        way.proxy(lambda request: kind if draw.random() < rate else "") as proxy,
        way.open(way.place(name, proxy.endpoint), retry_timeout=RETRY_S) as manager,
    ):
        for step in range(NUM_STEPS):
            try:
                manager.save(step, state_of(step, step))
                saved.append(step)
            except SaveError as exc:
                if kind not in UNREADABLE or "Nothing committed is lost" not in str(exc):
                    raise
        if saved:
            check_restores(manager)
        proxy.gate.set()
    check_left(way, name, saved[-2:])
    return "survived" if len(saved) == NUM_STEPS else "detected"


def check_restores(manager: CheckpointManager) -> None:
    target = target_like(state_of(0, 0))
    step = manager.restore_latest(target)
    assert step == max(manager.all_steps()), step
    assert_same(state_of(step, step), target)


def check_left(way: Way, name: str, steps: list[int]) -> None:
    """As a fresh manager finds it, without the proxy: these steps, whole, and after one more save nothing else."""
    place = way.place(name)
    with way.open(place) as manager:
        assert manager.all_steps() == steps, (manager.all_steps(), steps)
        if steps:
            check_restores(manager)
        manager.save(NEXT_STEP, state_of(NEXT_STEP, NEXT_STEP))
        manager.join()
        assert manager.all_steps() == [*steps, NEXT_STEP][-2:]
        assert strays(place, manager._storage, manager.all_steps()) == []
        for step in manager.all_steps():
            manager.verify(step)


# -- all requests fail, for a while


def all_fail(ways: tuple[Way, ...], kind: Fault, seed: int, number: int) -> Outcome:
    """A save fails in time, with an error that says why; what was saved before is there, and the next save works."""
    way, name, is_broken = ways[number % 3], f"all-{kind}-{seed}-{number}", False
    with (
        way.proxy(lambda request: kind if is_broken else "") as proxy,
        way.open(way.place(name, proxy.endpoint), retry_timeout=1.0) as manager,
    ):
        manager.save(0, state_of(0, 0))
        is_broken = True
        message = failure_of(manager, 1)
        assert re.search(LASTING[kind][1], message), message
        assert manager.url in message, message
        is_broken = False
        proxy.gate.set()
        manager.refresh()
        assert 0 in manager.all_steps()
        check_restores(manager)
        manager.save(2, state_of(2, 2))
        steps = manager.all_steps()
    assert steps in ([0, 2], [1, 2]), steps  # what was not answered may have been done
    check_left(way, name, steps)
    return "detected"


def failure_of(manager: CheckpointManager, step: int) -> str:
    try:
        manager.save(step, state_of(step, step))
    except SaveError as exc:
        return str(exc)
    raise AssertionError(f"step {step} was saved")


def deletes_fail(ways: tuple[Way, ...], seed: int, number: int) -> Outcome:
    """Saves do not; one event tells; and all goes that is over when it may be deleted."""
    way, name, is_broken = ways[number % 3], f"delete-{seed}-{number}", True
    told: list[Event] = []

    def refuses(request: Request) -> Fault:
        return "403" if is_broken and request.operation in ("POST bucket", "DELETE object") else ""

    with way.proxy(refuses) as proxy, way.open(way.place(name, proxy.endpoint), events=[told.append]) as manager:
        for step in range(5):
            manager.save(step, state_of(step, step))
        manager.join()
        assert [event.phase for event in told if isinstance(event, Failed)] == ["prune"], told
        is_broken = False
        manager.save(5, state_of(5, 5))
    check_left(way, name, [4, 5])
    return "survived"
