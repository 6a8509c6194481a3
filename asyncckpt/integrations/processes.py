"""The processes of an Accelerator or a Trainer, which go on together or not at all. Called by accelerate.py and
transformers.py, on the training thread; both have their gathering from Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from asyncckpt.errors import CheckpointError, RestoreError

T = TypeVar("T")


def on_all_ranks(work: Callable[[], T], url: str, kind: type[CheckpointError] = RestoreError) -> list[T]:
    """What `work` gives on each rank. If it fails on one, all raise, the others a `kind`. A collective call."""
    if PartialState().num_processes == 1:
        return [work()]
    result, failure = None, None
    try:
        result = work()
    except Exception as exc:
        failure = exc
    told = gather_object([(result, f"{type(failure).__name__}: {failure}" if failure else "")])
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(told):
        if text:
            raise kind(f"rank {rank} failed, so nothing was done here: {text}", url=url, rank=rank)
    return [result for result, _ in told]
