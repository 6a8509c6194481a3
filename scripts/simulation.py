"""A job of very many ranks as rank 0 meets it, in one process: what planning and saving cost, and what is exchanged.

Rank 0 and rank 1 run the real code: SavePlanning, Ranks over a real TCPStore, Saver. Of the others there is what they
would send, made of rank 1's by the same code: their items, their reports. Messages over gloo are answered from memory
and counted; storage keeps names and sizes. Not simulated: the network, and ranks that are late. Called by
simulation_report.py, which prints it.

Seconds are CPU seconds of the thread concerned: what the clock says on a machine that does nothing else, but for the
time that answers of the store take.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from asyncckpt import commit, gloo_group, plan, save
from asyncckpt.chunks import ChunkTable, Placement
from asyncckpt.commit import Committer, SaveJob
from asyncckpt.framing import Layout
from asyncckpt.global_plan import LocalItems
from asyncckpt.gloo_group import GlooGroup
from asyncckpt.index import RunIndex
from asyncckpt.manifest import FileRecord, decode_manifest, encode_records
from asyncckpt.plan import PlannedSave, SavePlanning
from asyncckpt.ranks import Ranks
from asyncckpt.rng import rng_state
from asyncckpt.save import Part, Saver
from asyncckpt.shard_layout import ShardLayout
from asyncckpt.steps import attempt_name
from scripts.benchmarks.process import PeakRss

MIB = 1 << 20
PART_BYTES = 16 * MIB  # FsspecStorage's
PAGE_KEYS = 1000  # of a listing of S3
OBJECT_BYTES, OWN_BYTES = 1_300, 27_000  # torch.save of a small value; of a rank's random streams (seen)
SHAPES = ((256, 1024), (768, 1024), (1024, 256), (64, 2048), (512, 512), (1, 4096), (128, 1024), (1024, 1024))
"""Of one rank's part of a parameter: in the mean 1.5 MiB."""
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "norm", "up_proj", "down_proj")
OPTIONS = {
    "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False, "maximize": False,
    "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
}  # fmt: skip
"""Of AdamW."""
OTHER = 1
"""The rank that stands for all but the coordinator."""
SAVES = ("save, first", "save", "save, objects moved")
"""The last: the length of some object has changed, and with it where others lie."""
WHO_IS_MISSING = "who is missing"


# -- the state of each rank: AdamW under FSDP2, and a TrainState's values of this rank's own


@dataclass(frozen=True)
class ShardedTensor:
    """What DCP's planner sees of a DTensor that is sharded by rows over all ranks."""

    rank: int
    num_ranks: int
    rows: int
    columns: int

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        offsets, sizes = torch.Size((self.rank * self.rows, 0)), torch.Size((self.rows, self.columns))
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes),
            TensorProperties(torch.float32),
            torch.Size((self.num_ranks * self.rows, self.columns)),
        )
        return [WriteItem(MetadataIndex(fqn, offsets), WriteItemType.SHARD, tensor_data=data)]


def state_of(rank: int, num_ranks: int, num_parameters: int) -> dict[str, Any]:
    names = [f"layers.{number // 8}.{MODULES[number % 8]}.weight" for number in range(num_parameters)]

    def sharded(number: int) -> ShardedTensor:
        return ShardedTensor(rank, num_ranks, *SHAPES[number % len(SHAPES)])

    moments = {
        name: {"step": torch.tensor(1.0), "exp_avg": sharded(number), "exp_avg_sq": sharded(number)}
        for number, name in enumerate(names)
    }
    return {
        "progress": ({"step": 1, "epoch": 0},),
        "model": {name: sharded(number) for number, name in enumerate(names)},
        "optimizer": {
            "state": moments,
            "param_groups": [{**OPTIONS, "params": names}],
        },
        f"rng/rank_{rank}": (rng_state(),),
        f"dataloader/rank_{rank}": ({"start": rng_state(), "position": 1},),
    }


# -- what is exchanged


@dataclass
class Traffic:
    """Of one rank in one phase. messages: over gloo. requests: of torch's store. Bytes are sent and received."""

    messages: int = 0
    message_bytes: int = 0
    requests: int = 0
    request_bytes: int = 0


