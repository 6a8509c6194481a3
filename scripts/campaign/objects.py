"""Faults between a client and its object store, one request of a run at a time: S3 by obstore, S3 by s3fs, GCS.

A proxy stands between a real client and a real server (radosgw, or an emulator of GCS) and breaks one request, or has
the client killed at it. Then a fresh process looks, without the proxy, at what is there. The emulator of GCS knows no
create-if-absent, so what it shows holds for one writer.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts.campaign.object_client import PART_BYTES, SCHEDULE, Told, check, listen, run, start, write_oracle
from scripts.campaign.row import Outcome, Row, draws
from tests.faults.harness import Place
from tests.s3 import Fault, GcsProxy, Request, S3Proxy
from tests.servers import GcsEmulator, RadosGateway, Server

BUCKET = "torture"
KILLS = {
    "kill": "killed at a request",
    "kill half": "killed in the middle of a body",
    "kill answered": "killed, the answer not heard",
}
BREAKS = {
    "503": "503, slow down",
    "500": "500",
    "429": "429, too many requests",
    "403": "403, forbidden",
    "reset": "reset in the middle of a body",
    "half": "half of a body came",
    "cut": "half of an answer came",
    "drop": "the answer is lost",
    "delay": "a late answer, training goes on",
}


@dataclass(frozen=True)
class Way:
    """To a store. what: for the table. full: attempts for each fault; the emulator of GCS is slow."""

    name: str
    what: str
    transfer: str
    part_bytes: int
    full: int


WAYS = (
    Way("s3", "S3", "obstore", PART_BYTES, 10),
    Way("s3fs", "S3 by s3fs", "fsspec", PART_BYTES, 10),
    Way("gs", "GCS", "auto", 0, 8),
)


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # see GcsEmulator.env
    write_oracle(scratch / "oracle")
    with ExitStack() as stack:
        servers: dict[str, Server] = {
            "s3": stack.enter_context(RadosGateway(min_part_bytes=PART_BYTES)),
            "gs": stack.enter_context(GcsEmulator()),
        }
        for server in servers.values():
            server.make_bucket(BUCKET)
        yield [
            Row(
                f"objects-{way.name}-{fault.replace(' ', '-')}", f"{what}, {way.what}",
                int((number + 1) % len(WAYS) == turn),  # quick: each fault in one way, as they take seconds
                way.full, partial(line.attempt, fault, seed),
            )
            for turn, way in enumerate(WAYS)
            for line in [Lines(way, servers[way.name[:2]], scratch / "oracle")]
            for number, (fault, what) in enumerate((KILLS | BREAKS).items())
            if (way.name, fault) != ("gs", "half")  # see GcsProxy
        ]  # fmt: skip


class Lines:
    """One way to a server, and what a run that nothing happens to sends on it."""

    def __init__(self, way: Way, server: Server, oracle: Path) -> None:
        self._way = way
        self._server = server
        self._oracle = oracle
        self._rehearsed: list[Request] = []

    def attempt(self, fault: Fault, seed: int, number: int) -> Outcome:
        point = self._point(fault, seed, number)
        told = self.run(f"{fault.replace(' ', '-')}-{seed}-{number}", fault, point)
        if fault in KILLS:
            assert not told.is_over, f"the client was not killed at {point}"
            return "survived"
        assert told.is_over or told.refused, told
        assert told.num_raised == len(told.failed), f"{told.num_raised} errors were raised, {told.failed} told"
        assert fault not in ("delay", "drop") or not told.refused
        return "detected" if told.failed or told.refused or told.unread else "survived"

    def run(self, name: str, fault: Fault, point: Request | None) -> Told:
        """A run in which `fault` befalls the request like `point`, and the check of what is there afterwards."""
        scheme = self._way.name[:2]
        kind, url = (GcsProxy if scheme == "gs" else S3Proxy), f"{scheme}://{BUCKET}/{self._way.name}-{name}/run"
        processes: list[Any] = []
        reached: list[Request] = []

        def befalls(request: Request) -> Fault:
            if point is None or (request.operation, request.number) != (point.operation, point.number):
                return ""
            reached.append(request)
            return fault

        with kind(self._server.endpoint, befalls, lambda: os.kill(processes[0].pid, signal.SIGKILL)) as proxy:
            process, messages = start(
                run, Place(url, self._options(proxy.endpoint)), self._way.transfer, self._way.part_bytes
            )
            processes.append(process)
            told = listen(messages)
            proxy.wait_idle()
        assert bool(reached) == (point is not None), f"{point} did not come again: {told}"
        told.requests = proxy.requests
        process, messages = start(
            check, Place(url, self._options(self._server.endpoint)), self._way.transfer, self._oracle, told
        )
        assert [kind for kind, _ in messages] == ["checked"], f"the check died, after {point}: {told}"
        return told

    def _point(self, fault: Fault, seed: int, number: int) -> Request:
        """Drawn so that all kinds of requests have their turn before one comes again."""
        if not self._rehearsed:
            told = self.run("rehearsal", "", None)
            assert told.is_over, told
            assert told.committed == list(range(len(SCHEDULE))), told
            self._rehearsed = told.requests
        points = [request for request in self._rehearsed if _can_befall(fault, request)]
        draws(seed, f"{self._way.name} {fault}", 0).shuffle(points)
        seen = Counter[str]()
        turns: list[tuple[int, Request]] = []
        for request in points:
            turns.append((seen[request.operation], request))
            seen[request.operation] += 1
        return sorted(turns, key=lambda turn: turn[0])[number % len(turns)][1]

    def _options(self, endpoint: str) -> dict[str, Any]:
        options = self._server.storage_options
        if self._way.name == "gs":
            return options | {"endpoint_url": endpoint}
        return options | {"client_kwargs": {"endpoint_url": endpoint}}


def _can_befall(fault: Fault, request: Request) -> bool:
    if fault in ("kill half", "reset", "half"):
        return request.num_sent > 1
    return fault != "cut" or request.num_bytes > 1
