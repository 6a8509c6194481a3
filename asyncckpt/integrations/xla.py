"""`torch_xla.experimental.distributed_checkpoint`, over asyncckpt: code written for it runs with the import changed.

    from asyncckpt.integrations.xla import CheckpointManager, SPMDLoadPlanner, SPMDSavePlanner, prime_optimizer

Names, arguments and meaning are torch_xla 2.9's; what it loses or tears (tests/xla/) is whole here, and its checkpoints
restore. The rest is asyncckpt's: errors instead of assertions, `close()`, and what else its manager takes.

`chkpt_on_preemption` is SIGTERM, on any device: what Cloud TPU's auto-checkpoint (`--autocheckpoint-enabled`) sends the
process. torch_xla's coordinator on port 8547 is not started, and steps need not grow by one.
`init_method="xla://"` groups work where they have a store; `XLA_USE_DUMMY_STORE=1` is refused.
Called by users. Needs torch_xla 2.9 and torch 2.9; tests: `scripts/test --xla`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from io import BytesIO
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

try:
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as xs
    import torch_xla.distributed.xla_backend  # registers init_method="xla://"
    from torch_xla.experimental import distributed_checkpoint as torch_xla_checkpoint
    from torch_xla.experimental.distributed_checkpoint._helpers import (
        _cpu_shards_from_tensors,
        _CpuShards,
        _is_sharded_tensor,
        _unwrap_xla_sharded_tensor,
    )
except ImportError as exc:
    raise ImportError(
        f"asyncckpt.integrations.xla needs torch_xla 2.9 and torch 2.9; here is torch {torch.__version__}, and: {exc}. "
        "Install both: pip install 'torch==2.9.*' 'torch_xla==2.9.*'"
    ) from exc

import asyncckpt
from asyncckpt.chunks import keys_of
from asyncckpt.objects import load_object
from asyncckpt.plan import Leaf, leaves
from asyncckpt.prime import OptimizerT
from asyncckpt.restore import compare, objects_of, put
from asyncckpt.train_state import TrainState
from stagers import AsyncStager, BlockingAsyncStager, StagingError, StateDict
from stagers.blocking import Snapshot
from stagers.flatten import Flat, assemble, flatten, leaf_specs, unflatten

__all__ = ["CheckpointManager", "SPMDSavePlanner", "SPMDLoadPlanner", "XlaStager", "prime_optimizer"]


_FETCH_BYTES = 1 << 30
"""Of sharded tensors fetched at a time: all replicas of a shard on this host come; all but one are dropped. A guess."""
_COMMIT_MARKER = ".manager_metadata"
"""What torch_xla's manager writes last into a step. It is a pickle, so nothing here reads it."""


# -- what is where


def _separate(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what lies in shards, all else) of a flat state dict, as torch_xla's planners keep them."""
    wrapped = {fqn: xs.wrap_if_sharded(value) for fqn, value in flat.items()}
    sharded = {fqn: v for fqn, v in wrapped.items() if isinstance(v, _CpuShards) or _is_sharded_tensor(v)}
    return sharded, {fqn: _unwrap_xla_sharded_tensor(v) for fqn, v in wrapped.items() if fqn not in sharded}


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "xla"


def _finish_pending(values: Iterable[Any]) -> None:
    """Have the devices compute what is pending, if any of `values` is on one: only then is there data to copy or to
    load into, and torch_xla hangs without (pytorch/xla#7935)."""
    if any(map(_is_on_device, values)):
        torch_xla.sync()
        xm.wait_device_ops()


# -- planners, also for stock dcp.save and dcp.load


class SPMDSavePlanner(torch_xla_checkpoint.SPMDSavePlanner):  # type: ignore[misc]
    """torch_xla's, which keeps one of each shard's replicas on this host, where that one kept none.

    A tensor sharded over a part of the mesh lies on several local devices alike. torch_xla's plan names each of them,
    takes them for other hosts', and drops them all, without a word (pytorch/xla#7919). Keys are those of torch's own
    planner, so that it reads the optimizer's options, too.
    """

    def set_up_planner(
        self, state_dict: StateDict, is_coordinator: bool = False, storage_meta: StorageMeta | None = None
    ) -> None:
        flat, self.mappings = flatten_state_dict(state_dict)
        _finish_pending(flat.values())
        self.is_coordinator = is_coordinator
        self.sharded_state_dict, self.unsharded_state_dict = _separate(flat)
        self._local_shards: dict[str, Any] = {}  # a copy of a planner shares what that one has

    def create_local_plan(self) -> SavePlan:
        plan: SavePlan = super().create_local_plan()
        first: dict[MetadataIndex, WriteItem] = {}
        for item in plan.items:
            first.setdefault(item.index, item)
        return dataclasses.replace(plan, items=list(first.values()))

    def lookup_object(self, index: MetadataIndex) -> Any:
        if index.fqn in self.unsharded_state_dict:
            value = self.unsharded_state_dict[index.fqn]
            return value.__get_tensor_shard__(index) if isinstance(value, LocalShards) else value
        if index.fqn not in self._local_shards:
            tensor = self.sharded_state_dict[index.fqn]
            fetched = tensor if isinstance(tensor, _CpuShards) else _cpu_shards_from_tensors([tensor.global_tensor])[0]
            self._local_shards[index.fqn] = _local_shards(fetched).shards
        return self._local_shards[index.fqn].pop(index.offset)  # each is asked for once, and freed when written


