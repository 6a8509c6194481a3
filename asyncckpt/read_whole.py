"""Whole tensors and objects of a step, by the manifest's columns: without DCP's planner, and nearly without Python.

DCP's plan costs some 150 us per tensor, the bytes of a small one 1 us. So what needs no plan takes none: an object, and
a plain tensor that was saved in one piece. Neighbours that are small come in one read and are verified and copied one
by one; a large one is read right into the tensor. Called by restore.py, which leaves the rest (DTensors, tensors in
several chunks, subclasses) to read_items.py.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asyncckpt.boxes import PLAIN, boxes_of
from asyncckpt.chunks import ChunkTable, Keys, Numbers, Placement
from asyncckpt.framing import crc32
from asyncckpt.local_file import address_of
from asyncckpt.manifest import Manifest
from asyncckpt.read import (
    COALESCE_GAP_BYTES,
    Read,
    carry_out,
    direct_reads,
    flat_bytes,
    has_strides,
    payload_tensor,
    starts_run,
    upload_reads,
    verify,
)
from asyncckpt.storage import Storage

# Keeps the GIL, unlike ctypes.memmove: to hand it over and wait for it costs more than copying some KiB.
_memmove = ctypes.PyDLL(None).memmove
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memmove.restype = None


@dataclass(frozen=True, eq=False)
class Whole:
    """What is to be read; columns of equal length. chunk: a number in `chunks`. tensors: None for an object.

    address: of a tensor's first element. on_cpu: that is the CPU's memory. reach: how many bytes from there on hold
    elements; 0: the payload, as it is, is the tensor's memory.
    """

    chunks: ChunkTable
    keys: Sequence[str]
    chunk: Numbers
    tensors: Sequence[torch.Tensor | None]
    address: Numbers
    on_cpu: npt.NDArray[np.bool_]
    reach: Numbers
    turn: threading.Lock = field(default_factory=threading.Lock)
    """One thread at a time delivers small tensors. That is Python: threads that lose the GIL at each checksum, and wait
    for it, take twice the time."""

    @cached_property
    def file(self) -> Numbers:
        return self.chunks.placement.file[self.chunk]

    @cached_property
    def start(self) -> Numbers:
        """Of each payload in its file."""
        return (self.chunks.placement.offset + self.chunks.placement.head_bytes)[self.chunk]

    @cached_property
    def size(self) -> Numbers:
        return self.chunks.placement.payload_bytes[self.chunk]

    @cached_property
    def is_direct(self) -> npt.NDArray[np.bool_]:
        is_direct: npt.NDArray[np.bool_] = (self.address > 0) & (self.reach == 0)
        return is_direct


def find_whole(manifest: Manifest, keys: Keys, wanted: Mapping[str, Any]) -> tuple[Whole, dict[str, Any]]:
    """What of `wanted`, {key: value}, is read whole, and the rest. Tensors have the dtype and shape that `keys` say."""
    chunks, accelerator = manifest.chunks, _accelerator()
    # Kept: an export asks for some keys at a time, and these look at all.
    number_of, is_object, reach = keys.kept.get(
        "whole", (chunks,), lambda: (_whole_chunks(chunks, keys), _is_object(chunks), _reach_in(chunks.placement))
    )
    boxes = boxes_of(keys, chunks)
    found: list[str] = []
    numbers: list[int] = []
    tensors: list[torch.Tensor | None] = []
    rest: dict[str, Any] = {}
    with torch.no_grad():  # else a DTensor gives out its local tensor as a node of the graph
        for key, value in wanted.items():
            number = number_of.get(key, -1)
            if number >= 0 and (is_object[number] or (type(value) in PLAIN and _is_readable(value, accelerator))):
                found.append(key)
                numbers.append(number)
                tensors.append(None if is_object[number] else value)
                continue
            pieces = boxes.pieces_of(key, value)
            if (
                pieces is None
                or not all(_is_readable(tensor, accelerator) for _, tensor in pieces)
                # They would take turns, as if they shared memory.
                or (len(pieces) > 1 and any(reach(number, tensor) for number, tensor in pieces))
            ):
                rest[key] = value
                continue
            found += [key] * len(pieces)
            numbers += [number for number, _ in pieces]
            tensors += [tensor for _, tensor in pieces]
    return Whole(
        chunks, found, np.array(numbers, np.int64), tensors,
        np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors], np.int64),
        np.array([tensor is not None and tensor.is_cpu for tensor in tensors], np.bool_),
        np.array([0 if t is None else reach(number, t) for number, t in zip(numbers, tensors, strict=True)], np.int64),
    ), rest  # fmt: skip


def read_whole(storage: Storage, folder: str, whole: Whole, but: Numbers | None = None) -> tuple[int, dict[str, bytes]]:
    """Read into the tensors; the bytes read, and {key: the item of an object}. Raises what `carry_out` does.

    `folder` is what the files' names are relative to. but: positions to leave out. Tensors may be partly overwritten
    when this raises.
    """
    objects: dict[str, bytes] = {}
    at_once, one_by_one = without_clashes(whole)
    if but is not None:
        at_once = np.setdiff1d(at_once, but)
    num_bytes = sum(
        carry_out(storage, reads_of(storage.url, folder, whole, positions, objects))
        for positions in (at_once, *one_by_one)
    )
    return num_bytes, objects


def _whole_chunks(chunks: ChunkTable, keys: Keys) -> dict[str, int]:
    """{key: the number of its chunk}, -1 if there are several or it is not all of its tensor."""
    place = chunks.placement
    if not len(place):
        return {}
    numbers = np.full(len(place.fqns), -1)
    numbers[place.key] = np.arange(len(place))
    numbers[np.bincount(place.key, minlength=len(place.fqns)) > 1] = -1
    forms = {kind: number for number, kind in enumerate(keys.kinds)}
    form_of_layout = np.array([*(forms.get((x.dtype, x.shape), -2) for x, _ in place.layouts), -1])
    kind = keys.kind if place.fqns is keys.fqns else keys.kind[[keys.number[fqn] for fqn in place.fqns]]
    numbers[form_of_layout[place.layout[numbers]] != kind] = -1
    return dict(zip(place.fqns, numbers.tolist(), strict=True))


def _is_object(chunks: ChunkTable) -> list[bool]:
    is_object: list[bool] = (chunks.placement.layout < 0).tolist()
    return is_object


def _accelerator() -> str | None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device.type if device else None


def _is_readable(tensor: torch.Tensor, accelerator: str | None) -> bool:
    return tensor.layout is torch.strided and (tensor.is_cpu or tensor.device.type == accelerator)


def _reach_in(place: Placement) -> Callable[[int, torch.Tensor], int]:
    """`Whole.reach` of a chunk's target."""
    layout_of, layouts = place.layout.tolist(), [layout for layout, _ in place.layouts]
    is_contiguous = [layout.is_contiguous for layout in layouts]

    def reach(number: int, tensor: torch.Tensor) -> int:
        layout = layout_of[number]
        same = (is_contiguous[layout] and tensor.is_contiguous()) or has_strides(tensor, layouts[layout])
        if same and not tensor.is_neg() and not tensor.is_conj():
            return 0
        dims = zip(tensor.shape, tensor.stride(), strict=True)
        return (sum((size - 1) * stride for size, stride in dims) + 1) * tensor.element_size()

    return reach


