"""Process groups of torch_xla's making, on ranks that train without SPMD, as groups of its "xla" backend ask."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from tests.crew import Crew
from tests.processes import Link

pytestmark = pytest.mark.xla


@pytest.fixture
def two_ranks() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


def save_and_restore(link: Link, path: str) -> list[int]:
    os.environ.pop("XLA_USE_SPMD", None)  # set by `use_spmd()` of another test, in the process that started this one
    from asyncckpt.integrations.xla import CheckpointManager  # registers the backend

    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("xla", store=PrefixStore("xla", store), rank=link.rank, world_size=2)
    other = 1 - link.rank
    with CheckpointManager(path, 1) as manager:
        manager.save(1, {f"of {link.rank}": torch.full((3,), link.rank + 1).to("xla")})
        target: dict[str, Any] = {f"of {other}": torch.zeros(3, dtype=torch.int64).to("xla")}
        manager.restore(1, target)
    return target[f"of {other}"].tolist()


def refusal(link: Link, path: str) -> str:
    os.environ.pop("XLA_USE_SPMD", None)
    from torch_xla._internal.rendezvous import DummyStore

    from asyncckpt.integrations.xla import CheckpointManager

    dist.destroy_process_group()
    os.environ["TORCH_DIST_INIT_BARRIER"] = "0"
    dist.init_process_group("xla", store=DummyStore(), rank=link.rank, world_size=2)
    with pytest.raises(ValueError, match="does not work") as raised:
        CheckpointManager(path, 1)
    return str(raised.value)


def test_a_group_of_the_xla_backend_says_who_takes_part(two_ranks: Crew, tmp_path: pathlib.Path) -> None:
    """Nothing is sent over it: the manager's ranks meet through its store."""
    assert two_ranks.run(save_and_restore, str(tmp_path)) == [[2, 2, 2], [1, 1, 1]]


def test_a_group_without_a_store_is_refused_in_words(two_ranks: Crew, tmp_path: pathlib.Path) -> None:
    """As torch_xla makes with XLA_USE_DUMMY_STORE=1."""
    for message in two_ranks.run(refusal, str(tmp_path)):
        assert message.endswith("If XLA_USE_DUMMY_STORE=1 is set, unset it and TORCH_DIST_INIT_BARRIER.")
