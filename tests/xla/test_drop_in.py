"""asyncckpt.integrations.xla in place of torch_xla's module: its guide, its names, its trees, its broken promises."""

from __future__ import annotations

import inspect
import os
import pathlib
import pickle
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch_xla
import torch_xla.distributed.spmd as xs
from torch_xla.experimental import distributed_checkpoint as theirs

import asyncckpt
from asyncckpt import SaveError, StateMismatchError, StepNotFoundError, TrainState
from asyncckpt.integrations.xla import CheckpointManager, SPMDLoadPlanner, SPMDSavePlanner, XlaStager, prime_optimizer
from asyncckpt.testing import FaultyStorage
from tests.states import assert_same, target_like
from tests.xla.models import mesh_of, model_and_optimizer, on_cpu, sharded, sharding_of, state_of, train, trained

pytestmark = pytest.mark.xla

GUIDE = """
from asyncckpt.integrations.xla import CheckpointManager, prime_optimizer

# Create a CheckpointManager to checkpoint every 10 steps into GCS.
chkpt_mgr = CheckpointManager(path, 10)

# Select a checkpoint to restore from, and restore if applicable
tracked_steps = chkpt_mgr.all_steps()
if tracked_steps:
    # Choose the highest step
    best_step = max(tracked_steps)
    # Before restoring the checkpoint, the optimizer state must be primed
    # to allow state to be loaded into it.
    prime_optimizer(optim)
    state_dict = {'model': model.state_dict(), 'optim': optim.state_dict()}
    chkpt_mgr.restore(best_step, state_dict)
    model.load_state_dict(state_dict['model'])
    optim.load_state_dict(state_dict['optim'])

# Call `save` or `save_async` every step within the train loop. These methods
# return True when a checkpoint is taken.
for step, data in enumerate(dataloader):
    train(model, optim, 1)
    state_dict = {'model': model.state_dict(), 'optim': optim.state_dict()}
    if chkpt_mgr.save_async(step, state_dict):
        print(f'Checkpoint taken at step {step}')
"""
"""torch_xla's guide to distributed checkpoints, with another import, a path, and a training step for its "..."."""


class Bomb:
    def __reduce__(self) -> Any:
        return os.abort, ()


def state(step: int) -> dict[str, Any]:
    return {"w": sharded(torch.full((4, 4), float(step)), mesh_of(2, 2), "fsdp", None), "n": step}


def restored(manager: asyncckpt.CheckpointManager, step: int) -> dict[str, Any]:
    target = state(-1)
    manager.restore(step, target)
    return on_cpu(target)


# -- code written for torch_xla


def test_the_guide_s_example_runs_with_its_import_changed(tmp_path: pathlib.Path) -> None:
    """Twice: the second run goes on with the state of the first one's last checkpoint."""
    runs = []
    for seed, num_batches in ((1, 11), (2, 0)):
        model, optim = model_and_optimizer(mesh_of(2, 2), seed)
        names = {"path": str(tmp_path), "model": model, "optim": optim, "train": train}
        names["dataloader"] = range(num_batches)
        exec(GUIDE, names)
        names["chkpt_mgr"].join()
        runs.append(on_cpu(state_of(model, optim)))
        names["chkpt_mgr"].close()
    assert_same(runs[0], runs[1])


def test_arguments_methods_and_attributes_have_the_same_names() -> None:
    """And the arguments the same order."""
    for name in ("__init__", "should_save", "save", "save_async", "restore", "all_steps", "join", "reached_preemption"):
        expected = list(inspect.signature(getattr(theirs.CheckpointManager, name)).parameters)
        assert list(inspect.signature(getattr(CheckpointManager, name)).parameters)[: len(expected)] == expected
    assert set(theirs.__all__) <= set(inspect.getmodule(CheckpointManager).__all__)


def test_the_same_steps_are_taken(tmp_path: pathlib.Path) -> None:
    """Step 0, every n-th, and forced ones; the oldest by time goes, and its order outlives the run."""
    manager = CheckpointManager(str(tmp_path), save_interval=10, max_to_keep=2, num_of_threads=1)
    assert manager.base_path == os.path.join(tmp_path, "")
    assert [manager.save(step, state(step)) for step in (0, 5, 10)] == [True, False, True]
    assert manager.save(5, state(5), True)
    assert manager.save(0, state(0))
    assert manager.all_steps() == [0, 5]
    manager.close()
    with CheckpointManager(tmp_path, 10, 2) as manager:
        manager.save(10, state(10))
        assert manager.all_steps() == [0, 10]


