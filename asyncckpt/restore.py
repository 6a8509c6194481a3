"""One step back into a state dict: open it, compare it with the target, plan, read.

Nothing of the target is touched before keys, shapes and dtypes were compared. A step is opened by its manifest; a
foreign one (stock DCP) by its `.metadata` through the restricted unpickler. Reading and verifying bytes is read.py's
job; which step is newest, and what the ranks agree on, is manager.py's.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor

from asyncckpt.dcp_metadata import metadata_of, unpickle_metadata
from asyncckpt.errors import DamagedStepError, RestoreError, StateMismatchError, StepNotFoundError
from asyncckpt.framing import encode_object
from asyncckpt.manifest import Chunk, Manifest, ManifestError, decode_manifest
from asyncckpt.objects import load_object
from asyncckpt.per_rank import saved_ranks
from asyncckpt.plan import Leaf, leaves
from asyncckpt.ranks import Ranks
from asyncckpt.read import read_items
from asyncckpt.steps import DCP_METADATA, StepFiles, read_step_files
from asyncckpt.storage import Storage


@dataclass(frozen=True, slots=True)
class OpenStep:
    """A step ready to be read. folder: below the storage's root, "" for the root itself. manifest: None if foreign.

    metadata: DCP's, of all keys; its storage_data tells where the items are, relative to `data_folder`.
    """

    folder: str
    data_folder: str
    manifest: Manifest | None
    metadata: Metadata

    @property
    def where(self) -> Mapping[MetadataIndex, Chunk | _StorageInfo]:
        found: Mapping[MetadataIndex, Chunk | _StorageInfo] = self.metadata.storage_data
        return found

    @property
    def sequence(self) -> int:
        """Of the save that is open; 0 for a foreign one."""
        return 0 if self.manifest is None else self.manifest.head.sequence


def open_step(storage: Storage, folder: str) -> OpenStep:
    """Open the newest committed save of a step folder, or the foreign checkpoint in it.

    Raises StepNotFoundError (nothing whole is there), DamagedStepError.
    """
    while True:
        files = read_step_files(_below(storage.list_files(folder), folder))
        if files.sequence is None:
            return _open_foreign(storage, folder, files)
        try:
            manifest = read_manifest(storage, folder, files)
        except FileNotFoundError:  # the step was saved again between the listing and the read: look again
            continue
        data_folder = join(folder, manifest.head.attempt)
        return OpenStep(folder, data_folder, manifest, metadata_of(manifest.keys, manifest.chunks))


def read_manifest(storage: Storage, folder: str, files: StepFiles) -> Manifest:
    """The newest manifest of a step. FileNotFoundError if it is gone by now, DamagedStepError if it is unreadable."""
    assert files.sequence is not None
    path = join(folder, files.manifests[files.sequence])
    try:
        return decode_manifest(storage.read_file(path))
    except ManifestError as exc:
        raise DamagedStepError(
            f"the manifest {path} at {storage.url} is damaged: {exc}. Nothing was changed. "
            "Restore another step, or use restore_latest, which skips this one."
        ) from exc


def _open_foreign(storage: Storage, folder: str, files: StepFiles) -> OpenStep:
    if not files.is_foreign or DCP_METADATA not in files.other:
        state = "a save that was never committed" if files.attempts else "no checkpoint"
        raise StepNotFoundError(f"{join(storage.url, folder)} holds {state}", known=[], url=storage.url)
    path = join(folder, DCP_METADATA)
    try:
        metadata = unpickle_metadata(storage.read_file(path))
    except ValueError as exc:
        raise DamagedStepError(f"{path} at {storage.url} is damaged: {exc}. Nothing was changed.") from exc
    for index, info in metadata.storage_data.items():
        if not isinstance(info, _StorageInfo) or info.transform_descriptors:
            raise DamagedStepError(
                f"{path} at {storage.url}: {index.fqn!r} was stored through {info}, which only the writer of this "
                "checkpoint can read. Load it with torch.distributed.checkpoint.load and save it again."
            )
    return OpenStep(folder, folder, None, metadata)


@dataclass(frozen=True, slots=True)
class Restoring:
    """A restore that fits its target, which is untouched so far. unasked: keys of the checkpoint not in the target,
    other than other ranks' own values. plan: this rank's part. reader: takes what was read."""

    step: OpenStep
    target: dict[str, Any]
    unasked: tuple[str, ...]
    planner: LoadPlanner
    plan: LoadPlan
    reader: Any


def prepare(
    storage: Storage,
    step: OpenStep,
    target: dict[str, Any],
    *,
    is_coordinator: bool,
    load_planner: LoadPlanner | None,
    safe_globals: Iterable[Any],
) -> Restoring:
    """Compare a step with a nested state dict to read it into, and plan. Reads nothing, changes nothing.

    load_planner: a user's; it alone then decides about missing keys. Raises StateMismatchError.
    """
    targets = leaves(target)
    _compare(targets, step.metadata, f"the checkpoint at {join(storage.url, step.folder)}", load_planner is None)
    planner = _SafeLoadPlanner(safe_globals) if load_planner is None else copy.copy(load_planner)
    planner.set_up_planner(state_dict=target, metadata=step.metadata, is_coordinator=is_coordinator)
    reader: Any = planner if load_planner is None else Reserialising(planner, safe_globals)
    return Restoring(step, target, _unasked(step.metadata, targets), planner, planner.create_local_plan(), reader)


def read(storage: Storage, restoring: Restoring, ranks: Ranks) -> int:
    """Read into the tensors and containers of the target; bytes read. A collective call where the user's planner has a
    global plan of its own. DamagedStepError and OSError: the target may be half overwritten."""
    plan = _exchange(restoring.planner, restoring.plan, ranks)
    step = restoring.step
    return read_items(storage, step.data_folder, step.where, plan.items, restoring.reader)


def _unasked(metadata: Metadata, targets: Mapping[str, Leaf]) -> tuple[str, ...]:
    per_rank = saved_ranks(targets).keys()
    unasked = metadata.state_dict_metadata.keys() - targets.keys()
    return tuple(sorted(key for key in unasked if not saved_ranks([key]).keys() & per_rank))


def _compare(targets: Mapping[str, Leaf], metadata: Metadata, where: str, check_missing: bool) -> None:
    missing = [fqn for fqn in targets if fqn not in metadata.state_dict_metadata] if check_missing else []
    problems = [f"missing in the checkpoint: {fqn!r}" for fqn in missing]
    for fqn, leaf in targets.items():
        saved = metadata.state_dict_metadata.get(fqn)
        if saved is not None and (difference := _difference(saved, leaf.value)):
            problems.append(f"{fqn!r}: {difference}")
    if problems:
        raise StateMismatchError(
            f"{where} does not fit the state dict, {len(problems)} keys differ. Nothing was changed.\n  "
            + "\n  ".join(problems)
        )


def _difference(saved: Any, value: Any) -> str:
    is_tensor = isinstance(value, torch.Tensor)
    if not isinstance(saved, TensorStorageMetadata):
        return f"an object in the checkpoint, {_describe(value)} in the state dict" if is_tensor else ""
    found = f"{saved.properties.dtype} {tuple(saved.size)} in the checkpoint"
    if not is_tensor:
        return f"{found}, {type(value).__name__} in the state dict"
    if tuple(saved.size) != tuple(value.size()) or saved.properties.dtype != value.dtype:
        return f"{found}, {_describe(value)} in the state dict"
    if isinstance(value, DTensor | ShardedTensor):
        return ""
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        return f"{found}; an expanded tensor cannot be filled in place, give a contiguous one"
    return ""


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.size())}"


def _exchange(planner: LoadPlanner, plan: LoadPlan, ranks: Ranks) -> LoadPlan:
    if type(planner).create_global_plan is DefaultLoadPlanner.create_global_plan:
        return planner.finish_plan(plan)  # torch's global load plan is the local ones: nothing to exchange
    plans = ranks.gather_objects(plan, phase="restore")
    parts: list[Any] | None = None
    if ranks.is_coordinator:
        try:
            parts = planner.create_global_plan(plans)
        except Exception as exc:  # the others wait for their parts
            parts = [RestoreError(f"rank 0 could not plan the restore: {exc}", rank=0)] * ranks.world_size
    part = ranks.scatter_objects(parts, phase="restore")
    if isinstance(part, RestoreError):
        raise part
    return planner.finish_plan(part)


class _SafeLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, except that objects load without running code, and into the key they came from."""

    def __init__(self, safe_globals: Iterable[Any]) -> None:
        super().__init__()
        self._targets: Mapping[str, Leaf] = {}
        self._safe_globals = safe_globals

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        self._targets = leaves(state_dict)  # afterwards, because DCP's set-up puts new lists in place of those there

    def create_local_plan(self) -> LoadPlan:
        # Not DCP's: it takes a checkpoint with more keys than this rank asks for to be one of torch 2.3.
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        leaf = self._targets[fqn]
        leaf.container[leaf.key] = load_object(value.getvalue(), self._safe_globals, fqn)


class Reserialising:
    """A planner that may unpickle without limits sees only bytes that we wrote ourselves, from a safe load."""

    def __init__(self, planner: LoadPlanner, safe_globals: Iterable[Any]) -> None:
        self._planner = planner
        self._safe_globals = safe_globals
        self.resolve_tensor = planner.resolve_tensor
        self.commit_tensor = planner.commit_tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        safe = load_object(value.getvalue(), self._safe_globals, read_item.storage_index.fqn)
        self._planner.load_bytes(read_item, io.BytesIO(encode_object(safe)))


def _below(files: Mapping[str, int], folder: str) -> dict[str, int]:
    return {path.removeprefix(f"{folder}/") if folder else path: size for path, size in files.items()}


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
