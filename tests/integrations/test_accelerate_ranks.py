"""Accelerate over asyncckpt on two ranks: DDP and FSDP2, each rank's own files, and runs that are killed."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
from asyncckpt import DamagedStepError, RestoreError, SaveError
from tests.crew import Crew
from tests.exact import bits
from tests.processes import Link

pytestmark = pytest.mark.integration
SCRIPT = pathlib.Path(__file__).with_name("accelerate_script.py")


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


def begin(link: Link, layout: str, url: str | None, loader: str = "plain") -> Any:
    """An Accelerator as in a fresh process."""
    from accelerate.state import AcceleratorState, GradientState

    from asyncckpt.integrations.accelerate import attach
    from tests.integrations.accelerate_script import make_accelerator

    os.environ |= {"RANK": str(link.rank), "LOCAL_RANK": str(link.rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    warnings.filterwarnings("ignore", "'set_vital' is deprecated")
    AcceleratorState._reset_state()
    GradientState._reset_state()
    from accelerate.state import PartialState

    PartialState._shared_state.clear()  # its own reset would end the process group
    accelerator = make_accelerator(layout, "no", loader)
    return attach(accelerator, url) if url else accelerator


def trained(accelerator: Any, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for _ in range(2):
        accelerator.backward(model(torch.randn(6, 4)).sum())
        optimizer.step()
    return model, optimizer


def found(model: Any, optimizer: Any) -> Any:
    """This rank's part."""

    def local(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: local(v) for k, v in value.items()}
        return value.to_local() if hasattr(value, "to_local") else value

    return bits([local(model.state_dict()), local(optimizer.state_dict())])


# -- each rank's own


def loaders_of_two(link: Link, url: str) -> Any:
    accelerator = begin(link, "ddp", url, "stateful")
    assert accelerator.num_processes == 2
    data = torch.utils.data.TensorDataset(torch.arange(16.0))
    loader = accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=2))
    for number, _ in enumerate(loader):
        if number == link.rank:  # rank 1 is one batch further
            accelerator.save_state(block=True)
            break
    at_save = loader.state_dict()
    list(loader)
    accelerator.load_state()
    state = loader.base_dataloader.next_iter_state
    accelerator.checkpoints.close()
    return at_save == state, state["_num_yielded"], sorted(accelerator.checkpoints._index.all_steps())


def test_each_rank_gets_its_own_place_in_the_data_back(crew: Crew, tmp_path: pathlib.Path) -> None:
    """7: Accelerate has all ranks write one file, and all read what the last one wrote."""
    first, second = crew.run(loaders_of_two, str(tmp_path / "run"))
    assert first == (True, 1, [0])
    assert second == (True, 2, [0])


def files_of_two(link: Link, url: str) -> Any:
    accelerator = begin(link, "ddp", url)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    trained(accelerator, 0)
    accelerator.register_save_state_pre_hook(
        lambda models, weights, folder: torch.save(link.rank, f"{folder}/hook.bin")
    )
    accelerator.save_state(block=True)
    names = set(accelerator.checkpoints.files(0))
    accelerator.checkpoints.fetch(0, f"{url}-{link.rank}")
    accelerator.checkpoints.close()
    return names, torch.load(f"{url}-{link.rank}/hook.bin")


def test_of_what_all_ranks_write_one_is_kept(crew: Crew, tmp_path: pathlib.Path) -> None:
    """scaler.pt, and what a hook writes that does not ask who it is: the lowest rank's."""
    told = crew.run(files_of_two, str(tmp_path / "run"))
    names = {
        "model.safetensors", "optimizer.bin", "scaler.pt", "hook.bin", "random_states_0.pkl", "random_states_1.pkl",
        "asyncckpt_dataloaders_0.bin", "asyncckpt_dataloaders_1.bin",
    }  # fmt: skip
    assert told == [(names, 0), (names, 0)]


def failing_on_one(link: Link, url: str) -> Any:
    accelerator = begin(link, "ddp", url)
    trained(accelerator, 0)

    def fail(*_: Any) -> None:
        if link.rank == 1:
            raise ValueError("not here")

    handle = accelerator.register_save_state_pre_hook(fail)
    try:
        accelerator.save_state()
    except (SaveError, ValueError) as exc:
        told = f"{type(exc).__name__}: {exc}"
    handle.remove()
    saved = accelerator.save_state(block=True)
    steps = accelerator.checkpoints.all_steps()
    accelerator.checkpoints.close()
    return told, pathlib.Path(saved).name, steps


def test_a_hook_that_fails_on_one_rank_keeps_no_other_waiting(crew: Crew, tmp_path: pathlib.Path) -> None:
    """The others hear of it; nothing was saved, and the number is free."""
    first, second = crew.run(failing_on_one, str(tmp_path / "run"))
    assert first[0].startswith("SaveError: rank 1 failed")
    assert second[0] == "ValueError: not here"
    assert first[1:] == second[1:] == ("checkpoint_0", [0])


