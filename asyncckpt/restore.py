"""One step back into a state dict: open it, compare it with the target, plan, read.

Nothing of the target is touched before keys, shapes and dtypes were compared. A step is opened by its manifest; a
foreign one (stock DCP) by its `.metadata` through the restricted unpickler. Reading and verifying bytes is read.py's
job; which step is newest, and what the ranks agree on, is restorer.py's.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor

from asyncckpt.boxes import PLAIN
from asyncckpt.chunks import Chunk, Key, Keys, Placement, keys_of
from asyncckpt.dcp_metadata import metadata_of, unpickle_metadata
from asyncckpt.errors import UNCHANGED, DamagedStepError, RestoreError, StateMismatchError, StepNotFoundError
from asyncckpt.framing import encode_object
from asyncckpt.manifest import Head, Manifest, ManifestError, decode_manifest
from asyncckpt.objects import load_object
from asyncckpt.per_rank import saved_ranks
from asyncckpt.plan import Leaf, leaves
from asyncckpt.ranks import Ranks
from asyncckpt.read_items import read_items
from asyncckpt.read_once import read_shared
from asyncckpt.read_whole import Whole, find_whole, read_whole
from asyncckpt.selection import EVERYTHING, Selection
from asyncckpt.steps import DCP_METADATA, StepFiles, manifest_name, read_step_files
from asyncckpt.storage import Storage

PASS_OVER = f"{UNCHANGED} Restore another step, or use restore_latest, which skips this one."


@dataclass(frozen=True, eq=False)
class OpenStep:
    """A step ready to be read. folder: below the storage's root, "" for the root itself. data_folder: what the files'
    names are relative to. manifest: None if foreign. keys: of the whole step. lacking: {key: the file that it needs
    and that is missing or cut}. lost: the same of files that were given, which no key needs."""

    folder: str
    data_folder: str
    manifest: Manifest | None
    keys: Keys
    lacking: Mapping[str, str] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    _foreign: Metadata | None = None

    @cached_property
    def metadata(self) -> Metadata:
        """DCP's, of all keys, for its planners; its storage_data tells where the items are. Of a step of ours it is
        made here, which takes longer than to read a small tensor."""
        if self._foreign is not None:
            return self._foreign
        assert self.manifest is not None
        return metadata_of(self.keys, self.manifest.chunks)

    @property
    def saved(self) -> Mapping[str, TensorStorageMetadata | BytesStorageMetadata]:
        """What `metadata.state_dict_metadata` says of each key, without the chunks."""
        return self._foreign.state_dict_metadata if self._foreign is not None else _SavedKeys(self.keys)

    @property
    def where(self) -> Mapping[MetadataIndex, Chunk | _StorageInfo]:
        found: Mapping[MetadataIndex, Chunk | _StorageInfo] = self.metadata.storage_data
        return found

    @property
    def sequence(self) -> int:
        """Of the save that is open; 0 for a foreign one."""
        return 0 if self.manifest is None else self.manifest.head.sequence


@dataclass(frozen=True, slots=True, eq=False)
class _SavedKeys(Mapping[str, TensorStorageMetadata | BytesStorageMetadata]):
    keys_: Keys

    def __len__(self) -> int:
        return len(self.keys_)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __contains__(self, fqn: object) -> bool:
        return fqn in self.keys_

    def __getitem__(self, fqn: str) -> TensorStorageMetadata | BytesStorageMetadata:
        key = self.keys_[fqn]
        if key.dtype is None or key.shape is None:
            return BytesStorageMetadata()
        return TensorStorageMetadata(TensorProperties(getattr(torch, key.dtype)), torch.Size(key.shape), chunks=[])


class Index(NamedTuple):
    """path: a manifest's, from the storage's root on. data: what it holds. sizes: of all files of its step."""

    path: str
    data: bytes
    sizes: Mapping[str, int]


def open_step(storage: Storage, folder: str, index: Index | None = None) -> OpenStep:
    """Open the newest committed save of a step folder, or the foreign checkpoint in it.

    index: what `read_index` gave another rank; None: it is read here. Raises StepNotFoundError (nothing whole is
    there), DamagedStepError.
    """
    before: tuple[str, dict[int, str]] | None = None
    found = index or read_index(storage, folder)
    while found is not None:
        manifest = _decode(storage, folder, found.path, found.data)
        wrong = _wrong_files(folder, manifest, found.sizes)
        # A listing is of no single moment, and the step may be saved again during it: damage is what stays.
        if not wrong or before == (found.path, wrong):
            keys = Keys.of(manifest.keys)
            lacking = _keys_in(wrong, manifest.chunks.placement)
            lost = tuple(what for what in wrong.values() if what not in lacking.values())
            return OpenStep(folder, join(folder, manifest.head.attempt), manifest, keys, lacking, lost)
        before, found = (found.path, wrong), read_index(storage, folder)
    return _open_foreign(storage, folder)


def read_index(storage: Storage, folder: str) -> Index | None:
    """The newest manifest of a step folder, as it is stored; None: there is none."""
    while True:
        sizes = storage.list_files(folder)
        files = files_below(sizes, folder)
        if files.sequence is None:
            return None
        path = join(folder, files.manifests[files.sequence])
        try:
            return Index(path, storage.read_file(path), sizes)
        except FileNotFoundError:  # the step was saved again between the listing and the read: look again
            continue


def read_manifest(storage: Storage, folder: str, files: StepFiles) -> Manifest:
    """The newest manifest of a step. FileNotFoundError if it is gone by now, DamagedStepError if it is unreadable."""
    assert files.sequence is not None
    path = join(folder, files.manifests[files.sequence])
    return _decode(storage, folder, path, storage.read_file(path))


def _decode(storage: Storage, folder: str, path: str, data: bytes) -> Manifest:
    try:
        manifest = decode_manifest(data)
        _check_place(manifest.head, folder, path)
    except ManifestError as exc:
        raise DamagedStepError(f"the manifest {path} at {storage.url} is damaged: {exc}", outcome=PASS_OVER) from exc
    return manifest


def _check_place(head: Head, folder: str, path: str) -> None:
    """That a manifest lies where it was written: a whole one of another save or step would restore the wrong state.
    The folder of a single step, opened as the root (""), may have any name."""
    if path != join(folder, manifest_name(head.sequence)):
        raise ManifestError(f"it is of the save {head.attempt!r} with number {head.sequence}, moved or renamed")
    if folder and folder != str(head.step):
        raise ManifestError(f"it is of step {head.step}, and was copied or moved from there; ShardReader reads it")


def _wrong_files(folder: str, manifest: Manifest, sizes: Mapping[str, int]) -> dict[int, str]:
    """{number of a file: what is wrong with it, by a listing}"""
    found: dict[int, str] = {}
    for number, file in enumerate(manifest.files):
        path = join(folder, f"{manifest.head.attempt}/{file.name}")
        if wrong := wrong_size(path, file.size, sizes):
            found[number] = wrong
    return found


def wrong_size(path: str, size: int, sizes: Mapping[str, int]) -> str:
    """What is wrong with a file by a listing, or ""."""
    if path not in sizes:
        return f"{path} is missing"
    return "" if sizes[path] == size else f"{path} has {sizes[path]} bytes, the manifest says {size}"


def _keys_in(wrong: Mapping[int, str], place: Placement) -> dict[str, str]:
    if not wrong:
        return {}
    numbers = np.flatnonzero(np.isin(place.file, list(wrong))).tolist()
    return {place.key_of(number): wrong[int(place.file[number])] for number in numbers}


def _open_foreign(storage: Storage, folder: str) -> OpenStep:
    sizes = storage.list_files(folder)
    files = files_below(sizes, folder)
    if not files.is_foreign or DCP_METADATA not in files.other:
        state = "a save that was never committed" if files.attempts else "no checkpoint"
        raise StepNotFoundError(f"{join(storage.url, folder)} holds {state}", known=[], url=storage.url)
    path = join(folder, DCP_METADATA)
    try:
        metadata = unpickle_metadata(storage.read_file(path))
    except ValueError as exc:
        raise DamagedStepError(f"{path} at {storage.url} is damaged: {exc}", outcome=UNCHANGED) from exc
    lacking: dict[str, str] = {}
    for index, info in metadata.storage_data.items():
        if not isinstance(info, _StorageInfo) or info.transform_descriptors:
            raise DamagedStepError(
                f"{path} at {storage.url}: {index.fqn!r} was stored through {info}, which only the writer of this "
                "checkpoint can read. Load it with torch.distributed.checkpoint.load and save it again."
            )
        file = join(folder, info.relative_path)
        if not is_inside(info, file, sizes):
            lacking[index.fqn] = (
                f"{file} should hold {index.fqn!r} at offset {info.offset}, {info.length} bytes, and has "
                f"{sizes.get(file, 'none at all')}"
            )
    return OpenStep(folder, folder, None, keys_of(metadata), lacking, _foreign=metadata)


def is_inside(info: _StorageInfo, path: str, sizes: Mapping[str, int]) -> bool:
    """Whether an item of a foreign step lies within `path`, a file that was listed: its index may say anything."""
    return 0 <= info.offset <= info.offset + info.length <= sizes.get(path, -1)


@dataclass(frozen=True, slots=True)
class Restoring:
    """A restore that fits its target, which is untouched so far. unasked: keys of the checkpoint not in the target,
    other than other ranks' own values. missing: keys of the target that the checkpoint may lack, and does. leaves: what
    of the target is read, {key: leaf}. whole: what needs no planner; planned: what one asks for, None: nothing.
    given: what that planner fills. unverified: keys that were read and carry no checksum."""

    step: OpenStep
    target: dict[str, Any]
    unasked: tuple[str, ...]
    missing: tuple[str, ...]
    leaves: Mapping[str, Leaf]
    given: dict[str, Any]
    whole: Whole | None
    planned: Planned | None
    safe_globals: Iterable[Any]
    unverified: list[str] = field(default_factory=list)

    @property
    def overwrites(self) -> set[str]:
        """The keys of the target that reading changes."""
        return {fqn for fqn in self.leaves if fqn in self.step.keys}

    @property
    def checksums(self) -> str:
        """As in VerifyReport, of what was read."""
        return "manifest" if self.step.manifest is not None else "none" if self.unverified else "zip"


@dataclass(frozen=True, slots=True)
class Planned:
    """This rank's part of a load plan. reader: takes what was read."""

    where: Mapping[MetadataIndex, Chunk | _StorageInfo]
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
    selection: Selection = EVERYTHING,
) -> Restoring:
    """Compare a step with a nested state dict to read it into, and plan. Reads nothing, changes nothing.

    load_planner: a user's; it alone then decides about missing keys, but for those that `selection` lets be. Raises
    StateMismatchError; DamagedStepError: a file that holds what the target asks for is missing or cut.
    """
    asked = leaves(target, objects_of(step._foreign))
    where = f"the checkpoint at {join(storage.url, step.folder)}"
    selection.check_used(step.keys, asked, where)
    targets, missing = _selected(asked, step.keys, selection)
    given = target if len(targets) == len(asked) else {fqn: leaf.value for fqn, leaf in targets.items()}
    compare(targets, step.keys, where, load_planner is None)
    if lost := list(dict.fromkeys(what for key, what in step.lacking.items() if key in targets)):
        named = "; ".join(lost[:8]) + ("; ..." if len(lost) > 8 else "")
        raise DamagedStepError(f"{where} is damaged: {named}", url=storage.url, outcome=PASS_OVER)
    whole, planned = None, None
    if load_planner is not None:
        planner = copy.copy(load_planner)
        reader = Reserialising(planner, safe_globals)
        planned = _plan(planner, given, step.metadata, is_coordinator, reader)
    elif step.manifest is None:
        planner = _SafeLoadPlanner(safe_globals)
        planned = _plan(planner, given, step.metadata, is_coordinator, planner)
    else:
        whole, rest = find_whole(step.manifest, step.keys, {fqn: leaf.value for fqn, leaf in targets.items()})
        if rest:
            planner = _SafeLoadPlanner(safe_globals)
            planned = _plan(planner, rest, _metadata_of_some(step.manifest, rest), is_coordinator, planner)
    unasked = tuple(key for key in _unasked(step.keys, asked) if selection.has(key))
    return Restoring(step, target, unasked, missing, targets, given, whole, planned, safe_globals)