def test_sigterm_is_the_preemption_notice(tmp_path: pathlib.Path) -> None:
    """torch_xla's manager cannot be made with its default arguments here: it asks a TPU for its address."""
    with CheckpointManager(str(tmp_path), 100) as manager:
        assert not manager.save_async(1, state(1))
        assert not manager.reached_preemption(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert manager.save_async(7, state(7))
        assert manager.reached_preemption(7)
        manager.join()
        assert manager.all_steps() == [7]


# -- states on XLA devices


def test_a_run_on_a_2x2_mesh_goes_on_on_a_4x1_mesh_bit_for_bit(tmp_path: pathlib.Path) -> None:
    """Into a new optimizer, primed; partly replicated parameters, and those the compiler sharded, too."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        model, optimizer = model_and_optimizer(mesh_of(2, 2), seed=1)
        train(model, optimizer, 3)
        before = on_cpu(state_of(model, optimizer))
        manager.save_async(3, state_of(model, optimizer))
        train(model, optimizer, 1)  # AdamW's step is a CPU tensor, which torch_xla restores as 4
        other, other_optimizer = model_and_optimizer(mesh_of(4, 1), seed=2)
        target = state_of(other, prime_optimizer(other_optimizer))
        manager.join()
        manager.restore(3, target, strict=True)
        assert_same(before, on_cpu(target))
        other.load_state_dict(target["model"])
        other_optimizer.load_state_dict(target["optim"])
        torch_xla.sync()  # as at the end of each step; without, torch_xla forgets how parameters are sharded
    assert_same(before, on_cpu(state_of(other, other_optimizer)))
    assert sharding_of(other_optimizer.state[other[0].weight]["exp_avg"]) == sharding_of(other[0].weight)
    train(other, other_optimizer, 1)


@pytest.mark.parametrize("planners", [{}, {"save_planner": SPMDSavePlanner(), "load_planner": SPMDLoadPlanner()}])
def test_asyncckpt_s_own_manager_takes_the_stager_and_the_planners(tmp_path: pathlib.Path, planners: Any) -> None:
    """For several saves; what it loads without the planner is whole tensors on the CPU, as from any checkpoint."""
    with asyncckpt.CheckpointManager(str(tmp_path), 1, stager=XlaStager(), **planners) as manager:
        manager.prewarm(state(0))
        for step in range(3):
            manager.save_async(step, state(step))
        manager.save(3, state(3))
        for step in range(4):
            if planners:
                assert_same(on_cpu(state(step)), restored(manager, step))
            target = {"w": torch.zeros(4, 4), "n": 0}
            manager.restore(step, target)
            assert_same(on_cpu(state(step)), target)


def test_stock_dcp_and_a_machine_without_xla_read_what_was_saved(tmp_path: pathlib.Path) -> None:
    """The format is as always, with as many pieces as shards."""
    saved = trained(mesh_of(2, 2), seed=1)
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, saved)
        manager.verify(1)
    for_dcp, for_us = target_like(on_cpu(saved)), target_like(on_cpu(saved))
    with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
        dcp.load(for_dcp, checkpoint_id=str(tmp_path / "1"))
    with asyncckpt.CheckpointManager(str(tmp_path)) as manager:
        manager.restore(1, for_us, strict=True)
    assert_same(on_cpu(saved), for_dcp)
    assert_same(on_cpu(saved), for_us)


def test_a_mismatch_is_told_key_by_key_and_changes_nothing(tmp_path: pathlib.Path) -> None:
    """An optimizer that was not primed, say."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, state(1))
        target = {**state(5), "missing": 1}
        with pytest.raises(StateMismatchError, match="missing in the checkpoint: 'missing'"):
            manager.restore(1, target)
        assert_same({**on_cpu(state(5)), "missing": 1}, on_cpu(target))
        with pytest.raises(StepNotFoundError, match="committed are"):
            manager.restore(2, state(0))


def test_a_step_saved_again_by_a_resumed_run_stays(tmp_path: pathlib.Path) -> None:
    """torch_xla's manager listed [20, 30], and had 30 alone on the disk; and none at all after saving one twice."""
    with CheckpointManager(str(tmp_path), 10, max_to_keep=2) as manager:
        for step in (10, 20):
            manager.save(step, state(step))
    with CheckpointManager(str(tmp_path), 10, max_to_keep=2) as manager:
        for step in (20, 30, 30):
            manager.save_async(step, state(step))
        manager.join()
        assert manager.all_steps() == [20, 30]
        for step in (20, 30):
            assert_same(on_cpu(state(step)), restored(manager, step))


def test_a_save_that_failed_in_the_background_is_heard_of(tmp_path: pathlib.Path) -> None:
    """torch_xla's manager says nothing, not even in the log."""
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager._saver.committer.storage = FaultyStorage(manager._storage, "write_file", nth=1)
        assert manager.save_async(1, state(1))
        with pytest.raises(SaveError, match=r"step 1 .* injected fault"):
            manager.join()
        assert manager.all_steps() == []


def test_a_train_state_is_saved_and_restored(tmp_path: pathlib.Path) -> None:
    """With keys by parameters' names, and nothing to prime or to load by hand."""
    model, optimizer = model_and_optimizer(mesh_of(2, 2), seed=1)
    train(model, optimizer, 2)
    other, other_optimizer = model_and_optimizer(mesh_of(4, 1), seed=2)
    with CheckpointManager(str(tmp_path), 1) as manager:
        manager.save(1, TrainState(model=model, optimizer=optimizer))
        assert manager.restore_latest(TrainState(model=other, optimizer=other_optimizer)) == 1
    assert_same(on_cpu(state_of(model, optimizer)), on_cpu(state_of(other, other_optimizer)))
    assert sharding_of(other[0].weight) == sharding_of(model_and_optimizer(mesh_of(4, 1), seed=3)[0][0].weight)


# -- prime_optimizer


def test_priming_changes_neither_parameters_nor_gradients_and_shards_the_state_alike() -> None:
    """torch_xla's leaves zero gradients, step 1 and, with weight decay, other parameters."""
    model, optimizer = model_and_optimizer(mesh_of(2, 2), seed=1)
    model(torch.ones(2, 16).to("xla")).sum().backward()
    before = on_cpu([(p, p.grad) for p in model.parameters()])
    assert prime_optimizer(optimizer) is optimizer
    assert_same_list(before, on_cpu([(p, p.grad) for p in model.parameters()]))
    for parameter in model.parameters():
        found = optimizer.state[parameter]
        assert found["step"].item() == 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert not found[name].cpu().any()
            if xs.wrap_if_sharded(parameter) is not parameter:
                assert sharding_of(found[name]) == sharding_of(parameter)
    kept = {id(value) for state in optimizer.state.values() for value in state.values()}
    assert {id(v) for s in prime_optimizer(optimizer).state.values() for v in s.values()} == kept


def assert_same_list(expected: list[Any], found: list[Any]) -> None:
    assert_same([list(pair) for pair in expected], [list(pair) for pair in found])


# -- trees that torch_xla wrote


@pytest.fixture
def old_tree(tmp_path: pathlib.Path, _alone: None) -> tuple[pathlib.Path, dict[int, Any]]:
    """Steps 10 and 20 by torch_xla's own manager, a third that it never finished, and what was saved. On a mesh from
    which it loses nothing."""
    manager = theirs.CheckpointManager(str(tmp_path), 10, chkpt_on_preemption=False)
    model, optimizer = model_and_optimizer(mesh_of(4, 1), seed=1)
    saved = {}
    for step in (10, 20, 30):
        train(model, optimizer, 1)
        manager.save(step, state_of(model, optimizer))
        saved[step] = on_cpu(state_of(model, optimizer))
        (tmp_path / str(step) / ".manager_metadata").write_bytes(pickle.dumps(Bomb()))  # would end this process
    (tmp_path / "30" / ".manager_metadata").unlink()
    return tmp_path, saved


@pytest.mark.filterwarnings("ignore:The function definition for SavePlanner.set_up_planner has been updated")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing is deprecated")
def test_a_tree_of_torch_xla_is_listed_restored_and_never_changed(old_tree: Any) -> None:
    """On another mesh, whole, and without unpickling its manager's metadata; new steps stand beside the old ones."""
    path, saved = old_tree
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    model, optimizer = model_and_optimizer(mesh_of(2, 2), seed=2)
    target = state_of(model, prime_optimizer(optimizer))
    with CheckpointManager(str(path), 10, max_to_keep=1) as manager:
        assert manager.all_steps() == [10, 20]
        for step in (10, 20):
            manager.restore(step, target)
            assert_same(saved[step], on_cpu(target))
        manager.restore(10, target)
        assert manager.restore_latest(target) == 20
        assert_same(saved[20], on_cpu(target))
        with pytest.raises(SaveError, match="another writer"):
            manager.save(20, target)
        for step in (40, 50):
            manager.save(step, target)
        assert manager.all_steps() == [10, 20, 50]
        assert manager.restore_latest(target) == 50
    assert {file: file.read_bytes() for file in files} == files


@pytest.mark.filterwarnings("ignore:The function definition for SavePlanner.set_up_planner has been updated")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing is deprecated")
def test_a_tree_of_torch_xla_restores_without_torch_xla(old_tree: Any) -> None:
    """By asyncckpt's manager, into CPU tensors; also the optimizer's options, which torch_xla keeps as one object."""
    path, saved = old_tree
    target = target_like(saved[20])
    with asyncckpt.CheckpointManager(str(path)) as manager:
        manager.restore(20, target, strict=True)
    assert_same(saved[20], target)


# -- process groups


def test_an_xla_init_method_gives_a_group_that_the_manager_works_with(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it finds this process alone. Importing the module has registered it."""
    monkeypatch.setenv("MASTER_PORT", "0")
    dist.init_process_group("gloo", init_method="xla://")
    try:
        with CheckpointManager(str(tmp_path), 1) as manager:
            manager.save(1, state(1))
            assert_same(on_cpu(state(1)), restored(manager, 1))
    finally:
        dist.destroy_process_group()
