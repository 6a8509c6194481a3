"""A proxy before an S3 server that breaks requests at a rate, in another process: what it costs or keeps is its own.

For what is measured: leaks.py, and the suite `faults` of scripts/bench.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tests.s3 import Fault, Request, S3Proxy

KINDS: tuple[Fault, ...] = ("503", "500", "reset", "drop", "cut", "half")


@contextmanager
def breaking_proxy(endpoint: str, seed: int) -> Iterator[tuple[str, Any]]:
    """(its endpoint, its rate: a `.value` from 0, as at first, to 1)"""
    context = multiprocessing.get_context("spawn")  # this process may have threads
    rate, (here, there) = context.Value("d", 0.0), context.Pipe()
    child = context.Process(target=_serve, args=(endpoint, seed, rate, there), daemon=True)
    child.start()
    try:
        yield here.recv(), rate
    finally:
        here.close()
        child.kill()
        child.join()


def _serve(endpoint: str, seed: int, rate: Any, link: Any) -> None:
    draw = random.Random(seed)

    def fault(request: Request) -> Fault:
        return draw.choice(KINDS) if draw.random() < rate.value else ""

    with S3Proxy(endpoint, fault) as proxy:
        link.send(proxy.endpoint)
        with suppress(EOFError):
            link.recv()