def _selected(
    asked: Mapping[str, Leaf], keys: Keys, selection: Selection
) -> tuple[Mapping[str, Leaf], tuple[str, ...]]:
    """What of the target is to be read, and what else of it may stay as it is because the checkpoint lacks it."""
    if selection is EVERYTHING:
        return asked, ()
    taken = {fqn: leaf for fqn, leaf in asked.items() if selection.has(fqn)}
    may_lack = selection.may_lack
    missing = () if may_lack is None else tuple(fqn for fqn in taken if fqn not in keys and may_lack(fqn))
    for fqn in missing:
        del taken[fqn]
    return taken, missing


def read(storage: Storage, restoring: Restoring, ranks: Ranks | None = None, *, read_once: bool = False) -> int | None:
    """Read into the tensors and containers of the target; the bytes that this rank took from storage. A collective call
    with `read_once`, and where the user's planner has a global plan of its own; with `ranks` None never: this process
    reads for itself. None: with `read_once` another rank failed. Then, and with DamagedStepError and OSError, the
    target may be half overwritten."""
    num_bytes, folder, whole = 0, restoring.step.data_folder, restoring.whole
    done, objects = None, dict[str, bytes]()
    if read_once and whole is not None and ranks is not None and ranks.world_size > 1:  # first: other ranks wait for it
        shared = read_shared(storage, folder, whole, ranks)
        if shared is None:
            return None
        num_bytes, done, objects = shared.num_bytes, shared.positions, shared.objects
    if whole is not None:
        whole_bytes, own_objects = read_whole(storage, folder, whole, done)
        num_bytes += whole_bytes
        objects |= own_objects
    values = {fqn: load_object(data, restoring.safe_globals, fqn) for fqn, data in objects.items()}
    if (planned := restoring.planned) is not None:
        plan = _exchange(planned.planner, planned.plan, ranks) if ranks else planned.planner.finish_plan(planned.plan)
        num_bytes += read_items(
            storage, folder, planned.where, plan.items, planned.reader, unverified=restoring.unverified
        )
    if restoring.given is not restoring.target:
        values |= {fqn: value for fqn, value in restoring.given.items() if value is not restoring.leaves[fqn].value}
    for fqn, value in values.items():  # when all was found whole
        leaf = restoring.leaves[fqn]
        leaf.container[leaf.key] = value
    return num_bytes


