"""Saves to S3 while requests fail: what a save costs of which 5 % of the requests fail, over one of which none do.

Both go through the same proxy before the same server (Ceph's radosgw, where it is installed), which breaks requests in
one of six ways drawn at random. The proxy and the server share the cores with the client.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from scripts.campaign.breaking_proxy import breaking_proxy
from tests.servers import best_s3_server

from . import clients
from .contenders import Ours
from .frame import LIMIT, OURS, PEER, Bench, Outcome, Round, ratio_row, timed

RATE = 0.05
CLEAN, BROKEN = "save to S3, no request fails", "save to S3, 5 % of requests fail"
STOCK_CLEAN, STOCK_BROKEN = "dcp.save, FsspecWriter, none fails", "dcp.save, FsspecWriter, 5 % fail"
GOAL = 1.5


def run(bench: Bench) -> Outcome:
    state = clients.state_of(bench.scale.object_bytes)
    with best_s3_server() as server, breaking_proxy(server.endpoint, seed=1) as (endpoint, rate):
        server.make_bucket(clients.BUCKET)
        proxied = _Proxied(server.storage_options, endpoint)

        @contextmanager
        def ours(name: str, broken: float) -> Iterator[Round]:
            with Ours(clients.url(name), storage_options=proxied.storage_options) as manager:
                yield lambda number: measured(lambda: manager.manager.save(number, state), name, broken)

        @contextmanager
        def stock(name: str, broken: float) -> Iterator[Round]:
            save = clients.save_by_fsspec_writer
            yield lambda number: measured(lambda: save(proxied, f"{name}/{number}", state), name, broken)

        def measured(save: Callable[[], Any], name: str, broken: float) -> Mapping[str, float]:
            rate.value = broken
            try:
                seconds = timed(save)
            finally:
                rate.value = 0.0
            clients.empty(server, name)
            return {"time": seconds}

        rounds = bench.take_turns(
            {
                CLEAN: (LIMIT, partial(ours, "clean", 0.0)),
                BROKEN: (OURS, partial(ours, "broken", RATE)),
                STOCK_CLEAN: (PEER, partial(stock, "stock-clean", 0.0)),
                STOCK_BROKEN: (PEER, partial(stock, "stock-broken", RATE)),
            }
        )
    what = f"{bench.scale.object_bytes / 1e6:.0f} MB"
    name = f"save to {server.name} of which 5 % of the requests fail, over a clean one"
    return Outcome(
        [
            ratio_row("faults", name, rounds, BROKEN, CLEAN, GOAL, note=what),
            ratio_row("faults", f"{name}, FsspecWriter", rounds, STOCK_BROKEN, STOCK_CLEAN, None, note=what),
        ],
        {f"save to {server.name} through a proxy that breaks requests": (rounds, "time")},
        errors=dict(rounds.errors),
    )


class _Proxied:
    """The server as clients see it."""

    def __init__(self, options: dict[str, Any], endpoint: str) -> None:
        self._options = options | {"client_kwargs": {"endpoint_url": endpoint}}

    @property
    def storage_options(self) -> dict[str, Any]:
        return copy.deepcopy(self._options)
