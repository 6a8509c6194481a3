"""What is in a step, and one value of it, without a state dict to restore into.

For whoever looks a checkpoint up: a tensor, rows of it, an object, a subtree, the tree itself. Reads what is asked for
and little more, all of it verified. Which step there is, and opening it, is the caller's business: manager.py,
checkpoint.py, export.py and the command line.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from asyncckpt.chunks import HUGE, Chunk, Numbers, Path
from asyncckpt.errors import DamagedStepError, KeyNotFoundError
from asyncckpt.framing import BLOCK_BYTES
from asyncckpt.local_file import address_of
from asyncckpt.manifest import Manifest
from asyncckpt.read import Read, carry_out, starts_run, verify
from asyncckpt.read_items import read_items
from asyncckpt.restore import OpenStep, join, open_step, prepare, read
from asyncckpt.slices import Box, Part, boxes_between, part_of, within
from asyncckpt.storage import Storage

T = TypeVar("T")
MAX_COMPARED, MAX_DIFFERENCE = 2000, 3
"""Names that an unknown one is compared with, some 100 us each, and by how many letters they may be longer."""


class Saved(NamedTuple):
    """A value in a step, not read. shape, dtype: None for an object. num_bytes: of the tensor's elements, or of the
    object as it is stored. num_chunks: how many pieces it was saved in."""

    key: str
    path: Path
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    num_bytes: int
    num_chunks: int


def saved_in(step: OpenStep) -> list[Saved]:
    """All values of a step, in the order of its keys; a million in seconds."""
    return _saved_of(step, np.arange(len(step.keys)))


def _saved_of(step: OpenStep, numbers: Numbers) -> list[Saved]:
    """Of some keys, by their places."""
    keys = step.keys
    kinds = [(shape, _dtype_of(dtype)) for dtype, shape in keys.kinds]
    shapes, dtypes = [shape for shape, _ in kinds], [dtype for _, dtype in kinds]
    num_bytes = np.array([min(math.prod(shape) * dtype.itemsize, HUGE) for shape, dtype in kinds] + [0], np.int64)
    num_chunks, object_bytes = _extents(step)
    kind, places = keys.kind[numbers], numbers.tolist()
    sizes = np.where(kind < 0, object_bytes[numbers], num_bytes[kind])
    return list(
        map(
            Saved, map(keys.fqns.__getitem__, places), map(keys.paths.__getitem__, places),
            map([*shapes, None].__getitem__, kind.tolist()), map([*dtypes, None].__getitem__, kind.tolist()),
            sizes.tolist(), num_chunks[numbers].tolist(),
        )
    )  # fmt: skip


def _dtype_of(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def tree_of(step: OpenStep, key: str = "") -> Any:
    """The nested dicts and lists that were saved, with a Saved for each value; `key`: the subtree of that name, or the
    Saved of that one value. KeyNotFoundError."""
    below = _below(step, key)
    numbers = np.array([step.keys.number[fqn] for fqn, _ in below], np.int64)
    return nest((path, saved) for (_, path), saved in zip(below, _saved_of(step, numbers), strict=True))


def look(storage: Storage, folder: str, work: Callable[[OpenStep], T], opened: OpenStep | None = None) -> T:
    """What `work` makes of a step, opened for it; once more if another run saves the step anew meanwhile.

    opened: by an earlier call, which may be of a save that is gone by now."""
    step = opened or open_step(storage, folder)
    for _ in range(2):
        try:
            return work(step)
        except DamagedStepError as exc:
            if not isinstance(exc.__cause__, FileNotFoundError):
                raise
            before, step = step, open_step(storage, folder)
            if step.sequence == before.sequence:
                raise
    return work(step)


def read_value(
    storage: Storage,
    step: OpenStep,
    key: str = "",
    index: Any = None,
    *,
    safe_globals: Iterable[Any] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A tensor, or what `index` says of it; an object; or the nested dicts and lists below a key, "" for all.

    Arguments and errors: of `read_tensor` and `read_object`. dtype: of floating-point tensors alone, where there are
    several.
    """
    if index is not None or (key in step.keys and step.keys[key].dtype is not None):
        return read_tensor(storage, step, key, index, dtype=dtype, device=device)
    below = _below(step, key)
    values = read_values(storage, step, [fqn for fqn, _ in below], safe_globals)
    return nest((path, _moved(values[fqn], dtype, device)) for fqn, path in below)


