"""Lightning: `Trainer(plugins=[AsyncckptIO()])`, of `lightning` or `pytorch_lightning`, saves in the background.

The checkpoint stays what it is to Lightning: one `.ckpt` file in torch.save's format under the name that Lightning
chose, in a folder or at a URL, which Lightning without this plugin reads. Strategies whose checkpoints are folders save
by lightning_sharded.py, through this plugin. When to save and what to keep is ModelCheckpoint's affair. Called by
Lightning's strategies; imports neither package.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
import threading
import time
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any, TypeAlias

import torch
import torch.distributed as dist
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol
from torch import Tensor

from asyncckpt import events
from asyncckpt.errors import DamagedStepError, WriteError
from asyncckpt.events import Sink, log_events
from asyncckpt.exits import at_exit
from asyncckpt.storage import Storage, open_storage, redact
from asyncckpt.torch_file import TorchFile
from asyncckpt.writer import BackgroundWriter
from stagers import BlockingAsyncStager
from stagers.base import StagedSnapshot

__all__ = ["AsyncckptIO", "newest_checkpoint"]

Path: TypeAlias = str | os.PathLike[str]
Write: TypeAlias = Callable[[], int]
"""Makes a checkpoint durable; its size in bytes."""

Stage: TypeAlias = Callable[[BlockingAsyncStager], tuple[StagedSnapshot, Write]]

META = "meta.pt"
"""What Lightning looks for in a folder, to know a checkpoint of a sharded strategy."""
_ZIP = b"PK\x03\x04"


class AsyncckptIO:
    """A `CheckpointIO` of Lightning's, for `Trainer(plugins=[...])` and `Fabric(plugins=[...])`.

    A save returns when the state is copied to host memory (page-locked where that is faster, reused), and is written
    by a background thread, in order: a reader sees the whole file or the one before. On filesystems that are neither a
    folder nor S3 or GCS that holds as far as their `mv` is atomic. Tensors are saved as CPU tensors.

    A file is removed only when the save before the request is durable; if that failed, it stays. In folders where this
    run has saved nothing, nothing is removed: the checkpoint of another run, that this one went on from, stays, too.
    What failed is raised once, by the next save or the end of `fit`. A folder with a link among its checkpoints
    (`save_last="link"`) is saved to without the background: a link must not point to what is not there yet.

    max_pending_async: saves in flight, each with its copy of the state; a further one waits. 2, as `save_last=True`
    makes two of each. storage_options: for fsspec. events: further sinks, which see the saves; `url` is the file.
    """

    def __init__(
        self,
        *,
        max_pending_async: int = 2,
        storage_options: Mapping[str, Any] | None = None,
        events: Iterable[Sink] = (),
    ) -> None:
        if max_pending_async < 1:
            raise ValueError(f"max_pending_async must be at least 1, not {max_pending_async}")
        self._max_pending = max_pending_async
        self.storage_options = dict(storage_options or {})
        self._sinks = (log_events, *events)
        self._storages: dict[str, Storage] = {}
        self._saves: _Saves | None = None
        # A subclass of both packages' CheckpointIO would import both; who makes a plugin for a Trainer has its package.
        for package in ("lightning.fabric", "lightning_fabric"):
            if module := sys.modules.get(f"{package}.plugins.io.checkpoint_io"):
                module.CheckpointIO.register(AsyncckptIO)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        """Blocks while the state is copied, and before that while too many saves are in flight. Raises what an earlier
        save failed with; then nothing is saved."""
        storage, name = self._open(path, storage_options)

        def stage(stager: BlockingAsyncStager) -> tuple[StagedSnapshot, Write]:
            snapshot, copy = staged_copy(stager, checkpoint)
            try:
                content = TorchFile(copy)
            except BaseException:
                snapshot.release()
                raise

            def write() -> int:
                storage.replace_file(name, content.size, content.views())
                return content.size

            return snapshot, write

        self.save_staged(path, int(checkpoint.get("global_step", -1)), stage)

    def save_staged(self, path: Path, step: int, stage: Stage) -> None:
        """Queue what `stage` prepares; the snapshot is released when it is written. For lightning_sharded.py."""
        self._begun().save(os.fspath(path), step, stage)
        if not _is_local(path):
            # ModelCheckpoint asks this thread's own filesystem what is there, which may have listed the folder before.
            url_to_fs(os.fspath(path))[0].invalidate_cache()
        elif _holds_links(path):
            self.join()

    def load_checkpoint(
        self, path: Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What was saved, once all saves are over; checksums verified. A file at a URL is held in memory meanwhile.

        Raises FileNotFoundError, DamagedStepError, and what torch.load does. weights_only: as torch.load takes it.
        """
        self.drain()
        with self._opened(path) as file:
            _verify(file, redact(os.fspath(path)))
            loaded: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=weights_only)
        return loaded

    def remove_checkpoint(self, path: Path) -> None:
        """Returns at once; the class says when it is removed, and when not."""
        storage, name = self._open(path, None)
        self._begun().remove(os.fspath(path), lambda: _delete(storage, name))

    def drain(self) -> None:
        """Wait until all saves and removals are over. What failed is raised later."""
        if self._saves is not None:
            self._saves.writer.join()

    def join(self) -> None:
        """Wait until all saves and removals are over. Raises what failed since it was last raised."""
        self.drain()
        if self._saves is not None:
            self._saves.writer.raise_failures()

    def teardown(self) -> None:
        """`join`, and free thread and buffers; the next save makes new ones."""
        saves, self._saves = self._saves, None
        self._storages.clear()
        if saves is not None:
            saves.close()
            saves.writer.raise_failures()

    def _begun(self) -> _Saves:
        if self._saves is None:
            self._saves = _Saves(self._max_pending, self._sinks)
        return self._saves

    def _open(self, path: Path, storage_options: Mapping[str, Any] | None) -> tuple[Storage, str]:
        """The storage of the folder that holds `path`, and the name in it."""
        name = os.fspath(path).rpartition("/")[2]
        folder = os.fspath(path).removesuffix(name) or "."
        if storage_options:
            return open_storage(folder, self.storage_options | dict(storage_options)), name
        if folder not in self._storages:
            self._storages[folder] = open_storage(folder, self.storage_options)
        return self._storages[folder], name

    @contextmanager
    def _opened(self, path: Path) -> Iterator[IO[bytes]]:
        if _is_local(path):
            with open(url_to_fs(os.fspath(path))[1], "rb") as file:
                yield file
            return
        # A filesystem of its own, as those that are shared may have listed the folder before the file was replaced.
        filesystem, full = url_to_fs(os.fspath(path), skip_instance_cache=True, **self.storage_options)
        size = int(filesystem.size(full))
        content = io.BytesIO()
        content.truncate(size)
        content.seek(size - 1)
        content.write(b"\0")
        storage, name = self._open(path, None)
        storage.read_into(name, [(0, content.getbuffer())])
        content.seek(0)
        yield content


