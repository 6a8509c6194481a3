"""Times what a checkpoint costs, ours beside others', in one run, and against what the machine itself can do.

    scripts/bench                               every suite
    scripts/bench stall --gib 0.25 --rounds 9   one of them, on another amount

stall    how long one save keeps a training loop from going on. "call": the call. "stall": call, and the wait before
         the next update of the parameters, where a copy may still be under way. Not in it: what a writer at work takes
         from later steps in cores and memory bandwidth.
save     from the call to durable, nothing else running.
restore  into live tensors, the files in the page cache.

Contenders (bench_contenders.py) take turns: one round of each, then the next round, every other one in reverse; the
first is a warm-up. A round ends when its checkpoint is durable, deleted, and the disk idle. The limits are measured in
the same rounds: a copy of the same tensors to warm memory, plain writes and reads of the same bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from bench_contenders import OURS, PEER, RESTORERS, SAVERS, Pending, Restorer, Save, Saver, Training

ROOT = Path(__file__).resolve().parents[1]
LIMIT = "limit"
SLICE_BYTES = 16 << 20  # of a raw read or write; smaller ones do not reach the disk's rate


@dataclass
class Result:
    """One contender's rounds. seconds: {what: one value a round}. error: why it did not run, else ""."""

    name: str
    kind: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    error: str = ""

    def median(self, what: str) -> float:
        return statistics.median(self.seconds[what])


Round = Callable[[int], Mapping[str, float]]
"""One round, by number, and its seconds."""
Contender = tuple[str, AbstractContextManager[Round]]
"""Its kind, and what gives its rounds."""


@dataclass(frozen=True)
class Bench:
    """What every suite is given. scratch: warm, page-aligned memory for all bytes of the tensors."""

    training: Training
    scratch: mmap.mmap
    folder: Path
    rounds: int

    def run(self, contenders: Mapping[str, Contender]) -> list[Result]:
        """The contenders' results, in their order. One that fails is out, and its error is its result."""
        results = {name: Result(name, kind) for name, (kind, _) in contenders.items()}
        with ExitStack() as stack:
            running: dict[str, Round] = {}
            for name, (_, start) in contenders.items():
                try:
                    running[name] = stack.enter_context(start)
                except Exception as exc:
                    results[name].error = _reason(exc)
            for number in range(self.rounds + 1):
                print(f"\r{'round ' + str(number) if number else 'warm-up'} of {self.rounds}", end="", file=sys.stderr)
                for name in sorted(running, key=list(results).index, reverse=number % 2 == 1):
                    try:
                        seconds = running[name](number)
                    except Exception as exc:
                        results[name].error = _reason(exc)
                        del running[name]
                        continue
                    finally:
                        gc.collect()
                        os.sync()
                    for what in seconds if number else ():
                        results[name].seconds.setdefault(what, []).append(seconds[what])
            print(file=sys.stderr)
        return list(results.values())


# -- suites: one function each, that returns the results


def stall(bench: Bench) -> list[Result]:
    @contextmanager
    def rounds_of(name: str, saver: Saver) -> Iterator[Round]:
        folder = _folder(bench, name)
        with saver(folder, bench.training) as save:
            yield partial(_stalled_round, bench.training, save, folder)

    return bench.run(
        {
            "limit: copy to warm memory": (LIMIT, nullcontext(partial(_copy_round, bench))),
            **{name: (kind, rounds_of(name, saver)) for name, (kind, saver) in SAVERS.items() if "threads" not in name},
        }
    )


def _stalled_round(training: Training, save: Save, folder: Path, number: int) -> Mapping[str, float]:
    started = time.perf_counter()
    pending = save(number)
    call_s = time.perf_counter() - started
    training.forward_backward()
    wait_s = _timed(pending.before_update)
    training.optimizer.step()
    _finish(pending, folder, number)
    return {"call": call_s, "stall": call_s + wait_s}


