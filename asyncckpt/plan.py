"""Who writes what: each rank's items by DCP's planner, exchanged only when the structure of the state changed.

Runs on the training thread, because a change of structure is exchanged between the ranks with collectives; in steady
state it costs a comparison. Which rank writes what several have is global_plan.py's to say, or that of a planner with a
global plan of its own. Also the state dict's walk that the planners' flattening implies: leaves by fqn. Called by
manager.py; writing is shard.py's job, reading restore.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from asyncckpt.chunks import Keys, Numbers, keys_of
from asyncckpt.errors import SaveError
from asyncckpt.framing import crc32, encode_object
from asyncckpt.global_plan import SPREAD_BYTES, Assignment, LocalItems, assign
from asyncckpt.objects import check_object, is_plain
from asyncckpt.ranks import Ranks
from asyncckpt.shard_layout import ShardLayout
from stagers import StateDict

Path: TypeAlias = tuple[Any, ...]


class Leaf(NamedTuple):
    """A leaf of a nested state dict, and where it hangs: `container[key] is value`."""

    value: Any
    container: Any
    key: Any


def leaves(state_dict: Mapping[str, Any], whole: Container[str] = ()) -> dict[str, Leaf]:
    """{fqn: leaf} by the rules of DCP's `flatten_state_dict`, but keeping each leaf's own container and key: DCP turns
    keys into str on the way, so that a value under an int key would be restored to a new key. whole: fqns of containers
    that are leaves all the same. ValueError: two leaves have one fqn."""
    return {fqn: leaf for fqn, (_, leaf) in _named(state_dict, whole).items()}


def _named(state_dict: Mapping[str, Any], whole: Container[str] = ()) -> dict[str, tuple[Path, Leaf]]:
    found: dict[str, tuple[Path, Leaf]] = {}
    _collect(found, "", (), state_dict, whole)
    return found


def _collect(
    found: dict[str, tuple[Path, Leaf]], prefix: str, path: Path, container: Any, whole: Container[str]
) -> None:
    entries = container.items() if isinstance(container, Mapping) else enumerate(container)
    for key, value in entries:
        fqn = f"{prefix}{key!s}"
        # Tensors first: asking for a Mapping costs more than all the rest.
        if (
            not isinstance(value, torch.Tensor)
            and (isinstance(value, Mapping) or (isinstance(value, list) and _is_split(value)))
            and fqn not in whole
        ):
            _collect(found, f"{fqn}.", (*path, key), value, whole)
        elif fqn in found:
            raise ValueError(
                f"two values of the state dict flatten to the key {fqn!r}: checkpoint keys join the path with dots. "
                "Nothing was written. Rename one of the two."
            )
        else:
            found[fqn] = (*path, key), Leaf(value, container, key)


def _is_split(values: list[Any]) -> bool:
    """DCP splits a list if a tensor or a mapping is in it, however deep in lists; else it is one object."""
    return any(
        isinstance(value, (torch.Tensor, Mapping)) or (isinstance(value, list) and _is_split(value)) for value in values
    )


def check_savable(state_dict: Mapping[str, Any], safe_globals: Iterable[Any]) -> dict[str, Path]:
    """{fqn: path} of the objects in a state dict. Raises what must be heard of before anything is written: duplicate
    keys (ValueError), objects that could not be loaded back (UnsafeObjectError)."""
    objects = {}
    for fqn, (path, leaf) in _named(state_dict).items():
        if not isinstance(leaf.value, torch.Tensor) and not hasattr(leaf.value, "__create_write_items__"):
            check_object(leaf.value, safe_globals, fqn)
            objects[fqn] = path
    return objects


def _check_summed(state_dict: Mapping[str, Any]) -> None:
    """torch 2.9 plans a Partial DTensor as if each rank had the sum; later ones refuse it."""
    for fqn, leaf in leaves(state_dict).items():
        if isinstance(leaf.value, DTensor) and any(placement.is_partial() for placement in leaf.value.placements):
            raise SaveError(
                f"{fqn!r} is a DTensor whose sum over ranks is yet to be made: {leaf.value.placements}. Nothing was "
                "written. Save `value.full_tensor()`, or redistribute it first."
            )


def value_at(state_dict: Mapping[str, Any], path: Path) -> Any:
    value: Any = state_dict
    for key in path:
        value = value[key]
    return value


def digests(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """{fqn: a checksum} of what is cheap to compare with other ranks' values of the same key: plain objects, and small
    tensors on the CPU, such as a state of random numbers."""
    found = {}
    for fqn, leaf in leaves(state_dict).items():
        value = leaf.value
        if "/rank_" in fqn:  # PerRank's: no other rank has it
            continue
        if type(value) in (torch.Tensor, torch.nn.Parameter):
            if value.is_cpu and value.layout is torch.strided and value.nbytes <= SPREAD_BYTES:
                dense = value.detach().resolve_conj().resolve_neg().contiguous()
                found[fqn] = crc32(dense.reshape(-1).view(torch.uint8).numpy())
        elif not isinstance(value, torch.Tensor) and is_plain(value) and not _holds_set(value):
            found[fqn] = crc32(repr(value).encode())
    return found


def _holds_set(value: Any) -> bool:
    """Whether the order of its parts may be each process's own."""
    if isinstance(value, Mapping):
        return any(map(_holds_set, value.values()))
    return isinstance(value, set) or (isinstance(value, list | tuple) and any(map(_holds_set, value)))


