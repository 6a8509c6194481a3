"""`borrow`: large tensors are copied by whoever waits for them, piece by piece, and never after the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stagers import BlockingAsyncStager, OverlappingAsyncStager, StagingError

LARGE = 1_000_000


@pytest.fixture(params=[BlockingAsyncStager, OverlappingAsyncStager])
def stager(request: pytest.FixtureRequest) -> Any:
    with request.param() as stager:
        yield stager


def test_a_borrowed_state_is_whole_after_the_wait(stager: Any) -> None:
    """Large and small, tied and transposed, and the objects."""
    large = torch.randn(LARGE)
    state = {
        "large": large, "tied": large, "small": torch.arange(5), "flipped": torch.randn(700, 900).t(),
        "conj": torch.randn(LARGE, dtype=torch.complex64).conj(), "sliced": torch.randn(2, LARGE)[:, ::2], "step": 3,
    }  # fmt: skip
    snapshot = stager.borrow(state)
    snapshot.wait()
    for key in ("large", "small", "flipped", "conj", "sliced"):
        assert torch.equal(snapshot.state_dict[key], state[key].resolve_conj()), key
    assert snapshot.state_dict["tied"] is snapshot.state_dict["large"]
    assert snapshot.state_dict["step"] == 3
    snapshot.release()


def test_only_what_is_asked_for_is_copied(stager: Any) -> None:
    """So that writing can begin before the rest is there; small tensors are there at once."""
    state = {"a": torch.ones(LARGE), "b": torch.ones(LARGE), "small": torch.ones(3)}
    stager.borrow(state).release()  # its buffer will be used again
    for tensor in state.values():
        tensor.fill_(2)
    snapshot = stager.borrow(state)
    assert snapshot.state_dict["small"].tolist() == [2, 2, 2]
    start = snapshot.state_dict["b"].data_ptr() - snapshot.state_dict["a"].data_ptr()
    snapshot.wait_for(start, start + 4000)
    assert snapshot.state_dict["b"][:1000].eq(2).all()
    assert not snapshot.state_dict["b"][1000:].eq(2).any()
    assert not snapshot.state_dict["a"].eq(2).any()
    snapshot.wait()
    assert all(tensor.eq(2).all() for tensor in snapshot.state_dict.values())
    snapshot.release()


def test_nothing_is_copied_into_a_buffer_that_was_given_back(stager: Any) -> None:
    """Who waits late may find the buffer lent to another."""
    state = {"w": torch.ones(LARGE)}
    late = stager.borrow(state)
    late.release()
    taken = stager.snapshot({"w": torch.zeros(LARGE)})
    late.wait()
    taken.wait()
    assert not taken.state_dict["w"].any()
    taken.release()


def test_a_wait_that_was_interrupted_spoils_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources may change from then on."""
    with BlockingAsyncStager() as stager:
        snapshot = stager.borrow({"w": torch.ones(LARGE)})

        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ctypes.memmove", interrupted)
            with pytest.raises(KeyboardInterrupt):
                snapshot.wait()
        with pytest.raises(StagingError, match="interrupted"):
            snapshot.wait_for(0, 100)
        snapshot.release()
