"""Family "damage": bits that flip, and files that are cut, lengthened, emptied, swapped, missing or another step's.

A step is saved once for each kind there is of it, then damaged again and again, in place. `verify` must report every
change, and a restore either raises DamagedStepError or gives, bit for bit, what was saved; what else it raises is a
loss. `restore_latest` goes back to the step before, and says why.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItemType

from asyncckpt import CheckpointManager, DamagedStepError, Event, Restored, ShardWriter, UnsafeObjectError
from asyncckpt.dcp_metadata import unpickle_metadata
from asyncckpt.manifest import Manifest, decode_manifest
from asyncckpt.storage import Storage, open_storage
from asyncckpt.verify import find_damage
from scripts.campaign.row import Outcome, Row, draws
from tests.servers import best_s3_server
from tests.states import DTYPES, assert_same, target_like, tensor_of

BUCKET = "torture-damage"
FLIPS = 25
"""Of one attempt."""
MANIFEST_BYTES = 100
"""Of a manifest that one attempt goes through, one bit of each."""


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)  # each damage is an event, too
    torch.set_num_threads(1)
    with ExitStack() as stack:
        flips = [_flips(kind, stack.enter_context(kind.make(scratch / kind.name)), seed) for kind in KINDS]
        small = stack.enter_context(KINDS[0].make(scratch / "manifest"))
        stock = StockStep(scratch / "stock")
        run = ThreeSteps.make(scratch / "files")
        s3 = OnS3(stack)
        yield [
            *flips,
            Row(
                "damage-manifest", "a bit flipped in each byte of a manifest", 4, small.num_manifest_parts,
                partial(flip_manifest, small, seed),
            ),
            Row("damage-stock", "bits flipped, items of stock DCP", 1, 40, stock.attempt(seed)),
            Row(
                "damage-files", "files cut, swapped, missing, stale", len(DAMAGES), 30 * len(DAMAGES),
                run.attempt(seed),
            ),
            Row("damage-s3", "the same, S3", 1, 24, s3.attempt(seed)),
        ]  # fmt: skip


# -- kinds of steps


def _small(seed: int) -> dict[str, Any]:
    """Every dtype, tensors without elements or dimensions, objects, in many small items."""
    return {
        "dtypes": {str(dtype): tensor_of(dtype, 3, 5, seed=seed) for dtype in DTYPES},
        "many": {str(n): tensor_of(torch.float32, 1 + n, seed=seed + n) for n in range(12)},
        "scalar": torch.tensor(3.5 + seed),
        "flag": torch.tensor(seed % 2 == 0),
        "empty": torch.empty(0, 3),
        "transposed": tensor_of(torch.float32, 5, 6, seed=seed).t(),
        "groups": [{"lr": 0.1 * seed, "betas": (0.9, 0.95), "name": f"group {seed}"}, {"lr": torch.tensor(0.5 * seed)}],
        "n": seed,
        "name": f"run {seed}",
    }


def _medium(seed: int) -> dict[str, Any]:
    """For several files of 128 KiB."""
    return {f"t{n}": tensor_of(torch.float32, 10_000, seed=seed + n) for n in range(8)} | {"n": seed}


def _large(seed: int) -> dict[str, Any]:
    """A payload of three blocks, aligned behind a gap."""
    return {
        "first": tensor_of(torch.int64, 7, seed=seed),
        "large": torch.arange(2_300_000, dtype=torch.int32) * 1_103_515_245 + seed,
        "medium": tensor_of(torch.bfloat16, 600_000, seed=seed),
        "n": seed,
    }


def _of_two_ranks(seed: int) -> dict[str, Any]:
    return {
        "rows": tensor_of(torch.float32, 10, 300, seed=seed),
        "first": {"w": tensor_of(torch.bool, 90, seed=seed), "n": seed},
        "second": {"w": tensor_of(torch.bfloat16, 70, seed=seed), "n": [seed]},
    }


def _save(url: str, state: Mapping[str, Any], *, file_bytes: int = 1 << 40) -> None:
    with CheckpointManager(url) as manager:
        manager._storage.max_file_bytes = file_bytes
        manager.save(1, state, metrics={"loss": 0.25}, metadata={"note": "of a run", "list": [1, None, "x"]})


class _Rows(DefaultSavePlanner):
    """Of a rank that has, as under FSDP, its rows of a tensor."""

    def __init__(self, start: int, size: tuple[int, ...]) -> None:
        super().__init__()
        self._start, self._size = start, torch.Size(size)

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        rows = self.state_dict["rows"]
        offsets = torch.Size([self._start, 0])
        chunk = ChunkStorageMetadata(offsets, rows.size())
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(rows), self._size)
        index = MetadataIndex("rows", offsets)
        self.plan = replace(plan, items=[
            replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data) if item.index.fqn == "rows" else item
            for item in plan.items
        ])  # fmt: skip
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]


def _save_as_two_ranks(url: str, state: Mapping[str, Any]) -> None:
    """What DCP does on two ranks, here one after the other."""
    rows = state["rows"]
    states = [{"rows": rows[:4], "first": state["first"]}, {"rows": rows[4:], "second": state["second"]}]
    planners = [_Rows(start, rows.size()) for start in (0, 4)]
    for planner, part in zip(planners, states, strict=True):
        planner.set_up_planner(part, None, planner is planners[0])
    plans, metadata = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    writer = ShardWriter(f"{url}/1")
    writer.set_up_storage_writer(is_coordinator=True)
    plans = writer.prepare_global_plan(plans)
    written = [
        writer.write_data(planner.finish_plan(plan), planner).wait()
        for planner, plan in zip(planners, plans, strict=True)
    ]
    writer.finish(metadata, written)


@dataclass(frozen=True)
class Kind:
    name: str
    what: str
    state: Callable[[int], dict[str, Any]]
    save: Callable[[str, Mapping[str, Any]], None]
    quick: int
    full: int

    @contextmanager
    def make(self, path: Path) -> Iterator[Saved]:
        state = self.state(1)
        self.save(str(path), state)
        with CheckpointManager(str(path), chkpt_on_preemption=False) as manager:
            yield Saved(path, state, manager)


KINDS = (
    Kind("small", "bits flipped, small tensors", _small, _save, 5, 120),
    Kind("parts", "bits flipped, several files", _medium, partial(_save, file_bytes=128 << 10), 4, 90),
    Kind("ranks", "bits flipped, two ranks' files", _of_two_ranks, _save_as_two_ranks, 4, 90),
    Kind("large", "bits flipped, blocks of a large tensor", _large, _save, 2, 20),
)


# -- bits


class Saved:
    """Step 1 of a run, and what it must hold."""

    def __init__(self, path: Path, state: Mapping[str, Any], manager: CheckpointManager) -> None:
        self.path, self.state, self.manager = path, state, manager
        self.storage = open_storage(str(path))
        self.manifest_path = next((path / "1").glob("manifest-*"))
        manifest = decode_manifest(self.manifest_path.read_bytes())
        self.regions = _regions(path / "1", manifest)

    @property
    def num_manifest_parts(self) -> int:
        return -(-self.manifest_path.stat().st_size // MANIFEST_BYTES)

    def flip(self, path: Path, at: int, bit: int) -> Outcome:
        descriptor = os.open(path, os.O_RDWR)
        try:
            (byte,) = os.pread(descriptor, 1, at)
            os.pwrite(descriptor, bytes([byte ^ 1 << bit]), at)
            try:
                return self._found(f"bit {bit} of byte {at} of {path.relative_to(self.path)}")
            finally:
                os.pwrite(descriptor, bytes([byte]), at)
        finally:
            os.close(descriptor)

    def _found(self, what: str) -> Outcome:
        assert _is_reported(self.storage, 1), f"verify does not report {what}"
        target = target_like(self.state)
        try:
            self.manager.restore(1, target)
        except DamagedStepError:
            return "detected"
        assert_same(self.state, target, what)
        return "survived"


def _is_reported(storage: Storage, step: int) -> bool:
    try:
        return bool(find_damage(storage, str(step))[1])
    except DamagedStepError:
        return True


def _regions(folder: Path, manifest: Manifest) -> dict[str, list[tuple[Path, int, int]]]:
    """{class of bytes: [(file, start, stop)]}, of every byte of a step but the manifest."""
    found: dict[str, list[tuple[Path, int, int]]] = {}

    def add(kind: str, path: Path, start: int, stop: int) -> None:
        if stop > start:
            found.setdefault(kind, []).append((path, start, stop))

    add("stock", folder / ".metadata", 0, manifest.dcp_metadata_size)
    for file in manifest.files:
        path, end = folder / manifest.head.attempt / file.name, 0
        for chunk in sorted((c for c in manifest.chunks if c.file == file.name), key=lambda c: c.offset):
            add("gap", path, end, chunk.offset)
            end = chunk.offset + chunk.length
            if chunk.layout is None:
                add("object", path, chunk.offset, end)
                continue
            payload_bytes = _payload_bytes(chunk)
            payload_end = chunk.payload_offset + payload_bytes
            add("head", path, chunk.offset, chunk.payload_offset)
            add("payload", path, chunk.payload_offset, payload_end)
            descriptor_end = payload_end + (16 if payload_bytes else 0)
            add("descriptor", path, payload_end, descriptor_end)
            add("directory", path, descriptor_end, end)
        add("gap", path, end, file.size)
    return found


def _payload_bytes(chunk: Any) -> int:
    size = chunk.layout.torch_dtype.itemsize
    for length in chunk.layout.shape:
        size *= length
    return size


def _flips(kind: Kind, saved: Saved, seed: int) -> Row:
    key = f"damage-{kind.name}"

    def attempt(number: int) -> Counter[Outcome]:
        draw, classes, outcomes = draws(seed, key, number), sorted(saved.regions), Counter[Outcome]()
        for flip in range(FLIPS):
            path, start, stop = draw.choice(saved.regions[classes[(number * FLIPS + flip) % len(classes)]])
            outcomes[saved.flip(path, draw.randrange(start, stop), draw.randrange(8))] += 1
        return outcomes

    return Row(key, kind.what, kind.quick, kind.full, attempt)


def flip_manifest(saved: Saved, seed: int, number: int) -> Counter[Outcome]:
    """One attempt goes through a part of it, one of eight bits of each byte."""
    draw, size = draws(seed, "damage-manifest", number), saved.manifest_path.stat().st_size
    parts = range(number * MANIFEST_BYTES % size, min(size, (number * MANIFEST_BYTES) % size + MANIFEST_BYTES))
    return Counter(saved.flip(saved.manifest_path, at, draw.randrange(8)) for at in parts)


class StockStep:
    """A step that torch.distributed.checkpoint saved: the CRC32s of its items' zips cover all but their directories."""

    def __init__(self, path: Path) -> None:
        self.state = _medium(1)
        dcp.save(self.state, checkpoint_id=str(path / "1"))
        self.storage, self.data = open_storage(str(path)), path / "1" / "__0_0.distcp"
        self.manager = CheckpointManager(str(path), chkpt_on_preemption=False)

    def attempt(self, seed: int) -> Callable[[int], Counter[Outcome]]:
        whole = self.data.read_bytes()
        metadata = unpickle_metadata((self.data.parent / ".metadata").read_bytes())
        items = [(info.offset, info.length) for info in metadata.storage_data.values()]

        def attempt(number: int) -> Counter[Outcome]:
            draw, outcomes = draws(seed, "damage-stock", number), Counter[Outcome]()
            for _ in range(FLIPS):
                offset, length = draw.choice(items)
                # Half of them into what is not payload.
                at = offset + draw.choice(
                    (draw.randrange(length), draw.randrange(700), length - draw.randrange(1, 700))
                )
                data = bytearray(whole)
                data[at] ^= 1 << draw.randrange(8)
                self.data.write_bytes(data)
                outcomes[self._outcome(f"byte {at}")] += 1
            self.data.write_bytes(whole)
            return outcomes

        return attempt

    def _outcome(self, what: str) -> Outcome:
        is_reported, target = _is_reported(self.storage, 1), target_like(self.state)
        try:
            self.manager.restore(1, target)
        except (DamagedStepError, UnsafeObjectError):  # the latter: of an object's zip, where no CRC32 covers it
            return "detected"
        assert_same(self.state, target, what)
        return "detected" if is_reported else "survived"