@dataclass(eq=False)
class Plan:
    """Who writes what, the same object for as long as the structure stays. all_keys: of all ranks; None elsewhere than
    on the coordinator. differing: keys that ranks have different values for, of which the lowest rank's is written.

    objects: where this rank's objects are. layout, places: of the items in the files, and of the tensors in the staging
    buffer; the writer thread finds them at the first save, if the planner gives out what it is given.
    """

    items: Sequence[WriteItem]
    all_keys: Keys | None
    objects: Mapping[str, Path]
    differing: tuple[str, ...] = ()
    layout: ShardLayout | None = None
    places: Numbers | None = None

    @cached_property
    def written_objects(self) -> list[Path | None]:
        """The path of each object among the items; None for one that makes its own items."""
        return [self.objects.get(item.index.fqn) for item in self.items if item.type == WriteItemType.BYTE_IO]

    @property
    def keys(self) -> Keys:
        assert self.all_keys is not None
        return self.all_keys


@dataclass(frozen=True, slots=True)
class PlannedSave:
    """What the writer needs."""

    plan: Plan
    state_dict: StateDict
    _planner: SavePlanner
    _is_set_up: bool

    @property
    def resolves_plainly(self) -> bool:
        """Whether the planner surely gives out the tensors and objects of the state dict as they are."""
        return type(self._planner) is DefaultSavePlanner and None not in self.plan.written_objects

    def planner(self) -> SavePlanner:
        """The planner, holding the staged state dict; to be called once. Where the plan is an old one this flattens it,
        some microseconds per tensor that the training thread is spared."""
        if not self._is_set_up:
            self._planner.set_up_planner(self.state_dict, is_coordinator=self.plan.all_keys is not None)
        return self._planner

    def objects(self) -> list[bytes]:
        """The items of this rank's objects, in the order of the plan."""
        return [encode_object(value_at(self.state_dict, path)) for path in self.plan.written_objects if path]


