"""A sample of the families "folder" and "power" of scripts/torture, so that what breaks them is seen at once."""

from __future__ import annotations

from pathlib import Path

from scripts.campaign import folder, power


def test_a_run_that_is_broken_at_a_call_of_each_kind(tmp_path: Path) -> None:
    """Killed, failed, cut short, held up."""
    kinds = ("kill", "kill-within", "fail-EIO", "fail-after", "cut-write", "cut-full", "remove", "delay", "fsspec.kill")
    with folder.rows(tmp_path, seed=1) as rows:
        attempts = {row.key: row.attempt for row in rows}
        for kind in kinds:
            assert attempts[f"folder.{kind}"](0) in ("survived", "detected"), kind


def test_a_run_whose_power_goes(tmp_path: Path) -> None:
    """Two moments for each way in which a disk may be found."""
    with power.rows(tmp_path, seed=1) as rows:
        for row in rows:
            for number in range(2):
                assert row.attempt(number), row.key