def read_object(storage: Storage, step: OpenStep, key: str, safe_globals: Iterable[Any] = ()) -> Any:
    """An object of a step. UnsafeObjectError: it needs more than `weights_only` and `safe_globals` allow;
    DamagedStepError; KeyNotFoundError; TypeError: it is a tensor."""
    if _known(step, key).dtype is not None:
        raise TypeError(f"{key!r} is a tensor; read_tensor reads it")
    return read_values(storage, step, [key], safe_globals)[key]


def read_tensor(
    storage: Storage,
    step: OpenStep,
    key: str,
    index: Any = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """A tensor of a step as one, however it was sharded, contiguous, on the CPU; or `tensor[index]` of it.

    index: an int, a slice with a step above 0, Ellipsis, None, or a tuple of them; None alone is the whole tensor. Only
    the blocks of 4 MiB that hold elements of it are read, each once, and each is compared with its checksum. Of a
    foreign step the items are read whole that hold some, as they are all that has a checksum there (or has none).
    dtype, device: converted and moved after it was read. Memory: the result and some 64 MiB, of a foreign step its
    largest items.
    Raises KeyNotFoundError; TypeError: it is an object; what `part_of` does; DamagedStepError.
    """
    saved = _known(step, key)
    if saved.dtype is None or saved.shape is None:
        raise TypeError(f"{key!r} is an object, of which there are no parts and no dtype; read_object reads it")
    part = part_of(saved.shape, ... if index is None else index)
    if part.shape == saved.shape:
        tensor: torch.Tensor = read_values(storage, step, [key])[key]
    elif 0 in part.shape:
        tensor = torch.empty(part.shape, dtype=_dtype_of(saved.dtype))
    elif step.manifest is None:
        tensor = _read_foreign(storage, step, key, part)
    else:
        tensor = torch.empty(part.shape, dtype=_dtype_of(saved.dtype))
        _read_part(storage, step, step.manifest, key, part, tensor)
    found: torch.Tensor = tensor[part.view].to(device=device, dtype=dtype)
    return found


def read_values(
    storage: Storage, step: OpenStep, keys: Sequence[str], safe_globals: Iterable[Any] = ()
) -> dict[str, Any]:
    """{key: tensor or object} of known keys, in one go: neighbours come in one read."""
    _check_stored(storage, step, keys)
    target: dict[str, Any] = {}
    for key in keys:
        saved = step.keys[key]
        if saved.dtype is None or saved.shape is None:
            target[key] = None
        else:
            target[key] = torch.empty(saved.shape, dtype=_dtype_of(saved.dtype))
    restoring = prepare(storage, step, target, is_coordinator=True, load_planner=None, safe_globals=safe_globals)
    read(storage, restoring)
    return target


def nest(values: Iterable[tuple[Path, Any]]) -> Any:
    """Nested dicts, and lists where the parts of paths are 0, 1, 2, ...; a single value of path () as it is."""
    root: dict[Any, Any] = {}
    of_numbers: list[tuple[dict[Any, Any], Any]] = []
    for path, value in values:
        if not path:
            return value
        node = root
        for part, following in pairwise(path):
            if part not in node:
                node[part] = {}
                if isinstance(following, int):
                    of_numbers.append((node, part))
            if not isinstance(node[part], dict):  # a value of that name is there, too
                break
            node = node[part]
        else:
            node[path[-1]] = value
            continue
        root[".".join(map(str, path))] = value
    for node, part in reversed(of_numbers):  # the inner ones first
        node[part] = _listed(node[part])
    return _listed(root)


def _listed(node: dict[Any, Any]) -> Any:
    is_list = node and node.keys() == set(range(len(node)))
    return [node[number] for number in range(len(node))] if is_list else node


# -- keys


def _below(step: OpenStep, key: str) -> list[tuple[str, Path]]:
    """[(fqn, path from `key` on)]"""
    keys = step.keys
    if not key:
        return list(zip(keys.fqns, keys.paths, strict=True))
    if key in keys:
        return [(key, ())]
    prefix = f"{key}."
    found = [
        (fqn, _rest(prefix, fqn, keys.paths[number])) for fqn, number in keys.number.items() if fqn.startswith(prefix)
    ]
    if not found:
        raise _unknown(step, key)
    return found


def _rest(prefix: str, fqn: str, path: Path) -> Path:
    """The path from a prefix of the key on. It may end within a part: in "model.a.b" of the path ("model", "a.b")."""
    start = 0
    for number, part in enumerate(path):
        start += len(str(part)) + 1
        if start == len(prefix):
            return path[number + 1 :]
        if start > len(prefix):
            return (fqn[len(prefix) : start - 1], *path[number + 1 :])
    return (fqn[len(prefix) :],)


def _known(step: OpenStep, key: str) -> Any:
    if key not in step.keys:
        raise _unknown(step, key)
    return step.keys[key]


def _unknown(step: OpenStep, key: str) -> KeyNotFoundError:
    fqns = step.keys.fqns
    near = list(islice((fqn for fqn in fqns if key in fqn), 3))
    if not near:
        depth, last = key.count(".") + 1, key.rpartition(".")[2]
        names = dict.fromkeys(".".join(fqn.split(".", depth)[:depth]) for fqn in fqns)
        alike = (name for name in names if abs(len(name) - len(key)) <= MAX_DIFFERENCE)
        likely = sorted(alike, key=lambda name: not name.endswith(last))  # else in their order
        near = difflib.get_close_matches(key, likely[:MAX_COMPARED], 3)
    hint = f", among them {', '.join(map(repr, near))}" if near else f", the first is {fqns[0]!r}" if fqns else ""
    return KeyNotFoundError(f"there is no key {key!r} among the {len(fqns)} of the step{hint}", near=near)


def _extents(step: OpenStep) -> tuple[Numbers, Numbers]:
    """Of each key: how many chunks it has, and the bytes of them if it is an object."""
    counts, sizes = np.zeros(len(step.keys), np.int64), np.zeros(len(step.keys), np.int64)
    if step.manifest is not None:
        place = step.manifest.chunks.placement
        key_of = step.keys.numbers_of(place)
        counts += np.bincount(key_of, minlength=len(counts))
        np.add.at(sizes, key_of, np.where(place.layout < 0, place.length, 0))
        return counts, sizes
    for index, info in step.where.items():
        assert isinstance(info, _StorageInfo)
        number = step.keys.number[index.fqn]
        counts[number] += 1
        sizes[number] += info.length
    return counts, sizes


def _check_stored(storage: Storage, step: OpenStep, keys: Sequence[str]) -> None:
    """That a foreign index, which may say anything, does not make us take more memory for tensors than is stored. Of a
    step of ours that was checked when it was opened."""
    if step.manifest is not None:
        return
    numbers = np.array([step.keys.number[key] for key in keys], np.int64)
    _, stored = _extents(step)
    for saved, num_stored in zip(_saved_of(step, numbers), stored[numbers].tolist(), strict=True):
        if saved.shape is not None and saved.num_bytes > num_stored:
            raise DamagedStepError(
                f"the checkpoint at {join(storage.url, step.folder)} is damaged: {saved.key!r} has {saved.num_bytes} "
                f"bytes by its shape {saved.shape}, and {num_stored} are stored"
            )


# -- parts of a tensor


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a chunk's payload that holds elements asked for. boxes: which, by dimension in the order of `order`;
    wanted: of these, in elements of the chunk. target: where all of the chunk's go, with dimensions in that order."""

    chunk: Chunk
    number: int
    strides: Sequence[int]
    wanted: Sequence[range]
    boxes: Sequence[Box]
    target: torch.Tensor

    @property
    def offset(self) -> int:
        return self.chunk.payload_offset + self.number * BLOCK_BYTES

    def deliver(self, url: str, path: str, view: memoryview) -> None:
        """Verify and copy."""
        verify(url, path, self.chunk.key, self.offset, self.chunk.block_crcs[self.number], view)
        is_aligned = address_of(view) % self.target.element_size() == 0
        memory = torch.frombuffer(view if is_aligned else bytearray(view), dtype=self.target.dtype)
        start = self.number * BLOCK_BYTES // self.target.element_size()
        for box in self.boxes:
            rows = [one[side] for one, side in zip(self.wanted, box, strict=True)]
            at = sum(stride * one[0] for stride, one in zip(self.strides, rows, strict=True)) - start
            steps = [stride * one.step for stride, one in zip(self.strides, rows, strict=True)]
            self.target[box].copy_(memory.as_strided(list(map(len, rows)), steps, at))


def _read_part(
    storage: Storage, step: OpenStep, manifest: Manifest, key: str, part: Part, target: torch.Tensor
) -> None:
    if key in step.lacking:
        raise DamagedStepError(f"the checkpoint at {join(storage.url, step.folder)} is damaged: {step.lacking[key]}")
    numbers = _chunks_of(step, manifest, key, part)
    blocks = [block for number in numbers for block in _blocks(manifest.chunks[number], part.ranges, target)]
    carry_out(storage, _reads(storage.url, step.data_folder, blocks))


def _chunks_of(step: OpenStep, manifest: Manifest, key: str, part: Part) -> list[int]:
    """The chunks that lie where the part does."""
    place = manifest.chunks.placement
    numbers = np.flatnonzero(step.keys.numbers_of(place) == step.keys.number[key])
    layouts, layout = np.unique(place.layout[numbers], return_inverse=True)
    starts = np.array([place.offsets[number] for number in numbers.tolist()])
    sizes = np.array([place.layouts[number][0].shape for number in layouts.tolist()])[layout]
    first, last = ([one[end] for one in part.ranges] for end in (0, -1))
    chosen: list[int] = numbers[((starts <= last) & (starts + sizes > first)).all(axis=1)].tolist()
    return chosen


def _blocks(chunk: Chunk, ranges: Sequence[range], target: torch.Tensor) -> Iterator[_Block]:
    """What of a chunk is to be read."""
    layout, offsets = chunk.layout, chunk.offsets
    assert layout is not None
    assert offsets is not None
    box = within(ranges, offsets, layout.shape)
    if box is None:
        return
    order = sorted(range(len(offsets)), key=lambda dim: -layout.stride[dim])
    strides = [layout.stride[dim] for dim in order]
    inside = [ranges[dim][box[dim]] for dim in order]
    wanted = [
        range(one.start - offsets[dim], one.stop - offsets[dim], one.step)
        for dim, one in zip(order, inside, strict=True)
    ]
    mine = target[box].permute(order)
    per_block = BLOCK_BYTES // layout.torch_dtype.itemsize
    first, last = (sum(stride * one[end] for stride, one in zip(strides, wanted, strict=True)) for end in (0, -1))
    for number in range(first // per_block, last // per_block + 1):
        boxes = list(boxes_between(number * per_block, (number + 1) * per_block, strides, wanted))
        if boxes:
            yield _Block(chunk, number, strides, wanted, boxes, mine)


def _reads(url: str, folder: str, blocks: Sequence[_Block]) -> Iterator[Read]:
    """Neighbours in a file, where they are small, as one."""
    blocks = sorted(blocks, key=lambda block: (block.chunk.file, block.offset))
    sizes = [min(BLOCK_BYTES, _payload_bytes(block.chunk) - block.number * BLOCK_BYTES) for block in blocks]
    names = {block.chunk.file: None for block in blocks}
    file_of = {name: number for number, name in enumerate(names)}
    columns = [file_of[block.chunk.file] for block in blocks], [block.offset for block in blocks], sizes
    starts = np.flatnonzero(starts_run(*(np.array(column, np.int64) for column in columns))).tolist()
    for first, stop in zip(starts, [*starts[1:], len(blocks)], strict=True):
        yield _read_of(url, f"{folder}/{blocks[first].chunk.file}", blocks[first:stop], sizes[first:stop])


def _read_of(url: str, path: str, run: Sequence[_Block], sizes: Sequence[int]) -> Read:
    start = run[0].offset

    def take(view: memoryview) -> None:
        for block, size in zip(run, sizes, strict=True):
            block.deliver(url, path, view[block.offset - start : block.offset - start + size])

    return Read(path, start, run[-1].offset + sizes[-1] - start, take, (run[0].chunk.key,))


def _payload_bytes(chunk: Chunk) -> int:
    assert chunk.layout is not None
    return math.prod(chunk.layout.shape) * chunk.layout.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Into:
    """What `read_items` asks of a planner, for a plan with one target."""

    target: torch.Tensor

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        box = zip(item.dest_offsets, item.lengths, strict=True)
        return self.target[tuple(slice(start, start + length) for start, length in box)]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _read_foreign(storage: Storage, step: OpenStep, key: str, part: Part) -> torch.Tensor:
    """The items that hold some of it, whole."""
    if key in step.lacking:
        raise DamagedStepError(f"the checkpoint at {join(storage.url, step.folder)} is damaged: {step.lacking[key]}")
    _check_stored(storage, step, [key])
    entry = step.metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    offsets, sizes = [one[0] for one in part.ranges], [one[-1] - one[0] + 1 for one in part.ranges]
    box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    target = torch.empty(sizes, dtype=entry.properties.dtype)
    into: Any = _Into(target)
    read_items(storage, step.data_folder, step.where, create_read_items_for_chunk_list(key, entry, [box]), into)
    return target[tuple(slice(None, None, one.step) for one in part.ranges)].contiguous()


def _moved(value: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
