"""A process of its own that writes and opens the index of a step of many chunks, one tensor each; called by tensors.py.

    python -m scripts.benchmarks.index_process NUM_CHUNKS FOLDER    prints JSON: seconds, and MiB of memory

Nothing that the library may keep between saves is kept here: both are the first time. Memory is above that of a process
that has imported the library, and holds what is written or opened.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from asyncckpt.chunks import ChunkTable, Key, Keys, Placement
from asyncckpt.framing import Layout
from asyncckpt.manifest import FileRecord, Head, Manifest, decode_manifest, encode_manifest
from asyncckpt.storage import open_storage

from .process import PeakRss

ITEM_BYTES, HEAD_BYTES, NUM_FILES = 8192, 1024, 64
LAYOUT = Layout("float32", (32, 32), (32, 1))
NAME = "manifest-00000001.json"


def made(num_chunks: int) -> Manifest:
    fqns = [f"model.layers.{number // 8}.part{number % 8}.weight" for number in range(num_chunks)]
    number = np.arange(num_chunks, dtype=np.int64)
    files = tuple(f"__0_{n}.distcp" for n in range(NUM_FILES))
    placement = Placement(
        fqns=tuple(fqns),
        key=number,
        offsets=[(0, 0)] * num_chunks,
        layouts=((LAYOUT, HEAD_BYTES),),
        layout=np.zeros(num_chunks, np.int64),
        files=files,
        file=number % NUM_FILES,
        offset=number // NUM_FILES * ITEM_BYTES,
        length=np.full(num_chunks, ITEM_BYTES, np.int64),
    )
    crcs = np.random.default_rng(0).integers(0, 2**32, (2, num_chunks), np.uint32)
    size = (num_chunks // NUM_FILES + 1) * ITEM_BYTES
    return Manifest(
        Head(0, 1, "00000001-0123456789abcdef", "save", 1, "2.13", "0.1"),
        Keys.of({fqn: Key(tuple(fqn.split(".")), "float32", (32, 32)) for fqn in fqns}),
        ChunkTable(placement, crcs[0], crcs[1], {}),
        [FileRecord(name, size, 1) for name in files],
        1,
        1,
    )


def main() -> None:
    num_chunks, folder = int(sys.argv[1]), sys.argv[2]
    storage = open_storage(folder)
    peak = PeakRss()
    manifest = made(num_chunks)
    started = time.perf_counter()
    storage.create(NAME, encode_manifest(manifest))
    write_s = time.perf_counter() - started
    peak_mib = peak.extra_mib()
    del manifest
    peak = PeakRss()
    started = time.perf_counter()
    opened = decode_manifest(storage.read_file(NAME))
    open_s = time.perf_counter() - started
    assert len(opened.chunks) == num_chunks
    print(json.dumps({"write_s": write_s, "open_s": open_s, "peak_mib": max(peak_mib, peak.extra_mib())}))


if __name__ == "__main__":
    main()
