"""Accelerate's own Accelerator over asyncckpt: what it saves where, resumes from, keeps, and refuses. One process."""

from __future__ import annotations

import gc
import os
import pathlib
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest
import torch

pytest.importorskip("accelerate")
import accelerate.accelerator
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, DistributedType, ProjectConfiguration, set_seed

from asyncckpt import CheckpointManager, DamagedStepError, RestoreError, SaveError, StepNotFoundError, Written
from asyncckpt.integrations.accelerate import SavedState, attach
from tests.exact import bits

pytestmark = pytest.mark.integration
Make = Callable[..., Any]


@pytest.fixture
def make(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes an Accelerator as in a fresh process, which saves to `url`; None: where its project_dir says."""
    monkeypatch.chdir(tmp_path)
    made = []

    def make(url: str | None = None, *, attached: bool = True, options: Any = None, **arguments: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, **arguments)
        if attached:
            attach(accelerator, url, **(options or {}))
            made.append(accelerator)
        return accelerator

    yield make
    for accelerator in made:
        accelerator.checkpoints.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def model_and_optimizer(accelerator: Any, seed: int = 0) -> tuple[Any, Any]:
    """Trained by a step."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(torch.randn(6, 4)).sum())
    optimizer.step()
    return model, optimizer


def of(*parts: Any) -> Any:
    return bits([part.state_dict() for part in parts])


def tear(accelerator: Any, step: int, name: str) -> None:
    """Cut a file of a step short."""
    (path,) = pathlib.Path(accelerator.checkpoints.url, str(step)).glob(f"*/{name}")
    path.write_bytes(path.read_bytes()[:-100])


# -- the eight failures of Accelerate 1.15


def test_a_url_is_where_it_says_and_no_local_folder(make: Make, memory_url: str, tmp_path: pathlib.Path) -> None:
    """1: as project_dir, and as output_dir."""
    accelerator = make(project_dir=memory_url)
    model, optimizer = model_and_optimizer(accelerator)
    accelerator.save_state(block=True)
    accelerator.save_state(f"{memory_url}/best", block=True)
    saved = of(model, optimizer)
    for path in (None, f"{memory_url}/best", f"{memory_url}/checkpoints/checkpoint_0"):
        model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
        accelerator.load_state(path)
        assert of(model, optimizer) == saved
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_a_bucket_is_saved_to_and_loaded_from(make: Make, s3_url: str, s3_options: Any) -> None:
    """1, on a real server; with `save_model` and what loads it."""
    accelerator = make(s3_url, options={"storage_options": s3_options})
    model, optimizer = model_and_optimizer(accelerator)
    saved = of(model, optimizer)
    accelerator.save_state()
    accelerator.save_model(model, f"{s3_url}/weights")
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
    accelerator.load_state()
    assert of(model, optimizer) == saved
    assert f"{s3_url[5:]}/weights/model.safetensors" in fsspec.filesystem("s3", **s3_options).find(s3_url)


@pytest.mark.parametrize("automatic", [True, False])
def test_a_resumed_run_goes_on_counting(make: Make, automatic: bool) -> None:
    """2: with automatic naming and without; also where only storage knows how far the run was."""
    project = ProjectConfiguration(project_dir="run", automatic_checkpoint_naming=automatic)
    for names in (["checkpoint_0", "checkpoint_1"], ["checkpoint_2"]):
        accelerator = make(project_config=project)
        model_and_optimizer(accelerator)
        if names == ["checkpoint_2"]:
            accelerator.load_state()
            assert accelerator.save_iteration == 2
        assert [os.path.basename(accelerator.save_state()) for _ in names] == names
        accelerator.end_training()
    project.iteration = 0
    accelerator = make(project_config=project)
    assert accelerator.save_state().endswith("/run/checkpoints/checkpoint_3")


def test_a_torn_newest_checkpoint_is_passed_over(make: Make) -> None:
    """3: the one before it is loaded, all of it; the torn one, asked for by name, is an error that changes nothing."""
    accelerator = make("run")
    model, optimizer = model_and_optimizer(accelerator)
    accelerator.save_state(block=True)
    saved = of(model, optimizer)
    model_and_optimizer(accelerator)
    accelerator._models, accelerator._optimizers = [model], [optimizer]
    for parameter in model.parameters():
        parameter.data.add_(1)
    accelerator.save_state(block=True)
    later = of(model, optimizer)
    tear(accelerator, 1, "optimizer.bin")
    with pytest.raises(DamagedStepError, match=r"optimizer\.bin"):
        accelerator.load_state("run/checkpoints/checkpoint_1")
    assert of(model, optimizer) == later
    accelerator.load_state()
    assert of(model, optimizer) == saved


class Stuck:
    """Registered by a user; cannot be saved for a while."""

    def __init__(self) -> None:
        self.fails = False

    def state_dict(self) -> dict[str, Any]:
        return {"value": Unpicklable()} if self.fails else {"value": torch.zeros(1_000_000)}

    def load_state_dict(self, state: Any) -> None:
        pass


class Unpicklable:
    def __init__(self) -> None:
        self.large = torch.zeros(1_000_000)

    def __reduce__(self) -> Any:
        raise RuntimeError("not now")


def test_a_save_that_fails_costs_no_older_checkpoint(make: Make, tmp_path: pathlib.Path) -> None:
    """4: with total_limit=1; in the call, and in the background, which is heard of once. Then saves go on."""
    accelerator = make(project_config=ProjectConfiguration(project_dir="run", total_limit=1))
    stuck = Stuck()
    accelerator.register_for_checkpointing(stuck)
    accelerator.save_state(block=True)
    stuck.fails = True
    with pytest.raises(RuntimeError, match="not now"):
        accelerator.save_state()
    stuck.fails = False
    run = tmp_path / "run/checkpoints/1"
    run.write_text("in the way")
    failing = accelerator.save_state()
    with pytest.raises(SaveError, match="step 1"):
        accelerator.save_state()
    assert accelerator.checkpoints.all_steps() == [0]
    accelerator.load_state()
    run.unlink()
    assert accelerator.save_state().result() == failing
    assert accelerator.checkpoints.all_steps() == [1]


def test_other_files_among_the_checkpoints_are_no_matter(make: Make, tmp_path: pathlib.Path) -> None:
    """5: a .DS_Store, an editor's folder. They stay."""
    for name in (".DS_Store", "old/notes.txt", "checkpoint_x/model.safetensors"):
        path = tmp_path / "run/checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("?")
    accelerator = make("run", project_config=ProjectConfiguration(automatic_checkpoint_naming=True, total_limit=1))
    for _ in range(2):
        accelerator.save_state(block=True)
    accelerator.load_state()
    assert accelerator.checkpoints.all_steps() == [1]
    assert (tmp_path / "run/checkpoints/checkpoint_x/model.safetensors").exists()


@pytest.mark.parametrize("by", ["us", "accelerate"])
def test_random_states_that_cannot_be_read_are_an_error(make: Make, by: str, tmp_path: pathlib.Path) -> None:
    """6: nothing was changed. Of a checkpoint of ours it is the checksum that tells."""
    accelerator = make("run")
    model, _ = model_and_optimizer(accelerator)
    if by == "us":
        accelerator.save_state(block=True)
        tear(accelerator, 0, "random_states_0.pkl")
        error: Any = DamagedStepError
    else:
        accelerate.accelerator.Accelerator.save_state(accelerator, "plain")
        path = tmp_path / "plain/random_states_0.pkl"
        path.write_bytes(path.read_bytes()[:-100])
        error = RestoreError
    for parameter in model.parameters():
        parameter.data.add_(1)
    before = of(model), torch.get_rng_state()
    with pytest.raises(error, match="random"):
        accelerator.load_state("run/checkpoints/checkpoint_0" if by == "us" else "plain")
    assert of(model) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


class Shuffled(torch.utils.data.IterableDataset[Any]):
    """Draws its order from torch's own stream."""

    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.tensor(float(i)),) for i in torch.randperm(20))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata, where it is first used