def _plan(
    planner: LoadPlanner, target: dict[str, Any], metadata: Metadata, is_coordinator: bool, reader: Any
) -> Planned:
    planner.set_up_planner(state_dict=target, metadata=metadata, is_coordinator=is_coordinator)
    return Planned(metadata.storage_data, planner, planner.create_local_plan(), reader)


def _metadata_of_some(manifest: Manifest, fqns: Iterable[str]) -> Metadata:
    place = manifest.chunks.placement
    keys = {fqn: manifest.keys[fqn] for fqn in fqns}
    is_wanted = np.fromiter((fqn in keys for fqn in place.fqns), np.bool_, len(place.fqns))
    chunks = [manifest.chunks[number] for number in np.flatnonzero(is_wanted[place.key]).tolist()]
    return metadata_of(keys, chunks)


def _unasked(keys: Keys, targets: Mapping[str, Leaf]) -> tuple[str, ...]:
    unasked = [key for key in keys.fqns if key not in targets]
    per_rank = saved_ranks(targets).keys() if unasked else set()
    return tuple(sorted(key for key in unasked if not saved_ranks([key]).keys() & per_rank))


def objects_of(metadata: Metadata | None) -> set[str]:
    """The keys of a foreign step that hold objects. torch_xla, and torch before 2.4, wrote a container without tensors
    as one object, so a container of such a key is to be restored as one."""
    entries = {} if metadata is None else metadata.state_dict_metadata
    return {fqn for fqn, saved in entries.items() if isinstance(saved, BytesStorageMetadata)}


