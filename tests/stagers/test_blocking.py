"""BlockingAsyncStager: the conformance suite, and that the copy is complete on return."""

from __future__ import annotations

import torch

from stagers import BlockingAsyncStager
from tests.stagers.conformance import StagerTests, model_and_optimizer, plain, state_of
from tests.states import assert_same


class TestBlockingAsyncStager(StagerTests):
    make = staticmethod(BlockingAsyncStager)

    def test_the_copy_is_complete_on_return(self, stager):
        """No `wait()` needed, and parameters may be edited by hand at once."""
        model, optimizer = model_and_optimizer()
        before = plain(state_of(model, optimizer))
        snapshot = stager.snapshot(state_of(model, optimizer))
        staged = stager.stage(state_of(model, optimizer))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert_same(before, snapshot.state_dict)
        assert_same(before, staged)
