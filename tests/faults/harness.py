"""Runs that are killed: a process that saves in a loop and ends by SIGKILL at a chosen point, and what must hold then.

`run_until_killed` starts the process, `KillPoint` says where it ends, `assert_survived` opens the path with a fresh
manager and checks every promise. States are pure functions of the step, so nothing is remembered but step numbers.
Other tests reuse `state_of`, `open_manager` and `strays`.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from urllib.parse import urlsplit

import botocore.session
import pytest
import torch

from asyncckpt import manager as manager_module
from asyncckpt.errors import DamagedStepError
from asyncckpt.events import Committed, Event
from asyncckpt.files import BytesFile, File
from asyncckpt.manager import CheckpointManager
from asyncckpt.storage import TEMP_PREFIX, Storage, open_storage
from asyncckpt.testing import Call, RecordingStorage
from tests.states import assert_same, target_like

KEPT = 2
SCHEDULE = (0, 1, 2, 1, 3, 0, 4)
"""The steps of a run, in order: 1 is saved again while retention holds it, 0 after it was pruned."""
STEPS = (*SCHEDULE, 5)
"""Of every save that a run may make: those of SCHEDULE, and one that shows that saving goes on."""
NEXT = 99
"""The step, and the number of the save, by which `assert_survived` shows that saving goes on."""
S3_PART_BYTES = 5 << 20  # the least that S3 takes, so that a file of 6 MB has two parts
TIMEOUT_S = 60.0  # of a test's own waits: far beyond any that succeeds

_forks = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "torch", "torch.distributed", "torch.utils.serialization.config", "numpy", "pytest", "s3fs",
    "asyncckpt.storage_fsspec", __name__,
]  # fmt: skip


def state_of(step: int, save: int, num_rows: int = 1450) -> dict[str, Any]:
    """The state that save number `save` stores as `step`: 6 MB in tensors of several kinds, or so many rows of 4 KB,
    and objects."""
    seed = 1000 * step + save
    words = torch.arange(1000 * num_rows, dtype=torch.int32) * 1_103_515_245 + seed
    return {
        "save": save,
        "model": {
            "large": words.view(torch.float32).reshape(num_rows, 1000),
            "medium": words[:50_000].view(torch.bfloat16).clone(),
            "small": [words[: n + 1].clone() for n in range(5)],
            "scalar": torch.tensor(float(seed)),
        },
        "optimizer": {"param_groups": [{"lr": seed / 7, "name": f"group {seed}"}], "step": step},
    }


def files_of(step: int, save: int) -> dict[str, File | bytes]:
    """The files that save number `save` gives for `step`: 1.5 MB of a tensor, small ones, an empty one."""
    words = torch.arange(375_000, dtype=torch.int32) * (1000 * step + save + 1)
    return {
        "given/deep/optimizer.bin": File(words, lambda staged: BytesFile(staged.numpy().tobytes())),
        "given/save.json": f'{{"save": {save}}}'.encode(),
        "given/random.pkl": bytes([step]) * (10_000 + save),
        "given/none": b"",
    }


Moment = Literal["before", "middle", "after"]


@dataclass(frozen=True)
class Place:
    """Where a run saves, and what: states whose largest tensor has `num_rows` rows of 4 KB.

    oracles: a folder to which `save_oracles` wrote the states; "": they are made again. may_tear: files that should be
    written in one go may be cut off where a run was killed, and a step whose manifest is cut off is damaged. has_files:
    beside the state, those of `files_of`.
    """

    url: str
    options: dict[str, Any]
    num_rows: int = 1450
    oracles: str = ""
    may_tear: bool = False
    has_files: bool = False

    def state(self, step: int, save: int) -> dict[str, Any]:
        return state_of(step, save, self.num_rows)

    def oracle(self, step: int, save: int) -> dict[str, Any]:
        if not self.oracles:
            return self.state(step, save)
        found: dict[str, Any] = torch.load(f"{self.oracles}/{step}-{save}.pt")
        return found

    def save_oracles(self) -> None:
        """By torch.save: what every restored state is compared with."""
        for save, step in [*enumerate(STEPS), (NEXT, NEXT)]:
            torch.save(self.state(step, save), f"{self.oracles}/{step}-{save}.pt")


@dataclass(frozen=True)
class KillPoint:
    """Where a run ends itself. kind "call": at the `number`-th call of its storage (from 0), at `moment`; "syscall":
    before the `number`-th change to a folder; "delay": `delay_s` after it began its `number`-th save, by us."""

    kind: Literal["call", "syscall", "delay"]
    number: int
    moment: Moment = "before"
    fraction: float = 0.5
    """Of the bytes of a write, or of the files of a delete, that a kill in the middle lets through."""
    delay_s: float = 0.0


@dataclass(frozen=True)
class Rehearsal:
    """What a run does that nobody kills."""

    calls: tuple[Call, ...]
    num_syscalls: int
    save_s: float

    def kill_point(self, seed: int) -> KillPoint:
        """Drawn from the seed: by turns around any call, within a write, between two system calls, by the clock."""
        draw = random.Random(seed)
        kind = ("call", "write", "syscall" if self.num_syscalls else "call", "delay")[seed % 4]
        if kind == "delay":
            return KillPoint("delay", draw.randrange(len(SCHEDULE)), delay_s=draw.uniform(0, 2 * self.save_s))
        if kind == "syscall":
            return KillPoint("syscall", draw.randrange(self.num_syscalls))
        if kind == "write":
            writes = [number for number, call in enumerate(self.calls) if call.verb == "write_file"]
            return KillPoint("call", draw.choice(writes), "middle", draw.random())
        number = draw.randrange(len(self.calls))
        moments: list[Moment] = ["before", "after"]
        if self.calls[number].verb == "delete":
            moments.append("middle")
        return KillPoint("call", number, draw.choice(moments), draw.random())


class KilledStorage(RecordingStorage):
    """Ends this process at one call."""

    def __init__(self, inner: Storage, point: KillPoint | None) -> None:
        super().__init__(inner)
        self._point = point if point and point.kind == "call" else None
        self._lock = threading.Lock()
        self._last_path = ""  # of the write in which it ends

    def _around(self, call: Call, run: Callable[[], Any]) -> Any:
        with self._lock:  # files are written on several threads
            moment = self._moment()
            self.calls.append(call)
        if moment == "before":
            _die()
        if moment == "middle":
            self._last_path = call.path
        result = run()
        if moment is not None:  # of an empty file there is no middle
            _die()
        return result

    def write_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        super().write_file(path, size, self._until_killed(path, size, views))

    def delete(self, paths: Iterable[str]) -> None:
        names = list(paths)
        if self._moment() == "middle":
            assert self._point is not None
            self.inner.delete(names[: int(len(names) * self._point.fraction)])
            _die()
        super().delete(names)

    def _moment(self) -> str | None:
        return self._point.moment if self._point and self._point.number == len(self.calls) else None

    def _until_killed(self, path: str, size: int, views: Iterator[memoryview]) -> Iterator[memoryview]:
        if path != self._last_path:
            yield from views
            return
        assert self._point is not None
        left = int(size * self._point.fraction)
        for view in views:
            yield view[: min(left, len(view))]
            left -= len(view)
            if left <= 0:
                _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def open_manager(place: Place, wrap: Callable[[Storage], Storage] = lambda storage: storage, **arguments: Any) -> Any:
    """A CheckpointManager that sees storage through `wrap`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "open_storage", lambda *args, **kwargs: wrap(open_storage(*args, **kwargs)))
        return CheckpointManager(place.url, storage_options=place.options, **arguments)


