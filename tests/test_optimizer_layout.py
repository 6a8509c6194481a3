"""An optimizer's state nested and flat, and from one to the other."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from asyncckpt import CheckpointManager, StateMismatchError, TrainState
from asyncckpt.optimizer_layout import flat, is_saved_flat, with_groups
from tests.exact import bits
from tests.states import tensor_of

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Net(nn.Module):
    """Names with dots, one of which begins with another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.b = nn.ModuleDict({"a": nn.Linear(2, 2), "aa": nn.Linear(2, 1)})


def stepped(model: nn.Module, *, lr: float = 0.1) -> torch.optim.Optimizer:
    """Two groups, one with a tensor for its learning rate; with other moments for each parameter and lr."""
    params = dict(model.named_parameters())
    weights, others = ([p for n, p in params.items() if ("weight" in n) is flag] for flag in (True, False))
    groups = [{"params": weights, "lr": torch.tensor(lr), "weight_decay": lr}, {"params": others, "lr": lr / 2}]
    optimizer = torch.optim.AdamW(groups)
    for number, param in enumerate(params.values()):
        param.grad = tensor_of(torch.float32, *param.shape, seed=number) * lr
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def nested_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy(TrainState(model=model, optimizer=optimizer).state_dict()["optimizer"])


def test_flat_is_what_dcp_makes_of_it() -> None:
    """Key for key, so that stock DCP reads it."""
    model = Net()
    optimizer = stepped(model)
    state = TrainState(model=model, optimizer=optimizer, options=FLAT).state_dict()["optimizer"]
    expected = get_optimizer_state_dict(model, optimizer, options=FLAT)
    assert bits(state) == bits(dict(expected))
    assert is_saved_flat({f"optimizer.{key}" for key in state}, "optimizer.", default=False)


def test_a_flat_state_has_the_groups_back() -> None:
    """Also state that is nested itself."""
    model = Net()
    nested = nested_of(model, stepped(model))
    nested["state"]["a.weight"]["blocks"] = {0: torch.ones(2), 1: {"n": 3}}
    assert bits(with_groups(flat(nested), nested["param_groups"])) == bits(nested)
    assert bits(with_groups(nested, nested["param_groups"])) == bits(nested)


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("target_options", [None, FLAT], ids=["into nested", "into flat"])
def test_a_checkpoint_of_either_layout_is_restored_with_either(
    options: StateDictOptions | None, target_options: StateDictOptions | None, tmp_path: Any
) -> None:
    """The checkpoint decides."""
    model, other = Net(), Net()
    optimizer, fresh = stepped(model), stepped(other, lr=0.7)
    live_lr = fresh.param_groups[0]["lr"]
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(0, TrainState(model=model, optimizer=optimizer, options=options))
        manager.restore(0, TrainState(model=other, optimizer=fresh, options=target_options), strict=True)
    assert bits(nested_of(other, fresh)) == bits(nested_of(model, optimizer))
    assert fresh.param_groups[0]["lr"] is live_lr


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
def test_a_part_of_the_model_with_fewer_groups_takes_its_own(options: StateDictOptions | None, tmp_path: Any) -> None:
    """A stage of a pipeline that has only the second of two groups: by name, not by number."""
    model = Net()
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(0, TrainState(model=model, optimizer=stepped(model), options=options))
        stage = nn.ParameterDict({"a": nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2))})})
        optimizer = torch.optim.AdamW(stage.parameters(), lr=9.0)
        manager.restore(0, TrainState(model=stage, optimizer=optimizer, options=FLAT))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.05, 0.01)


def test_groups_of_ranks_that_differ_are_taken_in_their_order_with_a_warning() -> None:
    """Nested, a checkpoint names one rank's parameters only. What it does name goes by name."""
    loaded = {"state": {}, "param_groups": [{"params": ["a"], "lr": 1.0}, {"params": ["b"], "lr": 2.0}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swapped = with_groups(loaded, [{"params": ["z", "b"]}, {"params": ["a"]}])
        empty = with_groups(loaded, [{"params": ["a"]}, {"params": []}])
    assert [group["lr"] for group in swapped["param_groups"]] == [2.0, 1.0]
    assert [group["lr"] for group in empty["param_groups"]] == [1.0, 2.0]
    with pytest.warns(UserWarning, match="'y' was: it is nested.*flatten_optimizer_state_dict"):
        elsewhere = with_groups(loaded, [{"params": ["z", "b"]}, {"params": ["y"]}])
    assert [group["lr"] for group in elsewhere["param_groups"]] == [2.0, 2.0]


def test_parameters_of_one_group_that_were_saved_with_different_options_are_an_error() -> None:
    """One of the two would be lost."""
    loaded = {f"param_groups.{name}.lr": lr for name, lr in {"a": 0.1, "b": torch.tensor(0.2)}.items()}
    with pytest.raises(StateMismatchError, match=r"'a' and 'b' are in one parameter group.*lr=0\.1 and tensor"):
        with_groups(loaded, [{"params": ["a", "b"]}])


def test_names_that_torch_gave_wrapped_parameters_are_not_saved(tmp_path: Any) -> None:
    """An optimizer made of named_parameters() keeps them; they tell of the wrapper, and restored would be another's."""
    model = Net()
    wrapped, plain = (torch.optim.AdamW([(f"{prefix}{n}", p) for n, p in model.named_parameters()])
                      for prefix in ("module.", ""))  # fmt: skip
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(0, TrainState(model=model, optimizer=wrapped))
        manager.restore(0, TrainState(model=model, optimizer=plain), strict=True)
    assert plain.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