def torn_on_one(link: Link, url: str) -> Any:
    accelerator = begin(link, "ddp", url)
    model, optimizer = trained(accelerator, 0)
    accelerator.save_state(block=True)
    saved = found(model, optimizer)
    for parameter in model.parameters():
        parameter.data.add_(1)
    accelerator.save_state(block=True)
    if link.rank == 0:
        (path,) = pathlib.Path(url, "checkpoints/1").glob("*/random_states_1.pkl")
        path.write_bytes(path.read_bytes()[:-100])
    accelerator.wait_for_everyone()
    later = found(model, optimizer)
    with pytest.raises((DamagedStepError, RestoreError), match=r"random_states_1\.pkl"):
        accelerator.load_state(f"{url}/checkpoints/checkpoint_1")
    is_untouched = found(model, optimizer) == later
    accelerator.load_state()
    accelerator.checkpoints.close()
    return is_untouched, found(model, optimizer) == saved


def test_what_is_torn_for_one_rank_is_torn_for_all(crew: Crew, tmp_path: pathlib.Path) -> None:
    """Nobody waits for the rank that raised; all go back to the same checkpoint."""
    assert crew.run(torn_on_one, str(tmp_path / "run")) == [(True, True), (True, True)]


def save_as_two(link: Link, url: str) -> None:
    accelerator = begin(link, "ddp", url)
    trained(accelerator, 0)
    accelerator.save_state(block=True)
    accelerator.checkpoints.close()


def test_another_number_of_processes_is_told(
    crew: Crew, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model loads; the places in the data would not mean the same."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    from asyncckpt.integrations.accelerate import attach

    crew.run(save_as_two, str(tmp_path / "run"))
    accelerator: Any = attach(Accelerator(cpu=True), tmp_path / "run")
    try:
        accelerator.register_save_state_pre_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="of 2 processes, and here are 1"):
            accelerator.load_state()
    finally:
        accelerator.checkpoints.close()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


# -- FSDP2


def fsdp_there_and_back(link: Link, url: str, layout: str) -> Any:
    accelerator = begin(link, layout, url)
    model, optimizer = trained(accelerator, 0)
    accelerator.save_state(block=True)
    names = sorted(name for name in accelerator.checkpoints.files(0) if "/" in name or name.endswith(".bin"))
    saved = found(model, optimizer)
    accelerator.checkpoints.fetch(0, f"{url}-fetched-{link.rank}")
    for parameter in model.parameters():
        parameter.data.mul_(2)
    accelerator.load_state()
    is_back = found(model, optimizer) == saved
    accelerator.checkpoints.close()
    plain = begin(link, layout, None)
    model, optimizer = trained(plain, 1)
    plain.load_state(f"{url}-fetched-{link.rank}")
    return names, is_back, found(model, optimizer) == saved


@pytest.mark.parametrize("layout", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2_saves_and_loads_in_either_layout(crew: Crew, tmp_path: pathlib.Path, layout: str) -> None:
    """What was fetched loads with plain Accelerate, too."""
    for names, is_back, loads_plainly in crew.run(fsdp_there_and_back, str(tmp_path / "run"), layout):
        if layout == "SHARDED_STATE_DICT":
            shards = (".metadata", "__0_0.distcp", "__1_0.distcp")
            expected = [f"{folder}/{name}" for folder in ("optimizer_0", "pytorch_model_fsdp_0") for name in shards]
        else:
            expected = ["optimizer.bin", "pytorch_model_fsdp.bin"]
        assert [name for name in names if not name.startswith("asyncckpt_")] == expected
        assert is_back
        assert loads_plainly


# -- killed


def run_script(tmp_path: pathlib.Path, name: str, num_ranks: int, *options: str, dies: bool = False) -> Any:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*(torchrun if num_ranks > 1 else [sys.executable]), str(SCRIPT)]
    command += [str(tmp_path / name), str(tmp_path / f"{name}-out"), *options]
    root = str(SCRIPT.parents[2])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if dies:
        assert done.returncode in (-signal.SIGKILL, 1), done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return [json.loads((tmp_path / f"{name}-out.{rank}").read_text()) for rank in range(num_ranks)]


@pytest.mark.parametrize(
    ("num_ranks", "layout", "precision", "loader"),
    [
        (1, "ddp", "bf16", "plain"),
        (2, "ddp", "fp16", "stateful"),
        (2, "SHARDED_STATE_DICT", "fp16", "seedable"),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    tmp_path: pathlib.Path, num_ranks: int, layout: str, precision: str, loader: str
) -> None:
    """SIGKILL in mid-epoch and mid-save, then a fresh job: the same batches, losses and weights, bit for bit.
    With accumulation, clipping, autocast, a GradScaler where there is fp16, a scheduler and dropout."""
    options = ("--layout", layout, "--precision", precision, "--loader", loader)
    whole = run_script(tmp_path, "whole", num_ranks, *options)
    run_script(tmp_path, "cut", num_ranks, *options, "--die-at", "23", dies=True)
    resumed = run_script(tmp_path, "cut", num_ranks, *options)
    for uninterrupted, rest in zip(whole, resumed, strict=True):
        assert 0 < len(rest["seen"]) < len(uninterrupted["seen"])
        assert uninterrupted["seen"][-len(rest["seen"]) :] == rest["seen"]
        assert uninterrupted["weights"] == rest["weights"]
        assert uninterrupted["steps"] == rest["steps"]