@pytest.mark.parametrize("kind", ["plain", "seedable", "stateful", "iterable"])
def test_in_mid_epoch_the_batches_that_were_left_follow(make: Make, kind: str) -> None:
    """8: in epoch 1, after random numbers of another past; with the next epoch, and what is drawn meanwhile."""

    def begin() -> tuple[Any, Any]:
        config = DataLoaderConfiguration(
            use_seedable_sampler=kind == "seedable", use_stateful_dataloader=kind == "stateful"
        )
        accelerator = make("run", dataloader_config=config)
        set_seed(random.randrange(1000))
        data = torch.utils.data.TensorDataset(torch.arange(20.0))
        return accelerator, accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=2, shuffle=True))

    def seen(loader: Any) -> list[Any]:
        return [(batch.tolist(), torch.rand(1).item()) for (batch,) in loader]

    accelerator, loader = begin()
    seen(loader)
    left = []
    for number, (batch,) in enumerate(loader):
        left.append((batch.tolist(), torch.rand(1).item()))
        if number == 3:
            accelerator.save_state()
            left.clear()
    left += seen(loader)
    accelerator.end_training()
    accelerator, loader = begin()
    accelerator.load_state()
    rest = loader if kind == "stateful" else accelerator.skip_first_batches(loader, 4)
    resumed = seen(rest) + seen(loader)
    assert resumed == left


