"""The command line of `scripts/simulate`; see `scripts/simulate --help`, which is this text.

    scripts/simulate --ranks 4096 --chunks 1000000      one job: rank 0's seconds, what is exchanged, requests, sizes
    scripts/simulate --curve growth.png                 8 to as many ranks, with as many chunks for each; and a picture

The state of the job is AdamW's under FSDP2: three parts of each parameter on every rank, its step counter on all, and
two objects of each rank's own. What runs and what does not: scripts/simulation.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scripts.simulation import OTHER, PAGE_KEYS, SAVES, TIMED, WHO_IS_MISSING, SimulatedJob

CURVE = (8, 64, 256, 1024, 4096)
PUTS_PER_S = 3_500
"""Of one prefix, as S3's guide to performance states it."""
SYNC_POLL_S = 0.1
"""Of SyncPoint's watcher, at least."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4096, help="at least 2; default: 4096")
    parser.add_argument("--chunks", type=int, default=1_000_000, help="of all ranks, about; default: a million")
    parser.add_argument("--curve", type=Path, metavar="FILE", help="also for fewer ranks; a picture there, as PNG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error("--ranks: one rank exchanges nothing; at least 2")
    counts = [arguments.ranks]
    if arguments.curve:
        counts = [*(count for count in CURVE if count < arguments.ranks), arguments.ranks]
    console, jobs = Console(highlight=False, width=110), []
    for count in counts:
        job = document(SimulatedJob(count, arguments.chunks * count // arguments.ranks))
        jobs.append(job)
        for table in tables(job):
            console.print(table)
    if len(jobs) > 1:
        console.print(growth_table(jobs))
    if arguments.json:
        arguments.json.write_text(json.dumps(jobs, indent=1))
    if arguments.curve:
        draw(jobs, arguments.curve)


def document(job: SimulatedJob) -> dict[str, Any]:
    """All figures of a job. bytes_each: that a rank other than the coordinator sends and receives."""
    exchanged = {}
    for phase, traffic in job.ledger.traffic.items():
        first, other = traffic[0], traffic[OTHER]
        bytes_each = other.message_bytes + other.request_bytes
        exchanged[phase] = {
            "messages_each": other.messages,
            "requests_coordinator": first.requests,
            "requests_each": other.requests,
            "bytes_each": bytes_each,
            "bytes_in_all": bytes_each * (job.num_ranks - 1) + first.request_bytes,
        }
    return {
        "ranks": job.num_ranks,
        "chunks": job.num_chunks,
        "items": job.num_items,
        "state_bytes": job.num_bytes,
        "coordinator_s": job.seconds,
        "coordinator_peak_bytes": job.peak_bytes,
        "each_s": job.each_s,
        "exchanged": exchanged,
        "storage_requests": {phase: dict(requests) for phase, requests in job.storage.requests.items()},
        "manifest_bytes": len(job.storage.written["manifest"]),
        "metadata_bytes": len(job.storage.written[".metadata"]),
        "at_any_time": at_any_time(job),
    }


def at_any_time(job: SimulatedJob) -> dict[str, float]:
    """What does not belong to a save; by counting, not run."""
    num_ranks = job.num_ranks
    mesh_requests, mesh_bytes = gloo_mesh(num_ranks)
    return {
        "mesh_connections_each": num_ranks - 1,
        "mesh_store_requests": mesh_requests,
        "mesh_store_bytes": mesh_bytes,
        "idle_store_requests_per_s": num_ranks / max(SYNC_POLL_S, job.poll_s),
        # Every rank lists the files of the step, and reads its manifest.
        "restore_lists": num_ranks * -(-(num_ranks + 2) // PAGE_KEYS),
        "restore_manifest_bytes": num_ranks * len(job.storage.written["manifest"]),
    }


def gloo_mesh(num_ranks: int) -> tuple[int, int]:
    """(requests, bytes) of all ranks to torch's store until each has a connection to each: the manager's constructor.

    Every rank leaves its addresses, one for each other, and reads those of all. Seen with a store that counts, 2 to 32
    ranks, torch 2.13; an address takes some bytes more or less.
    """
    return num_ranks + 2 * num_ranks**2, num_ranks * (num_ranks + 1) * (154 + 8 * num_ranks)


def tables(job: Mapping[str, Any]) -> list[Table]:
    shown = f"{job['ranks']:,} ranks, {job['chunks']:,} chunks, {job['state_bytes'] / 1e12:.3g} TB of state"
    return [seconds_table(job, shown), exchange_table(job), other_table(job)]


def seconds_table(job: Mapping[str, Any], title: str) -> Table:
    phases = job["coordinator_s"]
    table = new_table(f"{title}: seconds of rank 0", ["", *phases])
    for part in [*TIMED, "all else", "in all"]:
        spent = [seconds.get(part) for seconds in phases.values()]
        if any(spent):
            table.add_row(part, *("" if one is None else f"{one:.3f}" for one in spent), end_section=part == "all else")
    table.add_row("peak memory, more than before", *(_mb(job["coordinator_peak_bytes"][phase]) for phase in phases))
    return table


def exchange_table(job: Mapping[str, Any]) -> Table:
    table = new_table(
        "Exchanged", ["", "messages", "store requests, rank 0", "any other", "bytes, any other", "in all"]
    )
    for phase, sent in job["exchanged"].items():
        table.add_row(
            phase, str(sent["messages_each"]), str(sent["requests_coordinator"]), str(sent["requests_each"]),
            _mb(sent["bytes_each"]), _mb(sent["bytes_in_all"]),
        )  # fmt: skip
    return table


def other_table(job: Mapping[str, Any]) -> Table:
    requests, standing, each_s = job["storage_requests"][SAVES[1]], job["at_any_time"], job["each_s"]
    num_puts = sum(count for kind, count in requests.items() if kind.startswith("PUT"))
    table = new_table("Storage, and what does not belong to a save", ["", ""])
    for kind, count in requests.items():
        table.add_row(f"{kind}, a save", f"{count:,}")
    table.add_row(f"these PUTs at {PUTS_PER_S:,}/s of one prefix", f"{num_puts / PUTS_PER_S:.1f} s")
    table.add_row("manifest, .metadata", f"{_mb(job['manifest_bytes'])}, {_mb(job['metadata_bytes'])}")
    table.add_row("manifest read by all ranks to restore", _mb(standing["restore_manifest_bytes"]))
    table.add_row("LISTs of all ranks to restore", f"{standing['restore_lists']:,}")
    table.add_row("manifest opened by each in", f"{each_s['open manifest']:.2f} s")
    table.add_row("planned by each in, first", f"{each_s['plan']:.2f} s")
    table.add_row(f"{WHO_IS_MISSING}, asked by one rank", f"{each_s[WHO_IS_MISSING]:.3f} s")
    table.add_row(
        "gloo's mesh, made by the constructor: connections of a rank", f"{standing['mesh_connections_each']:,}"
    )
    table.add_row("its store requests", f"{standing['mesh_store_requests']:,}")
    table.add_row("its bytes from the store", _mb(standing["mesh_store_bytes"]))
    table.add_row("store requests while nothing is saved", f"{standing['idle_store_requests_per_s']:.0f}/s")
    return table


def growth_table(jobs: Sequence[Mapping[str, Any]]) -> Table:
    """A column for each job."""
    table = new_table("Growth", ["ranks", *(f"{job['ranks']:,}" for job in jobs)])
    table.add_row("chunks", *(f"{job['chunks']:,}" for job in jobs))
    for phase in jobs[0]["coordinator_s"]:
        table.add_row(f"{phase}: rank 0, s", *(f"{job['coordinator_s'][phase]['in all']:.3g}" for job in jobs))
    for phase in jobs[0]["exchanged"]:
        table.add_row(f"{phase}: bytes of a rank", *(_mb(job["exchanged"][phase]["bytes_each"]) for job in jobs))
    for phase in jobs[0]["exchanged"]:
        table.add_row(f"{phase}: bytes in all", *(_mb(job["exchanged"][phase]["bytes_in_all"]) for job in jobs))
    table.add_row("manifest", *(_mb(job["manifest_bytes"]) for job in jobs))
    table.add_row("read by all to restore", *(_mb(job["at_any_time"]["restore_manifest_bytes"]) for job in jobs))
    table.add_row("peak memory", *(_mb(max(job["coordinator_peak_bytes"].values())) for job in jobs))
    table.add_row("gloo's mesh, store requests", *(f"{job['at_any_time']['mesh_store_requests']:,}" for job in jobs))
    return table


def new_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


def _mb(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def draw(jobs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rank 0's seconds and memory, and what is exchanged, against the number of ranks; both axes logarithmic."""
    from matplotlib.figure import Figure  # slow to import; without pyplot it needs no display

    ranks = [job["ranks"] for job in jobs]
    phases = list(jobs[0]["coordinator_s"])
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    seconds, exchanged, kept = figure.subplots(1, 3)
    for phase in phases:
        seconds.plot(ranks, [job["coordinator_s"][phase]["in all"] for job in jobs], marker="o", label=phase)
        exchanged.plot(ranks, [job["exchanged"][phase]["bytes_in_all"] for job in jobs], marker="o", label=phase)
    kept.plot(ranks, [job["manifest_bytes"] for job in jobs], marker="o", label="manifest")
    kept.plot(ranks, [max(job["coordinator_peak_bytes"].values()) for job in jobs], marker="o", label="peak memory")
    for name in ("restore_manifest_bytes", "mesh_store_bytes"):
        label = "manifest, read by all to restore" if name.startswith("restore") else "gloo's mesh, from the store"
        kept.plot(ranks, [job["at_any_time"][name] for job in jobs], marker="o", label=label)
    for axes, title in ((seconds, "seconds of rank 0"), (exchanged, "bytes exchanged by all"), (kept, "bytes")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
        axes.set_xlabel(f"ranks, with {jobs[-1]['chunks'] // ranks[-1]:,} chunks each")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(color="#eeeeee")
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