class SPMDLoadPlanner(torch_xla_checkpoint.SPMDLoadPlanner):  # type: ignore[misc]
    """torch_xla's, which puts values back under keys that are no strings, compares shapes and dtypes, and runs no code.

    safe_globals: classes that objects in a checkpoint may be made of besides those of torch's `weights_only`. Holds a
    copy in host memory of all that it loads onto this host's devices. Raises StateMismatchError, UnsafeObjectError.
    """

    def __init__(self, safe_globals: Iterable[Any] = ()) -> None:
        super().__init__()
        self._safe_globals = tuple(safe_globals)

    def set_up_planner(self, state_dict: StateDict, metadata: Metadata, is_coordinator: bool = False) -> None:
        self._targets: Mapping[str, Leaf] = leaves(state_dict, objects_of(metadata))
        compare(self._targets, keys_of(metadata), "the checkpoint")
        flat = {fqn: leaf.value for fqn, leaf in self._targets.items()}
        _finish_pending(flat.values())
        self.metadata, self.is_coordinator = metadata, is_coordinator
        self.sharded_state_dict, self.unsharded_state_dict = _separate(flat)
        self._local_shards: dict[str, Any] = {}  # a copy of a planner shares what that one has
        self._pending_elements: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}

    create_global_plan = DefaultLoadPlanner.create_global_plan  # the same, and known to need no other rank

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        put(self._targets[fqn], load_object(value.getvalue(), self._safe_globals, fqn))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """A buffer for a tensor on the device, which only the thread that traces may copy to: readers use others."""
        if index.fqn in self.sharded_state_dict and index.fqn not in self._local_shards:
            shards = self.sharded_state_dict[index.fqn].local_shards
            self._local_shards[index.fqn] = shards
            self._pending_elements[index.fqn] = sum(_unpadded(shard).numel() for shard in shards)
        tensor: Tensor = super().lookup_tensor(index)
        if not _is_on_device(tensor):
            return tensor
        if index.fqn not in self._buffers:
            # `empty_like(tensor, device="cpu")` of an XLA tensor has no address: what was read into it was lost.
            self._buffers[index.fqn] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._pending_elements[index.fqn] = tensor.numel()
        return self._buffers[index.fqn]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        fqn = read_item.dest_index.fqn
        if fqn not in self._buffers:
            super().commit_tensor(read_item, tensor)
            return
        self._pending_elements[fqn] -= read_item.lengths.numel()
        if not self._pending_elements[fqn]:
            with torch.no_grad():
                self.unsharded_state_dict[fqn].copy_(self._buffers.pop(fqn))


# -- staging


class LocalShards(Tensor):
    """This host's part of a sharded tensor, in CPU memory; shape and dtype are the whole tensor's.

    Every DCP planner writes it as shards. shards: {offsets in the whole tensor: a tensor of its own memory}.
    """

    shards: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls: Any, shards: dict[torch.Size, Tensor], shape: torch.Size) -> LocalShards:
        dtype = next(iter(shards.values())).dtype
        made: LocalShards = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)
        made.shards = shards
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of shards: a staged state dict is there to be written")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<LocalShards of {tuple(self.shape)}: {[tuple(offsets) for offsets in self.shards]}>"

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets, shard.shape),
                    properties=TensorProperties.create_from_tensor(shard),
                    size=self.shape,
                ),
            )
            for offsets, shard in self.shards.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.shards[index.offset]


