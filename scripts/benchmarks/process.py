"""This process's memory, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

from .frame import MIB


def rss_bytes() -> int:
    return _status("VmRSS")


def pss_bytes() -> int:
    """Pages shared with other processes count as their share."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


class PeakRss:
    """From construction on; one at a time, as the kernel keeps one high-water mark."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before, and kept, hides what is allocated now
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