def without_clashes(whole: Whole) -> tuple[Numbers, list[Numbers]]:
    """Positions that may be read at once; and those, each alone and in their order, whose targets share memory with
    others: tied tensors that were not tied when they were saved. Those that were are read once; empty ones never."""
    used = np.flatnonzero(whole.size)
    used = used[np.lexsort((used, whole.start[used], whole.file[used], whole.address[used]))]
    columns = np.stack((whole.address[used], whole.file[used], whole.start[used]))
    is_same = np.zeros(len(used), np.bool_)
    is_same[1:] = (
        (columns[:, 1:] == columns[:, :-1]).all(axis=0) & whole.is_direct[used[1:]] & whole.is_direct[used[:-1]]
    )
    used = used[~is_same]
    address = whole.address[used]
    reach = np.where(whole.is_direct[used], whole.size[used], whole.reach[used])
    is_apart = np.ones(len(used), np.bool_)
    is_apart[1:] = (address[1:] >= np.maximum.accumulate(address + reach)[:-1]) | (address[1:] == 0)
    group = np.cumsum(is_apart) - 1
    is_alone = np.bincount(group, minlength=1)[group] == 1
    return used[is_alone], [np.array([position]) for position in sorted(used[~is_alone].tolist())]


def reads_of(url: str, folder: str, whole: Whole, positions: Numbers, objects: dict[str, bytes]) -> Iterator[Read]:
    files, chunks = whole.chunks.placement.files, whole.chunks
    is_large = (whole.size[positions] > COALESCE_GAP_BYTES) & whole.is_direct[positions]
    for position in positions[is_large].tolist():
        number, tensor = int(whole.chunk[position]), whole.tensors[position]
        assert tensor is not None
        crcs = chunks.blocks.get(number) or (int(chunks.crc32[number]),)
        path = f"{folder}/{files[whole.file[position]]}"
        reads = direct_reads if whole.on_cpu[position] else upload_reads
        yield from reads(url, path, whole.keys[position], int(whole.start[position]), tensor.detach(), crcs)
    for run in _runs(whole, positions[~is_large]):
        yield _read_of(url, f"{folder}/{files[whole.file[run[0]]]}", whole, run, objects)