# -- files


class Step:
    """The files of one step of a run, by name, read and written whole; `other` is the run's step before it, and
    `stranger` the same step of another run."""

    def __init__(self, storage: Storage, step: int, stranger: Storage) -> None:
        self.storage, self.step, self.stranger = storage, step, stranger

    def paths(self, step: int | None = None) -> list[str]:
        return sorted(self.storage.list_files(str(step or self.step)))

    def one(self, end: str, step: int | None = None) -> str:
        return next(path for path in self.paths(step) if end in path.rpartition("/")[2])

    def read(self, path: str) -> bytes:
        return self.storage.read_file(path)

    def write(self, path: str, data: bytes) -> None:
        if data != self.read(path):
            self.storage.replace(path, data)

    def data(self) -> list[str]:
        return [path for path in self.paths() if path.endswith(".distcp")]


def _boundaries(step: Step, path: str) -> list[int]:
    manifest = decode_manifest(step.read(step.one("manifest-")))
    chunks = [chunk for chunk in manifest.chunks if path.endswith(f"/{chunk.file}")]
    marks = {0, 1} | {mark for c in chunks for mark in (c.offset, c.payload_offset, c.offset + c.length)}
    return sorted(mark for mark in marks if mark < len(step.read(path)))


def cut_at_a_boundary(step: Step, draw: random.Random) -> None:
    path = draw.choice(step.data())
    step.write(path, step.read(path)[: draw.choice(_boundaries(step, path))])


