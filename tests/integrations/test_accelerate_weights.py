"""A model's weights at a URL, in the files that Accelerate and transformers write; and back into a model."""

from __future__ import annotations

import copy
import os
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
import torch

pytest.importorskip("accelerate")
import accelerate
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from asyncckpt import RestoreError, WriteError
from asyncckpt.integrations.accelerate import attach, load_checkpoint_in_model
from tests.exact import bits

pytestmark = pytest.mark.integration


@pytest.fixture
def accelerator(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    accelerator = attach(Accelerator(cpu=True), "run")
    yield accelerator
    accelerator.checkpoints.close()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(3)))


def names_at(url: str) -> set[str]:
    return {path.rpartition("/")[2] for path in fsspec.filesystem("memory").find(url)}


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_goes_to_a_url_and_back(accelerator: Any, memory_url: str, safe: bool, shards: int) -> None:
    """Whole or in shards with an index; the files are those of Accelerate, to the byte."""
    model = accelerator.prepare(make_model())
    size = "10GB" if shards == 1 else "1500KB"
    accelerator.save_model(model, memory_url, max_shard_size=size, safe_serialization=safe)
    accelerator.save_model(model, "local", max_shard_size=size, safe_serialization=safe)
    files = fsspec.filesystem("memory")
    assert names_at(memory_url) == set(os.listdir("local"))
    assert len(names_at(memory_url)) == (1 if shards == 1 else 4)
    if safe:
        for name in os.listdir("local"):
            assert files.cat(f"{memory_url}/{name}") == pathlib.Path("local", name).read_bytes()
    for place in [memory_url] if shards > 1 else [memory_url, f"{memory_url}/{os.listdir('local')[0]}"]:
        loaded = make_model(seed=1)
        load_checkpoint_in_model(loaded, place, device_map={"": "cpu"})
        assert bits(loaded.state_dict()) == bits(make_model().state_dict())
    loaded = make_model(seed=1)
    load_checkpoint_in_model(loaded, "local", device_map={"": "cpu"})
    accelerate.load_checkpoint_in_model(loaded, "local")
    assert bits(loaded.state_dict()) == bits(make_model().state_dict())
    assert not pathlib.Path("memory:").exists()


def test_a_model_saved_anew_leaves_no_shard_of_the_old(accelerator: Any, memory_url: str) -> None:
    """What is no weights stays."""
    fsspec.filesystem("memory").pipe(f"{memory_url}/notes.txt", b"?")
    accelerator.save_model(make_model(), memory_url, max_shard_size="1500KB")
    accelerator.save_model(make_model(), memory_url)
    assert names_at(memory_url) == {"model.safetensors", "notes.txt"}


def test_the_guide_s_state_dict_is_saved_by_name(accelerator: Any, memory_url: str) -> None:
    """`accelerator.save` to a URL, beside what lies there."""
    accelerator.save_model(make_model(), memory_url)
    accelerator.save(make_model().state_dict(), f"{memory_url}/pytorch_model.bin")
    assert names_at(memory_url) == {"model.safetensors", "pytorch_model.bin"}
    with fsspec.open(f"{memory_url}/pytorch_model.bin") as file:
        assert bits(dict(torch.load(file))) == bits(dict(make_model().state_dict()))


def test_a_url_without_weights_is_an_error_in_words(accelerator: Any, memory_url: str) -> None:
    """As is one that cannot be written to."""
    with pytest.raises(RestoreError, match="no checkpoint at memory"):
        load_checkpoint_in_model(make_model(), memory_url)
    fsspec.filesystem("memory").pipe(f"{memory_url}/model.safetensors/in-the-way", b"?")
    with pytest.raises((WriteError, RestoreError)):
        load_checkpoint_in_model(make_model(), f"{memory_url}/nothing")


def test_save_pretrained_takes_a_url(accelerator: Any, memory_url: str, tmp_path: pathlib.Path) -> None:
    """As in the guide, with `save_function`; the model can be copied and pickled as before."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=5000, n_positions=16)
    model = accelerator.prepare(transformers.GPT2LMHeadModel(config))
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        memory_url, is_main_process=accelerator.is_main_process, save_function=accelerator.save, max_shard_size="1MB"
    )
    unwrapped.save_pretrained("local", save_function=accelerator.save, max_shard_size="1MB")
    assert names_at(memory_url) == set(os.listdir("local"))
    assert len(names_at(memory_url)) > 3
    fsspec.filesystem("memory").get(memory_url, str(tmp_path / "brought"), recursive=True)
    read = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "brought")
    assert bits(read.state_dict()) == bits(unwrapped.state_dict())
    for other in (copy.deepcopy(unwrapped), pickle.loads(pickle.dumps(unwrapped))):
        other.save_pretrained("other")
    assert not pathlib.Path("memory:").exists()
