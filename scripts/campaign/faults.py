"""Storage that fails at random, for good, or for a while: S3 through obstore and through s3fs, and GCS.

The line of "objects" breaks one chosen request of a run; here requests fail at a rate while a run saves, prunes and
restores, and whole servers fail until they are mended. A proxy stands between a real client and a real server.
Deadlines of requests are a tenth of the library's, so that an attempt takes seconds. The last row saves for long under
faults of all kinds and looks for what does not come back: memory, descriptors, threads, uploads, files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from asyncckpt import CheckpointManager, client_requests, s3_settings
from scripts.campaign.row import Outcome, Row, draws
from tests.faults.harness import S3_PART_BYTES, Place, state_of, strays
from tests.s3 import Fault, GcsProxy, Request, S3Proxy
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
RATES = (0.05, 0.2)
NUM_STEPS = 3
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
    with ExitStack() as stack:
        s3, gs = stack.enter_context(best_s3_server()), stack.enter_context(GcsEmulator())
        for server in (s3, gs):
            server.make_bucket(BUCKET)
        ways = (Way("s3", s3), Way("s3fs", s3, "fsspec"), Way("gs", gs))
        yield [
            Row(f"faults-some-{kind}", f"5 and 20 % of requests: {what}", 2, 30, partial(some_fail, ways, kind, seed))
            for kind, what in PASSING.items()
        ]


# -- some requests fail


def some_fail(ways: tuple[Way, ...], kind: Fault, seed: int, number: int) -> Outcome:
    """Everything succeeds: a fault of a request is not one of a save."""
    draw, way, rate = draws(seed, kind, number), ways[number % 3], RATES[number // 3 % 2]
    name = f"{kind}-{seed}-{number}"
    with way.proxy(lambda request: kind if draw.random() < rate else "") as proxy:
        with way.open(way.place(name, proxy.endpoint), retry_timeout=RETRY_S) as manager:
            for step in range(NUM_STEPS):
                manager.save(step, state_of(step, step))
            check_restores(manager)
        proxy.gate.set()
    check_left(way, name, list(range(NUM_STEPS))[-2:])
    return "survived"


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
        check_restores(manager)
        manager.save(NUM_STEPS, state_of(NUM_STEPS, NUM_STEPS))
        manager.join()
        assert manager.all_steps() == [*steps, NUM_STEPS][-2:]
        assert strays(place, manager._storage, manager.all_steps()) == []
        for step in manager.all_steps():
            manager.verify(step)