class Ledger:
    """phase: where what happens now is entered, for rank 0 and for OTHER."""

    def __init__(self) -> None:
        self.phase = ""
        self.traffic: dict[str, dict[int, Traffic]] = defaultdict(lambda: {0: Traffic(), OTHER: Traffic()})

    def of(self, rank: int) -> Traffic:
        return self.traffic[self.phase][rank]

    def message(self, num_bytes: int) -> None:
        """Between rank 0 and OTHER."""
        other = self.of(OTHER)
        other.messages += 1
        other.message_bytes += num_bytes


class CountedStore:
    """A client of torch's store that enters each request."""

    def __init__(self, store: Any, ledger: Ledger, rank: int) -> None:
        self._store, self._ledger, self._rank = store, ledger, rank

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*values: Any) -> Any:
            answer = getattr(self._store, name)(*values)
            traffic = self._ledger.of(self._rank)
            traffic.requests += 1
            traffic.request_bytes += _num_bytes(values) + _num_bytes(answer)
            return answer

        return ask


def _num_bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_num_bytes, value))
    return len(value) if isinstance(value, bytes | str) else 8


class SimulatedGroup(GlooGroup):
    """Rank 0's end of a group whose other ranks are not there. items: theirs, as they would send them."""

    def __init__(self, num_ranks: int, ledger: Ledger, items: Iterable[bytes]) -> None:
        self.rank, self.world_size, self.timeout = 0, num_ranks, timedelta(seconds=600)
        self.shares: Sequence[Any] = ()
        self._ledger = ledger
        self._items = [gloo_group._pickled(of_rank) for of_rank in items]

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        self._ledger.message(mine.nbytes)
        return mine.repeat(self.world_size, 1)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._ledger.message(tensor.nbytes)
        return tensor

    def gather_objects(self, value: Any) -> list[Any]:
        self.gather(torch.tensor([0]))
        self._ledger.message(self._items[0].nbytes)
        return [value, *map(gloo_group._unpickled, self._items)]

    def scatter_objects(self, values: Sequence[Any] | None) -> Any:
        self.shares = values or ()
        return super().scatter_objects(values)

    def send(self, tensor: torch.Tensor, rank: int) -> Any:
        if rank == OTHER:
            self._ledger.message(tensor.nbytes)
        return SimpleNamespace(wait=lambda _: None)