class XlaStager(BlockingAsyncStager):
    """Copies a state dict with XLA tensors, sharded or not, before it returns: of sharded ones this host's shards.

    For the manager, and for `dcp.async_save`. Has the devices finish what is pending, so it is to be called where a
    step ends. Host memory: one copy of each shard on this host, made anew each time, and meanwhile at most
    `_FETCH_BYTES` of replicas. All else, and `max_bytes`, is as with BlockingAsyncStager.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        super().__init__(max_bytes)
        self._seen: Any = None
        self._num_seen = 0

    def snapshot(self, state_dict: StateDict) -> Snapshot:
        return self._completed(state_dict, super().snapshot)

    def borrow(self, state_dict: StateDict) -> Snapshot:
        return self._completed(state_dict, super().borrow)

    def stage(self, state_dict: StateDict) -> StateDict | Future[StateDict]:
        flat = flatten(state_dict)
        staged = cast(StateDict, super().stage(_without_xla(flat)))
        fetched = _fetch(flat.tensors)
        return _merged(staged, fetched) if fetched else staged

    def prewarm(self, state_dict: StateDict, *, num_snapshots: int = 1) -> None:
        super().prewarm(_without_xla(flatten(state_dict)), num_snapshots=num_snapshots)

    def _completed(self, state_dict: StateDict, stage: Callable[[StateDict], Snapshot]) -> Snapshot:
        """The snapshot that `stage` makes of all else, with the XLA tensors put in."""
        started = time.perf_counter()
        flat = flatten(state_dict)
        snapshot = stage(_without_xla(flat))
        try:
            fetched = _fetch(flat.tensors)
        except BaseException:
            snapshot.release()
            raise
        if fetched:
            snapshot.state_dict = _merged(snapshot.state_dict, fetched)
            snapshot.memory = None  # does not hold all of it
        snapshot.num_bytes += sum(part.nbytes for copy in set(fetched.values()) for _, part in _parts_of(copy))
        snapshot.structure = self._number_of((snapshot.structure, _form_of(fetched)))
        snapshot.stall_s = time.perf_counter() - started
        return snapshot

    def _number_of(self, structure: Any) -> int:
        if structure != self._seen:
            self._seen = structure
            self._num_seen += 1
        return self._num_seen


def _rebuilt(flat: Flat, tensors: Iterable[Tensor]) -> StateDict:
    """The state dict that `flat` is of, with these in place of its plain tensors."""
    parts = iter(tensors)
    whole = [assemble(spec, parts) for spec in leaf_specs(flat.spec)]
    return cast(StateDict, unflatten(flat.spec, iter(whole), iter(flat.objects)))


def _without_xla(flat: Flat) -> StateDict:
    """With an empty tensor in place of each one on a device."""
    return _rebuilt(flat, [torch.empty(0) if _is_on_device(tensor) else tensor for tensor in flat.tensors])


def _merged(staged: StateDict, fetched: Mapping[int, Tensor]) -> StateDict:
    """With `fetched[i]` in place of the i-th tensor."""
    flat = flatten(staged)
    return _rebuilt(flat, [fetched.get(i, tensor) for i, tensor in enumerate(flat.tensors)])


def _fetch(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """For each XLA tensor, by its place in `tensors`, a copy in CPU memory of its own; of a sharded one `LocalShards`.
    Tied ones have one copy. StagingError: torch_xla could not."""
    try:
        _finish_pending(tensors)
        # The same for all that `detach` and `state_dict` give of a tensor.
        ids = {i: torch_xla._XLAC._xla_get_tensor_id(t) for i, t in enumerate(tensors) if _is_on_device(t)}
        distinct = {identity: tensors[i] for i, identity in ids.items()}
        sharded = {identity: t for identity, t in distinct.items() if _is_sharded_tensor(xs.wrap_if_sharded(t))}
        whole = {identity: t for identity, t in distinct.items() if identity not in sharded}
        copies = dict(zip(whole, torch_xla._XLAC._xla_get_cpu_tensors(list(whole.values())), strict=True))
        for some in _batches(sharded):
            fetched = _cpu_shards_from_tensors([sharded[identity] for identity in some])
            copies.update(zip(some, map(_local_shards, fetched), strict=True))
    except RuntimeError as error:
        raise StagingError(f"the copy failed: {error}. The source was not changed.") from error
    return {i: copies[identity] for i, identity in ids.items()}


def _batches(tensors: Mapping[int, Tensor]) -> Iterator[list[int]]:
    batch: list[int] = []
    num_bytes = 0
    for identity, tensor in tensors.items():
        if batch and num_bytes + tensor.nbytes > _FETCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(identity)
        num_bytes += tensor.nbytes
    if batch:
        yield batch


def _local_shards(fetched: Any) -> LocalShards:
    """One of each shard's replicas, without the padding that makes shards equal in size on the devices."""
    shards: dict[torch.Size, Tensor] = {}
    for shard in fetched.shards:
        offsets = torch.Size(extent.start for extent in shard.indices)
        if offsets not in shards:
            data = _unpadded(shard)
            shards[offsets] = data if data.numel() == shard.data.numel() else data.clone()
    return LocalShards(shards, fetched.global_shape)


