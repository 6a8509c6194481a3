"""Copies of PyTorch state dicts in host memory, with an owner.

    from stagers import BlockingAsyncStager
    with BlockingAsyncStager() as stager:
        snapshot = stager.snapshot({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        ...                          # train on; snapshot.state_dict keeps this moment
        snapshot.release()

Both stagers also serve as `torch.distributed.checkpoint.async_save(..., async_stager=stager)`. Imports torch only.

General layout, each file importing only those above it:
    base         the protocols and the error
    flatten      a state dict in parts, and whole again
    layout       the place of each tensor in a buffer
    pool         the buffers
    copying      bytes into the buffer; streams and events
    blocking     the stager that copies before it returns
    overlapping  the stager that copies beside the training
"""

from stagers.base import AsyncStager, StagedSnapshot, StagingError, StateDict
from stagers.blocking import BlockingAsyncStager
from stagers.overlapping import OverlappingAsyncStager
from stagers.pool import BufferPool

__all__ = [
    "AsyncStager",
    "BlockingAsyncStager",
    "OverlappingAsyncStager",
    "StagedSnapshot",
    "StagingError",
    "StateDict",
    "BufferPool",
]