def cut_anywhere(step: Step, draw: random.Random) -> None:
    path = draw.choice(step.paths())
    data = step.read(path)
    step.write(path, data[: draw.randrange(len(data))])


def lengthen(step: Step, draw: random.Random) -> None:
    path = draw.choice(step.paths())
    step.write(path, step.read(path) + draw.choice((b"\0", draw.randbytes(draw.randrange(1, 9000)))))


def zero_a_block(step: Step, draw: random.Random) -> None:
    """As a filesystem leaves it that lost a write."""
    path = draw.choice(step.paths())
    data = step.read(path)
    at = draw.randrange(0, len(data), 4096)
    step.write(path, data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :])


def swap_blocks(step: Step, draw: random.Random) -> None:
    path = draw.choice(step.data())
    data = step.read(path)
    a, b = sorted(draw.sample(range(0, len(data) - 4096, 4096), 2))
    step.write(path, data[:a] + data[b : b + 4096] + data[a + 4096 : b] + data[a : a + 4096] + data[b + 4096 :])


def swap_files(step: Step, draw: random.Random) -> None:
    first, second = draw.sample(step.data(), 2)
    a, b = step.read(first), step.read(second)
    step.write(first, b)
    step.write(second, a)


def stale_file(step: Step, draw: random.Random) -> None:
    """Of the step before, which has the same layout and so the same length."""
    path = draw.choice(step.data())
    step.write(path, step.read(step.one(path.rpartition("/")[2], step.step - 1)))