def compare(targets: Mapping[str, Leaf], keys: Keys, where: str, check_missing: bool = True) -> None:
    """Raise StateMismatchError unless what `targets` asks for is among the keys saved, with that dtype and shape."""
    kinds = [(getattr(torch, dtype), shape) for dtype, shape in keys.kinds]
    number_of, kind_of = keys.number, keys.kind.tolist()
    problems: list[str] = []
    for fqn, leaf in targets.items():
        number, value = number_of.get(fqn), leaf.value
        if number is None:
            if check_missing:
                problems.append(f"missing in the checkpoint: {fqn!r}")
            continue
        kind = kind_of[number]
        # First what holds for nearly all, in half a microsecond.
        if kind >= 0 and type(value) in PLAIN and (value.dtype, value.shape) == kinds[kind] and _is_contiguous(value):
            continue
        if difference := _difference(keys[fqn], value):
            problems.append(f"{fqn!r}: {difference}")
    if problems:
        problems.sort(key=lambda text: not text.startswith("missing"))
        raise StateMismatchError(
            f"{where} does not fit the state dict, {len(problems)} keys differ\n  " + "\n  ".join(problems),
            outcome=UNCHANGED,
        )


def _difference(saved: Key, value: Any) -> str:
    is_tensor = isinstance(value, torch.Tensor)
    if saved.dtype is None or saved.shape is None:
        return f"an object in the checkpoint, {_describe(value)} in the state dict" if is_tensor else ""
    found = f"torch.{saved.dtype} {saved.shape} in the checkpoint"
    if not is_tensor:
        return f"{found}, {type(value).__name__} in the state dict"
    if saved.shape != tuple(value.size()) or f"torch.{saved.dtype}" != str(value.dtype):
        return f"{found}, {_describe(value)} in the state dict"
    if isinstance(value, DTensor | ShardedTensor):
        return ""
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        return f"{found}; an expanded tensor cannot be filled in place, give a contiguous one"
    return ""