class SavePlanning:
    """Plans of one manager, kept while the structure stays the same. Training thread only."""

    def __init__(self, ranks: Ranks, save_planner: SavePlanner | None, safe_globals: Iterable[Any]) -> None:
        self._ranks = ranks
        self._template = save_planner or DefaultSavePlanner()
        self._safe_globals = safe_globals
        self._structure: int | None = None
        self._plan: Plan | None = None
        self._objects: Mapping[str, Path] = {}

    def check(self, state_dict: Mapping[str, Any], structure: int | None) -> None:
        """Raise what must be heard of before anything is written (`check_savable`); objects alone can have become bad
        where the structure is the planned one."""
        if not self.is_current(structure):
            self._objects = check_savable(state_dict, self._safe_globals)
            return
        assert self._plan is not None
        for fqn, path in self._plan.objects.items():
            check_object(value_at(state_dict, path), self._safe_globals, fqn)

    def is_current(self, structure: int | None) -> bool:
        """Whether the plan at hand fits a state dict of this structure (a stager's `snapshot.structure`)."""
        return self._plan is not None and structure is not None and structure == self._structure

    def plan(
        self, view: Mapping[str, Any], state_dict: StateDict, structure: int | None, *, replan: bool
    ) -> PlannedSave:
        """A plan for the staged `state_dict`. view: what it is, or will be, a copy of. replan: a collective call, asked
        for if any rank's structure changed."""
        # A copy, because the planner holds one save's tensors while the writer may still be busy with another's.
        planner = copy.copy(self._template)
        if replan:
            objects = self._plan.objects if self._plan is not None and self.is_current(structure) else self._objects
            self._plan = None
            local = self._attempt(lambda: self._local_plan(planner, state_dict))
            if _has_own_global_plan(planner):
                self._plan = self._plan_by(planner, local, objects)
            else:
                self._plan = self._plan_together(planner, local, objects, view)
            self._structure = structure
        assert self._plan is not None
        return PlannedSave(self._plan, state_dict, planner, replan)

    def _local_plan(self, planner: SavePlanner, state_dict: StateDict) -> SavePlan:
        _check_summed(state_dict)
        planner.set_up_planner(state_dict=state_dict, is_coordinator=self._ranks.is_coordinator)
        return planner.create_local_plan()

    # A failure on any rank reaches the coordinator as a value, and is raised on all of them.

    def _plan_together(
        self, planner: SavePlanner, local: SavePlan | SaveError, objects: Mapping[str, Path], view: Mapping[str, Any]
    ) -> Plan:
        """All ranks' items to the coordinator, and back to each the numbers of those it writes."""
        ranks, is_alone = self._ranks, self._ranks.world_size == 1

        def mine() -> LocalItems | bytes:
            items = LocalItems.of(_value(local), {} if is_alone else digests(view))
            return items if is_alone else items.encode()

        def assigned() -> Assignment:
            return assign([part if is_alone else LocalItems.decode(part) for part in map(_value, parts)])

        parts = ranks.gather_objects(self._attempt(mine), phase="plan")
        everything = self._attempt(assigned) if ranks.is_coordinator else None
        shares = everything.written if isinstance(everything, Assignment) else [everything] * ranks.world_size
        share = _value(ranks.scatter_objects(shares, phase="plan"))
        mine_all: SavePlan = _value(local)
        plan = planner.finish_plan(replace(mine_all, items=[mine_all.items[number] for number in share.tolist()]))
        if not isinstance(everything, Assignment):
            return Plan(plan.items, None, objects)
        return Plan(plan.items, everything.keys, objects, everything.differing)

    def _plan_by(self, planner: SavePlanner, local: SavePlan | SaveError, objects: Mapping[str, Path]) -> Plan:
        """Local plans to the coordinator, the planner's global plan back."""
        ranks = self._ranks
        local_plans = ranks.gather_objects(local, phase="plan")
        parts, metadata = None, None
        if ranks.is_coordinator:
            made = self._attempt(lambda: planner.create_global_plan([_value(plan) for plan in local_plans]))
            parts, metadata = ([made] * ranks.world_size, None) if isinstance(made, SaveError) else made
        part = ranks.scatter_objects(parts, phase="plan")
        plan = self._attempt(lambda: planner.finish_plan(_value(part)))
        for rank, (failed,) in enumerate(ranks.agree([isinstance(plan, SaveError)], phase="plan")):
            if failed and not isinstance(plan, SaveError):
                raise SaveError(f"rank {rank} could not plan the save, see its error. Nothing was written.", rank=rank)
        return Plan(_value(plan).items, None if metadata is None else keys_of(metadata), objects)

    def _attempt(self, function: Callable[[], Any]) -> Any:
        """The result or, so that the other ranks hear of it, the failure as a value."""
        try:
            return function()
        except SaveError as exc:
            return exc
        except Exception as exc:
            what = f"rank {self._ranks.rank} could not plan the save: {type(exc).__name__}: {exc}. Nothing was written."
            error = SaveError(what, rank=self._ranks.rank)
            error.__cause__ = exc
            return error


def _has_own_global_plan(planner: SavePlanner) -> bool:
    """Whether the planner would plan otherwise than DCP's default one, or has been told to."""
    methods = ("create_global_plan", "_create_global_plan", "_dedup_save_plans", "finish_plan")
    return (
        not isinstance(planner, DefaultSavePlanner)
        or any(getattr(type(planner), name, 0) != getattr(DefaultSavePlanner, name, 0) for name in methods)
        or planner.dedup_save_to_lowest_rank
        or planner._enable_plan_caching
    )


def _value(result: Any) -> Any:
    if isinstance(result, SaveError):
        raise result
    return result
