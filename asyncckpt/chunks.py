"""The chunks of a step in memory, as columns: what they are, where they lie, and their checksums; and the tree of keys.

A million objects would take seconds and gigabytes, so a Chunk or a Key is made only for who asks for one. Nothing here
knows how columns are written: manifest.py and dcp_metadata.py do, and keep what they made on the objects it was made
of. Made by shard_layout.py and shard.py for each rank's part of a save, read by the restoring half.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from asyncckpt.framing import BLOCK_BYTES, Layout

HUGE = 2**62
"""Above every number of bytes or elements that a manifest may hold; sums of two still fit an int64."""

Path = tuple[str | int, ...]
Numbers = npt.NDArray[np.int64]
Checksums = npt.NDArray[np.uint32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Key:
    """dtype, shape: of the whole tensor; None for an object."""

    path: Path
    dtype: str | None
    shape: tuple[int, ...] | None


class Kept:
    """What was made of objects that stay the same from save to save; of each kind the latest."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[tuple[object, ...], Any]] = {}

    def get(self, what: str, basis: tuple[object, ...], make: Callable[[], T]) -> T:
        """What `make` gives, until it is asked for with a basis of other objects, equal or not."""
        known = self._made.get(what)
        if known is None or not all(map(operator.is_, known[0], basis)):
            known = self._made[what] = basis, make()
        made: T = known[1]
        return made


@dataclass(frozen=True, eq=False)
class Keys(Mapping[str, Key]):
    """{fqn: Key} as columns; makes a Key when asked.

    The same object for as long as the structure of the state stays, so what is made for it and for the placements of
    its chunks is kept on it. kinds: (dtype, shape). kind: index into kinds for each fqn, -1 for an object.
    """

    fqns: tuple[str, ...]
    paths: Sequence[Path]
    kinds: tuple[tuple[str, tuple[int, ...]], ...]
    kind: Numbers
    kept: Kept = field(default_factory=Kept, init=False, repr=False)

    @classmethod
    def of(cls, keys: Mapping[str, Key]) -> Keys:
        if isinstance(keys, Keys):
            return keys
        kinds: dict[tuple[str, tuple[int, ...]], int] = {}
        kind = [
            -1 if key.dtype is None or key.shape is None else kinds.setdefault((key.dtype, key.shape), len(kinds))
            for key in keys.values()
        ]
        return cls(tuple(keys), [key.path for key in keys.values()], tuple(kinds), np.array(kind, np.int64))

    def __len__(self) -> int:
        return len(self.fqns)

    def __iter__(self) -> Iterator[str]:
        return iter(self.fqns)

    def __contains__(self, fqn: object) -> bool:
        return fqn in self.number

    def __getitem__(self, fqn: str) -> Key:
        number = self.number[fqn]
        kind = int(self.kind[number])
        return Key(self.paths[number], *((None, None) if kind < 0 else self.kinds[kind]))

    @cached_property
    def number(self) -> dict[str, int]:
        """The place of each fqn."""
        return dict(zip(self.fqns, range(len(self.fqns)), strict=True))

    def numbers_of(self, placement: Placement) -> Numbers:
        """Which key each chunk is of."""
        return self.kept.get(
            "key", (placement.fqns, placement.key),
            lambda: placement.key
            if placement.fqns == self.fqns
            else numbers(map(self.number.__getitem__, placement.fqns))[placement.key],
        )  # fmt: skip