def test_the_end_of_training_waits_and_tells(make: Make, tmp_path: pathlib.Path) -> None:
    """What the last save failed with is not lost."""
    accelerator = make("run")
    accelerator.save_state()
    accelerator.end_training()
    accelerator = make("run")
    assert accelerator.checkpoints.all_steps() == [0]
    (tmp_path / "run/checkpoints/1").write_text("in the way")
    accelerator.save_state()
    with pytest.raises(SaveError, match="step 1"):
        accelerator.end_training()


# -- the guide


def test_the_guide_s_example_works_as_written(make: Make) -> None:
    """Save the first state, train, load it: by the path in the guide, though the folder is called `checkpoints`."""
    accelerator = make(project_dir="my/save/path")
    model, optimizer = model_and_optimizer(accelerator)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, step_size=1, gamma=0.99)
    accelerator.register_for_checkpointing(scheduler)
    accelerator.save_state()
    saved = of(model, optimizer, scheduler)
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.randn(6, 4)).sum())
        optimizer.step()
        scheduler.step()
    assert of(model, optimizer, scheduler) != saved
    accelerator.load_state("my/save/path/checkpointing/checkpoint_0")
    assert of(model, optimizer, scheduler) == saved


def test_what_plain_accelerate_saved_is_loaded(make: Make, memory_url: str) -> None:
    """From a folder, as in the guide's second example, and from a URL that somebody copied it to."""
    plain = make(attached=False)
    model, optimizer = model_and_optimizer(plain)
    plain.save_state("my_state")
    saved = of(model, optimizer)
    fsspec.filesystem("memory").put("my_state", f"{memory_url}/my_state", recursive=True)
    for url in ("my_state", f"{memory_url}/my_state"):
        accelerator = make("run")
        model, optimizer = model_and_optimizer(accelerator, seed=1)
        accelerator.load_state(url)
        assert of(model, optimizer) == saved
        accelerator.end_training()


def test_a_run_of_plain_accelerate_is_taken_over(make: Make) -> None:
    """Its newest checkpoint is loaded, the count goes on, and its folders stay."""
    project = ProjectConfiguration(project_dir="run", automatic_checkpoint_naming=True)
    plain = make(attached=False, project_config=project)
    model, optimizer = model_and_optimizer(plain)
    plain.save_state()
    for parameter in model.parameters():
        parameter.data.add_(1)
    plain.save_state()
    saved = of(model, optimizer)
    accelerator = make(project_config=ProjectConfiguration(project_dir="run", total_limit=1))
    model, optimizer = model_and_optimizer(accelerator, seed=1)
    accelerator.load_state()
    assert of(model, optimizer) == saved
    assert accelerator.save_state(block=True).endswith("/checkpoint_2")
    accelerator.load_state()
    assert {"checkpoint_0", "checkpoint_1", "2"} <= set(os.listdir("run/checkpoints"))
    accelerator.end_training()
    with pytest.raises(StepNotFoundError, match="no checkpoint"):
        make("empty").load_state()


