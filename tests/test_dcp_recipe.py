"""Training as torchtitan has it, with plain DCP calls and our storage: FSDP2, wrappers, `dcp.async_save`; killed."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

from asyncckpt import CheckpointManager, ShardReader, ShardWriter
from stagers import BlockingAsyncStager
from tests.processes import Job

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class ModelWrapper(Stateful):
    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return get_model_state_dict(self.model)

    def load_state_dict(self, state_dict):
        set_model_state_dict(self.model, state_dict)


class OptimizerWrapper(Stateful):
    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        return get_optimizer_state_dict(self.model, self.optimizer, options=FLAT)

    def load_state_dict(self, state_dict):
        set_optimizer_state_dict(self.model, self.optimizer, state_dict, options=FLAT)


class Progress(Stateful):
    step = 0

    def state_dict(self):
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict):
        self.step = int(state_dict["step"])


class DyingWriter(ShardWriter):
    """Its process ends when the files of this rank are written, and nothing is committed."""

    def write_data(self, plan, planner):
        super().write_data(plan, planner)
        os.kill(os.getpid(), signal.SIGKILL)


def train(link, url, options, total, dies_at=None):
    """[(step, loss)] of the steps of this process, or the error in the way of a save."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    progress, history = Progress(), []
    states = {
        "model": ModelWrapper(model),
        "optimizer": OptimizerWrapper(model, optimizer),
        "lr_scheduler": scheduler,
        "train_state": progress,
    }
    with CheckpointManager(url, chkpt_on_preemption=False, storage_options=options) as manager:
        newest = manager.latest_step()
    if newest is not None:
        dcp.load(states, storage_reader=ShardReader(f"{url}/{newest}", storage_options=options))
    group, stager, saving = dist.new_group(backend="gloo"), BlockingAsyncStager(), None
    while progress.step < total:
        torch.manual_seed(10 * progress.step + dist.get_rank())
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        history.append((progress.step, loss.item()))
        progress.step += 1
        if progress.step % 2 == 0:
            if saving:
                saving.result()
            kind = DyingWriter if (dist.get_rank(), progress.step) == (1, dies_at) else ShardWriter
            writer = kind(f"{url}/{progress.step}", storage_options=options)
            saving = dcp.async_save(states, storage_writer=writer, process_group=group, async_stager=stager)
    try:
        saving.result()
    except Exception as exc:
        return str(exc)
    return history


@pytest.mark.slow
def test_plain_dcp_users_killed_in_a_save_go_on_from_the_newest_whole_step(any_url, tmp_path):
    """Two ranks; rank 1 ends when its files of step 6 are written. The losses are those of a run that nobody killed."""
    url, options = any_url
    if url.startswith("memory:"):
        pytest.skip("each process has its own")
    with Job(2, train, str(tmp_path / "whole"), {}, 10) as job:
        whole = job.results()
    with Job(2, train, url, options, 6, 6) as job:
        assert isinstance(job.result(0), str)  # its own save failed with its peer
    with CheckpointManager(url, storage_options=options) as manager:
        assert manager.all_steps() == [2, 4]
    with Job(2, train, url, options, 10) as job:
        resumed = job.results()
    assert resumed == [history[4:] for history in whole]
    with CheckpointManager(url, storage_options=options, max_to_keep=2) as manager:
        assert manager.all_steps() == [2, 4, 6, 8, 10]
        manager.verify(10)