def run_until_killed(place: Place, point: KillPoint) -> list[int]:
    """Run until it is dead; the numbers of the saves that it reported as committed."""
    committed: list[int] = []
    for kind, value in _run_messages(place, point):
        if kind == "committed":
            committed.append(value)
        assert kind != "done" or point.kind == "delay", "the kill point was never reached"
    return committed


def rehearse(place: Place) -> Rehearsal:
    """A run to its end, which must be as a run should be."""
    started, done = time.monotonic(), None
    for kind, value in _run_messages(place, None):
        if kind == "done":
            done = value
        if kind == "saving" and value == 0:
            started = time.monotonic()
    assert done is not None, "the run died by itself"
    calls, num_syscalls = done
    return Rehearsal(calls, num_syscalls, (time.monotonic() - started) / len(SCHEDULE))


def _run_messages(place: Place, point: KillPoint | None) -> Iterator[tuple[str, Any]]:
    process, messages = start(_save_all, place, point, preload=_PRELOAD, silence_s=TIMEOUT_S)
    for kind, value in messages:
        if point and point.kind == "delay" and (kind, value) == ("saving", point.number):
            time.sleep(point.delay_s)
            process.kill()  # and hear what it has said until then
        yield kind, value


def messages_of(body: Callable[..., None], *args: Any) -> Iterator[tuple[str, Any]]:
    """What a process that runs `body(link, *args)` sends over the link until it ends; leaving off kills it."""
    yield from start(body, *args, preload=_PRELOAD, silence_s=TIMEOUT_S)[1]


