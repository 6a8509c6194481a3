"""A checkpoint without a run: opened by its URL, read, its weights loaded; nothing is left running or changed."""

from __future__ import annotations

import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from asyncckpt import (
    Checkpoint,
    CheckpointManager,
    DamagedStepError,
    RestoreError,
    ShardWriter,
    StateMismatchError,
    StepNotFoundError,
    TrainState,
    open_checkpoint,
)
from tests.crew import Crew
from tests.processes import Link
from tests.states import assert_same


class Model(nn.Module):
    """With tied weights, a buffer, and one that no checkpoint has."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embedding.weight


class Told(nn.Linear):
    """Has extra state."""

    def __init__(self, told: Any = None) -> None:
        super().__init__(2, 2)
        self.told = told

    def get_extra_state(self) -> Any:
        return self.told

    def set_extra_state(self, state: Any) -> None:
        self.told = state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Model]:
    """A run of two steps, and the model of the second."""
    url = str(tmp_path_factory.mktemp("run"))
    torch.manual_seed(1)
    with CheckpointManager(url, chkpt_on_preemption=False) as manager:
        for step in (5, 3):  # the newest is the one committed last
            model = Model()
            state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()))
            manager.save(step, state, metadata={"n": step}, metrics={"loss": 0.5})
    return url, model


def weights(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_the_newest_step_is_opened_and_says_what_it_is(run: tuple[str, Model]) -> None:
    """Or another one by its number; or the one whose folder is given."""
    url, model = run
    newest = open_checkpoint(url)
    assert (newest.step, newest.metadata, newest.metrics) == (3, {"n": 3}, {"loss": 0.5})
    assert repr(newest) == f"<Checkpoint {url}/3>"
    assert open_checkpoint(url, 5).step == 5
    assert open_checkpoint(f"{url}/5").metadata == {"n": 5}
    assert newest.tree("model")["norm.weight"].shape == (4,)
    assert torch.equal(newest.read("model.embedding.weight", 2), model.embedding.weight[2])


def test_reading_leaves_nothing_behind(run: tuple[str, Model]) -> None:
    """No thread, no signal handler, no file."""
    url, _ = run
    before = threading.active_count(), signal.getsignal(signal.SIGTERM), sorted(os.walk(url))
    open_checkpoint(url).load_weights(Model())
    assert (threading.active_count(), signal.getsignal(signal.SIGTERM), sorted(os.walk(url))) == before


def test_weights_are_read_into_the_model_in_place(run: tuple[str, Model]) -> None:
    """Its parameters stay the same objects, and its gradients' graph is not touched."""
    url, model = run
    other = Model()
    parameter = other.embedding.weight
    assert open_checkpoint(url).load_weights(other) == ([], [])
    assert_same(weights(model), weights(other))
    assert other.embedding.weight is parameter
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_a_model_on_the_meta_device_gets_new_tensors_and_stays_tied(run: tuple[str, Model]) -> None:
    """No memory for weights before; what was frozen is."""
    url, model = run
    with torch.device("meta"):
        other = Model()
    other.norm.weight.requires_grad_(False)
    open_checkpoint(url).load_weights(other)
    assert_same(weights(model), weights(other))
    assert other.head.weight is other.embedding.weight
    assert not other.norm.weight.requires_grad
    assert other.norm.bias.requires_grad


def test_a_buffer_that_no_checkpoint_has_is_told_when_it_stays_on_meta(run: tuple[str, Model]) -> None:
    """Before anything is changed; strict=False leaves it."""
    url, _ = run
    with torch.device("meta"):
        other = Model()
        other.register_buffer("angles", torch.zeros(3), persistent=False)
    with pytest.raises(StateMismatchError, match="the buffer 'angles'"):
        open_checkpoint(url).load_weights(other)
    assert other.norm.weight.is_meta
    open_checkpoint(url).load_weights(other, strict=False)
    assert not other.norm.weight.is_meta


def test_another_dtype_is_converted_only_when_asked_for(run: tuple[str, Model]) -> None:
    """Else it is an error that says so, and nothing is changed; counters are not touched by it."""
    url, model = run
    other = Model().to(torch.bfloat16)
    before = weights(other)["norm.weight"].clone()
    with pytest.raises(StateMismatchError, match="cast=True converts them"):
        open_checkpoint(url).load_weights(other)
    assert torch.equal(other.norm.weight, before)
    open_checkpoint(url).load_weights(other, cast=True)
    assert torch.equal(other.embedding.weight, model.embedding.weight.to(torch.bfloat16))
    with torch.device("meta"):
        third = Model().to(torch.bfloat16)
    open_checkpoint(url).load_weights(third, cast=True)
    assert_same(weights(other), weights(third))


