"""Two hosts of one SPMD job: two processes with devices of their own and a gloo group between them."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import asyncckpt
from asyncckpt.integrations.xla import CheckpointManager, SPMDLoadPlanner, SPMDSavePlanner, XlaStager, prime_optimizer
from asyncckpt.manifest import decode_manifest
from tests.crew import Crew
from tests.processes import Link
from tests.states import assert_same, raw_bytes, target_like
from tests.xla.models import mesh_of, model_and_optimizer, on_cpu, sharded, state_of, trained

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def hosts() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


def save_many(link: Link, path: str) -> list[int]:
    with CheckpointManager(path, 10, max_to_keep=2) as manager:
        for step in range(0, 50, 10):
            manager.save_async(step, {"w": sharded(torch.full((4, 4), step), mesh_of(2, 2), "fsdp", None)})
        manager.join()
        return manager.all_steps()


def save_and_restore(link: Link, path: str, has_planners: bool) -> bytes:
    """Both hosts' devices hold the whole mesh's parts, as far as torch_xla can tell on a CPU."""
    planners = {"save_planner": SPMDSavePlanner(), "load_planner": SPMDLoadPlanner()} if has_planners else {}
    kind: Any = asyncckpt.CheckpointManager if has_planners else CheckpointManager
    with kind(path, 1, stager=XlaStager(), **planners) as manager:
        saved = trained(mesh_of(2, 2), seed=1)
        for step in range(2):
            manager.save(step, saved)
        model, optimizer = model_and_optimizer(mesh_of(4, 1), seed=2)
        target = state_of(model, prime_optimizer(optimizer))
        manager.restore(1, target, strict=True)
        assert_same(on_cpu(saved), on_cpu(target))
    return raw_bytes(model[0].weight.cpu())


def test_hosts_agree_on_the_steps_that_are_kept(hosts: Crew, tmp_path: pathlib.Path) -> None:
    """torch_xla prunes on rank 0 alone: there the second host listed all five."""
    assert hosts.run(save_many, str(tmp_path)) == [[30, 40], [30, 40]]


@pytest.mark.parametrize("has_planners", [False, True])
def test_what_two_hosts_hold_is_written_once_and_restored_on_both(
    hosts: Crew, tmp_path: pathlib.Path, has_planners: bool
) -> None:
    """By the default planner over the stager's shards, and by torch_xla's; one process restores it, too."""
    first, second = hosts.run(save_and_restore, str(tmp_path), has_planners)
    assert first == second
    saved = on_cpu(trained(mesh_of(2, 2), seed=1))
    with asyncckpt.CheckpointManager(str(tmp_path)) as manager:
        target = target_like(saved)
        manager.restore(1, target, strict=True)
    assert_same(saved, target)
    (path,) = (tmp_path / "1").glob("manifest-*.json")
    chunks = [(chunk.key, chunk.offsets) for chunk in decode_manifest(path.read_bytes()).chunks]
    assert len(set(chunks)) == len(chunks)
