"""A state dict taken apart into tensors, other objects and a `Spec`, and put together again around copies.

The spec holds the nesting and the keys: two state dicts of equal spec differ in values only. Nothing here copies a
tensor or knows of buffers; the stagers call `flatten` on every snapshot, so a plain tensor costs one loop turn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from stagers.base import StagingError

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_IMMUTABLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device})


class Leaf(Enum):
    """TENSOR: one plain tensor. OBJECT: a value that is neither tensor nor container."""

    TENSOR = 1
    OBJECT = 2


TENSOR, OBJECT = Leaf.TENSOR, Leaf.OBJECT


class Container(NamedTuple):
    """A dict (`keys` are its keys), or a list or tuple (`keys` are positions) that holds tensors or dicts."""

    kind: type
    keys: tuple[Any, ...]
    children: tuple[Any, ...]


class Wrapper(NamedTuple):
    """A tensor subclass around inner tensors, such as DTensor, by torch's flatten protocol for subclasses.

    inner: (attribute, TENSOR or Wrapper or a value that is no tensor). context: what the class needs besides.
    """

    kind: Any
    inner: tuple[tuple[str, Any], ...]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]

    def wrap(self, parts: Iterator[Tensor]) -> Tensor:
        inner = {name: assemble(child, parts) for name, child in self.inner}
        wrapped: Tensor = self.kind.__tensor_unflatten__(inner, self.context, self.size, self.stride)
        return wrapped.requires_grad_(False)  # it is part of most contexts, and never kept


@dataclass(frozen=True)
class Sharded:
    """FSDP1's ShardedTensor: this rank's shards and the metadata of all ranks'."""

    metadata: Any
    local: tuple[Any, ...]
    process_group: Any

    def wrap(self, parts: Iterator[Tensor]) -> Tensor:
        # As `ShardedTensor.cpu()` does; torch has no public way to make one without talking to other ranks.
        from torch.distributed._shard.sharded_tensor.api import ShardedTensor
        from torch.distributed._shard.sharded_tensor.shard import Shard

        metadata = copy.deepcopy(self.metadata)
        metadata.shards_metadata = [_on_cpu(shard) for shard in metadata.shards_metadata]
        metadata.tensor_properties.requires_grad = False
        shards = [Shard(next(parts), _on_cpu(shard)) for shard in self.local]
        wrapped: Tensor = ShardedTensor._init_from_local_shards_and_global_metadata(
            shards, sharded_tensor_metadata=metadata, process_group=self.process_group
        )
        return wrapped


Spec: TypeAlias = Leaf | Container | Wrapper | Sharded


class Flat:
    """A state dict in parts.

    tensors: all plain tensors in order, also those inside subclasses. outer: the subclass around each of the latter, by
    its index. objects: all else that is no container.
    """

    def __init__(self) -> None:
        self.spec: Spec = OBJECT
        self.tensors: list[Tensor] = []
        self.outer: dict[int, Tensor] = {}
        self.objects: list[Any] = []


