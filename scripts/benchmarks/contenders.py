"""The contenders: how asyncckpt and its peers save one training run in a folder, and read it back.

A saver is a function (folder, training) -> context manager of `save(number) -> Pending`; a restorer one of `restore()`.
Each uses its library as its documentation says to, imports it when it starts, and measures nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import staging
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from asyncckpt import CheckpointManager, Committed, Event, Failed, TrainState
from stagers import AsyncStager, BlockingAsyncStager, OverlappingAsyncStager

from .frame import OURS, PEER


class Training:
    """A model and its optimizer: `num_tensors` tensors of equal size, parameters and what the optimizer keeps of each.

    adamw: AdamW, which keeps two (and a step count), in place of SGD with momentum, which keeps one.
    """

    def __init__(self, num_bytes: int, num_tensors: int = 100, *, adamw: bool = False) -> None:
        num_parameters = num_tensors // (3 if adamw else 2)
        width = max(1, round((num_bytes / num_tensors / 4) ** 0.5))
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_parameters)))
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(parameters, lr=1e-9) if adamw else torch.optim.SGD(parameters, lr=1e-9, momentum=0.9)
        )
        self._batch = torch.randn(16, width)
        self.forward_backward()
        self.optimizer.step()
        kept = [value for state in self.optimizer.state.values() for value in state.values() if value.ndim]
        self.tensors = [*self.model.parameters(), *kept]
        self.num_bytes = sum(tensor.nbytes for tensor in self.tensors)

    def forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)  # freed and allocated anew, they would be half of the time
        self.model(self._batch).sum().backward()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Pending:
    """A save after its call. join: waits until it is over, and raises what failed. before_update: until parameters may
    change. is_over: without waiting."""

    join: Callable[[], Any] = _nothing
    before_update: Callable[[], Any] = _nothing
    is_over: Callable[[], bool] = lambda: True


Save = Callable[[int], Pending]
Saver = Callable[[Path, Training], AbstractContextManager[Save]]
Restorer = Callable[[Path, Training], AbstractContextManager[Callable[[], Any]]]


# -- ours


def train_state(training: Training) -> Any:
    return TrainState(model=training.model, optimizer=training.optimizer)


def plain_dict(training: Training) -> Any:
    """What peers save, too; the manager asks both for their state_dict()."""
    return {"model": training.model, "optimizer": training.optimizer}


class Ours:
    """A manager whose saves are `Pending`s. Close it by its context manager."""

    def __init__(self, url: str, **options: Any) -> None:
        self._is_over = threading.Event()
        self.manager = CheckpointManager(url, chkpt_on_preemption=False, events=[self._hear], **options)

    def save_async(self, step: int, state: Any) -> Pending:
        self._is_over.clear()
        self.manager.save_async(step, state)
        return Pending(self.manager.join, self.manager.wait_staged, self._is_over.is_set)

    def _hear(self, event: Event) -> None:
        if isinstance(event, (Committed, Failed)):
            self._is_over.set()

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.manager.close()


MakeState = Callable[[Training], Any]


@contextmanager
def asyncckpt_async(
    folder: Path, training: Training, *, stager: Callable[[], AsyncStager], make_state: MakeState, **options: Any
) -> Iterator[Save]:
    state = make_state(training)
    with Ours(str(folder), stager=stager(), **options) as ours:
        yield lambda number: ours.save_async(number, state)


@contextmanager
def asyncckpt_sync(folder: Path, training: Training) -> Iterator[Save]:
    state = plain_dict(training)
    with Ours(str(folder)) as ours:

        def save(number: int) -> Pending:
            ours.manager.save(number, state)
            return Pending()

        yield save


@contextmanager
def asyncckpt_restorer(folder: Path, training: Training, *, make_state: MakeState) -> Iterator[Callable[[], Any]]:
    state = make_state(training)
    with Ours(str(folder)) as ours:
        ours.manager.save(0, state)
        yield lambda: ours.manager.restore(0, state)


# -- torch


@contextmanager
def torch_save(folder: Path, training: Training) -> Iterator[Save]:
    folder.mkdir()

    def save(number: int) -> Pending:
        with open(folder / str(number), "wb") as file:
            torch.save(training.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        return Pending()

    yield save


@contextmanager
def dcp_save(folder: Path, training: Training, *, num_threads: int = 1) -> Iterator[Save]:
    def save(number: int) -> Pending:
        writer = dcp.FileSystemWriter(folder / str(number), thread_count=num_threads)
        dcp.save(training.state_dict(), storage_writer=writer)
        return Pending()

    yield save


@contextmanager
def dcp_async_save(folder: Path, training: Training, *, make_stager: Callable[[], Any] | None = None) -> Iterator[Save]:
    stager = make_stager and make_stager()

    def save(number: int) -> Pending:
        saving = dcp.async_save(training.state_dict(), checkpoint_id=folder / str(number), async_stager=stager)
        if isinstance(saving, AsyncSaveResponse):  # its stager gave a future
            upload, staged = saving.upload_completion, saving.staging_completion
            return Pending(upload.result, staged.result, upload.done)
        return Pending(saving.result, is_over=saving.done)

    yield save
    if stager is not None:
        stager.close()


@contextmanager
def torch_load(folder: Path, training: Training, *, mmap: bool) -> Iterator[Callable[[], Any]]:
    with torch_save(folder, training) as save:
        save(0)

    def restore() -> None:  # in place, as the others do
        loaded = torch.load(folder / "0", weights_only=True, mmap=mmap)
        training.model.load_state_dict(loaded["model"])
        for key, entry in training.optimizer.state_dict()["state"].items():
            entry["momentum_buffer"].copy_(loaded["optimizer"]["state"][key]["momentum_buffer"])

    yield restore


@contextmanager
def dcp_load(folder: Path, training: Training) -> Iterator[Callable[[], Any]]:
    dcp.save(training.state_dict(), checkpoint_id=folder)
    yield lambda: dcp.load(training.state_dict(), checkpoint_id=folder)


# -- others, where they are installed: pip install '.[bench]'


@contextmanager
def lightning_async_io(folder: Path, training: Training) -> Iterator[Save]:
    from lightning_fabric.plugins import TorchCheckpointIO
    from pytorch_lightning.plugins.io import AsyncCheckpointIO

    is_over = threading.Event()

    class ReportingIO(TorchCheckpointIO):
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            try:
                super().save_checkpoint(*args, **kwargs)
            finally:
                is_over.set()

    plugin = AsyncCheckpointIO(ReportingIO())

    def save(number: int) -> Pending:
        is_over.clear()
        plugin.save_checkpoint(training.state_dict(), folder / str(number))
        return Pending(is_over.wait, is_over=is_over.is_set)

    yield save
    plugin.teardown()


@contextmanager
def torch_checkpointing_save(folder: Path, training: Training) -> Iterator[Save]:
    import torch_checkpointing
    from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
    from torch_checkpointing.config import AsyncCheckpointSaverConfig
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    manager = torch_checkpointing.CheckpointManager(
        torch_checkpointing.CheckpointManager.Config(
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),  # its default ends in EINVAL on ext4
            save=AsyncCheckpointSaverConfig(
                process_config=CheckpointProcessConfig(subprocess_init_timeout_secs=120)  # imports all this, too
            ),
        )
    )

    def staged() -> None:
        with manager.lock():
            pass

    def save(number: int) -> Pending:
        saving = manager.save(str(folder / str(number)), training.state_dict())
        return Pending(saving.result, staged, saving.done)

    folder.mkdir()
    yield save
    manager.close()


@contextmanager
def torchsnapshot_async_take(folder: Path, training: Training) -> Iterator[Save]:
    from torchsnapshot import Snapshot

    def save(number: int) -> Pending:
        app = {"model": training.model, "optimizer": training.optimizer}
        snapshot = Snapshot.async_take(str(folder / str(number)), app)
        return Pending(snapshot.wait, is_over=snapshot.done)

    yield save


def _torch_stager(*, in_thread: bool) -> staging.DefaultStager:
    """Pinned memory and non-blocking copies, its other two options, are refused without an accelerator."""
    return staging.DefaultStager(
        staging.StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=in_thread, use_non_blocking_copy=False
        )
    )


BLOCKING, BLOCKING_TRAIN_STATE, OVERLAPPING = (
    "save_async, BlockingAsyncStager",
    "save_async, BlockingAsyncStager, TrainState",
    "save_async, OverlappingAsyncStager",
)
SAVE = "save"
DCP_SAVE, DCP_LOAD = "dcp.save", "dcp.load"
NO_FSYNC = "no fsync"

ASYNC_SAVERS: dict[str, tuple[str, Saver]] = {
    BLOCKING: (OURS, partial(asyncckpt_async, stager=BlockingAsyncStager, make_state=plain_dict)),
    BLOCKING_TRAIN_STATE: (OURS, partial(asyncckpt_async, stager=BlockingAsyncStager, make_state=train_state)),
    OVERLAPPING: (OURS, partial(asyncckpt_async, stager=OverlappingAsyncStager, make_state=train_state)),
    "dcp.async_save": (PEER, dcp_async_save),
    "dcp.async_save, BlockingAsyncStager kept": (
        PEER,
        partial(dcp_async_save, make_stager=partial(staging.BlockingAsyncStager, cache_staged_state_dict=True)),
    ),
    "dcp.async_save, DefaultStager kept": (
        PEER,
        partial(dcp_async_save, make_stager=partial(_torch_stager, in_thread=False)),
    ),
    "dcp.async_save, DefaultStager in a thread": (
        PEER,
        partial(dcp_async_save, make_stager=partial(_torch_stager, in_thread=True)),
    ),
    f"Lightning AsyncCheckpointIO, {NO_FSYNC}": (PEER, lightning_async_io),
    f"torch_checkpointing, {NO_FSYNC}": (PEER, torch_checkpointing_save),
    f"torchsnapshot async_take, {NO_FSYNC}": (PEER, torchsnapshot_async_take),
}
"""Peers named "no fsync" let a save count as done while its bytes are still in the page cache."""

SAVERS: dict[str, tuple[str, Saver]] = {
    SAVE: (OURS, asyncckpt_sync),
    BLOCKING: ASYNC_SAVERS[BLOCKING],
    "torch.save, fsync": (PEER, torch_save),
    DCP_SAVE: (PEER, dcp_save),
    "dcp.save, 2 threads": (PEER, partial(dcp_save, num_threads=2)),
    **{name: saver for name, saver in ASYNC_SAVERS.items() if NO_FSYNC in name},
}

RESTORERS: dict[str, tuple[str, Restorer]] = {
    "restore": (OURS, partial(asyncckpt_restorer, make_state=plain_dict)),
    "restore, TrainState": (OURS, partial(asyncckpt_restorer, make_state=train_state)),
    "torch.load": (PEER, partial(torch_load, mmap=False)),
    "torch.load, mmap": (PEER, partial(torch_load, mmap=True)),
    DCP_LOAD: (PEER, dcp_load),
}


def finish(pending: Pending, written: Path) -> None:
    """Raise what failed, and delete what was written."""
    pending.join()
    if not written.exists():
        raise FileNotFoundError(f"nothing was saved in {written}")
    delete(written)


def delete(path: Path) -> None:
    """A file or a folder; a manager that tidies up after a commit may be quicker with one of its empty folders."""
    if not path.is_dir():
        path.unlink()
        return
    while path.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
