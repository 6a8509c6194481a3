"""scripts/simulate: ranks that are not there, planned and saved by the code that real ones run."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, ProcessGroupGloo
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from asyncckpt.global_plan import LocalItems
from asyncckpt.manifest import decode_manifest
from asyncckpt.plan import digests
from scripts import simulation_report
from scripts.simulation import SAVES, SHAPES, Names, Others, SimulatedJob, state_of

NUM_RANKS = 5


@pytest.fixture(scope="module")
def job() -> SimulatedJob:
    return SimulatedJob(NUM_RANKS, 60)


@pytest.fixture(scope="module")
def found(job: SimulatedJob) -> Mapping[str, Any]:
    return simulation_report.document(job)


def test_its_manifest_has_every_part_of_every_rank(job: SimulatedJob) -> None:
    """Read back by the real code."""
    manifest = decode_manifest(job.storage.written["manifest"])
    assert len(manifest.chunks) == job.num_chunks
    assert manifest.head.world_size == NUM_RANKS
    assert {f"rng/rank_{rank}" for rank in range(NUM_RANKS)} <= set(manifest.keys)
    boxes = [chunk.offsets for chunk in manifest.chunks if chunk.key == "model.layers.0.q_proj.weight"]
    assert boxes == [(rank * SHAPES[0][0], 0) for rank in range(NUM_RANKS)]
    assert [file.name for file in manifest.files] == [f"__{rank}_0.distcp" for rank in range(NUM_RANKS)]


def test_what_other_ranks_send_is_what_their_planner_makes() -> None:
    """It is made of one rank's, for speed."""
    sent = [LocalItems.decode(items) for items in Others(NUM_RANKS, 4).items()]
    for rank, items in enumerate(sent, start=1):
        state, planner = state_of(rank, NUM_RANKS, 4), DefaultSavePlanner()
        planner.set_up_planner(state_dict=state, is_coordinator=False)
        made = LocalItems.of(planner.create_local_plan(), digests(state))
        assert [getattr(items, name) for name in items.__slots__] == [getattr(made, name) for name in made.__slots__]


def test_in_steady_state_ranks_exchange_no_plan(found: Mapping[str, Any]) -> None:
    """Two messages to agree, and reports of what has changed."""
    exchanged = found["exchanged"]
    assert [exchanged[phase]["messages_each"] for phase in ("plan, first", "plan", *SAVES)] == [6, 2, 0, 0, 0]
    first, again, moved = (exchanged[phase]["bytes_each"] for phase in SAVES)
    assert again < moved < first
    assert set(found["coordinator_s"]["plan"]) == {"all else", "in all"}


def test_requests_are_those_that_s3_would_see(found: Mapping[str, Any]) -> None:
    """A file of each rank, in parts if it is large; a look at the step before the commit and after it, and at first
    listings for what dead saves have left."""
    first, again, _ = (found["storage_requests"][phase] for phase in SAVES)
    assert again == {"PUT of data": NUM_RANKS, "LIST": 2, "PUT of manifest and .metadata": 2}
    assert first == again | {"LIST": 4}
    storage = Names()
    storage.requests_of("save")
    storage.add("file", 40 << 20)
    assert storage.requests["save"] == {"PUT of parts of data": 3, "POST to begin and end them": 2}


class CountingStore(dist.Store):
    def __init__(self) -> None:
        super().__init__()
        self.num_requests = self.num_bytes = 0
        self._inner, self._lock = HashStore(), threading.Lock()

    def _count(self, value: bytes = b"") -> bytes:
        with self._lock:
            self.num_requests += 1
            self.num_bytes += len(value)
        return value

    def set(self, key: str, value: bytes) -> None:
        self._inner.set(key, self._count(value))

    def get(self, key: str) -> bytes:
        return self._count(self._inner.get(key))

    def wait(self, keys: list[str], *timeout: Any) -> None:
        self._count()
        self._inner.wait(keys, *timeout)


@pytest.mark.parametrize("num_ranks", [2, 12])
def test_gloo_asks_the_store_as_often_as_is_said(num_ranks: int) -> None:
    """Each rank makes its group in a thread."""
    store, groups = CountingStore(), []

    def join(rank: int) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        groups.append(ProcessGroupGloo(store, rank, num_ranks, options))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    num_requests, num_bytes = simulation_report.gloo_mesh(num_ranks)
    assert store.num_requests == num_requests
    assert store.num_bytes == pytest.approx(num_bytes, rel=0.1)


def run(monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", *map(str, options)])
    simulation_report.main()


def test_a_curve_is_a_table_a_picture_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many chunks for each rank."""
    run(monkeypatch, "--ranks", "16", "--chunks", "160", "--curve", tmp_path / "growth.png", "--json", tmp_path / "all")
    jobs = json.loads((tmp_path / "all").read_text())
    assert [job["ranks"] for job in jobs] == [8, 16]
    assert jobs[0]["items"] * 2 == jobs[1]["items"]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    for part in ("seconds of rank 0", "Exchanged", "Storage", "Growth"):
        assert part in said


def test_one_rank_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It exchanges nothing."""
    with pytest.raises(SystemExit):
        run(monkeypatch, "--ranks", "1")
    assert "at least 2" in capsys.readouterr().err