def start(
    body: Callable[..., None], *args: Any, preload: list[str], silence_s: float
) -> tuple[Any, Iterator[tuple[str, Any]]]:
    """(a process that runs `body(link, *args)`, what it sends until it ends). Leaving off kills it. It is forked from a
    server that imported `preload` and used nothing."""
    _forks.set_forkserver_preload(preload)
    here, there = _forks.Pipe(duplex=False)
    process = _forks.Process(target=_run, args=(there, body, args), daemon=True)
    process.start()
    there.close()
    return process, _messages(process, here, silence_s)


def _messages(process: Any, here: Connection, silence_s: float) -> Iterator[tuple[str, Any]]:
    try:
        while True:
            assert here.poll(silence_s), f"the run said nothing for {silence_s:.0f} s"
            try:
                kind, value = here.recv()
            except EOFError:
                return
            assert kind != "error", f"the run failed:\n{value}"
            yield kind, value
    finally:
        process.kill()
        process.join()
        here.close()


def _run(link: Connection, body: Callable[..., None], args: tuple[Any, ...]) -> None:
    """The process."""
    try:
        body(link, *args)
    except BaseException:
        link.send(("error", traceback.format_exc()))


def _save_all(link: Connection, place: Place, point: KillPoint | None) -> None:
    """Save as fast as it goes, and say what was begun and what was committed: short lines, which pass whole even if
    both threads talk at once."""
    syscalls = _count_syscalls(place.url, point)
    storages: list[KilledStorage] = []

    def wrap(storage: Storage) -> Storage:
        if hasattr(storage, "part_bytes"):
            storage.part_bytes = S3_PART_BYTES
        storages.append(KilledStorage(storage, point))
        return storages[0]

    def report(event: Event) -> None:
        if isinstance(event, Committed):
            link.send(("committed", event.sequence - 1))  # a run on an empty path counts from 1

    manager = open_manager(place, wrap, max_to_keep=KEPT, events=[report])
    for save, step in enumerate(SCHEDULE):
        link.send(("saving", save))
        manager.save_async(step, place.state(step, save), files=files_of(step, save) if place.has_files else None)
    manager.close()
    link.send(("done", (tuple(storages[0].calls), syscalls())))


def _count_syscalls(root: str, point: KillPoint | None) -> Callable[[], int]:
    """Count this process's changes to names below `root`, and end it before one of them."""
    count = 0
    changes = ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "os.truncate")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in changes and isinstance(args[0], str) and args[0].startswith(root):
            if point and point.kind == "syscall" and point.number == count:
                _die()
            count += 1

    sys.addaudithook(hook)
    return lambda: count


# -- what must hold afterwards


def assert_survived(place: Place, committed: Sequence[int]) -> None:
    """All promises, seen by a fresh manager after a run of SCHEDULE was killed; committed: what it reported."""
    with open_manager(place, max_to_keep=KEPT) as manager:
        found, torn = _restorable(manager, place)
        before, after = retained_of(committed), retained_of([*committed, *_next(committed)])
        assert before.items() <= found.items() or after.items() <= found.items() or torn, (before, after, found)
        # Only the save that was under way can be torn; where its step is saved again, it hides the older save of it.
        assert torn <= {STEPS[save] for save in _next(committed)}, torn
        assert {step: save for step, save in before.items() if step not in torn}.items() <= found.items() or not torn

        latest = target_like(place.state(0, 0))
        step = manager.restore_latest(latest) if found or not place.may_tear else None
        assert (step is None) == (not found)
        if step is not None:
            assert latest["save"] == found[step] == max(found.values()) >= max(committed, default=-1)

        age_temporary_files(place)
        manager.save(NEXT, place.state(NEXT, NEXT))
        found[NEXT] = NEXT
        newest = sorted(sorted(found, key=found.__getitem__)[-KEPT:])
        manager.refresh()
        steps = manager.all_steps()
        assert set(newest) <= set(steps) if place.may_tear else newest == steps, (found, steps)
        # Nothing cleans a damaged step.
        left = [path for path in strays(place, manager._storage, steps) if path.split("/")[0] not in map(str, torn)]
        assert left == [], left
        assert _restored_save(manager, place, NEXT) == NEXT
        for step in newest:
            manager.verify(step)


