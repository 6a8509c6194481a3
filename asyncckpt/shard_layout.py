"""Where the items of one rank lie in its files: pure arithmetic, made once for each plan and kept while that stays.

Large tensors first, each payload on a page of the file, which O_DIRECT needs; then the small ones, those of one layout
side by side, so that their frames are written for many at once; then the objects, whose sizes change from save to
save. Tied tensors are one item. Nothing here reads or writes a byte; called by shard.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch.distributed.checkpoint.metadata import MetadataIndex

from asyncckpt.chunks import Kept, Numbers, Placement
from asyncckpt.framing import Layout, frame_of

ALIGNED_PAYLOAD_BYTES = 1024 * 1024
"""From this size on a payload starts on a page of the file; smaller ones are copied anyway."""
REGION_BYTES = 2 * 1024 * 1024
"""Of small items put together in one buffer, which goes out as it lies if it starts on a page of the file."""
REGION_ITEMS = 480
"""Numpy gives up the GIL where it goes over more than 500 elements, and each time it is given up beside a busy Python
thread, that thread loses half a millisecond and ours five."""
ALIGNED_RUN_BYTES = 64 * 1024
"""From this size on a run starts on a page. Storage gathers smaller pieces anyway."""
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Run:
    """Items of one layout, each right behind the other, no more than fit into a region; a large one is alone.
    rows: their numbers in the plan."""

    layout: Layout
    rows: Numbers
    offset: int

    @property
    def is_large(self) -> bool:
        return _is_large(self.layout)


@dataclass(slots=True)
class ShardFile:
    """objects: (row, offset)."""

    name: str
    runs: list[Run] = field(default_factory=list)
    objects: list[tuple[int, int]] = field(default_factory=list)
    size: int = 0


class ShardLayout:
    """layouts: of each item of the plan, None for an object. same_as: for each the row of the item whose bytes it
    shares, or its own. A rank without items has no file."""

    def __init__(
        self,
        indices: Sequence[MetadataIndex],
        layouts: Sequence[Layout | None],
        same_as: Sequence[int],
        *,
        rank: int,
        max_file_bytes: int,
    ) -> None:
        self.same_as = np.array(same_as, np.int64)
        self.object_rows = [row for row, layout in enumerate(layouts) if layout is None]
        self._rank = rank
        self._max_file_bytes = max_file_bytes
        self._tensor_files: list[ShardFile] = []
        for layout, rows in _runs(layouts, same_as):
            self._append(layout, np.array(rows, np.int64))
        self._columns = _Columns.of(indices, layouts)
        self._placed: tuple[Sequence[int] | None, Placement, list[ShardFile]] | None = None

    def place(self, object_bytes: Sequence[int]) -> tuple[Placement, list[ShardFile]]:
        """With objects of these sizes, in the order of `object_rows`; the same as last time if they are the same."""
        if self._placed is None or self._placed[0] != object_bytes:
            files = [replace(file, objects=[]) for file in self._tensor_files]
            for row, size in zip(self.object_rows, object_bytes, strict=True):
                file = self._file_with_room(files, size)
                file.objects.append((row, file.size))
                file.size += size
            self._placed = object_bytes, self._columns.placement(files, object_bytes, self.same_as), files
        return self._placed[1:]

    def _append(self, layout: Layout, rows: Numbers) -> None:
        """In the last file as far as there is room, and in new ones."""
        frame = frame_of(layout)
        while len(rows):
            file = self._file_with_room(self._tensor_files, frame.num_bytes)
            room = min(REGION_BYTES, self._max_file_bytes - file.size - PAGE_BYTES)
            run = Run(layout, rows[: max(1, min(room // frame.num_bytes, REGION_ITEMS))], file.size)
            if run.is_large:
                run = replace(run, offset=_next_page(file.size + len(frame.head)) - len(frame.head))
            elif len(run.rows) * frame.num_bytes >= ALIGNED_RUN_BYTES:
                run = replace(run, offset=_next_page(file.size))
            file.runs.append(run)
            file.size = run.offset + len(run.rows) * frame.num_bytes
            rows = rows[len(run.rows) :]

    def _file_with_room(self, files: list[ShardFile], num_bytes: int) -> ShardFile:
        if not files or files[-1].size + num_bytes > self._max_file_bytes:
            files.append(ShardFile(f"__{self._rank}_{len(files)}.distcp"))
        return files[-1]


def _next_page(position: int) -> int:
    return position + -position % PAGE_BYTES


def _is_large(layout: Layout) -> bool:
    return frame_of(layout).payload_bytes >= ALIGNED_PAYLOAD_BYTES


def _runs(layouts: Sequence[Layout | None], same_as: Sequence[int]) -> Iterator[tuple[Layout, Sequence[int]]]:
    """Each large tensor in plan order, then the small ones by layout; tied ones once."""
    small: dict[Layout, list[int]] = {}
    for row, layout in enumerate(layouts):
        if layout is None or same_as[row] != row:
            continue
        if _is_large(layout):
            yield layout, [row]
        else:
            small.setdefault(layout, []).append(row)
    yield from small.items()


@dataclass(frozen=True, slots=True)
class _Columns:
    """What of a Placement stays while the plan does."""

    fqns: tuple[str, ...]
    key: Numbers
    offsets: list[tuple[int, ...] | None]
    layouts: tuple[tuple[Layout, int], ...]
    layout: Numbers
    kept: Kept = field(default_factory=Kept)

    @classmethod
    def of(cls, indices: Sequence[MetadataIndex], layouts: Sequence[Layout | None]) -> _Columns:
        fqns: dict[str, int] = {}
        known: dict[Layout, int] = {}
        key = [fqns.setdefault(index.fqn, len(fqns)) for index in indices]
        layout = [-1 if item is None else known.setdefault(item, len(known)) for item in layouts]
        offsets = [
            None if item is None else tuple(index.offset or ())
            for index, item in zip(indices, layouts, strict=True)
        ]  # fmt: skip
        framed = tuple((item, len(frame_of(item).head)) for item in known)
        return cls(tuple(fqns), np.array(key, np.int64), offsets, framed, np.array(layout, np.int64))

    def placement(self, files: Sequence[ShardFile], object_bytes: Sequence[int], same_as: Numbers) -> Placement:
        file, offset, length = (np.zeros(len(self.key), np.int64) for _ in range(3))
        for number, one in enumerate(files):
            for run in one.runs:
                num_bytes = frame_of(run.layout).num_bytes
                file[run.rows], length[run.rows] = number, num_bytes
                offset[run.rows] = run.offset + num_bytes * np.arange(len(run.rows))
            for row, at in one.objects:
                file[row], offset[row] = number, at
        length[self.layout < 0] = object_bytes
        return Placement(
            self.fqns, self.key, self.offsets, self.layouts, self.layout,
            tuple(one.name for one in files), file[same_as], offset[same_as], length[same_as], kept=self.kept,
        )  # fmt: skip
