"""torch_xla on the CPU. Where it is not installed, as in the environment of the default suite, nothing here is seen."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

if importlib.util.find_spec("torch_xla") is None:
    collect_ignore_glob = ["test_*.py"]
else:  # read when torch_xla is imported, also by the ranks of tests/processes.py
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "4")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else a line for each compilation: GSPMD is going to go


@pytest.fixture
def _alone() -> Iterator[None]:
    """A process group of this process, which torch_xla's own manager asks for."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
