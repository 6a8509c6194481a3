"""Our phases beside DCP's own messages, for a real handler."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.logger import _dcp_logger

from asyncckpt import CheckpointManager, WriteError


@pytest.fixture
def heard() -> Iterator[list[tuple[int, dict]]]:
    """(level, message) of everything that reaches DCP's logger."""
    messages: list[tuple[int, dict]] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append((record.levelno, record.msg))
    _dcp_logger.addHandler(handler)
    yield messages
    _dcp_logger.removeHandler(handler)


def ended(messages) -> dict[str, dict]:
    return {message["func_name"]: message for _, message in messages if message["event"] == "end"}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_save_and_a_restore_look_like_dcps_own_to_a_handler(heard, tmp_path):
    """Phases of the same names, with every field that DCP's have; and ours beside them."""
    state = {"w": torch.ones(1000)}
    dcp.save(state, checkpoint_id=str(tmp_path / "stock"), no_dist=True)
    dcp.load(state, checkpoint_id=str(tmp_path / "stock"), no_dist=True)
    stock = ended(heard)
    heard.clear()
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save(3, state)
        manager.restore(3, state)
    ours = ended(heard)
    assert list(ours) == ["stage_state_dict", "write_data", "finish_checkpoint", "save", "load"]
    for name in ours.keys() & stock.keys():
        assert stock[name].keys() - {"storage_writer", "storage_reader"} <= ours[name].keys(), name
        assert {type(value) for value in (ours[name]["time"], ours[name]["times_spent"])} == {int}
    assert ours["save"]["checkpoint_id"] == f"{tmp_path}/run/3"
    assert ours["write_data"]["num_bytes"] > 4000
    assert {level for level, _ in heard} == {logging.DEBUG}


def test_a_failure_is_an_exception_there(heard, tmp_path):
    """At ERROR, with what it was."""
    (tmp_path / "run").mkdir()
    with CheckpointManager(tmp_path / "run") as manager:
        (tmp_path / "run" / "3").write_text("in the way")
        with pytest.raises(WriteError):
            manager.save(3, {"w": torch.ones(10)})
    ((level, message),) = [(level, message) for level, message in heard if message["event"] == "exception"]
    assert level == logging.ERROR
    assert message["func_name"] == "write_data"
    assert "run/3" in message["error"]
