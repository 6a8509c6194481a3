"""A job that stays up: each test has all its ranks run one function, so that one launch serves them all."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from tests.processes import Job, Link


class Crew:
    """`world_size` ranks. `body(link, *args)` is a module-level function; after a failure the next one gets new ranks.

    Warnings are errors on the ranks, too.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._job: Job | None = None

    def run(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """What `body` returned, by rank."""
        self.start(body, *args)
        return self.hear()

    def start(self, body: Callable[..., Any], *args: Any) -> Job:
        """Begin `body` on all ranks. The test may `tell` and `signal` the job, and must `hear` every message of the
        crew, the last of them what `body` returns."""
        if self._job is None:
            self._job = Job(self.world_size, serve)
        for rank in range(self.world_size):
            self._job.tell(rank, (body, args))
        return self._job

    def hear(self) -> list[Any]:
        """The next message of every rank."""
        assert self._job is not None
        job, self._job = self._job, None  # until all went well
        try:
            messages = [job.hear(rank) for rank in range(self.world_size)]
            failures = [f"rank {rank}:\n{m.text}" for rank, m in enumerate(messages) if isinstance(m, Failure)]
            assert not failures, "\n".join(failures)
        except BaseException:
            job.__exit__(None, None, None)
            raise
        self._job = job
        return messages

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        if self._job is not None:
            self._job.__exit__(kind, exc, tb)


@dataclass
class Failure:
    text: str


def serve(link: Link) -> None:
    warnings.simplefilter("error")
    # as in pyproject.toml, which says why
    warnings.filterwarnings("ignore", "Sending a large body directly with raw bytes", ResourceWarning)
    warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
    while True:
        body, args = link.receive()
        try:
            link.send(body(link, *args))
        except BaseException:
            link.send(Failure(traceback.format_exc()))
