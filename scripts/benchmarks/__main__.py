"""The command line of `scripts/bench`; see `scripts/bench --help`, which is this text.

    scripts/bench                           every suite, small, in a few minutes
    scripts/bench --full                    every suite, at the sizes the goals speak of
    scripts/bench stall save --full         some of them
    scripts/bench --readme run.json ...     no measuring: README.md's section from what --json wrote

Suites: stall, save and restore (a folder), ranks (eight), object (S3), faults (S3, requests fail), tensors (very many),
steps (very many), memory, interference, export (safetensors, torch.save).
Every contender takes its turn in each round; ratios are taken within a round. Peers that do not run are named with
their error; `pip install '.[bench]'` brings those that torch does not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from . import report
from .frame import FAILURES, FULL, QUICK, TINY, Bench, Outcome, Scale, not_measured, reason, say
from .process import others_cpu_s

ROOT = Path(__file__).resolve().parents[2]
SUITES = (
    "stall",
    "save",
    "restore",
    "ranks",
    "object",
    "faults",
    "tensors",
    "steps",
    "memory",
    "interference",
    "export",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; all if none is given")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_const", const=FULL, dest="scale", help="the sizes of the goals; an hour")
    size.add_argument("--tiny", action="store_const", const=TINY, dest="scale", help="only whether it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write medians and ranges there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures there")
    parser.add_argument(
        "--readme", type=Path, nargs="+", metavar="FILE", help="rewrite README.md's section from these runs' JSON"
    )
    parser.add_argument(
        "--dir", type=Path, default=ROOT / ".bench", help="on the disk to be measured; .bench by default"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    if arguments.readme:
        readme = ROOT / "README.md"
        run = report.merged([json.loads(file.read_text()) for file in arguments.readme])
        readme.write_text(report.into_readme(readme.read_text(), run))
        if arguments.json:
            arguments.json.write_text(report.to_json(run))
        return
    scale = arguments.scale or QUICK
    run = measure(arguments.suites or list(SUITES), scale, arguments.dir)
    run["command"] = " ".join(["scripts/bench", *arguments.suites, *([] if scale is QUICK else [f"--{scale.name}"])])
    print(report.text(run))
    if arguments.json:
        arguments.json.write_text(report.to_json(run))
    if arguments.plot:
        from .plot import draw

        draw(run, arguments.plot)


def measure(suites: list[str], scale: Scale, folder: Path) -> dict[str, Any]:
    """The run's document; see report.py. A suite that fails is a row that says why."""
    warnings.simplefilter("ignore")  # peers' deprecations, and DCP's on running without ranks
    folder.mkdir(parents=True, exist_ok=True)
    where = report.machine(folder)
    say(where)
    if scale is not FULL:
        say(f"{scale.name}: {scale.num_bytes / 2**20:.0f} MiB of state, smaller than the goals speak of; see --full")
    outcomes: dict[str, Outcome] = {}
    busy: dict[str, float] = {}
    for suite in suites:
        started, others_s = time.perf_counter(), others_cpu_s()
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            try:
                outcomes[suite] = importlib.import_module(f".{suite}", __package__).run(Bench(scale, Path(inner)))
            except FAILURES as exc:
                if scale is TINY:
                    raise
                outcomes[suite] = Outcome([not_measured(suite, f"the suite {suite}", "", None, reason(exc))])
        took_s = time.perf_counter() - started
        busy[suite] = round((others_cpu_s() - others_s) / took_s, 2)
        say(f"{suite}: {took_s:.0f} s; all else on the machine kept {busy[suite]:.2f} cores busy")
    return report.document(where, scale, outcomes) | {"others_busy_cores": busy}


if __name__ == "__main__":
    main()
