"""What stock `dcp.save` would write into a folder, kept as files of a step instead: planned now, written later.

`CapturingWriter` stands in for DCP's FileSystemWriter in `capture` (capture.py). Planning and its collectives are DCP's
and run in the call; the tensors are handed on as they are, to be staged, and each item's place is known before a byte
of it is there. The files are those that stock writes, with the CRC32 fields filled in. Nothing here touches storage.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from asyncckpt.files import File
from asyncckpt.framing import Layout, crc32, frame_of
from asyncckpt.shard import in_views, is_dense, payload_view
from asyncckpt.steps import DCP_METADATA


class CapturingWriter(StorageWriter):
    """keep: called with the path below `folder` and what is to be there."""

    def __init__(self, folder: str, keep: Callable[[str, File | bytes], None]) -> None:
        self._folder = folder
        self._keep = keep

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._folder = os.fspath(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError("dcp.save with use_collectives=False writes an index for each rank: not kept here")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{i}_")) for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        values = [_value(planner.resolve_data(item)) for item in plan.items]
        results, offset = [], 0
        for item, value in zip(plan.items, values, strict=True):
            length = len(value) if isinstance(value, bytes) else frame_of(_staged_layout(value)).num_bytes
            results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
            offset += length
        if values:
            self._keep(os.path.join(self._folder, name), File(values, ItemsFile))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator."""
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for part in results for result in part}
        metadata.storage_meta = self.storage_meta()
        self._keep(os.path.join(self._folder, DCP_METADATA), pickle.dumps(metadata))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class ItemsFile:
    """A file of items one behind the other: staged tensors, dense, in torch.save's framing, and items that are made."""

    items: Sequence[torch.Tensor | bytes]

    @property
    def size(self) -> int:
        return sum(len(i) if isinstance(i, bytes) else frame_of(Layout.of(i)).num_bytes for i in self.items)

    def views(self) -> Iterator[memoryview]:
        for item in self.items:
            if isinstance(item, bytes):
                yield memoryview(item)
            else:
                yield from _framed(item)


def _framed(tensor: torch.Tensor) -> Iterator[memoryview]:
    frame, payload, crc = frame_of(Layout.of(tensor)), payload_view(tensor), 0
    yield memoryview(frame.head)
    for view in in_views(payload):
        crc = crc32(view, crc)
        yield view
    yield memoryview(frame.tail_with(crc))


def _value(resolved: torch.Tensor | io.BytesIO) -> torch.Tensor | bytes:
    return resolved.getvalue() if isinstance(resolved, io.BytesIO) else resolved.detach()


def _staged_layout(tensor: torch.Tensor) -> Layout:
    """Of the copy that a stager makes of it."""
    if is_dense(tensor):
        return Layout.of(tensor)
    return Layout.of(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
