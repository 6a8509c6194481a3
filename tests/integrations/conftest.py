"""What all tests under trainers need."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun sets it for ranks: Accelerate warns where it is not set, and sums have one order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
