"""The checkpoint is the state at the call of save_async, whatever training does next; both stagers."""

from __future__ import annotations

import copy
import pathlib
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asyncckpt import CheckpointManager, SaveError, TrainState
from asyncckpt.testing import GatedStorage
from stagers import AsyncStager, BlockingAsyncStager, OverlappingAsyncStager
from tests.states import assert_same, target_like

STAGERS = [BlockingAsyncStager, OverlappingAsyncStager]
pytestmark = pytest.mark.parametrize("make_stager", STAGERS)


class Net(nn.Module):
    """Large enough that its weights are overlapped, with statistics that change in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def train_step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 256)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def saved_while(
    tmp_path: pathlib.Path,
    make_stager: Callable[[], AsyncStager],
    state: Any,
    go_on: Callable[[CheckpointManager], None],
) -> None:
    """Save `state`, run `go_on` while not a byte is written yet, then compare the checkpoint with the moment before."""
    plain = state.state_dict() if isinstance(state, TrainState) else state
    with CheckpointManager(str(tmp_path), 1, stager=make_stager()) as manager:
        gate = GatedStorage(manager._storage, "write_file")
        manager._saver.committer.storage = gate
        with gate:
            if isinstance(state, TrainState):
                state.step = 6  # as the manager will set it
                plain = state.state_dict()
            expected = copy.deepcopy(plain)
            manager.save_async(5, state)
            go_on(manager)
        manager.join()
        found = target_like(expected)
        manager.restore(5, found)
        assert_same(expected, found)


def test_adamw_and_batchnorm_train_on(tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager]) -> None:
    """Parameters, moments, CPU step counters and running statistics all change right after the call."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train_step(model, optimizer)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    saved_while(tmp_path, make_stager, state, lambda manager: [train_step(model, optimizer) for _ in range(3)])


@pytest.mark.parametrize("with_autograd", [True, False])
def test_a_step_counter_edited_right_after_the_call(
    tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager], with_autograd: bool
) -> None:
    """torch_xla and plain DCP save the later value: the tensor is on the CPU already."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)

    def edit(manager: CheckpointManager) -> None:
        if with_autograd:
            model(torch.randn(8, 256)).sum().backward()
        for values in optimizer.state.values():
            values["step"] += 100

    saved_while(tmp_path, make_stager, TrainState(model=model, optimizer=optimizer, rng=False), edit)


def test_forward_passes_right_after_the_call(tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager]) -> None:
    """BatchNorm statistics change without any optimizer step."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(model, optimizer)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    saved_while(tmp_path, make_stager, state, lambda manager: [model(torch.randn(8, 256)) for _ in range(5)])


def test_an_ema_copy_and_a_tensor_edited_by_hand(
    tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager]
) -> None:
    """Tensors of unknown origin are copied before save_async returns."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    ema = copy.deepcopy(model)
    counts = torch.zeros(100_000)
    train_step(model, optimizer)

    def go_on(manager: CheckpointManager) -> None:
        counts.add_(1)
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.5)
        train_step(model, optimizer)

    state = {"model": model.state_dict(), "ema": ema.state_dict(), "counts": counts}
    saved_while(tmp_path, make_stager, state, go_on)


def test_gradient_accumulation_and_two_optimizers(
    tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager]
) -> None:
    """The step of either optimizer waits for the copies of both."""
    first, second = Net(), Net()
    a = torch.optim.AdamW(first.parameters(), lr=0.1)
    b = torch.optim.SGD(second.parameters(), lr=0.1, momentum=0.9)
    train_step(first, a)
    train_step(second, b)

    def go_on(manager: CheckpointManager) -> None:
        first(torch.randn(8, 256)).sum().backward()
        first(torch.randn(8, 256)).sum().backward()
        train_step(second, b)
        a.step()

    state = {
        "first": first.state_dict(), "second": second.state_dict(), "a": a.state_dict(), "b": b.state_dict(),
    }  # fmt: skip
    saved_while(tmp_path, make_stager, state, go_on)


def test_a_fused_optimizer(tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager]) -> None:
    """Its writes raise no version count: only the rule protects."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    train_step(model, optimizer)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    saved_while(tmp_path, make_stager, state, lambda manager: [train_step(model, optimizer) for _ in range(3)])


def test_a_parameter_edited_by_hand_after_wait_staged(
    tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager]
) -> None:
    """The one thing an overlapping user has to write."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)

    def edit(manager: CheckpointManager) -> None:
        manager.wait_staged()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data.fill_(7)

    saved_while(tmp_path, make_stager, TrainState(model=model, optimizer=optimizer, rng=False), edit)


def test_a_torn_copy_is_never_committed(tmp_path: pathlib.Path, make_stager: Callable[[], AsyncStager]) -> None:
    """A parameter edited by hand without wait_staged: the copy is right, or the save fails and says so."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step(model, optimizer)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    before = copy.deepcopy(state.state_dict()["model"])
    with CheckpointManager(str(tmp_path), 1, stager=make_stager()) as manager:
        manager.save_async(1, state)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        error = None
        try:
            manager.join()
        except SaveError as exc:
            error = str(exc)
        if error is not None:
            assert "wait_staged" in error
            assert manager.all_steps() == []
        else:
            found = target_like(before)
            manager.restore(1, {"model": found})
            assert_same(before, found)


def test_a_save_that_ctrl_c_interrupts_is_of_the_moment_it_was_called(tmp_path, make_stager):
    """Its caller goes on with the state while the writer is still at the data."""
    state = {"w": torch.ones(1_000_000), "small": torch.ones(3)}
    with CheckpointManager(str(tmp_path), 1, stager=make_stager()) as manager:
        gate = manager._saver.committer.storage = GatedStorage(manager._storage, "write_file")

        def interrupt() -> None:
            gate.wait_reached()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes that thread from its wait

        interrupter = threading.Thread(target=interrupt)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        try:
            with gate:
                interrupter.start()
                with pytest.raises(KeyboardInterrupt):
                    manager.save(5, state)
                for tensor in state.values():
                    tensor.fill_(2)
            interrupter.join()
        finally:
            signal.signal(signal.SIGINT, handler)
        manager.join()
        found = target_like(state)
        manager.restore(5, found)
    assert all(tensor.eq(1).all() for tensor in found.values())
