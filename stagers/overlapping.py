"""`OverlappingAsyncStager`: returns at once and copies while the next forward and backward run.

What may wait is decided by one rule: large tensors that only an optimizer's `step()` changes. The next step of any
optimizer waits for the copies by itself, through torch's step hook, and the user writes nothing. A change that gets
past that rule (by hand, without `synchronize_staging()`) is caught where torch counts it, in `Tensor._version`;
fused optimizers, native batch_norm, `.data` and numpy do not count, which is why the rule decides and not the count.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from stagers import copying
from stagers.base import StagingError, StateDict
from stagers.blocking import BlockingAsyncStager
from stagers.flatten import Flat, flatten
from stagers.layout import Layout, Range

_OVERLAP_FROM_BYTES = 64 << 10
"""Smaller tensors are copied at once: it costs microseconds, and makes AdamW's `step`, which users edit, safe."""


class _Late(NamedTuple):
    """A copy still to come.

    source: an alias of the tensor in training, which keeps its memory and shares its count of changes. counted: the
    tensors that count (a DTensor counts for its local tensor). version: their sum when the copy was asked for.
    """

    place: Range
    view: Tensor
    source: Tensor
    counted: tuple[Tensor, ...]
    version: int

    def is_torn(self) -> bool:
        return _version(self.counted) != self.version


class OverlappingAsyncStager(BlockingAsyncStager):
    """Copies parameters and optimizer state beside the training, all else before it returns.

    An optimizer is known from its first `step()` on, or by `watch`. Replaying `step` from a CUDA graph runs no hooks:
    call `synchronize_staging()` before. `max_bytes`: as in BlockingAsyncStager.
    """

    def __init__(self, max_bytes: int | None = None) -> None:
        super().__init__(max_bytes)
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._side = copying.SideStreams()
        self._large: tuple[Layout | None, list[int]] = (None, [])
        # One thread: copies end in the order they began, so the last one stands for all.
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="stager")
        # Weak, as the future holds the staged tensors; while it is in flight the copier holds it.
        self._last: weakref.ref[Future[Any]] | None = None
        self._unhook = weakref.finalize(self, register_optimizer_step_pre_hook(_step_hook(self)).remove)

    def watch(self, optimizer: Optimizer) -> None:
        """Overlap what `optimizer` owns from now on, not only after its first step. Held weakly."""
        self._optimizers.add(optimizer)

    def stage(self, state_dict: StateDict) -> Future[StateDict]:
        """A future of the copy, as `dcp.async_save` expects of copies that are not complete on return."""
        staged, copy = self._stage(state_dict)
        future: Future[StateDict] = Future()
        if copy is None:
            future.set_result(staged)
        else:
            copy.add_done_callback(lambda copy: _resolve(future, staged, copy))
        return future

    def synchronize_staging(self) -> None:
        """Block until no copy is in flight. A failed copy raises in `wait()` of its snapshot, not here."""
        copy = self._last() if self._last is not None else None
        if copy is not None:
            wait_for([copy])

    def prewarm(self, state_dict: StateDict, *, num_snapshots: int = 1) -> None:
        super().prewarm(state_dict, num_snapshots=num_snapshots)
        self._copier.submit(int).result()  # starts the thread

    def close(self) -> None:
        """Wait for copies in flight, remove the hook, and free the buffers as they come back; idempotent."""
        self._unhook()
        self._copier.shutdown()
        super().close()

    def _copy(self, flat: Flat, layout: Layout, views: Sequence[Tensor]) -> Future[Any] | None:
        sources = [flat.tensors[i] for i in layout.first_of]
        late = self._late(flat, layout, views, sources)
        now = [i for i in range(len(sources)) if i not in late]
        events = copying.copy([views[i] for i in now], [sources[i] for i in now])
        on_device = [copy for copy in late.values() if copy.source.device.type != "cpu"]
        events += copying.copy([copy.view for copy in on_device], [copy.source for copy in on_device], self._side)
        if not late and not events:
            return None
        copy = self._copier.submit(_finish, list(late.values()), events)
        self._last = weakref.ref(copy)
        return copy

    def _late(self, flat: Flat, layout: Layout, views: Sequence[Tensor], sources: Sequence[Tensor]) -> dict[int, _Late]:
        """What may be copied later, by its index in `sources`."""
        if self._large[0] is not layout:
            places = enumerate(layout.ranges)
            self._large = layout, [i for i, p in places if p.is_dense and p.num_bytes >= _OVERLAP_FROM_BYTES]
        large = self._large[1]
        owned = _memory_of_optimizers(self._optimizers) if large else set()
        late = {}
        for i in large:
            outer = flat.outer.get(layout.first_of[i])
            if _address(sources[i]) in owned and _may_wait(sources[i], outer):
                source = sources[i].detach()
                counted = (source,) if outer is None else (source, outer)
                late[i] = _Late(layout.ranges[i], views[i], source, counted, _version(counted))
        return late


def _step_hook(stager: OverlappingAsyncStager) -> Callable[..., None]:
    reference = weakref.ref(stager)  # the hook is global: it must not keep the stager alive

    def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stager = reference()
        if stager is not None:
            stager.watch(optimizer)
            stager.synchronize_staging()

    return before_step


def _memory_of_optimizers(optimizers: Iterable[Optimizer]) -> set[int]:
    """Addresses of the storages of their parameters and state."""
    addresses: set[int] = set()
    for optimizer in optimizers:
        parameters = [group["params"] for group in optimizer.param_groups]
        try:
            tensors = flatten({"parameters": parameters, "state": optimizer.state}).tensors
        except StagingError:
            continue  # something in it is not for overlapping; if it is to be staged, the stager says so
        addresses.update(map(_address, tensors))
    return addresses - {0}


def _address(tensor: Tensor) -> int:
    """Of its storage; 0 if it has none that can be seen."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _may_wait(source: Tensor, outer: Tensor | None) -> bool:
    """True if changes are counted, the bytes are the values, and the device can copy beside other work."""
    if source.is_inference() or source.is_conj() or source.is_neg() or (outer is not None and outer.is_inference()):
        return False
    return source.device.type == "cpu" or source.device.type in copying.STREAM_DEVICES


def _version(tensors: Iterable[Tensor]) -> int:
    return sum(tensor._version for tensor in tensors)


def _finish(late: Sequence[_Late], events: Sequence[torch.Event]) -> None:
    """Complete a copy (copier thread) and check that nothing changed under it."""
    try:
        for copy in late:
            if copy.source.device.type == "cpu":
                copying.copy_bytes(copy.view, copy.source, 0, copy.place.num_bytes)
        for event in events:
            event.synchronize()
    except Exception as error:
        raise StagingError(f"the copy failed: {error}. The source was not changed.") from error
    torn = [copy.place.key for copy in late if copy.is_torn()]
    if torn:
        raise StagingError(
            f"{torn[0]!r}{f' and {len(torn) - 1} others' if torn[1:] else ''} changed outside of optimizer.step() "
            "while being copied: the copy is torn and must not be used. The source is as you made it. Call "
            "synchronize_staging() (with a manager: wait_staged()) before such a change, or use BlockingAsyncStager."
        )


def _resolve(future: Future[StateDict], staged: StateDict, copy: Future[Any]) -> None:
    error = copy.exception()
    if error is None:
        future.set_result(staged)
    else:
        future.set_exception(error)