def test_a_fetched_checkpoint_is_one_of_plain_accelerate(make: Make) -> None:
    """The same files, but for the one of ours; loaded by an Accelerator without us."""
    accelerator = make("run")
    model, optimizer = model_and_optimizer(accelerator)
    accelerator.save_state(block=True)
    accelerator.checkpoints.fetch(0, "fetched")
    accelerate.accelerator.Accelerator.save_state(accelerator, "plain")
    assert set(os.listdir("fetched")) == {*os.listdir("plain"), "asyncckpt_dataloaders_0.bin"}
    saved = of(model, optimizer)
    accelerator.end_training()
    plain = make(attached=False)
    model, optimizer = model_and_optimizer(plain, seed=1)
    plain.load_state("fetched")
    assert of(model, optimizer) == saved


# -- what is saved, and where


def test_it_is_the_state_of_the_call_that_is_saved(make: Make) -> None:
    """What changes right after it is not."""
    accelerator = make("run")
    model, optimizer = model_and_optimizer(accelerator)
    saved = of(model, optimizer)
    for _ in range(3):
        name = accelerator.save_state()
        for parameter in model.parameters():
            parameter.data.mul_(2)
        accelerator.load_state(name)
        assert of(model, optimizer) == saved


def test_save_state_returns_while_the_save_goes_on(make: Make) -> None:
    """`result()` waits for the commit."""
    gate = threading.Event()

    def hold(event: Any) -> None:
        if isinstance(event, Written):
            assert gate.wait(60)

    accelerator = make("run", options={"events": [hold]})
    saved = accelerator.save_state()
    assert accelerator.checkpoints.all_steps() == []
    gate.set()
    saved.result()
    assert accelerator.checkpoints.all_steps() == [0]


def test_names_say_which_checkpoint(make: Make, tmp_path: pathlib.Path) -> None:
    """Numbers are steps; any other path holds one, and a name without "/" lies below the URL, as project_dir does."""
    accelerator = make("run", project_dir="project")
    assert accelerator.save_state(step=7) == f"{tmp_path}/run/checkpoints/checkpoint_7"
    assert accelerator.save_state() == f"{tmp_path}/run/checkpoints/checkpoint_8"
    assert accelerator.save_state("run/checkpoints/checkpoint_3", block=True).endswith("/run/checkpoints/checkpoint_3")
    assert accelerator.checkpoints.all_steps() == [3, 7, 8]
    assert accelerator.save_state("best") == f"{tmp_path}/run/best"
    assert accelerator.save_state("best") == f"{tmp_path}/run/best"
    assert accelerator.save_state("project/epoch/2") == f"{tmp_path}/run/epoch/checkpoint_2"
    assert accelerator.save_state(str(tmp_path / "else/where"), block=True) == f"{tmp_path}/else/where"
    for path, steps in (("run/best", [0]), ("run/epoch", [2]), ("else/where", [0])):
        with CheckpointManager(path) as manager:
            assert manager.all_steps() == steps
    for name in ("best", "project/epoch/2", "else/where", "run/checkpoints/7"):
        accelerator.load_state(name)
    with pytest.raises(StepNotFoundError):
        accelerator.load_state("run/checkpoints/checkpoint_5")
    with pytest.raises(ValueError, match="give one of them"):
        accelerator.save_state("best", step=3)


def test_the_oldest_go_after_the_commit_of_a_newer_one(make: Make) -> None:
    """As many stay as max_to_keep says, or total_limit; the newest is always there."""
    accelerator = make("run", options={"max_to_keep": 2}, project_config=ProjectConfiguration(total_limit=1))
    names = [accelerator.save_state() for _ in range(4)]
    assert isinstance(names[0], SavedState)
    assert names[-1].result() == names[-1]
    assert accelerator.checkpoints.all_steps() == [2, 3]