def missing_file(step: Step, draw: random.Random) -> None:
    step.storage.delete([draw.choice(step.data())])


def missing_folder(step: Step, draw: random.Random) -> None:
    step.storage.delete(step.data())


def missing_stock(step: Step, draw: random.Random) -> None:
    step.storage.delete([step.one(".metadata")])


def stale_stock(step: Step, draw: random.Random) -> None:
    step.write(step.one(".metadata"), step.read(step.one(".metadata", step.step - 1)))


def missing_manifest(step: Step, draw: random.Random) -> None:
    step.storage.delete([step.one("manifest-")])


def empty_manifest(step: Step, draw: random.Random) -> None:
    step.write(step.one("manifest-"), b"")


def manifest_of_another_step(step: Step, draw: random.Random) -> None:
    step.write(step.one("manifest-"), step.read(step.one("manifest-", step.step - 1)))


def manifest_of_another_run(step: Step, draw: random.Random) -> None:
    step.write(step.one("manifest-"), step.stranger.read_file(step.one("manifest-")))


def manifest_numbered_anew(step: Step, draw: random.Random) -> None:
    path = step.one("manifest-")
    step.storage.replace(f"{step.step}/manifest-{draw.randrange(4, 99):08d}.json", step.read(path))
    if draw.random() < 0.5:
        step.storage.delete([path])


