"""Both stagers under torch's own `dcp.async_save`."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from stagers import BlockingAsyncStager, OverlappingAsyncStager
from tests.stagers.conformance import model_and_optimizer, plain, state_of, train
from tests.states import assert_same, target_like

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class HeldWriter(dcp.FileSystemWriter):
    """Writes nothing until `gate` is set."""

    def __init__(self, path: Any, gate: threading.Event) -> None:
        super().__init__(path)
        self._gate = gate

    def write_data(self, plan: Any, planner: Any) -> Any:
        self._gate.wait()
        return super().write_data(plan, planner)


def upload_of(response: Any) -> Any:
    """`async_save` gives the upload's future, or both futures if staging has one of its own."""
    return getattr(response, "upload_completion", response)


@pytest.mark.parametrize("make", [BlockingAsyncStager, OverlappingAsyncStager])
def test_two_saves_with_training_between_keep_their_moments(make, tmp_path):
    """Though the uploads begin only after all training, and a third save reuses the buffers of the first."""
    gate = threading.Event()
    expected, uploads = [], []
    with make() as stager:
        model, optimizer = model_and_optimizer()
        for number in range(2):
            state = state_of(model, optimizer)
            expected.append(plain(state))
            writer = HeldWriter(tmp_path / str(number), gate)
            uploads.append(upload_of(dcp.async_save(state, storage_writer=writer, async_stager=stager)))
            del state
            train(model, optimizer)
        stager.synchronize_staging()
        assert "2 lent" in repr(stager)
        gate.set()
        for upload in uploads:
            upload.result()
        upload_of(
            dcp.async_save(state_of(model, optimizer), checkpoint_id=tmp_path / "2", async_stager=stager)
        ).result()
    for number, state in enumerate(expected):
        found = target_like(state)
        dcp.load(found, checkpoint_id=tmp_path / str(number))
        assert_same(state["model"], found["model"])
        assert_same(state["optimizer"]["state"], found["optimizer"]["state"])