def _runs(whole: Whole, positions: Numbers) -> list[Numbers]:
    """Neighbours in a file that are read together."""
    if not len(positions):
        return []
    positions = positions[np.lexsort((whole.start[positions], whole.file[positions]))]
    starts = starts_run(whole.file[positions], whole.start[positions], whole.size[positions])
    return np.split(positions, np.flatnonzero(starts)[1:])


def _read_of(url: str, path: str, whole: Whole, run: Numbers, objects: dict[str, bytes]) -> Read:
    """A run as one read: verify each payload, then copy it to where it belongs."""
    first, stop = int(whole.start[run[0]]), int((whole.start[run] + whole.size[run]).max())
    elsewhere = map(whole.tensors.__getitem__, run[~whole.on_cpu[run]].tolist())
    device = next((tensor.device for tensor in elsewhere if tensor is not None), None)

    def take(view: memoryview) -> None:
        with whole.turn:
            _take_run(url, path, whole, run, view, objects)

    keys = [whole.keys[position] for position in run[:4].tolist()]
    return Read(path, first, stop - first, take, keys, device=device)


def _take_run(url: str, path: str, whole: Whole, run: Numbers, view: memoryview, objects: dict[str, bytes]) -> None:
    start = whole.start[run] - whole.start[run[0]]
    stop = start + whole.size[run]
    pieces = list(map(view.__getitem__, map(slice, start.tolist(), stop.tolist())))
    expected = whole.chunks.crc32[whole.chunk[run]].tolist()
    if list(map(crc32, pieces)) != expected:
        for position, piece, crc in zip(run.tolist(), pieces, expected, strict=True):
            verify(url, path, whole.keys[position], int(whole.start[position]), crc, piece)
    in_memory = whole.is_direct[run] & whole.on_cpu[run]
    columns = whole.address[run], start + address_of(view), whole.size[run]
    deque(map(_memmove, *(column[in_memory].tolist() for column in columns)), maxlen=0)
    for number in np.flatnonzero(~in_memory).tolist():
        _deliver(whole, int(run[number]), pieces[number], objects)


def _deliver(whole: Whole, position: int, piece: memoryview, objects: dict[str, bytes]) -> None:
    tensor = whole.tensors[position]
    if tensor is None:
        objects[whole.keys[position]] = bytes(piece)
    elif whole.is_direct[position]:
        flat_bytes(tensor).copy_(torch.frombuffer(piece, dtype=torch.uint8), non_blocking=True)
    else:
        place = whole.chunks.placement
        layout, _ = place.layouts[place.layout[whole.chunk[position]]]
        tensor.detach().copy_(payload_tensor(piece, layout, layout.shape))
