"""Faults of one rank in a job of 2 to 4, or of all at once: at a storage call, drawn from all that a run makes.

The others must hear of it, by an error of ours that names a rank, and nobody may hang. Then a fresh job, of another
size, looks at what is there. An attempt is several tries side by side: most of their time is the ranks' waiting.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from scripts.campaign.object_client import Told
from scripts.campaign.rank_job import Ended, Point, RankFault, check_all, save_all, write_oracle
from scripts.campaign.row import Outcome, Row, draws
from tests.faults.harness import Place
from tests.processes import Job, _forks
from tests.servers import RadosGateway

BUCKET = "ranks"
NUM_TRIES = 4
_PRELOAD = [
    "torch._dynamo", "pytest", "s3fs", "obstore.store", "scripts.campaign.fork_server", "scripts.campaign.rank_job",
]  # fmt: skip
LIMIT_S = 100.0  # for all that the ranks do, on a busy machine
FAULTS: dict[RankFault, str] = {
    "kill": "a rank is killed",
    "fail": "a call of a rank fails",
    "stop": "a rank is stopped, and comes back late",
    "lose all": "all ranks are killed at once",
}


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    _forks.set_forkserver_preload(_PRELOAD)
    write_oracle(scratch / "oracle")
    with ExitStack() as stack:
        server = stack.enter_context(RadosGateway())
        server.make_bucket(BUCKET)
        places = {
            "folder": ("a folder", lambda name: Place(str(scratch / name / "run"), {})),
            "s3": ("S3", lambda name: Place(f"s3://{BUCKET}/{name}/run", server.storage_options)),
        }
        yield [
            Row(
                f"ranks-{kind}-{fault.replace(' ', '-')}", f"{text}, {what}", 1, 10,
                partial(runs.attempt, fault, seed),
            )
            for kind, (what, place) in places.items()
            for runs in [Runs(kind, place, scratch / "oracle")]
            for fault, text in FAULTS.items()
        ]  # fmt: skip


class Runs:
    """Jobs that save to one kind of place. num_calls: {world size: storage calls of each rank}."""

    def __init__(self, kind: str, place: Any, oracle: Path) -> None:
        self._kind = kind
        self._place = place
        self._oracle = oracle
        self._num_calls: dict[int, list[int]] = {}
        self._rehearsing = threading.Lock()

    def attempt(self, fault: RankFault, seed: int, number: int) -> Counter[Outcome]:
        with ThreadPoolExecutor(NUM_TRIES) as pool:
            tries = range(number * NUM_TRIES, (number + 1) * NUM_TRIES)
            return Counter(pool.map(partial(self.run, fault, seed), tries))

    def _calls_of(self, world_size: int) -> list[int]:
        with self._rehearsing:
            if world_size not in self._num_calls:
                self._num_calls[world_size] = self._rehearse(world_size)
            return self._num_calls[world_size]

    def _rehearse(self, world_size: int) -> list[int]:
        ends, told, _ = self._save(self._place(f"rehearsal-{world_size}"), world_size, None, 60.0)
        assert not any(end.errors for end in ends.values()), (ends, told)
        return [ends[rank].num_calls for rank in range(world_size)]

    def run(self, fault: RankFault, seed: int, number: int) -> Outcome:
        """One try."""
        draw = draws(seed, f"{self._kind} {fault}", number)
        world_size = 2 + number % 3
        rank = draw.choice([0, draw.randrange(1, world_size)])
        point = Point(fault, rank, draw.randrange(self._calls_of(world_size)[rank]), draw.random() < 0.5)
        for timeout_s in (3.0, 15.0, 60.0):  # on a busy machine the first may be over before the fault comes
            place = self._place(f"{self._kind}-{fault.replace(' ', '-')}-{seed}-{number}-{timeout_s:.0f}")
            ends, told, reached = self._save(place, world_size, point, timeout_s)
            if reached:
                break
        story = f"{point} of {world_size} ranks, at {reached}: {ends}, {told}"
        assert reached, f"it was not reached: {story}"
        errors = [error for end in ends.values() for error in end.errors]
        assert all(names is not None or kind == "CheckpointError" for _, kind, _, names in errors), story
        new_size = draw.choice([size for size in (1, 2, 3, 4) if size != world_size])
        try:
            with Job(new_size, check_all, place, self._oracle, told) as job:
                job.results()
        except AssertionError as exc:
            raise AssertionError(f"{exc}\nafter {story}, checked by {new_size} ranks") from exc
        shutil.rmtree(Path(place.url).parent, ignore_errors=True)
        return "detected" if errors else "survived"

    def _save(
        self, place: Place, world_size: int, point: Point | None, timeout_s: float
    ) -> tuple[dict[int, Ended], Told, str]:
        """(how the ranks ended that were not killed, what they told, the call at which it happened)"""
        with Job(world_size, save_all, place, point, timeout_s) as job:
            return _listen(job, point)


def _listen(job: Job, point: Point | None) -> tuple[dict[int, Ended], Told, str]:
    ends: dict[int, Ended] = {}
    told, reached = Told(), ""
    links = dict(enumerate(job._links))
    deadline = time.monotonic() + LIMIT_S
    while links:
        if point and point.fault == "stop" and reached and [*links] == [point.rank]:
            job.signal(point.rank, signal.SIGCONT)  # the others are done with waiting
        ready = wait([*links.values()], deadline - time.monotonic())
        assert ready, f"ranks {[*links]} still run after {LIMIT_S:.0f} s, {point} at {reached!r}: {ends}, {told}"
        for rank in [rank for rank, link in links.items() if link in ready]:
            try:
                kind, value = links[rank].recv()
            except (EOFError, ConnectionResetError):
                is_meant = point is not None and (
                    point.fault == "lose all" or (point.fault, point.rank) == ("kill", rank)
                )
                assert is_meant, f"rank {rank} died: {point}, {ends}, {told}"
                del links[rank]
                continue
            assert kind != "error", f"rank {rank} failed, {point}:\n{value}"
            if kind == "result":
                ends[rank] = value
                del links[rank]
            elif value[0] == "reached":
                reached = value[1]
                if point and point.fault == "lose all":
                    for other in range(len(job._links)):
                        job.signal(other, signal.SIGKILL)
            elif value[0] == "saving" and value[1] not in told.begun:
                told.begun.append(value[1])
            elif value[0] == "committed" and value[1] not in told.committed:
                told.committed.append(value[1])
    told.committed.sort()
    _take_errors(told, ends)
    return ends, told, reached


def _take_errors(told: Told, ends: dict[int, Ended]) -> None:
    """What a rank says was not saved must not be there, and no other may say that it is."""
    for end in ends.values():
        for save, _, text, _ in end.errors:
            if "was not saved" in text:
                told.failed[save] = text
    both = {*told.failed} & {*told.committed}
    assert not both, f"saves {both} are told as committed and as not saved: {told}, {ends}"
