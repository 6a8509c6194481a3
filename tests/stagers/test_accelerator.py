"""Both stagers with state on an accelerator: page-locked buffers, streams. Needs one, so it runs where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stagers import BlockingAsyncStager, OverlappingAsyncStager, StagingError
from tests.stagers.conformance import plain, state_of
from tests.stagers.test_overlapping import held
from tests.states import assert_same

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]


@pytest.fixture(params=[BlockingAsyncStager, OverlappingAsyncStager])
def stager(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param() as stager:
        yield stager


def model_and_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """About 400 MB with AdamW's state, so that copies take longer than launching a step."""
    device = torch.accelerator.current_accelerator()
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.BatchNorm1d(4096), torch.nn.Linear(4096, 4096))
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(64, 4096, device=torch.accelerator.current_accelerator())).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def on_cpu(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, torch.Tensor) else state


def test_training_on_does_not_reach_the_copy(stager):
    """Steps, BatchNorm statistics, several times in the same buffer."""
    model, optimizer = model_and_optimizer()
    for _ in range(3):
        state = state_of(model, optimizer)
        before = on_cpu(plain(state))
        snapshot = stager.snapshot(state)
        for _ in range(3):
            train(model, optimizer)
        snapshot.wait()
        assert_same(before, snapshot.state_dict)
        snapshot.release()


def test_buffers_are_page_locked(stager):
    """Otherwise copies would neither overlap nor be fast."""
    snapshot = stager.snapshot({"x": torch.ones(1 << 20, device=torch.accelerator.current_accelerator())})
    snapshot.wait()
    assert snapshot.state_dict["x"].is_pinned()


def test_what_is_not_the_optimizer_s_is_copied_in_the_order_of_the_stream(stager):
    """A change queued right after the call comes after the copy."""
    x = torch.ones(1 << 26, device=torch.accelerator.current_accelerator())
    snapshot = stager.snapshot({"x": x, "gaps": x[::2], "t": x.view(1 << 13, -1).t()})
    x.zero_()
    snapshot.wait()
    assert all(value.all() for value in snapshot.state_dict.values())


def test_a_torn_copy_is_an_error():
    """Versions count when an operation is queued, and are compared when the copy is done."""
    model, optimizer = model_and_optimizer()
    with OverlappingAsyncStager() as stager:
        stager.watch(optimizer)
        with held(stager), torch.no_grad():
            snapshot = stager.snapshot(model.state_dict())
            model[0].weight.zero_()
        with pytest.raises(StagingError, match="torn"):
            snapshot.wait()
