"""This process's memory and all others' CPU time, as the kernel counts them."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path

from .frame import MIB


def rss_bytes() -> int:
    return _status("VmRSS")


def own_bytes() -> int:
    """All but the pages of files: torch's libraries are shared, and were seen to count 40 MiB more, as this process's
    share, the moment that another with torch ended."""
    found = re.findall(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert len(found) == 2
    return sum(map(int, found)) * 1024


def give_back_free_memory() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def others_cpu_s() -> float:
    """CPU seconds since boot of all but this process and its children that have ended (servers still running count).

    To be read with every ratio: one busy process beside it made `dcp.load` on two threads 3.4 times as slow (67 MB in
    100 tensors, 2 cores; on one thread it took no longer), as each parallel copy waits for the thread that was
    preempted. A ratio to a peer is then as wrong as the figure itself.
    """
    user, nice, system = (int(field) for field in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


class PeakRss:
    """From construction on; one at a time, as the kernel keeps one high-water mark."""

    def __init__(self) -> None:
        give_back_free_memory()  # else what was freed before, and kept, hides what is allocated now
        Path("/proc/self/clear_refs").write_text("5")
        self._before = rss_bytes()

    def extra_bytes(self) -> int:
        """Above what was resident at construction."""
        return max(0, _status("VmHWM") - self._before)

    def extra_mib(self) -> float:
        return self.extra_bytes() / MIB


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024
