"""`scripts/torture --fuzz SECONDS`: the parsers of fuzz.py under atheris, whose inputs follow what the parsers cover.

A process of its own, as libFuzzer ends it. The first byte of an input says whose it is. Exit status 0: nothing found.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["asyncckpt"]):
    from scripts.campaign.fuzz import TARGETS
    from scripts.campaign.row import draws

SEEDS = 40  # of each parser, to begin with
LIMITS = ("-rss_limit_mb=6000", "-timeout=60", "-max_len=20000", "-print_final_stats=1", "-verbosity=0")


def one_input(data: bytes) -> None:
    if not data:
        return
    target = list(TARGETS.values())[data[0] % len(TARGETS)]
    with contextlib.suppress(*target.refused):
        target.run(data[1:])


def main(seconds: float, seed: int) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="torture-") as corpus:
        for number, (name, target) in enumerate(TARGETS.items()):
            draw = draws(seed, f"atheris {name}", 0)
            for sample in range(SEEDS):
                Path(corpus, f"{name}-{sample}").write_bytes(bytes([number]) + target.make(draw))
        # It keeps what it finds in the folder, and a failing input where it was started.
        limits = [*LIMITS, f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}", f"-artifact_prefix={corpus}/"]
        atheris.Setup([sys.argv[0], *limits, corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