class _RefusedError(Exception):
    """Raised below a key; `path` grows as it passes the containers on its way up."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path: list[Any] = []


def flatten(state_dict: Mapping[Any, Any]) -> Flat:
    """Take `state_dict` apart; copies nothing. Raises StagingError naming the key of what cannot be staged."""
    flat = Flat()
    try:
        flat.spec = _flatten(state_dict, flat)
    except _RefusedError as refused:
        path = [str(key) for key in reversed(refused.path)]
        name = ".".join(path if len(path) <= 8 else [*path[:8], "..."])
        raise StagingError(f"{name!r} {refused}. Nothing was copied.") from None
    return flat


def unflatten(spec: Spec, leaves: Iterator[Tensor], objects: Iterator[Any]) -> Any:
    """The tree again, in new containers. leaves: one tensor for each tensor of the source, subclasses wrapped."""
    if type(spec) is not Container:
        return next(objects) if spec is OBJECT else next(leaves)
    items = [
        next(leaves) if child is TENSOR else next(objects) if child is OBJECT else unflatten(child, leaves, objects)
        for child in spec.children
    ]
    if spec.kind is dict:
        return dict(zip(spec.keys, items, strict=True))
    if spec.kind is list:
        return items
    return getattr(spec.kind, "_make", spec.kind)(items)  # a namedtuple takes its fields one by one


def assemble(spec: Any, parts: Iterator[Tensor]) -> Any:
    """One leaf from its plain parts."""
    if spec is TENSOR:
        return next(parts)
    return spec.wrap(parts) if isinstance(spec, Wrapper | Sharded) else spec


def leaf_specs(spec: Spec) -> Iterator[Spec]:
    """TENSOR, Wrapper or Sharded for each tensor of the tree, in order."""
    if isinstance(spec, Container):
        for child in spec.children:
            yield from leaf_specs(child)
    elif spec is not OBJECT:
        yield spec


def names(spec: Spec, mark: Leaf, path: str = "") -> Iterator[str]:
    """The dotted key of each of `Flat.tensors` (mark=TENSOR) or `Flat.objects` (mark=OBJECT)."""
    if isinstance(spec, Container):
        for key, child in zip(spec.keys, spec.children, strict=True):
            yield from names(child, mark, f"{path}.{key}" if path else str(key))
    elif isinstance(spec, Wrapper):
        for _, child in spec.inner:
            yield from names(child, mark, path)
    elif isinstance(spec, Sharded):
        yield from [path] * (len(spec.local) if mark is TENSOR else 0)
    elif spec is mark:
        yield path


def copy_objects(flat: Flat) -> list[Any]:
    """Deep copies; what is shared among the objects stays shared."""
    memo: dict[int, Any] = {}
    copies: list[Any] = []
    for value in flat.objects:
        try:
            copies.append(value if type(value) in _IMMUTABLE else _copy_object(value, memo))
        except Exception as error:
            name = next(islice(names(flat.spec, OBJECT), len(copies), None))
            raise StagingError(f"{name!r}, a {_type_name(value)}, cannot be deep-copied: {error}") from error
    return copies


def _copy_object(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) is list and _IMMUTABLE.issuperset(map(type, value)):
        return value.copy()  # an optimizer's list of parameter numbers: deepcopy would cost 0.3 us for each
    return copy.deepcopy(value, memo)


def _flatten(value: Any, flat: Flat) -> Spec:
    if isinstance(value, Tensor):
        start = len(flat.tensors)
        spec = _flatten_tensor(value, flat.tensors)
        flat.outer.update(dict.fromkeys(range(start, len(flat.tensors)), value))
        return spec
    if isinstance(value, Mapping):
        keys = tuple(value)
        return Container(dict, keys, _flatten_items(keys, value.values(), flat))
    if isinstance(value, list | tuple):
        return _flatten_sequence(value, flat)
    flat.objects.append(value)
    return OBJECT


def _flatten_items(keys: Any, values: Any, flat: Flat) -> tuple[Spec, ...]:
    children: list[Spec] = []
    tensors, objects = flat.tensors, flat.objects
    for key, value in zip(keys, values, strict=True):
        kind = type(value)
        if kind in _PLAIN_TENSORS:
            tensors.append(value)
            children.append(TENSOR)
        elif kind in _IMMUTABLE:
            objects.append(value)
            children.append(OBJECT)
        else:
            try:
                children.append(_flatten(value, flat))
            except RecursionError:
                raise _RefusedError("contains itself, or is nested deeper than Python can recurse") from None
            except _RefusedError as refused:
                refused.path.append(key)
                raise
    return tuple(children)


def _flatten_sequence(value: list[Any] | tuple[Any, ...], flat: Flat) -> Spec:
    """A sequence without tensors or dicts is one object, as it is one value in DCP's planners: it may change length."""
    start = len(flat.objects)
    if not _IMMUTABLE.issuperset(map(type, value)):
        children = _flatten_items(range(len(value)), value, flat)
        if any(child is not OBJECT for child in children):
            kind = list if isinstance(value, list) else type(value)
            return Container(kind, tuple(range(len(value))), children)
    del flat.objects[start:]
    flat.objects.append(value)
    return OBJECT


def _flatten_tensor(value: Tensor, tensors: list[Tensor]) -> Spec:
    if type(value) in _PLAIN_TENSORS:
        tensors.append(value)
        return TENSOR
    kind = type(value)
    if hasattr(kind, "global_tensor"):  # torch_xla's XLAShardedTensor: around one tensor, and a DTensor by name only
        return _flatten_tensor(value.global_tensor, tensors)  # type: ignore[attr-defined]
    if hasattr(kind, "__tensor_flatten__"):
        if hasattr(kind, "trigger_wait"):  # AsyncCollectiveTensor: a collective may still be writing it
            return _flatten_tensor(value.trigger_wait(), tensors)  # type: ignore[attr-defined]
        attributes, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = [(name, getattr(value, name)) for name in attributes]
        specs = tuple((name, _flatten_tensor(t, tensors) if isinstance(t, Tensor) else t) for name, t in inner)
        return Wrapper(kind, specs, context, value.size(), value.stride())
    if isinstance(value, _sharded_tensor_type()):
        local = value.local_shards()
        tensors.extend(shard.tensor for shard in local)
        return Sharded(value.metadata(), tuple(shard.metadata for shard in local), value._process_group)
    if is_lazy(value) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise _RefusedError(f"is a {_type_name(value)}: it has no memory of its own and no __tensor_flatten__")
    tensors.append(value.as_subclass(Tensor))  # a subclass that adds behaviour, not data
    return TENSOR


def _sharded_tensor_type() -> Any:
    if not torch.distributed.is_available():
        return ()
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor  # 20 ms, and few need it

    return ShardedTensor


def _on_cpu(metadata: Any) -> Any:
    metadata = copy.deepcopy(metadata)
    metadata.placement._device = torch.device("cpu")
    return metadata


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