def test_keys_that_differ_are_told_or_returned(run: tuple[str, Model]) -> None:
    """As load_state_dict does; a shape that differs is an error in any case."""
    url, model = run
    other = Model()
    del other.norm
    other.add_module("new", nn.Linear(1, 1))
    before = other.embedding.weight.detach().clone()
    with pytest.raises(
        StateMismatchError, match=r"(?s)7 keys differ.*'model.new.weight'.*not in the model: 'model.norm"
    ):
        open_checkpoint(url).load_weights(other)
    assert torch.equal(other.embedding.weight, before)
    found = open_checkpoint(url).load_weights(other, strict=False)
    assert found.missing_keys == ["new.weight", "new.bias"]
    assert "norm.weight" in found.unexpected_keys
    assert torch.equal(other.embedding.weight, model.embedding.weight)
    with pytest.raises(StateMismatchError, match=r"\(5, 4\) in the checkpoint"):
        open_checkpoint(url).load_weights(Model(3), strict=False, cast=True)


@pytest.mark.parametrize("told", [{"a": 1, "b": [2]}, (1, 2), torch.arange(3)], ids=["dict", "tuple", "tensor"])
def test_extra_state_is_loaded_too(tmp_path: pathlib.Path, told: Any) -> None:
    """Whatever a module says it is; a dict is saved as several keys."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"model": Told(told).state_dict()})
    other = Told(torch.zeros(3, dtype=torch.int64) if isinstance(told, torch.Tensor) else {})
    assert open_checkpoint(str(tmp_path)).load_weights(other) == ([], [])
    assert_same(told, other.told)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("ours", [False, True])
def test_a_step_of_dcp_is_opened_by_its_folder_and_by_its_run(tmp_path: pathlib.Path, ours: bool) -> None:
    """Stock DCP's, or one of its with our writer; the model may be all that is in it."""
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    path = tmp_path / "12"
    dcp.save(model.state_dict(), checkpoint_id=path, storage_writer=ShardWriter(path) if ours else None)
    for url in (path, tmp_path):
        other = nn.Linear(2, 3)
        open_checkpoint(str(url)).load_weights(other, prefix="")
        assert_same(weights(model), weights(other))
    assert open_checkpoint(str(tmp_path)).step == 12


def test_what_is_not_there_is_told(tmp_path: pathlib.Path) -> None:
    """No step, not that step, a damaged one: none older is taken instead."""
    with pytest.raises(StepNotFoundError, match="no whole step"):
        open_checkpoint(str(tmp_path / "none"))
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, {"w": torch.ones(3)})
        manager.save(2, {"w": torch.ones(3)})
    with pytest.raises(StepNotFoundError):
        open_checkpoint(str(tmp_path), 3)
    (manifest,) = tmp_path.glob("2/manifest-*.json")
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(DamagedStepError, match="damaged"):
        open_checkpoint(str(tmp_path))
    assert open_checkpoint(str(tmp_path), 1).read("w").tolist() == [1, 1, 1]


@pytest.mark.slow
def test_storage_that_fails_is_told(s3_options: dict[str, Any]) -> None:
    """A bucket that is not there, say."""
    with pytest.raises(RestoreError, match="cannot be listed"):
        open_checkpoint("s3://no-such-bucket/run", storage_options=s3_options)


def test_an_open_checkpoint_follows_a_step_that_is_saved_anew(tmp_path: pathlib.Path) -> None:
    """Its old files go."""
    with CheckpointManager(str(tmp_path), chkpt_on_preemption=False) as manager:
        manager.save(1, {"w": torch.ones(3)})
        checkpoint = open_checkpoint(str(tmp_path))
        manager.save(1, {"w": torch.zeros(3)}, force=True)
        manager.join()
        assert checkpoint.read("w").tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


def load_sharded(link: Link, url: str, expected: dict[str, Any]) -> None:
    if link.rank == 1:  # reading is no collective call: this rank makes one call more
        Checkpoint(open_checkpoint(url).storage, "3").read("model.norm.bias")
    model = Model()
    model.head = nn.Identity()  # FSDP2 does not keep ties
    fully_shard(model)
    found = open_checkpoint(url).load_weights(model, strict=False)
    assert found.missing_keys == []
    full = {name: p.full_tensor() for name, p in model.named_parameters()}
    for name, tensor in full.items():
        assert torch.equal(tensor, expected[name]), name


def load_wrapped(link: Link, url: str) -> dict[str, Any]:
    model = Model()
    open_checkpoint(url).load_weights(DistributedDataParallel(model))
    return weights(model)


@pytest.mark.slow
def test_wrappers_do_not_change_names(two: Crew, run: tuple[str, Model]) -> None:
    """Of DDP."""
    url, model = run
    for found in two.run(load_wrapped, url):
        assert_same(weights(model), found)


@pytest.mark.slow
def test_each_rank_of_a_sharded_model_reads_its_part(two: Crew, run: tuple[str, Model]) -> None:
    """From what one process saved."""
    url, model = run
    two.run(load_sharded, url, weights(model))