def newest_checkpoint(dirpath: Path, storage_options: Mapping[str, Any] | None = None) -> str | None:
    """The checkpoint in or below a folder or URL that was written last, for `fit(ckpt_path=...)`; None: there is none.

    For URLs, where Lightning's own "last" finds nothing and begins anew.
    """
    # A filesystem of its own: shared ones keep listings.
    filesystem, root = url_to_fs(os.fspath(dirpath), skip_instance_cache=True, **(storage_options or {}))
    try:
        files = [path for path in filesystem.find(root) if path.endswith((".ckpt", f".ckpt/{META}"))]
    except FileNotFoundError:
        return None
    if not files:
        return None
    newest = str(max(files, key=filesystem.modified)).removesuffix(f"/{META}")
    return os.fspath(dirpath).rstrip("/") + newest.removeprefix(root.rstrip("/"))


@dataclass(slots=True)
class _Save:
    """removals: what is to be removed when it is durable. is_durable: None until it is over."""

    path: str
    started: float
    stall_s: float = 0.0
    is_durable: bool | None = None
    removals: list[tuple[str, Callable[[], None]]] = field(default_factory=list)


class _Saves:
    """What there is between the first save and `teardown`: the thread, the buffers, and what may be removed.

    Both threads come here: the training thread by `save` and `remove`, the writer by the rest. State of both is touched
    under the one lock, and nothing else is done there.
    """

    def __init__(self, max_pending: int, sinks: Iterable[events.Sink]) -> None:
        self.writer = BackgroundWriter(max_pending)
        weakref.finalize(self, self.writer.end).atexit = False  # else the idle thread would stay
        self._stager = BlockingAsyncStager()
        self._sinks = tuple(sinks)
        self._lock = threading.Lock()
        self._newest: _Save | None = None
        self._in_flight: Counter[str] = Counter()
        self._claims: Counter[str] = Counter()
        self._folders: set[str] = set()
        self._sequence = 0
        at_exit(self, lambda saves: saves.writer.join())  # for saves after `fit`, which no `teardown` follows

    def save(self, path: str, step: int, stage: Stage) -> None:
        save = _Save(path, time.perf_counter())
        wait_s = self.writer.acquire()
        try:
            self.writer.raise_failures()
            staging = time.perf_counter()
            snapshot, write = stage(self._stager)
        except BaseException:
            self.writer.release()
            raise
        with self._lock:
            self._newest = save
            # ModelCheckpoint looks whether a name is taken, and finds that it is not while that save is in flight. So
            # two of them may give one name to one state, and it is to stay until both have removed it.
            self._claims[path] += bool(self._in_flight[path])
            self._in_flight[path] += 1
        now = time.perf_counter()
        save.stall_s = now - save.started
        self._tell(
            events.Staged, path, step,
            num_bytes=snapshot.num_bytes, wait_s=wait_s, stage_s=now - staging, stall_s=save.stall_s,
        )  # fmt: skip
        self.writer.submit(lambda: self._run(save, step, snapshot, write))

    def remove(self, path: str, delete: Callable[[], None]) -> None:
        with self._lock:
            if self._claims[path]:
                self._claims[path] -= 1
                return
            newest = self._newest
            if newest is not None and newest.is_durable is None:
                newest.removals.append((path, delete))
                return
        if newest is not None and newest.is_durable:
            self.writer.acquire()
            self.writer.submit(lambda: lambda: self._remove([(path, delete)]))
        else:
            self._keep(path, f"the save after it failed, {newest.path}" if newest else "this run has not saved yet")

    def close(self) -> None:
        self.writer.close()
        self._stager.close()

    def _run(self, save: _Save, step: int, snapshot: StagedSnapshot, write: Write) -> Callable[[], None]:
        """On the writer thread."""
        num_bytes, error = 0, None
        try:
            snapshot.wait()
            num_bytes = write()
        except Exception as exc:  # raised below
            error = exc
        finally:
            snapshot.release()
        with self._lock:
            self._in_flight[save.path] -= 1
            save.is_durable = error is None
            removals = save.removals
        if error is not None:
            raise self._failed(save, step, removals, error)
        self._folders.add(os.path.dirname(save.path))
        self._sequence += 1
        self._tell(
            events.Committed, save.path, step, sequence=self._sequence,
            num_bytes=num_bytes, stall_s=save.stall_s, durable_s=time.perf_counter() - save.started,
        )  # fmt: skip
        return lambda: self._remove(removals)

    def _failed(
        self, save: _Save, step: int, removals: Iterable[tuple[str, Callable[[], None]]], error: Exception
    ) -> WriteError:
        for path, _ in removals:
            self._keep(path, f"the save after it failed, {save.path}")
        url = redact(save.path)
        failure = WriteError(
            f"{url} was not saved: {error}. Earlier checkpoints are untouched, and none was removed for it. "
            "Free space, or check permissions and the network, and go on: the next save is tried as usual.",
            step=step, url=url, rank=_rank(),
        )  # fmt: skip
        failure.__cause__ = error
        self._tell(events.Failed, save.path, step, phase="write", error=failure)
        return failure

    def _remove(self, removals: Iterable[tuple[str, Callable[[], None]]]) -> None:
        """On the writer thread, in the order in which it was asked for."""
        for path, delete in removals:
            if os.path.dirname(path) not in self._folders:
                self._keep(path, "this run has saved nothing beside it")
                continue
            started = time.perf_counter()
            try:
                delete()
            except OSError as exc:  # what is left is whole and harms nobody
                self._tell(events.Failed, path, -1, phase="prune", error=exc)
            else:
                self._tell(events.Pruned, path, -1, whole=True, num_files=1, prune_s=time.perf_counter() - started)

    def _keep(self, path: str, reason: str) -> None:
        self._tell(events.Skipped, path, -1, reason=f"not removed: {reason}")

    def _tell(self, kind: Callable[..., events.Event], path: str, step: int, **values: Any) -> None:
        events.emit(self._sinks, kind(url=redact(path), step=step, rank=_rank(), time_s=time.time(), **values))


