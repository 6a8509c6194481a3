"""Lightning's sharded strategies, whose checkpoints are folders of DCP files, save in the background to any URL.

`ShardedSaves` is mixed into a strategy and hands its saves to `AsyncckptIO` (lightning.py), which has the thread, the
buffers and the removals. Full checkpoints go to the plugin as they are. Called by Lightning's Trainer, imports neither
of its packages.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from asyncckpt.dcp import ShardReader, ShardWriter
from asyncckpt.integrations.lightning import META, AsyncckptIO, Path, Write, staged_copy
from asyncckpt.storage import open_storage
from asyncckpt.torch_file import TorchFile
from stagers import BlockingAsyncStager
from stagers.base import StagedSnapshot

__all__ = ["ShardedSaves"]

_REST = "lightning_checkpoint"
"""The key in a checkpoint of what is neither model nor optimizer, as the bytes of a file of torch.save."""


class ShardedSaves:
    """Makes a strategy of Lightning's save its shards in the background, through `AsyncckptIO`, to any URL:

        class Sharded(ShardedSaves, ModelParallelStrategy): ...
        trainer = Trainer(strategy=Sharded(), plugins=[AsyncckptIO()])

    for `ModelParallelStrategy` (save_distributed_checkpoint=True) and `FSDPStrategy` (state_dict_type="sharded"), which
    otherwise bypass the plugin. The checkpoint is a folder: a DCP checkpoint of asyncckpt's, committed when all ranks
    are durable, which holds the rest of Lightning's checkpoint, too, and, after that, `meta.pt`, by which Lightning
    without this class knows and reads a local one. Other shardings and numbers of ranks may load it. Full checkpoints
    go to the plugin as ever. A rank that waits for others gives up after `GROUP_TIMEOUT`. Tested with FSDP2 on the CPU;
    FSDPStrategy refuses to run there.
    """

    GROUP_TIMEOUT = timedelta(minutes=10)

    _group: dist.ProcessGroup | None = None

    def save_checkpoint(self: Any, checkpoint: dict[str, Any], filepath: Path, storage_options: Any = None) -> None:
        plugin = self._plugin()
        if not self._is_sharding():
            if self.is_global_zero:
                plugin.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            return
        path = self.broadcast(os.fspath(filepath))
        state = {self._model_key(): checkpoint.pop("state_dict")}
        state |= {f"optimizer_{i}": each for i, each in enumerate(checkpoint.pop("optimizer_states", []))}
        group, options = self._own_group(), plugin.storage_options | dict(storage_options or {})

        def stage(stager: BlockingAsyncStager) -> tuple[StagedSnapshot, Write]:
            snapshot, rest = staged_copy(stager, checkpoint, state)
            try:
                meta = b"".join(TorchFile(rest).views()) if self.global_rank == 0 else b""
            except BaseException:
                snapshot.release()
                raise

            def write() -> int:
                _write(path, snapshot.state_dict["apart"], meta, group, options)
                return snapshot.num_bytes

            return snapshot, write

        plugin.save_staged(path, int(checkpoint.get("global_step", -1)), stage)

    def load_checkpoint(self: Any, checkpoint_path: Path, weights_only: bool | None = None) -> dict[str, Any]:
        plugin: AsyncckptIO = self._plugin()
        plugin.drain()
        path = self.broadcast(os.fspath(checkpoint_path))
        rest = _read_rest(path, plugin.storage_options, weights_only)
        if rest is None:  # one file, or Lightning's own folder
            loaded: dict[str, Any] = super().load_checkpoint(path, weights_only=weights_only)  # type: ignore[misc]
            return loaded
        model, strict = self.model, self.lightning_module.strict_loading
        weights = {self._model_key(): get_model_state_dict(model)}
        load(weights, storage_reader=ShardReader(path, storage_options=plugin.storage_options))
        set_model_state_dict(model, weights[self._model_key()], options=StateDictOptions(strict=strict))
        for i, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{i}": get_optimizer_state_dict(model, optimizer)}
            load(state, storage_reader=ShardReader(path, storage_options=plugin.storage_options))
            set_optimizer_state_dict(model, optimizer, state[f"optimizer_{i}"])
        return rest

    def teardown(self: Any) -> None:
        try:
            self._plugin().teardown()  # ModelParallelStrategy does not
        finally:
            super().teardown()  # type: ignore[misc]

    def _plugin(self: Any) -> AsyncckptIO:
        if not isinstance(self.checkpoint_io, AsyncckptIO):
            raise TypeError(f"{type(self).__name__} needs Trainer(plugins=[AsyncckptIO()])")
        return self.checkpoint_io

    def _is_sharding(self: Any) -> bool:
        # ModelParallelStrategy's, FSDPStrategy's
        return getattr(self, "_save_distributed_checkpoint", getattr(self, "_state_dict_type", "")) in (True, "sharded")

    def _model_key(self: Any) -> str:
        return "model" if hasattr(self, "_state_dict_type") else "state_dict"  # FSDPStrategy's, ModelParallelStrategy's

    def _own_group(self) -> dist.ProcessGroup | None:
        """For the writer threads of all ranks, which use no other: two threads on one group would wait for ever."""
        if self._group is None and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=self.GROUP_TIMEOUT)
        return self._group


def _write(
    path: str, state: dict[str, Any], meta: bytes, group: dist.ProcessGroup | None, storage_options: Mapping[str, Any]
) -> None:
    """On the writer threads of all ranks. meta: of rank 0, else empty."""
    storage = open_storage(path, storage_options)
    if meta:
        state[_REST] = torch.frombuffer(bytearray(meta), dtype=torch.uint8)
        storage.delete([META])  # it would go with the new weights for a moment
    save(state, storage_writer=ShardWriter(path, storage_options=storage_options), process_group=group)
    if meta:
        storage.replace(META, meta)


def _read_rest(path: str, storage_options: Mapping[str, Any], weights_only: bool | None) -> dict[str, Any] | None:
    """All but the weights and the optimizers of a checkpoint of `ShardedSaves`; None if it is something else."""
    try:
        if not open_storage(path, storage_options).list_files():
            return None
    except NotADirectoryError:
        return None
    reader = ShardReader(path, storage_options=storage_options)
    entry = reader.read_metadata().state_dict_metadata.get(_REST)
    if not isinstance(entry, TensorStorageMetadata):
        return None
    rest = {_REST: torch.empty(entry.size, dtype=torch.uint8)}
    load(rest, storage_reader=reader)
    file = io.BytesIO(rest[_REST].numpy().tobytes())
    loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=weights_only)
    return loaded
