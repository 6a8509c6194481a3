"""A step as a file of others: how fast it comes out beside a restore, and what memory that takes.

The bytes go nowhere: a disk is slower than both. Each export's memory is that of a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from asyncckpt import CheckpointManager
from asyncckpt.export import export_safetensors, export_torch
from asyncckpt.storage import open_storage

from .frame import MIB, OURS, PEER, Bench, Outcome, Round, Row, Spread, ratio_row, timed

LARGE_BYTES = (16 * 10**6, 100 * 10**6)
PEAK = """
import sys
from torch._subclasses.fake_tensor import FakeTensorMode
import torch
from asyncckpt.export import export_safetensors, export_torch
from asyncckpt.storage import open_storage
from scripts.benchmarks.export import Nowhere
from scripts.benchmarks.process import PeakRss
with FakeTensorMode():
    torch.empty(3)  # what torch loads at the first
source = open_storage(sys.argv[1])
peak = PeakRss()
if sys.argv[2] == "safetensors":
    export_safetensors(source, "1", Nowhere())
else:
    export_torch(source, "1", Nowhere(), "state.pt")
print(peak.extra_bytes())
"""


class Nowhere:
    """A storage that takes what is written, and has nothing."""

    url = "nowhere"

    def list_files(self, prefix: str = "") -> Mapping[str, int]:
        return {}

    def replace_file(self, path: str, size: int, views: Iterator[memoryview]) -> None:
        assert sum(map(len, views)) == size


def run(bench: Bench) -> Outcome:
    rows, tables = [], {}
    for tensor_bytes in LARGE_BYTES:
        size = min(tensor_bytes, bench.scale.num_bytes // 4)
        state = {f"{number}": torch.randn(size // 4) for number in range(bench.scale.num_bytes // size)}
        folder = bench.folder / f"step of {tensor_bytes}"
        with CheckpointManager(str(folder), 1) as manager:
            manager.save(1, state)
        title = f"tensors of {size / 1e6:.0f} MB"
        found = bench.take_turns({name: (kind, partial(_rounds, work)) for name, kind, work in _works(folder, state)})
        tables[title] = found, "time"
        for name in ("export, safetensors", "export, torch"):
            what = f"{name}, {title}: speed over a restore's"
            rows.append(ratio_row("export", what, found, "restore", name, 0.7, bound=">="))
            rows.append(_memory_row(folder, name, title, size))
        del state
    return Outcome(rows, tables)


def _works(folder: Path, state: dict[str, Any]) -> list[tuple[str, str, Callable[[], object]]]:
    source = open_storage(folder)
    nowhere: Any = Nowhere()

    def restore() -> None:
        with CheckpointManager(str(folder), 1) as manager:
            manager.restore(1, state)

    return [
        ("restore", OURS, restore),
        ("export, safetensors", OURS, lambda: export_safetensors(source, "1", nowhere)),
        ("export, torch", OURS, lambda: export_torch(source, "1", nowhere, "state.pt")),
        ("dcp_to_torch_save, to a disk", PEER, lambda: dcp_to_torch_save(folder / "1", folder / "peer.pt")),
    ]


@contextmanager
def _rounds(work: Callable[[], object]) -> Iterator[Round]:
    yield lambda number: {"time": timed(work)}


def _memory_row(folder: Path, name: str, title: str, largest: int) -> Row:
    """In MiB, above what the process had when it began."""
    format_ = name.removeprefix("export, ")
    told = subprocess.run([sys.executable, "-c", PEAK, folder, format_], capture_output=True, text=True, check=True)
    peak, goal = int(told.stdout) / MIB, (2 * largest + 256 * MIB) / MIB
    return Row("export", f"{name}, {title}: peak of memory", Spread(peak, peak, peak), "MiB", goal)