DAMAGES = (
    cut_at_a_boundary, cut_anywhere, lengthen, zero_a_block, swap_blocks, swap_files, stale_file, missing_file,
    missing_folder, missing_stock, stale_stock, missing_manifest, empty_manifest, manifest_of_another_step,
    manifest_of_another_run, manifest_numbered_anew,
)  # fmt: skip


def _save_three(url: str, options: Mapping[str, Any] | None = None, base: int = 0) -> None:
    with CheckpointManager(url, storage_options=options) as manager:
        manager._storage.max_file_bytes = 128 << 10
        for step in (1, 2, 3):
            manager.save(step, _medium(base + 100 * step))


def _check(url: str, options: Mapping[str, Any] | None, before: Mapping[str, bytes]) -> Outcome:
    """What must hold of steps 1 to 3 when something of step 3 was damaged. before: its files as they were."""
    storage = open_storage(url, options)
    now = {path: storage.read_file(path) for path in storage.list_files("3")}
    seen: list[Event] = []
    target = target_like(_medium(0))
    with CheckpointManager(url, storage_options=options, events=[seen.append], chkpt_on_preemption=False) as manager:
        steps = manager.all_steps()
        assert steps == ([1, 2, 3] if any("manifest-" in path for path in now) else [1, 2]), steps
        if 3 in steps:
            assert _is_reported(storage, 3) == (now != before), "verify does not report it"
        found = manager.restore_latest(target)
        assert found in (2, 3), found
        assert_same(_medium(100 * found), target)
        (event,) = [event for event in seen if isinstance(event, Restored)]
        assert event.skipped_steps == ((3,) if found == 2 and 3 in steps else ())
        assert all(event.skip_reasons)
        verified = target_like(_medium(0))
        assert manager.restore_latest(verified, verify=True) == found
        assert_same(_medium(100 * found), verified)
    return "survived" if found == 3 else "detected"


class ThreeSteps:
    """A run of three steps in a folder, and another one like it; each attempt damages a copy."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, path: Path) -> ThreeSteps:
        _save_three(str(path / "run"))
        _save_three(str(path / "stranger"), base=7)
        return cls(path)

    def attempt(self, seed: int) -> Callable[[int], Outcome]:
        def attempt(number: int) -> Outcome:
            copy = self.path / "copy"
            shutil.copytree(self.path / "run", copy)
            try:
                storage = open_storage(str(copy))
                before = {path: storage.read_file(path) for path in storage.list_files("3")}
                damage = DAMAGES[number % len(DAMAGES)]
                damage(Step(storage, 3, open_storage(str(self.path / "stranger"))), draws(seed, "damage-files", number))
                return _check(str(copy), None, before)
            finally:
                shutil.rmtree(copy)

        return attempt


class OnS3:
    """The same in a bucket, where files are put back afterwards."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._options: dict[str, Any] = {}
        self._url = f"s3://{BUCKET}/damage"

    def attempt(self, seed: int) -> Callable[[int], Outcome]:
        def attempt(number: int) -> Outcome:
            if not self._options:
                self._start()
            storage = open_storage(f"{self._url}/run", self._options)
            stranger = open_storage(f"{self._url}/stranger", self._options)
            before = {path: storage.read_file(path) for path in storage.list_files("3")}
            draw = draws(seed, "damage-s3", number)
            try:
                DAMAGES[draw.randrange(len(DAMAGES))](Step(storage, 3, stranger), draw)
                return _check(f"{self._url}/run", self._options, before)
            finally:
                storage.delete(storage.list_files("3").keys() - before.keys())
                for path, data in before.items():
                    storage.replace(path, data)

        return attempt

    def _start(self) -> None:
        server = self._stack.enter_context(best_s3_server())
        server.make_bucket(BUCKET)
        self._options = server.storage_options
        _save_three(f"{self._url}/run", self._options)
        _save_three(f"{self._url}/stranger", self._options, base=7)