def _copy_round(bench: Bench, _: int) -> Mapping[str, float]:
    targets = _scratch_tensors(bench)
    seconds = _timed(lambda: [t.copy_(s) for t, s in zip(targets, bench.training.tensors, strict=True)])
    return {"call": seconds, "stall": seconds}


def save(bench: Bench) -> list[Result]:
    @contextmanager
    def rounds_of(name: str, saver: Saver) -> Iterator[Round]:
        folder = _folder(bench, name)
        with saver(folder, bench.training) as save:
            yield partial(_saved_round, save, folder)

    names = [name for name in SAVERS if "async" not in name and "no fsync" not in name and "Overlapping" not in name]
    return bench.run(
        {
            "limit: write, fsync": (LIMIT, _raw_writes(bench, 1, 0)),
            "limit: O_DIRECT, 2 threads": (LIMIT, _raw_writes(bench, 2, os.O_DIRECT)),
            "limit: O_DIRECT, 4 threads": (LIMIT, _raw_writes(bench, 4, os.O_DIRECT)),
            **{name: (SAVERS[name][0], rounds_of(name, SAVERS[name][1])) for name in names},
        }
    )


def _saved_round(save: Save, folder: Path, number: int) -> Mapping[str, float]:
    started = time.perf_counter()
    pending = save(number)
    pending.join()
    seconds = time.perf_counter() - started
    _finish(pending, folder, number)
    return {"time": seconds}


@contextmanager
def _raw_writes(bench: Bench, num_threads: int, flags: int) -> Iterator[Round]:
    path = bench.folder / f"raw-{num_threads}-{flags}"

    def write() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
        try:
            _in_slices(bench.scratch, num_threads, lambda view, at: os.pwrite(descriptor, view, at))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def one_round(_: int) -> Mapping[str, float]:
        seconds = _timed(write)
        path.unlink()
        return {"time": seconds}

    yield one_round


def restore(bench: Bench) -> list[Result]:
    @contextmanager
    def rounds_of(name: str, restorer: Restorer) -> Iterator[Round]:
        with restorer(_folder(bench, name), bench.training) as restore:
            yield lambda _: {"time": _timed(restore)}

    return bench.run(
        {
            "limit: preadv, 4 threads": (LIMIT, _raw_reads(bench)),
            **{name: (kind, rounds_of(name, restorer)) for name, (kind, restorer) in RESTORERS.items()},
        }
    )


@contextmanager
def _raw_reads(bench: Bench) -> Iterator[Round]:
    path = bench.folder / "raw-read"
    path.write_bytes(bench.scratch)
    descriptor = os.open(path, os.O_RDONLY)

    def read() -> None:
        _in_slices(bench.scratch, 4, lambda view, at: os.preadv(descriptor, [view], at))

    yield lambda _: {"time": _timed(read)}
    os.close(descriptor)
    path.unlink()


SUITES: dict[str, tuple[Callable[[Bench], list[Result]], str]] = {
    "stall": (stall, "stall"),
    "save": (save, "time"),
    "restore": (restore, "time"),
}
"""{name: (what runs it, which of its seconds is compared)}"""


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _finish(pending: Pending, folder: Path, number: int) -> None:
    """Raise what failed, and delete what was written."""
    pending.join()
    written = folder / str(number)
    if not written.exists():
        raise FileNotFoundError(f"nothing was saved in {written}")
    if written.is_dir():
        shutil.rmtree(written)
    else:
        written.unlink()


def _folder(bench: Bench, name: str) -> Path:
    return bench.folder / "".join(c if c.isalnum() else "-" for c in name)


