"""OverlappingAsyncStager: the conformance suite, what is overlapped and what is not, and who waits for it.

`held` keeps the copier thread busy, so that what is overlapped is certainly not copied before the test lets it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

from stagers import OverlappingAsyncStager, StagingError
from stagers import overlapping as overlapping_module
from tests.stagers.conformance import StagerTests, model_and_optimizer, plain, state_of, train
from tests.states import assert_same

Stager = OverlappingAsyncStager


@contextmanager
def held(stager: Stager) -> Iterator[Callable[[], None]]:
    """No overlapped copy starts before the yielded function is called, or the block ends."""
    gate = threading.Event()
    stager._copier.submit(gate.wait)
    try:
        yield gate.set
    finally:
        gate.set()


def owned(size: int = 1 << 16) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    """A parameter large enough to overlap, and its optimizer."""
    parameter = torch.nn.Parameter(torch.ones(size))
    parameter.grad = -torch.ones(size)  # a step leaves no zeros, which stand for "not copied yet"
    return parameter, torch.optim.SGD([parameter], lr=1.0)


class TestOverlappingAsyncStager(StagerTests):
    make = staticmethod(OverlappingAsyncStager)

    # -- the rule

    def test_large_tensors_of_a_known_optimizer_are_copied_later(self, stager):
        """Parameters and state, seen in the state dict under any name or view."""
        model, optimizer = model_and_optimizer(amsgrad=True)
        stager.watch(optimizer)
        stager.prewarm(state_of(model, optimizer))
        with held(stager):
            copy = stager.snapshot(state_of(model, optimizer)).state_dict
            late = {key for key, value in copy["model"].items() if not value.any()}
            assert late == {"0.weight", "2.weight"}
            late_state = {(i, key) for i, v in copy["optimizer"]["state"].items() for key in v if not v[key].any()}
            assert late_state == {(i, key) for i in (0, 4) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")}

    def test_all_is_copied_at_once_while_no_optimizer_is_known(self, stager):
        """An optimizer is known from its first step on."""
        parameter, optimizer = owned()
        with held(stager):
            first = stager.snapshot({"p": parameter})
            assert first.state_dict["p"].all()
            first.release()
        optimizer.step()
        with held(stager):
            assert not stager.snapshot({"p": parameter, "q": torch.ones_like(parameter)}).state_dict["p"].any()

    def test_tensors_of_unknown_origin_are_copied_at_once_however_large(self, stager):
        """Clones of parameters, gradients, statistics."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        with held(stager):
            copy = stager.snapshot({"ema": parameter.detach().clone(), "grad": parameter.grad}).state_dict
            assert copy["ema"].all()
            assert copy["grad"].all()

    def test_parameters_whose_changes_are_not_counted_are_copied_at_once(self, stager):
        """Inference tensors have no `_version`; views with gaps are no plain copy of memory."""
        with torch.inference_mode():
            frozen = torch.nn.Parameter(torch.ones(1 << 16), requires_grad=False)
        parameter, optimizer = owned(1 << 17)
        stager.watch(optimizer)
        stager.watch(torch.optim.SGD([frozen]))
        with held(stager):
            copy = stager.snapshot({"frozen": frozen, "gaps": parameter[::2]}).state_dict
            assert copy["frozen"].all()
            assert copy["gaps"].all()

    def test_the_optimizer_is_held_weakly(self, stager):
        """Its end is not put off, and its parameters are then like any other tensor."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        del optimizer
        gc.collect()
        with held(stager):
            assert stager.snapshot({"p": parameter}).state_dict["p"].all()

    def test_an_optimizer_that_cannot_be_read_leaves_its_tensors_to_be_copied_at_once(self, stager):
        """State with a lazy parameter, say."""
        parameter, optimizer = owned()
        optimizer.state[parameter]["odd"] = torch.nn.parameter.UninitializedParameter()
        stager.watch(optimizer)
        with held(stager):
            assert stager.snapshot({"p": parameter}).state_dict["p"].all()

    # -- who waits

    def test_step_waits_for_the_copy(self, stager, monkeypatch):
        """The step of an optimizer that the stager never heard of, too."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        _, stranger = owned()
        waiting, stepped = threading.Event(), threading.Event()
        real_wait = overlapping_module.wait_for

        def wait(futures: Any) -> Any:
            waiting.set()
            return real_wait(futures)

        monkeypatch.setattr(overlapping_module, "wait_for", wait)
        for each in (stranger, optimizer):
            waiting.clear(), stepped.clear()
            with held(stager) as let_go:
                snapshot = stager.snapshot({"p": parameter})
                before = parameter.detach().clone()
                thread = threading.Thread(target=lambda step=each.step: (step(), stepped.set(), waiting.set()))
                thread.start()
                waiting.wait()
                assert not stepped.is_set()
                assert torch.equal(parameter, before)
                let_go()
                thread.join()
            assert stepped.is_set()
            snapshot.wait()
            assert torch.equal(snapshot.state_dict["p"], before)
            snapshot.release()
        assert not torch.equal(parameter, before)

    def test_synchronize_staging_and_wait_wait_for_the_copy(self, stager):
        """After either, a parameter may be edited by hand."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        for wait in (lambda snapshot: stager.synchronize_staging(), lambda snapshot: snapshot.wait()):
            snapshot = stager.snapshot({"p": parameter})
            wait(snapshot)
            with torch.no_grad():
                parameter.add_(1)
            snapshot.wait()
            assert torch.equal(snapshot.state_dict["p"] + 1, parameter)

    def test_stage_gives_a_future_that_ends_with_the_copy(self, stager):
        """DCP takes a dict for complete, so a dict would be read too early."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        with held(stager) as let_go:
            future = stager.stage({"p": parameter})
            assert isinstance(future, Future)
            assert not future.done()
            let_go()
            assert future.result()["p"].all()

    def test_release_waits_for_the_copy_that_still_writes_to_the_buffer(self, stager):
        """Otherwise the next snapshot would get it."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        with held(stager) as let_go:
            snapshot = stager.snapshot({"p": parameter})
            thread = threading.Thread(target=snapshot.release)
            thread.start()
            assert "0 idle, 1 lent" in repr(stager)
            let_go()
            thread.join()
        assert "1 idle, 0 lent" in repr(stager)

    def test_a_replaced_or_deleted_parameter_is_copied_as_it_was(self, stager):
        """The copy in flight keeps the memory, whatever happens to the tensor object."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        with held(stager) as let_go:
            snapshot = stager.snapshot({"p": parameter})
            parameter.data = torch.zeros(1 << 16)
            del parameter, optimizer
            gc.collect()
            let_go()
            snapshot.wait()
            assert snapshot.state_dict["p"].all()

    # -- what goes wrong

    def test_a_torn_copy_is_an_error_that_names_the_key(self, stager):
        """From `wait`, each time it is asked; the stager works on, also with the same buffer."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        with held(stager):
            snapshot = stager.snapshot({"model": {"p": parameter}})
            future = stager.stage({"model": {"p": parameter}})
            with torch.no_grad():
                parameter.add_(1)
        for _ in range(2):
            with pytest.raises(StagingError, match=r"'model\.p' changed outside of optimizer\.step\(\).*torn"):
                snapshot.wait()
        with pytest.raises(StagingError, match="torn"):
            future.result()
        snapshot.release()
        again = stager.snapshot({"model": {"p": parameter}})
        again.wait()
        assert torch.equal(again.state_dict["model"]["p"], parameter)

    def test_a_failure_in_the_copier_thread_reaches_wait_and_not_the_step(self, stager, monkeypatch):
        """Training goes on; the save fails."""
        parameter, optimizer = owned()
        stager.watch(optimizer)
        monkeypatch.setattr("ctypes.memmove", lambda *args: 1 / 0)
        snapshot = stager.snapshot({"p": parameter})
        optimizer.step()
        with pytest.raises(StagingError, match="division by zero"):
            snapshot.wait()
        snapshot.release()
        assert "1 idle, 0 lent" in repr(stager)

    # -- life and end

    def test_hooks_end_with_the_stager(self):
        """Closed or garbage."""
        before = dict(_global_optimizer_pre_hooks)
        closed, lost = Stager(), Stager()
        assert len(_global_optimizer_pre_hooks) == len(before) + 2
        closed.close()
        del lost
        gc.collect()
        assert _global_optimizer_pre_hooks == before

    def test_the_copier_thread_ends_with_the_stager(self):
        """Closed or garbage, and with a copy in flight when it was dropped."""
        parameter, optimizer = owned()
        closed, lost = Stager(), Stager()
        threads = []
        for stager in (closed, lost):
            stager.watch(optimizer)
            snapshot = stager.snapshot({"p": parameter})
            threads += stager._copier._threads
        closed.close()
        del lost, stager
        gc.collect()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        snapshot.wait()
        assert snapshot.state_dict["p"].all()

    def test_close_waits_for_copies_in_flight(self):
        """So that their sources may be changed afterwards."""
        parameter, optimizer = owned()
        stager = Stager()
        stager.watch(optimizer)
        snapshot = stager.snapshot({"p": parameter})
        stager.close()
        optimizer.step()
        snapshot.wait()
        assert snapshot.state_dict["p"].all()

    def test_two_stagers_do_not_disturb_each_other(self, stager):
        """A step waits for both, and closing one leaves the other's hook."""
        model, optimizer = model_and_optimizer()
        with Stager() as other:
            state = state_of(model, optimizer)
            before = plain(state)
            snapshots = [stager.snapshot(state), other.snapshot(state)]
            train(model, optimizer)
            for snapshot in snapshots:
                snapshot.wait()
                assert_same(before, snapshot.state_dict)
                snapshot.release()
        before = plain(state_of(model, optimizer))
        snapshot = stager.snapshot(state_of(model, optimizer))
        train(model, optimizer)
        snapshot.wait()
        assert_same(before, snapshot.state_dict)
