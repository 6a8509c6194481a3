"""`asyncckpt diff`: what is equal is told by checksums, what is not by values."""

from __future__ import annotations

import pathlib

import pytest
import torch
import torch.distributed.checkpoint as dcp

from asyncckpt import CheckpointManager
from tests.cli.commands import ran, told
from tests.states import every_kind

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def test_a_step_equals_itself_saved_again_and_nothing_is_read(tmp_path: pathlib.Path) -> None:
    """Of every kind of value."""
    with CheckpointManager(str(tmp_path)) as manager:
        for step in (1, 2):
            manager.save(step, every_kind(0))
    document = told("diff", f"{tmp_path}@1", "@2")
    assert (document["different"], document["read"], document["unknown"], document["keys"]) == (0, 0, 0, [])
    assert document["equal"] > 10


def test_every_way_in_which_a_key_may_differ(tmp_path: pathlib.Path) -> None:
    """Keys, kinds, shapes, dtypes, elements, objects; NaN equals NaN; status 1."""
    nan = torch.tensor([float("nan"), 1.0, 2.0])
    a = {"same": torch.ones(3), "gone": 1, "shape": torch.ones(2), "dtype": torch.ones(2), "kind": torch.ones(1),
         "w": torch.arange(6.0), "nan": nan, "inf": torch.tensor([1.0]), "o": {"x": [1, 2]}, "n": 3,
         "i": torch.tensor([1, 2])}  # fmt: skip
    b = {**a, "shape": torch.ones(3), "dtype": torch.ones(2, dtype=torch.float16), "kind": 1, "new": torch.ones(1),
         "w": torch.arange(6.0) + torch.tensor([0, 0.5, 0, 0, -2, 0]), "nan": nan + torch.tensor([0, 0, 1]),
         "inf": torch.tensor([float("inf")]), "n": 4, "i": torch.tensor([1, -5])}  # fmt: skip
    del b["gone"]
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, a)
        manager.save(2, b)
    document = told("diff", f"{tmp_path}@1", f"{tmp_path}@2", status=1)
    found = {row["key"]: row for row in document["keys"]}
    assert {key: row["result"] for key, row in found.items()} == {
        "gone": "only in A", "new": "only in B", "shape": "shape", "dtype": "dtype", "kind": "kind", "w": "differs",
        "nan": "differs", "inf": "differs", "n": "differs", "i": "differs",
    }  # fmt: skip
    assert (found["w"]["elements"], found["w"]["max_abs"]) == (2, 2.0)
    assert (found["nan"]["elements"], found["nan"]["max_abs"]) == (1, 1.0)
    assert found["inf"]["max_abs"] == "inf"
    assert (found["i"]["max_abs"], found["n"]["detail"]) == (7.0, "3 -> 4")
    assert document["equal"] == 2  # "same" and "o.x"
    text = ran("diff", f"{tmp_path}@1", "@2")
    assert text.exit_code == 1
    assert "2 keys equal, 10 different" in text.output
    assert told("diff", f"{tmp_path}@1", "@2", "--keys", "same")["equal"] == 1


@pytest.mark.slow
def test_other_pieces_and_other_writers_are_compared_by_value(tmp_path: pathlib.Path) -> None:
    """Stock DCP has no checksums of ours; max |A-B| of tensors larger than a piece."""
    weights = {"w": torch.randn(5_000_000), "n": torch.ones(2)}
    with CheckpointManager(str(tmp_path / "a")) as manager:
        manager.save(1, weights)
    dcp.save(weights, checkpoint_id=str(tmp_path / "b" / "1"))
    document = told("diff", tmp_path / "a", tmp_path / "b")
    assert (document["equal"], document["read"]) == (2, 2)
    weights["w"][-1] += 64
    dcp.save(weights, checkpoint_id=str(tmp_path / "c" / "1"))
    (row,) = told("diff", tmp_path / "a", tmp_path / "c", status=1)["keys"]
    assert (row["key"], row["elements"], round(row["max_abs"])) == ("w", 1, 64)


def test_what_cannot_be_compared_is_status_2(tmp_path: pathlib.Path) -> None:
    """No such step; a damaged one, in words."""
    with CheckpointManager(str(tmp_path)) as manager:
        for step in (1, 2):
            manager.save(step, {"w": torch.randn(8)})
    assert ran("diff", f"{tmp_path}@1", "@3").exit_code == 2
    next((tmp_path / "1").glob("*/*.distcp")).unlink()
    done = ran("diff", f"{tmp_path}@1", "@2")
    assert done.exit_code == 2
    assert "is damaged" in done.output