def _scratch_tensors(bench: Bench) -> list[torch.Tensor]:
    tensors, offset = [], 0
    for tensor in bench.training.tensors:
        flat = torch.frombuffer(bench.scratch, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        tensors.append(flat.view(tensor.shape))
        offset += tensor.nbytes
    return tensors


def _in_slices(memory: mmap.mmap, num_threads: int, move: Callable[[memoryview, int], int]) -> None:
    def move_slice(at: int) -> None:
        view = memoryview(memory)[at : at + SLICE_BYTES]
        if move(view, at) != len(view):
            raise OSError(f"a short read or write at {at}")

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(move_slice, range(0, len(memory), SLICE_BYTES)))


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# -- reports


def table(results: Sequence[Result], compared: str, num_bytes: int) -> str:
    """A Markdown table: medians with their range; ratios of medians, those of the compared measure."""
    ran = [result for result in results if not result.error]
    measures = list(ran[0].seconds)
    limit = min(result.median(compared) for result in ran if result.kind == LIMIT)
    best_peer = min((result.median(compared) for result in ran if result.kind == PEER), default=float("nan"))
    rate = [] if "stall" in measures else ["GB/s"]
    rows = [["", *(f"{measure}, s" for measure in measures), *rate, "÷ limit", "÷ best peer"]]
    for result in ran:
        seconds = result.median(compared)
        name = f"**{result.name}**" if result.kind == OURS else result.name
        cells = [_spread(result.seconds[measure]) for measure in measures]
        rates = [f"{num_bytes / seconds / 1e9:.2f}"] * len(rate)
        rows.append([name, *cells, *rates, f"{seconds / limit:.2f}", f"{seconds / best_peer:.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    notes = [f"{result.name} did not run: {result.error}" for result in results if result.error]
    return "\n".join([*lines, "", *notes])


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def machine(folder: Path) -> str:
    """One line that says where the figures come from."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    ram_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = subprocess.run(["df", "--output=fstype", folder], capture_output=True, text=True).stdout.split()[-1]
    return (
        f"{cpu[1] if cpu else 'unknown CPU'}, {os.cpu_count()} cores, {ram_gib:.0f} GiB RAM, {disk}, "
        f"torch {torch.__version__}, Linux {os.uname().release}, load {os.getloadavg()[0]:.1f} at the start"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; all if none is given")
    parser.add_argument("--rounds", type=int, default=5, help="after the warm-up; 5 by default")
    parser.add_argument("--gib", type=float, default=0.25, help="of tensors; 0.25 by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's seconds there")
    parser.add_argument(
        "--dir", type=Path, default=ROOT / ".bench", help="on the disk to be measured; .bench by default"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.suites) - set(SUITES):
        parser.error(f"no such suite: {', '.join(unknown)}")

    warnings.simplefilter("ignore")  # peers' deprecations, and DCP's on running without ranks
    where = machine(_made(arguments.dir))
    print(where)
    reports = {}
    training = Training(round(arguments.gib * 2**30))
    for name in arguments.suites or SUITES:
        run, compared = SUITES[name]
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            scratch = mmap.mmap(-1, -(-training.num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)  # whole pages: O_DIRECT
            scratch[:] = b"\1" * len(scratch)
            started, others_s = time.perf_counter(), _others_cpu_s()
            results = run(Bench(training, scratch, Path(folder), arguments.rounds))
        took_s, others_s = time.perf_counter() - started, _others_cpu_s() - others_s
        amount = f"{training.num_bytes / 1e9:.2f} GB in {len(training.tensors)} tensors"
        print(f"\n{name}: {amount}, median (range) of {arguments.rounds} rounds. "
              f"Took {took_s:.0f} s; all else on the machine kept {others_s / took_s:.2f} cores busy.\n")  # fmt: skip
        print(table(results, compared, training.num_bytes))
        reports[name] = [asdict(result) for result in results]
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": where, "suites": reports}, indent=1))


def _others_cpu_s() -> float:
    """CPU seconds since boot of all but this process and its children that have ended: kernel threads, other users."""
    user, nice, system = (int(field) for field in Path("/proc/stat").read_text().split()[1:4])
    own = os.times()
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(own[:4])


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