def retained(num_commits: int) -> dict[int, int]:
    """{step: save} that retention holds after the first `num_commits` saves of the schedule."""
    return retained_of(range(num_commits))


def retained_of(commits: Iterable[int]) -> dict[int, int]:
    """{step: save} that retention holds after these saves of STEPS."""
    saves: dict[int, int] = {}
    for save in commits:
        saves.pop(STEPS[save], None)
        saves[STEPS[save]] = save
    return dict(list(saves.items())[-KEPT:])


def _next(committed: Sequence[int]) -> list[int]:
    """The save that may be there without having been reported."""
    return [save for save in (max(committed, default=-1) + 1,) if save < len(STEPS)]


def _restorable(manager: CheckpointManager, place: Place) -> tuple[dict[int, int], set[int]]:
    """{step: save} of the steps that are listed: all of them, but for the torn ones where that may be."""
    found: dict[int, int] = {}
    torn = set()
    for step in manager.all_steps():
        try:
            found[step] = _restored_save(manager, place, step)
        except DamagedStepError:
            if not place.may_tear:
                raise
            torn.add(step)
    return found, torn


def _restored_save(manager: CheckpointManager, place: Place, step: int) -> int:
    """The number of the save that a step holds, which it must hold bit for bit."""
    target = target_like(place.state(0, 0))
    manager.restore(step, target, strict=True)
    assert_same(place.oracle(step, target["save"]), target)
    if place.has_files and step != NEXT:
        with TemporaryDirectory() as folder:
            manager.fetch(step, folder)
            given = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
            files = files_of(step, target["save"])
            assert given.keys() == files.keys() == manager.files(step).keys()
            for name, file in files.items():
                expected = file if isinstance(file, bytes) else b"".join(file.format(file.value).views())
                assert given[name].read_bytes() == expected, name
    return int(target["save"])


def strays(place: Place, storage: Storage, steps: Iterable[int]) -> list[str]:
    """Everything at a place that is not part of one whole save of one of `steps`, hidden things included."""
    files = storage.list_files()
    found = []
    for step in {path.split("/")[0] for path in files}:
        names = sorted(path for path in files if path.split("/")[0] == step)
        data = rf"{step}/(\d+)-([0-9a-f]+)/__0_0\.distcp(?: {step}/\1-\2/(?:__\d+_\d+\.distcp|given/[\w./]+))*"
        whole = rf"{step}/\.metadata {data} {step}/manifest-\1\.json"
        if step not in map(str, steps) or not re.fullmatch(whole, " ".join(names)):
            found += names
    if place.url.startswith("s3://"):
        return found + _unfinished_uploads(place)
    for folder, folders, names in os.walk(place.url):
        found += [str(Path(folder, name)) for name in names if name.startswith(TEMP_PREFIX)]
        found += [folder] if not folders and not names else []
    return found


def age_temporary_files(place: Place) -> None:
    """As if the killed run had ended long ago: storage spares young ones, which another writer may be about to name."""
    for path in Path(place.url).rglob(f"{TEMP_PREFIX}*"):
        os.utime(path, (0, 0))


def _unfinished_uploads(place: Place) -> list[str]:
    parts = urlsplit(place.url)
    client = _s3_client(place.options["client_kwargs"]["endpoint_url"], place.options["key"], place.options["secret"])
    answer = client.list_multipart_uploads(Bucket=parts.netloc, Prefix=parts.path.strip("/") + "/")
    return [f"upload of {upload['Key']}" for upload in answer.get("Uploads", ())]


@functools.cache
def _s3_client(endpoint: str, key: str, secret: str) -> Any:
    return botocore.session.Session().create_client(
        "s3", region_name="us-east-1", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret
    )