def keys_of(metadata: Metadata) -> Keys:
    """The tree of keys from what DCP's planner made."""
    paths: Mapping[str, Any] = metadata.planner_data or {}
    kinds: dict[tuple[torch.dtype, tuple[int, ...]], int] = {}
    kind = [
        kinds.setdefault((entry.properties.dtype, entry.size), len(kinds))
        if isinstance(entry, TensorStorageMetadata)
        else -1
        for entry in metadata.state_dict_metadata.values()
    ]
    return Keys(
        tuple(metadata.state_dict_metadata),
        [tuple(paths.get(fqn, (fqn,))) for fqn in metadata.state_dict_metadata],
        tuple((str(dtype)[6:], tuple(shape)) for dtype, shape in kinds),
        np.array(kind, np.int64),
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """One item in a file: a box of a tensor, or an object (`layout` and `offsets` None)."""

    key: str
    offsets: tuple[int, ...] | None
    layout: Layout | None
    head_bytes: int
    file: str
    offset: int
    length: int
    crc32: int
    item_crc32: int
    blocks: tuple[int, ...] = ()

    @property
    def payload_offset(self) -> int:
        return self.offset + self.head_bytes

    @property
    def block_crcs(self) -> tuple[int, ...]:
        """The CRC32 of each block of BLOCK_BYTES of the payload."""
        return self.blocks or (self.crc32,)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where every chunk of a step, or of one rank's part, lies: columns of equal length and what they point into.

    The same object for as long as nothing moves between saves; and where objects differ in length and move others,
    the rest of it is the same objects. Nothing of it may be changed.
    key: index into fqns. layouts: (layout, head_bytes). layout: index into layouts, -1 for an object. files: their
    names, in the order of their FileRecords. file: index into files. offset, length: of the item in its file, in bytes.
    parts: what `merge` made it of.
    """

    fqns: tuple[str, ...]
    key: Numbers
    offsets: Sequence[tuple[int, ...] | None]
    layouts: tuple[tuple[Layout, int], ...]
    layout: Numbers
    files: tuple[str, ...]
    file: Numbers
    offset: Numbers
    length: Numbers
    parts: tuple[Placement, ...] = ()
    kept: Kept = field(default_factory=Kept, repr=False)

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Placement:
        chunks = list(chunks)
        fqns: dict[str, int] = {}
        layouts: dict[tuple[Layout, int], int] = {}
        files: dict[str, int] = {}
        return cls(
            key=numbers(fqns.setdefault(chunk.key, len(fqns)) for chunk in chunks),
            offsets=[chunk.offsets for chunk in chunks],
            layout=numbers(
                -1 if chunk.layout is None else layouts.setdefault((chunk.layout, chunk.head_bytes), len(layouts))
                for chunk in chunks
            ),
            file=numbers(files.setdefault(chunk.file, len(files)) for chunk in chunks),
            offset=numbers(chunk.offset for chunk in chunks),
            length=numbers(chunk.length for chunk in chunks),
            fqns=tuple(fqns), layouts=tuple(layouts), files=tuple(files),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.key)

    def moved(
        self, files: tuple[str, ...], file: Numbers, offset: Numbers, length: Numbers, parts: tuple[Placement, ...] = ()
    ) -> Placement:
        """The same chunks at other places; what was kept of them stays."""
        return replace(self, files=files, file=file, offset=offset, length=length, parts=parts)

    def is_like(self, other: Placement) -> bool:
        """Whether they hold the same chunks, be it at other places."""
        return self.kept is other.kept

    def key_of(self, number: Any) -> str:
        """The fqn of a chunk."""
        return self.fqns[int(self.key[number])]

    @cached_property
    def head_bytes(self) -> Numbers:
        """Of each chunk: where its payload starts in its item."""
        return numbers(chain((head_bytes for _, head_bytes in self.layouts), [0]))[self.layout]

    @cached_property
    def payload_bytes(self) -> Numbers:
        """Of each chunk; an object's item is its payload."""
        sizes = numbers(chain((min(payload_bytes_of(layout), HUGE) for layout, _ in self.layouts), [0]))
        return np.where(self.layout < 0, self.length, sizes[self.layout])

    @cached_property
    def num_blocks(self) -> Numbers:
        """Of each chunk: how many block checksums it has, 0 if its payload is no longer than one block."""
        blocks = -(-self.payload_bytes // BLOCK_BYTES)
        return np.where((self.layout < 0) | (blocks < 2), 0, blocks)


@dataclass(frozen=True, eq=False)
class ChunkTable(Sequence[Chunk]):
    """The chunks of a step, or of one rank's part, as columns; makes a Chunk when asked.

    blocks: {chunk number: the CRC32 of each block of BLOCK_BYTES}, where a payload has more than one.
    """

    placement: Placement
    crc32: Checksums
    item_crc32: Checksums
    blocks: Mapping[int, tuple[int, ...]]

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> ChunkTable:
        if isinstance(chunks, ChunkTable):
            return chunks
        chunks = list(chunks)
        return cls(
            Placement.of(chunks),
            np.array([chunk.crc32 for chunk in chunks], np.uint32),
            np.array([chunk.item_crc32 for chunk in chunks], np.uint32),
            {number: chunk.blocks for number, chunk in enumerate(chunks) if chunk.blocks},
        )

    def __len__(self) -> int:
        return len(self.crc32)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        place = self.placement
        layout, head_bytes = (None, 0) if place.layout[number] < 0 else place.layouts[place.layout[number]]
        return Chunk(
            place.fqns[place.key[number]], place.offsets[number], layout, head_bytes, place.files[place.file[number]],
            int(place.offset[number]), int(place.length[number]),
            int(self.crc32[number]), int(self.item_crc32[number]), self.blocks.get(number, ()),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Chunk]:
        place, blocks = self.placement, self.blocks
        layouts: list[tuple[Layout | None, int]] = [*place.layouts, (None, 0)]
        columns = (place.key, place.layout, place.file, place.offset, place.length, self.crc32, self.item_crc32)
        rows = zip(place.offsets, *(column.tolist() for column in columns), strict=True)
        for number, (offsets, key, layout, file, offset, length, crc, item_crc) in enumerate(rows):
            frame, head_bytes = layouts[layout]
            yield Chunk(
                place.fqns[key], offsets, frame, head_bytes, place.files[file], offset, length, crc, item_crc,
                blocks.get(number, ()),
            )  # fmt: skip


def merge(tables: Sequence[ChunkTable], before: Placement | None = None) -> ChunkTable:
    """The parts of all ranks as one. before: what it was made into last time, of which is kept what has not changed."""
    if len(tables) == 1:
        return tables[0]
    parts = tuple(table.placement for table in tables)
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    return ChunkTable(
        _merged(parts, before),
        np.concatenate([np.zeros(0, np.uint32), *(table.crc32 for table in tables)]),
        np.concatenate([np.zeros(0, np.uint32), *(table.item_crc32 for table in tables)]),
        {
            start + number: blocks
            for start, table in zip(starts, tables, strict=False)
            for number, blocks in table.blocks.items()
        },
    )


def _merged(parts: tuple[Placement, ...], before: Placement | None) -> Placement:
    if before is not None and before.parts == parts:
        return before
    files, file = _joined([part.files for part in parts], [part.file for part in parts])
    offset = np.concatenate([numbers([]), *(part.offset for part in parts)])
    length = np.concatenate([numbers([]), *(part.length for part in parts)])
    if before is not None and len(before.parts) == len(parts) and all(map(Placement.is_like, before.parts, parts)):
        return before.moved(files, file, offset, length, parts)
    fqns, key = _joined([part.fqns for part in parts], [part.key for part in parts])
    layouts, layout = _joined([part.layouts for part in parts], [part.layout for part in parts])
    offsets = list(chain.from_iterable(part.offsets for part in parts))
    return Placement(fqns, key, offsets, layouts, layout, files, file, offset, length, parts)


def _joined(tables: Sequence[Sequence[T]], columns: Sequence[Numbers]) -> tuple[tuple[T, ...], Numbers]:
    """One table without doubles, and the columns as indices into it; -1 stays."""
    index: dict[T, int] = {}
    moved = [
        numbers(chain((index.setdefault(entry, len(index)) for entry in table), [-1]))[column]
        for table, column in zip(tables, columns, strict=True)
    ]
    return tuple(index), np.concatenate([numbers([]), *moved])


def payload_bytes_of(layout: Layout) -> int:
    return math.prod(layout.shape) * layout.torch_dtype.itemsize


def numbers(values: Iterable[int]) -> Numbers:
    return np.fromiter(values, np.int64)
