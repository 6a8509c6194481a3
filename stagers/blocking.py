"""`BlockingAsyncStager`: the copy is complete when the call returns.

It is also the frame that `OverlappingAsyncStager` fills in, which says only when which bytes are copied (`_copy`).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from stagers import copying
from stagers.base import StagingError, StateDict
from stagers.copying import Borrowed
from stagers.flatten import Flat, copy_objects, flatten, unflatten
from stagers.layout import Layout, Range
from stagers.pool import BufferPool, Slab

_BORROW_FROM_BYTES = 1 << 20
"""Smaller tensors are copied at once, in one call for all: asking for each would cost more than the copy."""

Copying: TypeAlias = Future[Any] | Borrowed
CopyBy: TypeAlias = Callable[[Flat, Layout, list[Tensor]], Copying | None]


class Snapshot:
    """A copy of a state dict in a slab of the pool; `StagedSnapshot` says what its owner may do when.

    Collected without `release()`, it costs the pool its slab: the tensors may still be read somewhere.
    """

    def __init__(
        self, state_dict: StateDict, layout: Layout, copy: Copying | None, pool: BufferPool, slab: Slab
    ) -> None:
        self.state_dict = state_dict
        self.memory: memoryview | None = memoryview(slab.memory)
        self.num_bytes = layout.num_bytes
        self.structure = layout.structure
        self.stall_s = 0.0
        self._copy = copy
        self._pool = pool
        self._slab = slab
        self._forget = weakref.finalize(self, pool.forget, slab)

    def wait(self) -> None:
        if self._copy is not None:
            self._copy.result()

    def wait_for(self, start: int, stop: int) -> None:
        if isinstance(self._copy, Borrowed):
            self._copy.complete(start, stop)
        else:
            self.wait()

    def release(self) -> None:
        if self._forget.detach():  # something for the first caller only, whatever its thread
            if isinstance(self._copy, Borrowed):
                self._copy.end()
            elif self._copy is not None:
                self._copy.exception()  # waits: the copy still writes to the slab
            self._pool.give_back(self._slab)


class BlockingAsyncStager:
    """Copies before it returns. `max_bytes` caps the host memory of all its snapshots together (None: no cap)."""

    _synchronize_after_execute = False

    def __init__(self, max_bytes: int | None = None) -> None:
        self._pool = BufferPool(max_bytes)
        self._layout: Layout | None = None
        self._num_structures = 0
        # Tensors over a slab cost 10 us each to make, so those of `snapshot` are kept as long as slab and layout are.
        self._kept: weakref.WeakKeyDictionary[Slab, tuple[Layout, list[Tensor], list[Tensor]]]
        self._kept = weakref.WeakKeyDictionary()

    @property
    def should_synchronize_after_execute(self) -> bool:
        return self._synchronize_after_execute

    def snapshot(self, state_dict: StateDict) -> Snapshot:
        """An owned copy; complete on return. Raises StagingError where a value or `max_bytes` does not allow it."""
        return self._snapshot(state_dict, self._copy)

    def borrow(self, state_dict: StateDict) -> Snapshot:
        """A snapshot whose large CPU tensors are copied by whoever waits for them; the rest is complete on return."""
        return self._snapshot(state_dict, _copy_when_asked)

    def _snapshot(self, state_dict: StateDict, copy_by: CopyBy) -> Snapshot:
        started = time.perf_counter()
        flat, layout = self._plan(state_dict)
        slab = self._pool.lend(layout.buffer_bytes)
        try:
            views, leaves = self._kept_tensors(slab, layout)
            staged, copy = _fill(flat, layout, views, leaves, copy_by)
        except BaseException:
            self._pool.give_back(slab)
            raise
        snapshot = Snapshot(staged, layout, copy, self._pool, slab)
        snapshot.stall_s = time.perf_counter() - started
        return snapshot

    def stage(self, state_dict: StateDict) -> StateDict | Future[StateDict]:
        """The copy, complete. Its memory goes back to the pool when the last tensor (or storage) over it is garbage."""
        staged, _ = self._stage(state_dict)
        return staged

    def synchronize_staging(self) -> None:
        """Nothing is ever in flight."""

    def prewarm(self, state_dict: StateDict, *, num_snapshots: int = 1) -> None:
        """Allocate and touch what `num_snapshots` snapshots at a time need, and learn the structure; copies nothing."""
        _, layout = self._plan(state_dict)
        slabs: list[Slab] = []
        try:
            while len(slabs) < num_snapshots:
                slabs.append(self._pool.lend(layout.buffer_bytes))
                self._kept_tensors(slabs[-1], layout)
        finally:
            for slab in slabs:
                self._pool.give_back(slab)

    def close(self) -> None:
        """Free the buffers, those in use as they come back; idempotent."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._pool!r}>"

    def _plan(self, state_dict: StateDict) -> tuple[Flat, Layout]:
        """The state dict in parts, and where they go: as last time, unless the structure changed."""
        flat = flatten(state_dict)
        if self._layout is None or not self._layout.fits(flat):
            self._num_structures += 1
            self._layout = Layout(flat, self._num_structures)
        return flat, self._layout

    def _kept_tensors(self, slab: Slab, layout: Layout) -> tuple[list[Tensor], list[Tensor]]:
        kept = self._kept.get(slab)
        if kept is None or kept[0] is not layout:
            views, leaves = _tensors(layout, slab.memory)
            self._kept[slab] = kept = (layout, views, leaves)
        return kept[1:]

    def _stage(self, state_dict: StateDict) -> tuple[StateDict, Any]:
        flat, layout = self._plan(state_dict)
        slab = self._pool.lend(layout.buffer_bytes)
        lease = memoryview(slab.memory)  # every storage over it keeps it alive
        weakref.finalize(lease, self._pool.give_back, slab)
        views, leaves = _tensors(layout, lease)
        return _fill(flat, layout, views, leaves, self._copy)

    def _copy(self, flat: Flat, layout: Layout, views: list[Tensor]) -> Future[Any] | None:
        """Copy each range's source to its view; a future if some of it is still to come."""
        for event in copying.copy(views, [flat.tensors[i] for i in layout.first_of]):
            event.synchronize()
        return None