# -- a copy of one moment


def staged_copy(
    stager: BlockingAsyncStager, value: Any, apart: dict[str, Any] | None = None
) -> tuple[StagedSnapshot, Any]:
    """A copy of any picklable value, types and ties kept, its tensors in the snapshot's memory.

    apart: a state dict that goes into the same snapshot, as its "apart".

    By pickle, not by the stager's own walk: torch.save would keep an OrderedDict with its attributes, a dataclass, or a
    module in the hyperparameters, and find the tensors in them.
    """
    stream = io.BytesIO()
    taken = _Taken(stream)
    taken.dump(value)
    snapshot = stager.snapshot({"apart": apart or {}, "taken": dict(enumerate(taken.tensors))})
    try:
        stream.seek(0)
        staged = snapshot.state_dict["taken"]
        copies = [_like(tensor, staged[i]) for i, tensor in enumerate(taken.tensors)]
        return snapshot, _Given(stream, copies).load()
    except BaseException:
        snapshot.release()
        raise


class _Taken(pickle.Pickler):
    """Leaves the tensors out, in `tensors`."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._index:
            self._index[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._index[id(value)]


class _Given(pickle.Unpickler):
    """Puts tensors in their places."""

    def __init__(self, stream: IO[bytes], tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self._tensors[index]


def _like(source: Tensor, staged: Tensor) -> Tensor:
    if isinstance(source, torch.nn.Parameter):
        return torch.nn.Parameter(staged, source.requires_grad)
    return staged.detach().requires_grad_() if source.requires_grad else staged


# -- files


def _verify(file: IO[bytes], url: str) -> None:
    """DamagedStepError if it is a zip that is cut short or differs from its checksums; if it has any."""
    problem = None
    if file.read(len(_ZIP)) == _ZIP:  # else torch's format before 1.6, which has none
        try:
            archive = zipfile.ZipFile(file)
            if any(record.CRC for record in archive.infolist()):  # torch can be told not to compute them
                problem = archive.testzip()
        except (zipfile.BadZipFile, EOFError) as exc:
            problem = str(exc)
    file.seek(0)
    if problem:
        raise DamagedStepError(
            f"{url} is damaged ({problem}). Nothing was changed. Go on from another checkpoint.", url=url
        )


def _delete(storage: Storage, name: str) -> None:
    """A file, a link, or a folder of files, in the order in which it never looks whole while it is not."""
    with suppress(IsADirectoryError):
        storage.delete([name])
    files = storage.list_files(name)
    for first in (f"{name}/{META}", f"{name}/manifest-"):
        storage.delete([path for path in files if path.startswith(first)])
    storage.delete(files)


def _holds_links(path: Path) -> bool:
    """Whether a checkpoint beside a local `path` is a link."""
    try:
        with os.scandir(os.path.dirname(url_to_fs(os.fspath(path))[1])) as entries:
            return any(entry.name.endswith(".ckpt") and entry.is_symlink() for entry in entries)
    except FileNotFoundError:
        return False


def _is_local(path: Path) -> bool:
    return get_protocol(os.fspath(path)) in ("file", "local")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
