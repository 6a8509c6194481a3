"""The seam between a state dict in training and its copy in CPU memory.

`AsyncStager` is DCP's protocol (`torch.distributed.checkpoint.staging.AsyncStager`) with one method more, `snapshot`,
that hands out a copy with an owner. Nothing here knows of files, steps or storage.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

StateDict = dict[str, Any]


class StagingError(RuntimeError):
    """A state dict could not be copied, or the copy is not one moment of the state. The source was not changed."""


class StagedSnapshot(Protocol):
    """A copy of a state dict in CPU memory, owned by whoever asked for it.

    `state_dict` has the nesting of the source; every tensor in it is on the CPU and shares no memory with the source,
    every other value is a copy. Tied tensors (same memory, shape and stride in the source) are one tensor object here.
    Tensors may be read after `wait()`, until `release()`.
    """

    state_dict: StateDict
    num_bytes: int
    """Payload bytes of the distinct tensors."""
    stall_s: float
    """Seconds for which the call that made the snapshot kept its caller."""
    structure: int
    """Changes from one snapshot of a stager to the next exactly if keys, nesting, shapes, dtypes, strides, devices,
    placements or ties changed; values that are no tensors, and lists of such values, do not count."""
    memory: memoryview | None
    """What all tensors of `state_dict` lie in, each at the same place in every snapshot of one `structure`; None where
    there is no such buffer. To be read as the tensors are: after `wait()`, until `release()`."""

    def wait(self) -> None:
        """Block until the copy is complete. Raises StagingError if it failed or the source changed under it."""

    def wait_for(self, start: int, stop: int) -> None:
        """`wait()` for the bytes [start, stop) of `memory` alone, where the copy can be had in parts."""

    def release(self) -> None:
        """Give the buffers back for reuse; idempotent. No tensor of `state_dict` may be read afterwards."""


@runtime_checkable
class AsyncStager(Protocol):
    """Copies state dicts to CPU memory; a superset of DCP's protocol of the same name.

    An instance belongs to one thread (the training thread); `StagedSnapshot.wait/release` may be called from any.
    """

    _synchronize_after_execute: bool = False

    @property
    def should_synchronize_after_execute(self) -> bool: ...

    def stage(self, state_dict: StateDict) -> StateDict | Future[StateDict]:
        """DCP's contract: the copy, or a future of it. Its buffers are reused once its tensors are garbage."""
        ...

    def synchronize_staging(self) -> None:
        """Block until every copy in flight is complete: afterwards any source tensor may be changed."""
        ...

    def snapshot(self, state_dict: StateDict) -> StagedSnapshot:
        """An owned copy of this moment of `state_dict`; see the class for what may still be in flight on return."""
        ...

    def borrow(self, state_dict: StateDict) -> StagedSnapshot:
        """A snapshot for a caller that changes no source before `wait()` has returned: waiting may be what copies, on
        the thread that waits, so that writing can start before all is copied."""
        ...

    def prewarm(self, state_dict: StateDict, *, num_snapshots: int = 1) -> None:
        """Allocate, touch and page-lock the buffers for `num_snapshots` snapshots at a time; copies nothing."""
        ...

    def close(self) -> None:
        """Wait for copies in flight, remove hooks and free the pool; idempotent."""
        ...