class Names:
    """A storage that keeps names and sizes, and what was last written. requests: as S3 would count them."""

    url, max_file_bytes, client, client_reason = "simulated", 128 << 30, "none", ""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.requests: dict[str, dict[str, int]] = {}
        self.written: dict[str, bytes] = {}

    def requests_of(self, phase: str) -> None:
        """Enter what follows there."""
        self._now = self.requests[phase] = defaultdict(int)

    def add(self, path: str, size: int) -> None:
        """A rank's file, in one PUT or in parts."""
        self.files[path] = size
        if size <= PART_BYTES:
            self._now["PUT of data"] += 1
        else:
            self._now["PUT of parts of data"] += -(-size // PART_BYTES)
            self._now["POST to begin and end them"] += 2

    def create(self, path: str, data: bytes) -> None:
        self.files[path] = len(data)
        self._now["PUT of manifest and .metadata"] += 1
        self.written[path.rpartition("/")[2].partition("-")[0]] = data

    replace = create

    def is_create_exclusive(self) -> bool:
        return True

    def list_files(self, prefix: str = "") -> Mapping[str, int]:
        found = {path: size for path, size in self.files.items() if path.startswith(prefix)}
        self._now["LIST"] += -(-len(found) // PAGE_KEYS)
        return found

    def delete(self, paths: Iterable[str]) -> None:
        self._now["POST to delete"] += -(-len(list(paths)) // PAGE_KEYS)

    def sweep(self, may_go: Callable[[str], bool]) -> None:
        self._now["LIST"] += 1


# -- the other ranks, made of one


@dataclass(frozen=True)
class Written:
    """What a rank has after one of SAVES. part: only of those that run the real code; of all it would be too much."""

    report: bytes
    files: list[FileRecord]
    part: Part | None


class Others:
    """What any rank would send, made of what OTHER's planner made."""

    def __init__(self, num_ranks: int, num_parameters: int) -> None:
        self.num_ranks = num_ranks
        started = time.thread_time()
        planning = SavePlanning(Ranks(None, None, None, rank=OTHER, world_size=num_ranks, timeout_s=1), None, ())
        state = state_of(OTHER, num_ranks, num_parameters)
        local = planning._local_plan(plan.DefaultSavePlanner(), state)
        self._items = LocalItems.of(local, plan.digests(state))
        self._items.encode()
        self.plan_s = time.thread_time() - started
        self._rows = [(item.index.fqn, item.index.offset, _layout(item)) for item in local.items]
        self.num_items = len(local.items)

    def items(self) -> Iterator[bytes]:
        """Of all ranks but the coordinator."""
        for rank in range(1, self.num_ranks):
            boxes = ((tuple(at * rank for at in offsets), sizes) for offsets, sizes in self._items.boxes)
            fqns = tuple(_own(fqn, rank) for fqn in self._items.fqns)
            paths = tuple(tuple(_own(part, rank) for part in path) for path in self._items.paths)
            yield replace(self._items, fqns=fqns, paths=paths, boxes=tuple(boxes)).encode()

    def writes(self, rank: int, share: Sequence[int]) -> list[Written]:
        """What a rank comes to in each of SAVES. share: of its items, those it writes."""
        rows = [self._rows[number] for number in share]
        layouts = [layout for _, _, layout in rows]
        indices = [
            MetadataIndex(_own(fqn, rank), None if offsets is None else torch.Size(at * rank for at in offsets))
            for fqn, offsets, _ in rows
        ]
        shard = ShardLayout(indices, layouts, range(len(rows)), rank=rank, max_file_bytes=Names.max_file_bytes)
        sizes = [OWN_BYTES if "/rank_" in fqn else OBJECT_BYTES for fqn, _, layout in rows if layout is None]
        random = np.random.default_rng(rank)
        known: Placement | None = None
        written = []
        for phase in SAVES:
            placement, places = shard.place([size + 64 for size in sizes] if "moved" in phase else sizes)
            blocks = {
                number: tuple(random.integers(1 << 32, size=placement.num_blocks[number]).tolist())
                for number in np.flatnonzero(placement.num_blocks).tolist()
            }
            crcs = random.integers(1 << 32, size=(2, len(placement)), dtype=np.uint32)
            files = [FileRecord(place.name, place.size, int(random.integers(1 << 32))) for place in places]
            part = ChunkTable(placement, *crcs, blocks), files
            written.append(Written(encode_records(*part, known), files, part if rank <= OTHER else None))
            known = placement
        return written


def _own(part: Any, rank: int) -> Any:
    return part.replace(f"/rank_{OTHER}", f"/rank_{rank}") if isinstance(part, str) and "/rank_" in part else part


def _layout(item: WriteItem) -> Layout | None:
    if item.tensor_data is None:
        return None
    sizes = tuple(item.tensor_data.chunk.sizes)
    return Layout(str(item.tensor_data.properties.dtype)[6:], sizes, torch.empty(sizes, device="meta").stride())


# -- a job


TIMED = {
    "decode items": (plan.LocalItems, "decode"),
    "assign": (plan, "assign"),
    "collect": (Ranks, "collect"),
    "decode reports": (save, "decode_records"),
    "merge": (save, "merge"),
    ".metadata": (commit, "pickle_metadata"),
    "manifest": (commit, "encode_manifest"),
}
"""What of a phase is timed by itself, where the code calls it."""


class Timer:
    """Seconds of this thread in each function of TIMED."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._thread = threading.get_ident()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enters what is spent, with all else that is done meanwhile."""
        self.spent.clear()
        with ExitStack() as stack:
            for name, (owner, function) in TIMED.items():
                stack.enter_context(mock.patch.object(owner, function, self._timed(name, getattr(owner, function))))
            started = time.thread_time()
            yield
            in_all = time.thread_time() - started
        self.spent |= {"all else": in_all - sum(self.spent.values()), "in all": in_all}

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                if threading.get_ident() == self._thread:
                    self.spent[name] += time.thread_time() - started

        return call


class SimulatedSaver(Saver):
    """Whose files are known without writing them. parts: what each save comes to."""

    parts: list[Part]

    def _write_shard(self, job: SaveJob) -> Part:
        return self.parts.pop(0)


class SimulatedJob:
    """Planned twice and saved as often as SAVES says, when it is made; what that came to is in the attributes.

    seconds, peak_bytes: of rank 0, by phase; the latter beyond what it had before. each_s: of any rank for itself.
    """

    def __init__(self, num_ranks: int, num_chunks: int) -> None:
        num_parameters = max(1, round((num_chunks / num_ranks - 2) / 3))  # 3 parts of each, and 2 objects of its own
        self.num_ranks = num_ranks
        self.storage, self.ledger = Names(), Ledger()
        self.seconds: dict[str, dict[str, float]] = {}
        self.peak_bytes: dict[str, int] = {}
        self._timer = Timer()
        self._store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
        self._others = Others(num_ranks, num_parameters)
        self._group = SimulatedGroup(num_ranks, self.ledger, self._others.items())
        self._coordinator = self._ranks(0)
        self.num_items = num_ranks * self._others.num_items
        self.poll_s = self._coordinator.poll_s
        self.each_s = {"plan": self._others.plan_s}
        planned = self._plan(state_of(0, num_ranks, num_parameters))
        self._save(planned)
        self._search()
        self._open()

    def _plan(self, state: dict[str, Any]) -> PlannedSave:
        planning = SavePlanning(self._coordinator, None, ())
        for phase in ("plan, first", "plan"):  # as CheckpointManager._stage does
            with self._measured(phase):
                is_new = not planning.is_current(1)
                planning.check(state, 1)
                rows = self._coordinator.agree([0, 0, is_new, 0, 0], phase="save")
                planned = planning.plan(state, state, 1, replan=any(row[2] for row in rows))
            traffic = self.ledger.traffic[phase]
            traffic[OTHER].requests = traffic[0].requests  # one before each collective
        return planned

    def _save(self, planned: PlannedSave) -> None:
        writes = [self._others.writes(rank, share) for rank, share in enumerate(self._group.shares)]
        self.num_chunks = sum(map(len, self._group.shares))
        self.num_bytes = sum(file.size for of_rank in writes for file in of_rank[0].files)
        savers = [self._saver(self._coordinator, writes[0]), self._saver(self._ranks(OTHER), writes[OTHER])]
        snapshot: Any = SimpleNamespace(wait=lambda: None, release=lambda: None)
        for number, phase in enumerate(SAVES):
            self.storage.requests_of(phase)
            job = SaveJob(
                number, number + 1, attempt_name(number + 1, 0), snapshot, planned, {}, {}, time.perf_counter()
            )
            for rank, of_rank in enumerate(writes):
                for file in of_rank[number].files:
                    self.storage.add(f"{job.folder}/{file.name}", file.size)
                if rank > OTHER:
                    self._post(rank, job.attempt, of_rank[number].report)
            with self._measured(phase), ThreadPoolExecutor(1) as thread:
                other = thread.submit(savers[1].run, job)
                savers[0].run(job)()
                other.result()()

    def _post(self, rank: int, key: str, report: bytes) -> None:
        ranks = self._ranks(rank, counted=False)
        ranks.post(key, save._reply(None, report))
        ranks.close()  # or its thread would stay

    def _search(self) -> None:
        """For a rank whose report is not there, as every rank does that gives up."""
        key = attempt_name(len(SAVES), 0)
        self._store.delete_key(f"{key}/{self.num_ranks - 1}")
        self.ledger.phase = WHO_IS_MISSING
        ranks = self._ranks(OTHER)
        started = time.process_time()  # with what the store's thread takes
        assert ranks.missing(key) == [self.num_ranks - 1]
        self.each_s[WHO_IS_MISSING] = time.process_time() - started

    def _open(self) -> None:
        """As every rank does to restore."""
        started = time.thread_time()
        decode_manifest(self.storage.written["manifest"])
        self.each_s["open manifest"] = time.thread_time() - started

    def _client(self, rank: int) -> CountedStore:
        return CountedStore(self._store.clone(), self.ledger, rank)

    def _ranks(self, rank: int, *, counted: bool = True) -> Ranks:
        store = self._client(rank) if counted else self._store
        group = self._group if rank == 0 else None
        return Ranks(group, store, store, rank=rank, world_size=self.num_ranks, timeout_s=600.0)

    def _saver(self, ranks: Ranks, writes: Sequence[Written]) -> SimulatedSaver:
        committer = Committer(self.storage, RunIndex(), None, lambda _: None, ranks.rank, ranks.world_size)
        saver = SimulatedSaver(committer, ranks, 600.0, lambda _: None)
        saver.parts = [write.part for write in writes]
        return saver

    @contextmanager
    def _measured(self, phase: str) -> Iterator[None]:
        self.ledger.phase, rss = phase, PeakRss()
        with self._timer.running():
            yield
        self.seconds[phase], self.peak_bytes[phase] = dict(self._timer.spent), rss.extra_bytes()
