"""The contenders of bench_run.py: how asyncckpt and its peers save one training run, and read it back.

A saver is a function (folder, training) -> context manager of `save(number) -> Pending`; a restorer one of `restore()`.
Each uses its library as its documentation says to, imports it when it starts, and measures nothing.
"""

from __future__ import annotations

import os
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

from asyncckpt import CheckpointManager, TrainState
from stagers import AsyncStager, BlockingAsyncStager, OverlappingAsyncStager


class Training:
    """A model and its optimizer: `num_tensors` tensors of equal size, half parameters and half momentum."""

    def __init__(self, num_bytes: int, num_tensors: int = 100) -> None:
        width = round((num_bytes / num_tensors / 4) ** 0.5)
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_tensors // 2)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-9, momentum=0.9)
        self._batch = torch.randn(16, width)
        self.forward_backward()
        self.optimizer.step()
        self.tensors = [*self.model.parameters(), *(s["momentum_buffer"] for s in self.optimizer.state.values())]
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
    """A save after its call. join: waits until it is durable. before_update: until parameters may change."""

    join: Callable[[], Any] = _nothing
    before_update: Callable[[], Any] = _nothing


Save = Callable[[int], Pending]
Saver = Callable[[Path, Training], AbstractContextManager[Save]]
Restorer = Callable[[Path, Training], AbstractContextManager[Callable[[], Any]]]


# -- ours


@contextmanager
def asyncckpt_saver(folder: Path, training: Training, *, stager: Callable[[], AsyncStager]) -> Iterator[Save]:
    state = TrainState(model=training.model, optimizer=training.optimizer)
    with CheckpointManager(str(folder), stager=stager(), chkpt_on_preemption=False) as manager:

        def save(number: int) -> Pending:
            manager.save_async(number, state)
            return Pending(manager.join, manager.wait_staged)  # step() waits by itself; here it is to be timed

        yield save


@contextmanager
def asyncckpt_restorer(folder: Path, training: Training) -> Iterator[Callable[[], Any]]:
    state = TrainState(model=training.model, optimizer=training.optimizer)
    with CheckpointManager(str(folder), chkpt_on_preemption=False) as manager:
        manager.save(0, state)
        yield lambda: manager.restore(0, state)


@contextmanager
def asyncckpt_dict_restorer(folder: Path, training: Training) -> Iterator[Callable[[], Any]]:
    with CheckpointManager(str(folder), chkpt_on_preemption=False) as manager:
        manager.save(0, training.state_dict())
        yield lambda: manager.restore(0, training.state_dict())


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
            return Pending(saving.upload_completion.result, saving.staging_completion.result)
        return Pending(saving.result)

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
        return Pending(is_over.wait)

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
        return Pending(saving.result, staged)

    folder.mkdir()
    yield save
    manager.close()


@contextmanager
def torchsnapshot_async_take(folder: Path, training: Training) -> Iterator[Save]:
    from torchsnapshot import Snapshot

    def save(number: int) -> Pending:
        app = {"model": training.model, "optimizer": training.optimizer}
        snapshot = Snapshot.async_take(str(folder / str(number)), app)
        return Pending(snapshot.wait)

    yield save


def _torch_stager(*, in_thread: bool) -> staging.DefaultStager:
    """Pinned memory and non-blocking copies, its other two options, are refused without an accelerator."""
    return staging.DefaultStager(
        staging.StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=in_thread, use_non_blocking_copy=False
        )
    )


OURS, PEER = "ours", "peer"

SAVERS: dict[str, tuple[str, Saver]] = {
    "`CheckpointManager`": (OURS, partial(asyncckpt_saver, stager=BlockingAsyncStager)),
    "`CheckpointManager`, `OverlappingAsyncStager`": (OURS, partial(asyncckpt_saver, stager=OverlappingAsyncStager)),
    "`torch.save`, fsync": (PEER, torch_save),
    "`dcp.save`": (PEER, dcp_save),
    "`dcp.save`, 2 threads": (PEER, partial(dcp_save, num_threads=2)),
    "`dcp.async_save`": (PEER, dcp_async_save),
    "`dcp.async_save`, `BlockingAsyncStager` kept": (
        PEER,
        partial(dcp_async_save, make_stager=partial(staging.BlockingAsyncStager, cache_staged_state_dict=True)),
    ),
    "`dcp.async_save`, `DefaultStager` kept": (
        PEER,
        partial(dcp_async_save, make_stager=partial(_torch_stager, in_thread=False)),
    ),
    "`dcp.async_save`, `DefaultStager` in a thread": (
        PEER,
        partial(dcp_async_save, make_stager=partial(_torch_stager, in_thread=True)),
    ),
    "Lightning `AsyncCheckpointIO`, no fsync": (PEER, lightning_async_io),
    "torch_checkpointing, no fsync": (PEER, torch_checkpointing_save),
    "torchsnapshot `async_take`, no fsync": (PEER, torchsnapshot_async_take),
}

RESTORERS: dict[str, tuple[str, Restorer]] = {
    "`CheckpointManager.restore`, TrainState": (OURS, asyncckpt_restorer),
    "`CheckpointManager.restore`, dict": (OURS, asyncckpt_dict_restorer),
    "`torch.load`": (PEER, partial(torch_load, mmap=False)),
    "`torch.load`, mmap": (PEER, partial(torch_load, mmap=True)),
    "`dcp.load`": (PEER, dcp_load),
}
