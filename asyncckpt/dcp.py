"""`ShardWriter` and `ShardReader`: our format and storage under stock `torch.distributed.checkpoint.save` and `load`.

Each handles one step folder: `dcp.save(sd, storage_writer=ShardWriter("s3://bucket/run/100"))` writes what the manager
would, manifest and all, and `dcp.load(sd, storage_reader=ShardReader(...))` verifies while it reads. Steps, retention,
staging and safe planning are the manager's.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from asyncckpt.chunks import Chunk, ChunkTable, keys_of
from asyncckpt.commit import commit_step, make_manifest
from asyncckpt.errors import DamagedStepError, SaveError
from asyncckpt.manifest import FileRecord, Head
from asyncckpt.read_items import read_items
from asyncckpt.restore import OpenStep, Reserialising, open_step
from asyncckpt.shard import write_items
from asyncckpt.steps import (
    DCP_METADATA,
    StepFiles,
    attempt_name,
    check_sequence,
    manifest_name,
    new_token,
    read_step_files,
)
from asyncckpt.storage import Storage, open_storage
from asyncckpt.version import __version__

_STEP_NAME = re.compile(r"(0|[1-9][0-9]*)\Z")


@dataclass(frozen=True)
class _Written:
    """Travels in WriteResult to the coordinator."""

    chunk: Chunk
    file: FileRecord


class _OneStep:
    """The folder of one step. path: any URL or local path; None until `checkpoint_id` gives it."""

    def __init__(self, path: str | os.PathLike[str] | None, storage_options: Mapping[str, Any] | None) -> None:
        self._path = path
        self._storage_options = storage_options
        self._opened: Storage | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Called by DCP first. checkpoint_id: another folder, with the same storage options."""
        if checkpoint_id is not None:
            self._path = checkpoint_id
        self._opened = None

    @property
    def _storage(self) -> Storage:
        if self._opened is None:
            if self._path is None:
                raise ValueError("no path: give one to the constructor, or checkpoint_id to dcp.save and dcp.load")
            self._opened = open_storage(os.fspath(self._path), self._storage_options)
        return self._opened

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        try:
            open_storage(os.fspath(checkpoint_id))
        except (ValueError, TypeError, ImportError):
            return False
        return True


class ShardWriter(_OneStep, StorageWriter):
    """DCP `StorageWriter` of our format, to any URL; commits when every rank is durable.

    path: the step folder; a name that is a whole number becomes the step in the manifest. Saving to it again replaces
    the checkpoint once the new one is committed. A checkpoint of another writer in it is refused (SaveError).
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(path, storage_options)
        self._rank = 0
        self._before = StepFiles()
        self._sequence = 0
        self._world_size = 1

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ValueError("ShardWriter needs use_collectives=True: one rank commits what all ranks wrote")
        self._rank = kwargs.get("rank", 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: names the attempt, which every rank finds in its plan."""
        self._storage.check_writable()
        self._before = read_step_files(self._storage.list_files())
        if self._before.is_foreign:
            raise SaveError(
                f"{self._storage.url} holds a checkpoint of another writer (stock DCP or torch_xla), which nothing "
                "here overwrites. Save to another folder, or move that checkpoint away.",
                url=self._storage.url,
            )
        self._sequence = check_sequence(self._before.max_sequence() + 1)
        self._world_size = len(plans)
        attempt = attempt_name(self._sequence, new_token())
        return [replace(plan, storage_data=(rank, attempt)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        rank, attempt = plan.storage_data
        chunks, files = write_items(self._storage, attempt, rank, plan.items, planner)
        by_name = {file.name: file for file in files}
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(item.index, chunk.length, (attempt, _Written(chunk, by_name[chunk.file])))
                for item, chunk in zip(plan.items, chunks, strict=True)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all ranks are durable: the commit, then the end of an older save."""
        attempts = {result.storage_data[0] for rank_results in results for result in rank_results}
        written = [result.storage_data[1] for rank_results in results for result in rank_results]
        attempt = attempts.pop() if attempts else attempt_name(self._sequence, new_token())
        name = _STEP_NAME.search(self._storage.url.rstrip("/").rsplit("/", 1)[-1])
        head = Head(
            int(name[1]) if name else 0, self._sequence, attempt, uuid.uuid4().hex, self._world_size,
            torch.__version__, __version__,
        )  # fmt: skip
        files = list({item.file.name: item.file for item in written}.values())
        manifest, stock = make_manifest(head, keys_of(metadata), ChunkTable.of(item.chunk for item in written), files)
        commit_step(self._storage, "", manifest, None if self._before.manifests else stock)
        if self._before.manifests:
            self._storage.replace(DCP_METADATA, stock)
        self._before.manifests[self._sequence] = manifest_name(self._sequence)
        for group in self._before.leftovers(self._sequence):
            self._storage.delete(group)


class ShardReader(_OneStep, StorageReader):
    """DCP `StorageReader` for our steps and for stock ones, from any URL; verifies checksums while it reads.

    Runs nothing that storage holds: `.metadata` of a stock step goes through a restricted unpickler, and DCP's planner,
    which unpickles objects without limits, gets only bytes made here from a `weights_only` load.
    safe_globals: classes that objects may be made of besides.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        safe_globals: Iterable[Any] = (),
    ) -> None:
        super().__init__(path, storage_options)
        self._safe_globals = tuple(safe_globals)
        self._step: OpenStep | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._step = open_step(self._storage, "")
        return self._step.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._step is None:
            self._step = open_step(self._storage, "")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self._step is not None
        for fqn in (item.storage_index.fqn for item in plan.items):
            if fqn in self._step.lacking:  # also what a link stands for, or lies outside: nothing opens it
                raise DamagedStepError(f"{self._storage.url}: {self._step.lacking[fqn]}. Nothing was changed.")
        reader: Any = Reserialising(planner, self._safe_globals)
        read_items(self._storage, self._step.data_folder, self._step.where, plan.items, reader)
        done: Future[None] = Future()
        done.set_result(None)
        return done