def _is_contiguous(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()


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


def put(leaf: Leaf, value: Any) -> None:
    """Put an object in the place of a leaf. A dict, which then was saved whole, is filled: others may hold it."""
    if isinstance(leaf.value, dict) and isinstance(value, dict):
        leaf.value.clear()
        leaf.value.update(value)
    else:
        leaf.container[leaf.key] = value


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
        objects = objects_of(metadata)
        # Afterwards, because DCP's set-up puts new lists in place of those there.
        self._targets = leaves(state_dict, objects)
        kept = {fqn: self._targets[fqn].value for fqn in objects & self._targets.keys() - self.state_dict.keys()}
        split = tuple(f"{fqn}." for fqn in kept)
        self.state_dict = {fqn: v for fqn, v in self.state_dict.items() if not fqn.startswith(split)} | kept

    def create_local_plan(self) -> LoadPlan:
        # Not DCP's: it takes a checkpoint with more keys than this rank asks for to be one of torch 2.3.
        assert self.metadata is not None
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        put(self._targets[fqn], load_object(value.getvalue(), self._safe_globals, fqn))


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


def files_below(sizes: Mapping[str, int], folder: str) -> StepFiles:
    """A listing of a step's folder, as what it means."""
    start = len(join(folder, ""))
    return read_step_files({path[start:]: size for path, size in sizes.items()})


def join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
