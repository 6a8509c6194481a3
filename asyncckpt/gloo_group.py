"""A gloo group of one manager alone, of which torch.distributed knows nothing. For ranks.py; no deadline but its own.

`dist.new_group` would not do for a part of the world: it names the group by how many groups the process has, so ranks
that are in different numbers of them wait for each other under different names (a manager of ranks 0 and 1, then one of
1 and 2: both hang), and after it so do the groups and meshes that the trainer makes. Seen on torch 2.13.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    BroadcastOptions,
    GatherOptions,
    ProcessGroupGloo,
)


class GlooGroup:
    """Making one is a collective call. store: keys that no other group has.

    Every call but `send` and `receive` is collective, and blocks. Rank 0 is the root of all. Tensors are on the CPU,
    contiguous and not empty: gloo sends nothing for one without elements. Raises RuntimeError: a rank did not come in
    `timeout_s`, or died.
    """

    def __init__(self, store: Any, *, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timedelta(seconds=timeout_s)
        self.backend: Any = ProcessGroupGloo(store, rank, world_size, self.timeout)

    def gather(self, mine: Tensor) -> Tensor:
        """Every rank's tensor, one below the other, on rank 0; elsewhere of that shape."""
        theirs = torch.empty((self.world_size, *mine.shape), dtype=mine.dtype, device="cpu")
        options = GatherOptions()
        options.rootRank = 0
        self.backend.gather([list(theirs)] if self.rank == 0 else [], [mine], options).wait()
        return theirs

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        options = BroadcastOptions()
        options.rootRank = 0
        self.backend.broadcast([tensor], options).wait()
        return tensor

    def all_gather(self, mine: Tensor) -> Tensor:
        """Every rank's tensor, one below the other."""
        theirs = torch.empty((self.world_size, *mine.shape), dtype=mine.dtype, device="cpu")
        self.backend.allgather([list(theirs)], [mine]).wait()
        return theirs

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's, by rank, on rank 0; empty elsewhere. Of any lengths: each sends no more than it has."""
        data = _pickled(value)
        lengths = self.gather(torch.tensor([len(data)], device="cpu"))[:, 0].tolist()
        if self.rank:
            self.send(data, 0).wait(self.timeout)
            return []
        theirs = [_empty(length) for length in lengths[1:]]
        for work in [self.receive(tensor, rank) for rank, tensor in enumerate(theirs, 1)]:
            work.wait(self.timeout)
        return [value, *map(_unpickled, theirs)]

    def scatter_objects(self, values: Sequence[Any] | None) -> Any:
        """This rank's of rank 0's `values`; None elsewhere."""
        data = [_pickled(value) for value in values or ()]
        lengths = self.broadcast(torch.tensor([len(each) for each in data] or [0] * self.world_size, device="cpu"))
        if values is not None:
            for work in [self.send(each, rank) for rank, each in enumerate(data) if rank]:
                work.wait(self.timeout)
            return values[0]
        mine = _empty(int(lengths[self.rank]))
        self.receive(mine, 0).wait(self.timeout)
        return _unpickled(mine)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's."""
        data = _pickled(value) if self.rank == 0 else _empty(0)
        length = int(self.broadcast(torch.tensor([len(data)], device="cpu")))
        data = self.broadcast(data if self.rank == 0 else _empty(length))
        return value if self.rank == 0 else _unpickled(data)

    def send(self, tensor: Tensor, rank: int) -> Any:
        """What to wait for, with `timeout`: this group's is not for it. Messages to one rank come in their order."""
        return self.backend.send([tensor], rank, 0)

    def receive(self, tensor: Tensor, rank: int) -> Any:
        """The like, for the next message of a rank, which must be as long."""
        return self.backend.recv([tensor], rank, 0)

    def close(self) -> None:
        """Let go of connections and threads; waits for no other rank."""
        self.backend = None


def _pickled(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpickled(data: Tensor) -> Any:
    """Between the ranks of one job, which run the same program."""
    return pickle.loads(data.numpy().tobytes())


def _empty(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.uint8, device="cpu")