def test_hooks_run_and_their_files_come_along(make: Make, memory_url: str) -> None:
    """As diffusers has them: the model is saved by the hook, into a folder of its own, and taken off the list."""
    accelerator = make(memory_url)
    model, optimizer = model_and_optimizer(accelerator)

    def on_save(models: Any, weights: Any, output_dir: str) -> None:
        os.mkdir(os.path.join(output_dir, "unet"))
        torch.save(weights.pop(), os.path.join(output_dir, "unet/weights.bin"))
        pathlib.Path(output_dir, "unet/config.json").write_text("{}")

    def on_load(models: Any, input_dir: str) -> None:
        assert pathlib.Path(input_dir, "unet/config.json").read_text() == "{}"
        models.pop().load_state_dict(torch.load(os.path.join(input_dir, "unet/weights.bin")))

    accelerator.register_save_state_pre_hook(on_save)
    accelerator.register_load_state_pre_hook(on_load)
    saved = of(model, optimizer)
    accelerator.save_state(block=True)
    assert {"unet/weights.bin", "unet/config.json"} <= set(accelerator.checkpoints.files(0))
    assert "model.safetensors" not in accelerator.checkpoints.files(0)
    for parameter in model.parameters():
        parameter.data.zero_()
    accelerator.load_state()
    assert of(model, optimizer) == saved


def test_the_old_format_of_weights_is_there_too(make: Make) -> None:
    """safe_serialization=False; several models and optimizers."""
    accelerator = make("run")
    parts = [*model_and_optimizer(accelerator), *model_and_optimizer(accelerator, seed=1)]
    accelerator.save_state(safe_serialization=False, block=True)
    files = {"pytorch_model.bin", "pytorch_model_1.bin", "optimizer.bin", "optimizer_1.bin"}
    assert files <= set(accelerator.checkpoints.files(0))
    saved = of(*parts)
    for parameter in (*parts[0].parameters(), *parts[2].parameters()):
        parameter.data.zero_()
    accelerator.load_state()
    assert of(*parts) == saved


def test_an_accelerator_is_attached_once_and_must_know_where_to(make: Make) -> None:
    """Both are errors in words."""
    accelerator = make("run")
    with pytest.raises(ValueError, match="Attach once"):
        attach(accelerator, "other")
    with pytest.raises(ValueError, match="url"):
        attach(make(attached=False))


class Engine(torch.nn.Module):
    """Writes and reads as DeepSpeed's engine does; that itself needs a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(500_000))

    def save_checkpoint(self, folder: str, tag: str) -> None:
        os.makedirs(f"{folder}/{tag}")
        torch.save(self.state_dict(), f"{folder}/{tag}/mp_rank_00_model_states.pt")
        self.last_read = torch.load(f"{folder}/{tag}/mp_rank_00_model_states.pt")  # it may look at what it wrote
        pathlib.Path(folder, "latest").write_text(tag)

    def load_checkpoint(self, folder: str, tag: str) -> None:
        assert pathlib.Path(folder, "latest").read_text() == tag
        self.load_state_dict(torch.load(f"{folder}/{tag}/mp_rank_00_model_states.pt"))


def test_deepspeed_writes_to_a_folder_first(make: Make, memory_url: str) -> None:
    """What it wrote is uploaded as it is, and brought back for it to read."""
    accelerator = make(memory_url)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    engine = Engine()
    accelerator._models.append(engine)
    accelerator.save_state(block=True)
    assert "pytorch_model/mp_rank_00_model_states.pt" in accelerator.checkpoints.files(0)
    engine.weight.data.zero_()
    accelerator.load_state()
    assert torch.equal(engine.weight, torch.ones(500_000))


def test_nothing_large_is_written_to_the_scratch_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors go from memory to the URL."""
    written = []

    def remember(models: Any, weights: Any, output_dir: str) -> None:
        written.append(output_dir)

    accelerator = make("run")
    accelerator.prepare(torch.nn.Linear(1000, 1000))
    accelerator.register_save_state_pre_hook(remember)
    monkeypatch.setattr(
        shutil, "rmtree", lambda path, **_: written.extend(p.name for p in pathlib.Path(path).rglob("*") if p.is_file())
    )
    accelerator.save_state(block=True)
    assert accelerator.checkpoints.files(0)["model.safetensors"] > 4_000_000
    assert "model.safetensors" not in written
    gc.collect()