def _tensors(layout: Layout, buffer: Any) -> tuple[list[Tensor], list[Tensor]]:
    # Tensors made in inference mode could not be written to outside of it.
    with torch.inference_mode(False), torch.no_grad():
        views = layout.views(buffer)
        return views, layout.leaves(views)


def _fill(
    flat: Flat, layout: Layout, views: list[Tensor], leaves: list[Tensor], copy_by: CopyBy
) -> tuple[StateDict, Any]:
    objects = copy_objects(flat)  # first, as it can fail: from here on something may be in flight
    staged: StateDict = unflatten(flat.spec, iter(leaves), iter(objects))
    try:
        with torch.no_grad():
            return staged, copy_by(flat, layout, views)
    except RuntimeError as error:
        raise StagingError(f"the copy failed: {error}. The source was not changed.") from error


def _copy_when_asked(flat: Flat, layout: Layout, views: Sequence[Tensor]) -> Borrowed:
    sources = [flat.tensors[i] for i in layout.first_of]
    late = [i for i, place in enumerate(layout.ranges) if _may_be_borrowed(sources[i], place)]
    now = sorted(set(range(len(views))).difference(late))
    for event in copying.copy([views[i] for i in now], [sources[i] for i in now]):
        event.synchronize()
    return Borrowed([layout.ranges[i].offset for i in late], [views[i] for i in late], [sources[i] for i in late])


def _may_be_borrowed(source: Tensor, place: Range) -> bool:
    """Large, and its memory is the bytes to be copied."""
    return (
        place.num_bytes >= _BORROW_FROM_BYTES
        and place.is_dense
        and source.device.type == "cpu"
        and not (source.is_conj() or source.is_neg())
    )