def _unpadded(shard: Any) -> Tensor:
    """torch_xla's own way to it warns of an indexing that torch is about to change."""
    return cast(Tensor, shard.data[tuple(slice(0, extent.stop - extent.start) for extent in shard.indices)])


def _parts_of(copy: Tensor) -> Iterable[tuple[torch.Size | None, Tensor]]:
    return copy.shards.items() if isinstance(copy, LocalShards) else [(None, copy)]


def _form_of(fetched: Mapping[int, Tensor]) -> Any:
    """What a plan depends on: shapes, dtypes, which parts are here, and which tensors are tied."""
    number = {copy: i for i, copy in fetched.items()}
    return [
        (number[copy], copy.dtype, copy.shape, [(offsets, part.shape) for offsets, part in _parts_of(copy)])
        for copy in fetched.values()
    ]


# -- the rest of torch_xla's module


class CheckpointManager(asyncckpt.CheckpointManager):
    """asyncckpt's, with the defaults that XLA tensors need, and seeing the steps that torch_xla's own manager wrote.

    Those are in `all_steps`, restore, and are never overwritten or deleted, so they do not count for `max_to_keep`.
    num_of_threads: None, the default here, lets storage choose. What `XlaStager` stages needs no save_planner.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        save_interval: int,
        max_to_keep: int = 0,
        max_pending_async: int = 1,
        num_of_threads: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        chkpt_on_preemption: bool = True,
        *,
        stager: AsyncStager | None = None,
        load_planner: LoadPlanner | None = None,
        safe_globals: Iterable[Any] = (),
        **options: Any,
    ) -> None:
        _check_store()
        safe_globals = tuple(safe_globals)
        super().__init__(
            os.fspath(path), save_interval, max_to_keep, max_pending_async, num_of_threads, process_group,
            chkpt_on_preemption, stager=stager or XlaStager(),
            load_planner=load_planner or SPMDLoadPlanner(safe_globals), safe_globals=safe_globals, **options,
        )  # fmt: skip
        self.base_path = os.path.join(path, "")
        self.save_interval = save_interval
        self.max_to_keep = max_to_keep
        self.chkpt_on_preemption = chkpt_on_preemption

    def _list_steps(self) -> None:
        super()._list_steps()
        theirs = [step for step in self._index.foreign_steps() if _COMMIT_MARKER in self._index.files_of(step).other]
        self._theirs = self._ranks.broadcast_object(theirs, phase="list")

    def all_steps(self) -> list[int]:
        return sorted({*super().all_steps(), *self._theirs})

    def restore(self, step: int, state_dict: TrainState | StateDict, **options: Any) -> None:
        super().restore(step, state_dict, **options)
        torch_xla.sync()  # read before that, a parameter that `load_state_dict` has set would lose its sharding

    def restore_latest(self, state_dict: TrainState | StateDict, *, verify: bool = False, **options: Any) -> int | None:
        step = super().restore_latest(state_dict, verify=verify, **options)
        if step is not None:
            torch_xla.sync()  # as above
        elif self._theirs:
            step = max(self._theirs)
            self.restore(step, state_dict, **options)
        return step


def _check_store() -> None:
    """torch_xla has a stand-in for a store that can do nothing, and ranks agree through the store."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    try:
        dist.distributed_c10d._get_default_store().check(["asyncckpt"])
    except RuntimeError as exc:
        raise ValueError(
            f"the store of the process group, through which the ranks agree on what is saved, does not work: {exc}. "
            "Nothing was done. If XLA_USE_DUMMY_STORE=1 is set, unset it and TORCH_DIST_INIT_BARRIER."
        ) from exc


def prime_optimizer(optimizer: OptimizerT) -> OptimizerT:
    """asyncckpt's: unlike torch_xla's function of that name it changes nothing else. The state of a sharded parameter
    is sharded like it. Has the devices finish what is pending."""
    _finish_pending(p for group in optimizer.param_groups for p in group["params"])
    known = {id(value) for state in optimizer.state.values() for value in state.values()}
    asyncckpt.prime_optimizer(optimizer)
    for parameter, state in optimizer.state.items():
        sharding = torch_xla._XLAC._get_xla_op_sharding(parameter) if _is_on_device(parameter) else None
        for value in state.values() if sharding else ():
            if id(value) not in known and _is_on_device(value) and value.shape == parameter.shape:
                torch_xla._XLAC._xla_mark_sharding(value, sharding)
    _finish_pending(value for state in optimizer.state.values() for value in state.values())
    return optimizer
