"""Checkpoints that were made to do harm, each a folder on disk with right checksums, and every way to read one.

Used by test_hostile.py, and with more seeds by scripts/campaign/hostile.py. Nothing here asserts: `attack` tells what
each way in raised.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import threading
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from asyncckpt import CheckpointError, CheckpointManager, KeepBest, ShardReader, open_checkpoint
from asyncckpt.chunks import Chunk, ChunkTable, Key
from asyncckpt.commit import make_manifest, mend_step
from asyncckpt.framing import crc32
from asyncckpt.manifest import FileRecord, Head, Manifest, encode_manifest
from asyncckpt.steps import manifest_name
from asyncckpt.storage import open_storage

STEP, FOREIGN, ATTEMPT = 7, 9, "00000001-0123456789abcdef"
OUTSIDE = "outside"
"""The folder beside the run's that nothing may open."""

Draw = random.Random


def state(seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(6, 4, generator=generator),
        "t": torch.randn(5, 3, generator=generator).t(),
        "big": torch.randn(300, 100, generator=generator),
        "o": (1, "text", b"bytes"),
        "n": seed,
    }


def target() -> dict[str, Any]:
    return {"w": torch.zeros(6, 4), "t": torch.zeros(3, 5), "big": torch.zeros(300, 100), "o": None, "n": 0}


def make_base(root: Path) -> None:
    """What the attacks change: step 7 of ours, step 9 of stock DCP."""
    with CheckpointManager(str(root), 1) as manager:
        manager.save(STEP, state(), files={"given/config": b"{}"})
    dcp.save(state(), checkpoint_id=str(root / str(FOREIGN)), no_dist=True)


@dataclass(frozen=True)
class Case:
    """make: puts it at a copy of the base; the run's folder, and what it draws. step: that is hostile. fails: whether
    restoring it must be an error; else it may be harmless."""

    name: str
    make: Callable[[Path, Draw], None]
    step: int = STEP
    fails: bool = True


# -- the ways in


def ways_in(root: Path, step: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    url = str(root)

    def managed(work: Callable[[CheckpointManager], Any], **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            with CheckpointManager(url, 1, chkpt_on_preemption=False, **options) as manager:
                return work(manager)

        return run

    def save_beside(manager: CheckpointManager) -> None:
        manager.save(STEP + 1, state(2), metrics={"loss": 1.0})
        manager.join()
        manager.save(STEP + 2 + (STEP + 2 == FOREIGN), state(3), metrics={"loss": 2.0})

    def load() -> None:
        dcp.load(target(), storage_reader=ShardReader(root / str(step)), no_dist=True)

    yield "restore", managed(lambda manager: manager.restore(step, target()))
    yield "restore_latest", managed(lambda manager: manager.restore_latest(target()))
    yield "all_steps", managed(lambda manager: (manager.all_steps(), manager.latest_step(), repr(manager)))
    yield "verify", managed(lambda manager: manager.verify(step))
    yield "load_planner", managed(lambda manager: manager.restore(step, target()), load_planner=DefaultLoadPlanner())
    yield "ShardReader", load
    yield "fetch", managed(lambda manager: (manager.files(step), manager.fetch(step, root.parent / "fetched")))
    yield "tree", managed(lambda manager: manager.tree(step))
    yield "read", managed(lambda manager: manager.read(step))
    yield (
        "read rows",
        managed(lambda manager: [manager.read(step, key, (-1, slice(0, 3, 2))) for key in ("w", "t", "big")]),
    )
    yield "open_checkpoint", lambda: open_checkpoint(str(root / str(step))).read("big", slice(0, 1))
    yield "mend", lambda: mend_step(open_storage(url), str(step), None)
    # The last ones: they change it.
    yield "retention", managed(save_beside, max_to_keep=1, keep=KeepBest(1, metric="loss"))
    yield "save", managed(lambda manager: manager.save(step, state(4)))


# -- an attack


@dataclass(frozen=True)
class Report:
    """What one case came to. raised: by way in, "" for none. wrong: what must not happen. grown_bytes: the most memory
    that the ways in took."""

    raised: dict[str, str]
    wrong: list[str]
    grown_bytes: int


ADDRESS_SPACE_BYTES = 2 << 30
ROOM_BYTES = 200 << 20  # threads, clients, a listing: what any restore takes
BYTES_PER_BYTE = 60  # of a checkpoint: JSON that is empty lists takes 20, sets of a pickle 230 each
DEADLINE_S = 120


def attack(case: Case, base: Path, place: Path, draw: Draw) -> Report:
    """Try every way in, in a child of this process, which should hold no threads."""
    shutil.copytree(base, place / "run", symlinks=True)
    (place / OUTSIDE).mkdir()
    told, tell = os.pipe()
    case_made = draw.getstate()
    pid = os.fork()
    if pid == 0:
        try:
            draw.setstate(case_made)
            os.close(told)
            os.chdir(place)
            case.make(place / "run", draw)
            with os.fdopen(tell, "w") as pipe:
                json.dump(_try_all(case, place), pipe)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(tell)
    watchdog = threading.Timer(DEADLINE_S, os.kill, (pid, signal.SIGKILL))
    watchdog.start()
    try:
        with os.fdopen(told) as pipe:
            text = pipe.read()
        _, status = os.waitpid(pid, 0)
    finally:
        watchdog.cancel()
        watchdog.join()
    if status or not text:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        return Report({}, [f"the process ended with {how} (9: it hung for {DEADLINE_S} s)"], 0)
    return Report(**json.loads(text))


def _try_all(case: Case, place: Path) -> dict[str, Any]:
    wrong: list[str] = []
    size = sum(path.lstat().st_size for path in (place / "run").rglob("*") if path.is_file())
    before, started = _classes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ADDRESS_SPACE_BYTES, resource.RLIM_INFINITY))
    touched: list[str] = []
    _watch(place / OUTSIDE, touched)
    raised: dict[str, str] = {}
    for way, enter in ways_in(place / "run", case.step):
        try:
            enter()
        except (Exception, CheckpointException) as exc:
            raised[way] = f"{type(exc).__name__}: {exc}"[:300]
            wrong += _unclear(way, exc)
        else:
            raised[way] = ""
            # An object's checksums are right, and verifying loads nothing.
            ways = ("restore", "load_planner", "ShardReader", *(() if case.name.startswith("object") else ("verify",)))
            if case.fails and way in ways:
                wrong.append(f"{way} found nothing wrong")
    wrong += touched
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started) << 10
    if grown > ROOM_BYTES + BYTES_PER_BYTE * size:
        wrong.append(f"{grown:,} bytes of memory were taken for {size:,} bytes of a checkpoint")
    if (after := _classes()) != before:
        wrong.append(
            f"a class of torch was changed: {[a.items() ^ b.items() for a, b in zip(before, after, strict=True)]}"
        )
    if list(place.rglob("exploded")):
        wrong.append("code was run")
    return {"raised": raised, "wrong": wrong, "grown_bytes": grown}


def _unclear(way: str, exc: BaseException) -> list[str]:
    if isinstance(exc, CheckpointError):
        return []
    if isinstance(exc, RuntimeError) and "Missing key in checkpoint" in str(exc):  # a planner's own word for it
        return []
    if isinstance(exc, AssertionError) and "global metadata read failed" in str(
        exc
    ):  # torch's words for what we raised
        return []
    if isinstance(exc, CheckpointException):  # how torch's dcp.load hands on what a reader raised
        return [line for failure, _ in exc.failures.values() for line in _unclear(way, failure)]
    return [f"{way} raised {''.join(traceback.format_exception(exc))}"]


def _classes() -> list[Any]:
    found = [Metadata, MetadataIndex, TensorStorageMetadata, ChunkStorageMetadata, TensorProperties, torch.Size]
    return [{name: id(value) for name, value in vars(cls).items() if name != "__doc__"} for cls in found]


def _watch(outside: Path, touched: list[str]) -> None:
    """Also of what C code tells."""
    started = (
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "ctypes.dlopen",
    )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in started:
            touched.append(f"{event} {args[0]!r}")
        if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], str):
            full = os.path.realpath(args[0])
            if full.startswith((str(outside), "/etc", "/dev/zero")):
                touched.append(f"{event} {args[0]!r}")

    sys.addaudithook(hook)


# -- pickles

_BOMBS = (
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
    ("builtins", "exec"), ("builtins", "getattr"), ("builtins", "__import__"), ("__builtin__", "eval"),
    ("torch.storage", "_load_from_bytes"), ("torch", "load"), ("torch.hub", "load"), ("functools", "partial"),
    ("importlib", "import_module"), ("runpy", "run_path"), ("pathlib", "Path.touch"), ("operator", "attrgetter"),
    ("torch._utils", "_rebuild_tensor.__globals__"), ("torch.serialization", "os.system"), ("numpy", "fromfile"),
    ("torch._inductor.codecache", "os.system"), ("pickle", "loads"), ("marshal", "loads"), ("torch", "from_file"),
)  # fmt: skip


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def called(module: str, name: str, *args: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(args) + b"tR"


def bomb(draw: Draw) -> bytes:
    module, name = draw.choice(_BOMBS)
    shout = text(f"touch {OUTSIDE}/exploded")
    if draw.random() < 0.5:
        return b"\x80\x04" + text(module) + text(name) + b"\x93" + shout + b"\x85R."
    return b"\x80\x02" + called(module, name, shout) + b"."


def inner_bomb(draw: Draw) -> bytes:
    """As deep inside of what looks right."""
    return b"\x80\x02" + b"}(" + text("a") + b"](" + bomb(draw)[2:-1] + b"eu."


def claims(draw: Draw) -> bytes:
    """Lengths and indices that are not there."""
    huge = draw.choice([2**31 - 1, 2**30, 2**28])
    return b"\x80\x04" + draw.choice(
        [
            b"Nr" + struct.pack("<I", huge) + b".",
            b"X" + struct.pack("<I", huge) + b"ab.",
            b"B" + struct.pack("<I", huge) + b"ab.",
            b"\x8d" + struct.pack("<Q", 2**40 + huge) + b"ab.",
            b"\x8e" + struct.pack("<Q", 2**40 + huge) + b"ab.",
            b"\x96" + struct.pack("<Q", 2**36 + huge) + b"ab.",
            b"\x8b" + struct.pack("<i", huge) + b"ab.",
            b"\x8b" + struct.pack("<i", -huge) + b"ab.",
            b"\x95" + struct.pack("<Q", 2**40 + huge) + b"N.",
            b"T" + struct.pack("<i", -huge) + b".",
            b"j" + struct.pack("<I", huge) + b".",
            b"\x84" + struct.pack("<i", huge) + b".",
            b"2" * 1000 + b".",
            b"Ptouch\n.",
            b"I" + b"9" * 100_000 + b"\n.",
        ]
    )


def laughs(draw: Draw) -> bytes:
    """Little that is a lot to whoever walks it, hashes it or writes it down."""
    shape = draw.choice(["lists", "tuple keys", "deep key", "deep lists", "deep tuples", "deep dicts", "set", "cycle"])
    depth = draw.choice([5_000, 150_000])
    doubling = b"".join(b"q" + bytes([n]) + b"](h%bh%be" % (bytes([n]), bytes([n])) for n in range(60))
    tuples = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
    return (
        b"\x80\x02"
        + {
            "lists": b"]" + doubling + b".",
            "tuple keys": b"}(N" + tuples + b"Nu.",
            "deep key": b"})" + b"\x85" * depth + b"Ns.",
            "deep lists": b"](" * depth + b"e" * depth + b".",
            "deep tuples": b")" + b"\x85" * depth + b".",
            "deep dicts": b"}(K\x01" * depth + b"N" + b"u" * depth + b".",
            "set": b"\x8f()" + b"\x85" * depth + b"\x90.",
            "cycle": b"]q\x00(h\x00h\x00e.",
        }[shape]
    )


def touched_classes(draw: Draw) -> bytes:
    """A state for a class, a function or a singleton in place of an object."""
    what = draw.choice(
        [
            named("torch.distributed.checkpoint.metadata", "Metadata"),
            named("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            named("torch.serialization", "_get_layout"),
            named("torch", "Size"),
            named("collections", "OrderedDict"),
            named("torch.nn.parameter", "Parameter"),
            named("torch._utils", "_rebuild_tensor_v2"),
            named("torch", "float32"),
        ]
    )
    changed = draw.choice(["__eq__", "__hash__", "__init__", "__setstate__", "__class__", "__code__", "x"])
    return b"\x80\x02" + what + b"N}(" + text(changed) + b"Nu\x86b."


PICKLES: dict[str, Callable[[Draw], bytes]] = {
    "bomb": bomb, "inner bomb": inner_bomb, "claims": claims, "laughs": laughs, "classes": touched_classes,
}  # fmt: skip


# -- objects

_STORAGE = b"(" + text("storage") + named("torch", "FloatStorage")


def stored(key: str, numel: int) -> bytes:
    return _STORAGE + text(key) + text("cpu") + integer(numel) + b"tQ"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(function: str, key: str, numel: int, offset: int, size: bytes, stride: bytes, *more: bytes) -> bytes:
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", function, stored(key, numel), integer(offset), size, stride, b"\x89", hooks, *more)


def greedy(draw: Draw) -> bytes:
    """Calls that torch's list allows, with arguments that take memory, or memory of others."""
    huge = draw.choice([10**9, 10**11, 10**15, 2**62, 2**63, 2**80])
    v2, two, one = "_rebuild_tensor_v2", numbers(2), numbers(1)
    quantizer = b"(" + named("torch", "per_tensor_affine") + b"G" + struct.pack(">d", 0.5) + integer(0) + b"t"
    encoded = text("a")
    for _ in range(50):
        encoded = called("_codecs", "encode", encoded, text("hex"))
    return b"\x80\x02" + draw.choice(
        [
            called("__builtin__", "bytearray", integer(huge)),
            called("__builtin__", "bytes", integer(huge)),
            called("__builtin__", "set", b"](" + b")" + b"\x85" * 150_000 + b"e"),
            called("collections", "Counter", b")" + b"\x85" * 150_000 + b"\x85"),
            called("collections", "OrderedDict", b"](](" + b")" + b"\x85" * 150_000 + b"Nee"),
            encoded,
            called("torch", "Tensor", integer(huge)),
            called("torch", "FloatTensor", integer(huge)),
            called("torch.storage", "UntypedStorage", integer(huge)),
            named("torch", "Tensor") + integer(huge) + b"\x85\x81",
            named("torch.storage", "UntypedStorage") + integer(huge) + b"\x85\x81",
            tensor(v2, "0", 4, 0, numbers(huge), one),
            tensor(v2, "0", 4, huge, two, one),
            tensor(v2, "0", 4, 0, two, numbers(huge)),
            tensor(v2, "0", 4, -1, two, one),
            tensor(v2, "0", 4, 0, numbers(-1), one),
            tensor(v2, "0", 4, 0, numbers(2, 2), one),
            tensor(v2, "0", huge, 0, two, one),
            tensor(v2, "1", 1, 0, two, one),
            tensor(v2, "empty", 0, 0, numbers(huge), one),
            tensor("_rebuild_tensor_v3", "0", 4, 0, numbers(4), one, named("torch", "complex128")),
            tensor("_rebuild_tensor", "0", 4, 0, numbers(huge), one),
            called("torch._utils", "_rebuild_qtensor", stored("0", 4), integer(0), numbers(huge), numbers(0), quantizer,
                   b"\x89", called("collections", "OrderedDict")),
            called("torch._utils", "_rebuild_nested_tensor", stored("0", 4), two, two, two),
            called("torch._utils", "_rebuild_parameter", text("x"), b"\x89", b"}"),
            called("torch._tensor", "_rebuild_from_type_v2", named("__builtin__", "bytearray"),
                   named("torch", "Tensor"), integer(huge) + b"\x85", b"}"),
            called("torch", "Size", numbers(huge, huge, -1)) + b"0" + bomb(draw)[2:-1],
            stored("0", 4) + b"N}(" + text("__class__") + b"Nu\x86b",
        ]
    ) + b"."  # fmt: skip


def archive(pickled: bytes, *, packed: bool = False, **records: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        named_records = {
            "data.pkl": pickled,
            "byteorder": b"little",
            "data/0": b"\0" * 16,
            "data/empty": b"",
            **records,
        }
        for name, data in named_records.items():
            made.writestr(f"archive/{name}", data)
    return out.getvalue()


def archives(draw: Draw) -> bytes:
    """What is wrong with the archive itself."""
    plain = bytearray(archive(b"\x80\x02N."))
    entry, end = plain.index(b"PK\x01\x02"), plain.rindex(b"PK\x05\x06")
    kind = draw.choice(
        ["bomb", "sizes", "offset", "count", "twice", "flags", "cut", "none", "pickle", "script", "zip64"]
    )
    if kind == "bomb":
        return archive(b"\x80\x02N.", packed=True, **{"data/0": b"\0" * draw.choice([10**7, 5 * 10**7])})
    if kind == "twice":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as made:
            made.writestr("archive/data.pkl", b"\x80\x02N.")
            made.writestr("else/data.pkl", b"\x80\x02N.")
        return out.getvalue()
    if kind == "sizes":
        struct.pack_into("<II", plain, entry + 20, *(draw.choice([2**32 - 2, 2**31, 10_000]) for _ in range(2)))
    if kind == "offset":
        struct.pack_into("<I", plain, entry + 42, draw.choice([2**32 - 2, len(plain) - 3, 1]))
    if kind == "count":
        struct.pack_into("<HHII", plain, end + 8, 65_535, 65_535, draw.choice([2**32 - 2, 0]), draw.choice([0, 2**31]))
    if kind == "flags":
        struct.pack_into("<H", plain, entry + 8, 1)
    if kind == "zip64":
        plain[end:end] = (
            b"PK\x06\x06"
            + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, 2**60)
            + (b"PK\x06\x07" + struct.pack("<IQI", 0, end, 1))
        )
        struct.pack_into("<HHII", plain, plain.rindex(b"PK\x05\x06") + 8, 65_535, 65_535, 2**32 - 1, 2**32 - 1)
    if kind == "cut":
        return bytes(plain[: draw.randrange(len(plain))])
    if kind == "none":
        return draw.randbytes(draw.randrange(200))
    if kind == "pickle":
        return bomb(draw)
    if kind == "script":
        return archive(bomb(draw), **{"constants.pkl": bomb(draw), "code/__torch__.py": b"import os"})
    return bytes(plain)


def with_object(data: Callable[[Draw], bytes]) -> Callable[[Path, Draw], None]:
    """A step of ours whose object is these bytes, by a manifest that is right in everything."""

    def make(root: Path, draw: Draw) -> None:
        item = data(draw)
        fresh = state()
        folder = root / str(STEP)
        shutil.rmtree(folder)
        with CheckpointManager(str(root), 1, chkpt_on_preemption=False) as manager:
            manager.save(STEP, {key: value for key, value in fresh.items() if key != "o"})
        add_object(folder, "o", item)

    return make


def add_object(folder: Path, key: str, item: bytes) -> None:
    path = max(folder.glob("manifest-*.json"))
    document = json.loads(path.read_bytes())
    (folder / document["head"]["attempt"] / "extra").write_bytes(item)
    document["files"]["name"].append("extra")
    document["files"]["size"].append(len(item))
    document["files"]["crc32"].append(crc32(item))
    document["keys"]["fqn"].append(key)
    document["keys"]["path"].append(len(document["paths"]))
    document["paths"].append([[key]])
    document["keys"]["kind"].append(-1)
    row = {"key": len(document["keys"]["fqn"]) - 1, "box": -1, "layout": -1, "file": len(document["files"]["name"]) - 1}
    for name, value in (row | {"offset": 0, "length": len(item)}).items():
        document["chunks"][name].append(value)
    document["payload_crc32"] += f"{crc32(item):08x}"
    document["item_crc32"] += f"{crc32(item):08x}"
    path.write_bytes(sealed(document))


# -- manifests


def sealed(document: Any) -> bytes:
    """With a right checksum over whatever it is."""
    if isinstance(document, dict):
        document.pop("crc32", None)
    return seal(json.dumps(document, separators=(",", ":")).encode()[:-1])


def seal(body: bytes) -> bytes:
    return body + b',"crc32":"%08x"}' % crc32(body)


WEIRD: tuple[Any, ...] = (
    None, True, False, -1, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 1.5, 1e308, "", "0", "../../x",
    "/", "\0", "\ud800", "a\nb", "x" * 100_000, [], {}, [[]], [None], {"": None}, ["a"], [2**62], [1] * 100, "load",
    "__doc__", "nn", "complex256", "quint8", "float32", [0] * 65, float("nan"), float("inf"),
)  # fmt: skip


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a document, `crc32` apart."""
    found: list[tuple[Any, Any]] = []
    todo = [document]
    while todo:
        value = todo.pop()
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in inside:
            found.append((value, key))
            todo.append(child)
    return found


def weird_value(document: Any, draw: Draw) -> None:
    """Something else at any place."""
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        container, key = draw.choice(places(document))
        what = draw.randrange(5)
        if what == 0 and isinstance(container, dict):
            del container[key]
        elif what == 1 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif what == 2 and isinstance(container, list):
            del container[key]
        elif what == 3 and isinstance(container[key], int):
            container[key] += draw.choice([1, -1, 2**31, 2**62, -(2**62)])
        else:
            container[key] = copy.deepcopy(draw.choice(WEIRD))


Change = Callable[[dict[str, Any]], Any]


def _number_of(document: dict[str, Any], fqn: str) -> tuple[int, int]:
    """(its number among the keys, its chunk's)"""
    key: int = document["keys"]["fqn"].index(fqn)
    return key, document["chunks"]["key"].index(key)


def half_of(document: dict[str, Any]) -> None:
    """ "w" says that it is twice as tall as its only chunk."""
    key, _ = _number_of(document, "w")
    dtype, shape = document["kinds"][document["keys"]["kind"][key]]
    document["kinds"].append([dtype, [2 * shape[0], shape[1]]])
    document["keys"]["kind"][key] = len(document["kinds"]) - 1


def smaller_chunk(document: dict[str, Any], rows: int = 3, start: int = 0) -> None:
    """ "w" has one chunk, of some of its rows."""
    _, chunk = _number_of(document, "w")
    head = document["layouts"][document["chunks"]["layout"][chunk]][3]
    document["layouts"].append(["float32", [rows, 4], [4, 1], head])
    document["boxes"].append([start, 0])
    document["chunks"]["layout"][chunk] = len(document["layouts"]) - 1
    document["chunks"]["box"][chunk] = len(document["boxes"]) - 1


def twice(document: dict[str, Any]) -> None:
    """ "w" has two chunks for its upper half and none for the lower one."""
    smaller_chunk(document)
    _, chunk = _number_of(document, "w")
    for column in document["chunks"].values():
        column.append(column[chunk])
    for crcs in ("payload_crc32", "item_crc32"):
        document[crcs] += document[crcs][8 * chunk : 8 * chunk + 8]


def moved_chunk(document: dict[str, Any]) -> None:
    """ "w" lies outside of itself."""
    smaller_chunk(document, rows=6, start=10**6)


def gone_key(document: dict[str, Any]) -> None:
    """ "w" has no chunk."""
    _, chunk = _number_of(document, "w")
    for column in document["chunks"].values():
        del column[chunk]
    for crcs in ("payload_crc32", "item_crc32"):
        document[crcs] = document[crcs][: 8 * chunk] + document[crcs][8 * chunk + 8 :]


def other_strides(document: dict[str, Any], stride: list[int]) -> None:
    """Of "w", whose payload then is not its memory."""
    _, chunk = _number_of(document, "w")
    head = document["layouts"][document["chunks"]["layout"][chunk]][3]
    document["layouts"].append(["float32", [6, 4], stride, head])
    document["chunks"]["layout"][chunk] = len(document["layouts"]) - 1


def other_dtype(document: dict[str, Any]) -> None:
    """The chunk of "w" is of ints, which a copy would turn into floats."""
    _, chunk = _number_of(document, "w")
    head = document["layouts"][document["chunks"]["layout"][chunk]][3]
    document["layouts"].append(["int32", [6, 4], [4, 1], head])
    document["chunks"]["layout"][chunk] = len(document["layouts"]) - 1


def many_dims(document: dict[str, Any]) -> None:
    """A shape whose number of elements has millions of digits."""
    document["layouts"].append(["float32", [2**61] * 50_000, [0] * 50_000, 0])


def colliding_paths(document: dict[str, Any]) -> None:
    document["paths"].append([["w"]])
    document["keys"]["path"] = [len(document["paths"]) - 1] * len(document["keys"]["fqn"])


def given(document: dict[str, Any], name: Any) -> None:
    """One file more, which a fetch would write under that name."""
    for column, value in (("name", name), ("size", 1), ("crc32", crc32(b"1"))):
        document["files"][column].append(value)


CHANGES: dict[str, Change] = {
    "half": half_of, "hole": smaller_chunk, "twice": twice, "moved": moved_chunk, "gone": gone_key,
    "other dtype": other_dtype, "many dims": many_dims,
    "stride 0": lambda document: other_strides(document, [0, 0]),
    "wide stride": lambda document: other_strides(document, [2**40, 1]),
    "overlap": lambda document: other_strides(document, [1, 1]),
    "attempt up": lambda document: document["head"].update(attempt="../../" + OUTSIDE),
    "attempt root": lambda document: document["head"].update(attempt="/etc"),
    "attempt of another": lambda document: document["head"].update(attempt="00000099-0123456789abcdef"),
    "sequence": lambda document: document["head"].update(sequence=99),
    "huge sequence": lambda document: document["head"].update(sequence=2**63),
    "step": lambda document: document["head"].update(step="7"),
    "world": lambda document: document["head"].update(world_size=0.5),
    "time": lambda document: document["head"].update(time="yesterday"),
    "metrics": lambda document: document["head"].update(metrics={"loss": "NaN"}),
    "metrics list": lambda document: document["head"].update(metrics=[1]),
    "metadata": lambda document: document["head"].update(metadata="text"),
    "extra": lambda document: document["head"].update(more=1),
    "unknown member": lambda document: document.update(more=1),
    "version": lambda document: document["head"].update(version=True),
    "file up": lambda document: document["files"]["name"].__setitem__(0, "../../../" + OUTSIDE + "/secret"),
    "file nul": lambda document: document["files"]["name"].__setitem__(0, "a\0b"),
    "file link": lambda document: document["files"]["name"].__setitem__(0, ".metadata"),
    "given up": lambda document: given(document, "../" * 5 + OUTSIDE + "/secret"),
    "given root": lambda document: given(document, "/etc/passwd"),
    "given nothing": lambda document: given(document, None),
    "given temporary": lambda document: given(document, "a/.tmp-1"),
    "given folder": lambda document: given(document, "given"),
    "given twice": lambda document: given(document, "given/config"),
    "given data": lambda document: given(document, "__0_0.distcp"),
    "dtype": lambda document: document["kinds"][0].__setitem__(0, "load"),
    "dtype doc": lambda document: document["kinds"][0].__setitem__(0, "__doc__"),
    "nan": lambda document: document["head"]["metrics"].update(a=float("nan")),
    "inf": lambda document: document["head"]["metadata"].update(a=float("inf")),
}  # fmt: skip


def changed(change: Callable[[dict[str, Any], Draw], Any]) -> Callable[[Path, Draw], None]:
    def make(root: Path, draw: Draw) -> None:
        path = max((root / str(STEP)).glob("manifest-*.json"))
        document = json.loads(path.read_bytes())
        change(document, draw)
        try:
            path.write_bytes(sealed(document))
        except UnicodeEncodeError:
            path.write_bytes(b"")

    return make


def odd_text(root: Path, draw: Draw) -> None:
    """JSON that is read in more than one way, or at a cost."""
    path = max((root / str(STEP)).glob("manifest-*.json"))
    body = path.read_bytes()[:-20].rstrip(b",")
    odd = draw.choice(
        [
            b'"kinds":[],"kinds":[]', b'"deep":' + b"[" * 200_000 + b"]" * 200_000, b'"deep":' + b'{"a":' * 100_000,
            b'"digits":' + b"9" * 1_000_000, b'"e":1e999', b'"x":NaN', b'"x":-Infinity', b'"files":{"name":[]}',
            b'"u":"\\ud800"', b'"raw":"\xff\xfe"', b'"bom":"\xef\xbb\xbf"', b'"many":[' + b"[]," * 150_000 + b"[]]",
            b'"head":{}', b'"a":-0', b'"wide":"\xf0\x9f\x98\x80"',
        ]
    )  # fmt: skip
    end = body.rindex(b',"crc32"') if b',"crc32"' in body[-40:] else len(body)
    path.write_bytes(seal(body[:end] + b"," + odd))


# -- names


def odd_names(root: Path, draw: Draw) -> None:
    """Folders and files that nearly are steps of ours. The step that is there stays what it is."""
    digits = draw.choice(["9" * 18, "9" * 19, "9" * 200, str(2**63), str(2**63 - 1), "1" + "0" * 15])
    manifest = max((root / str(STEP)).glob("manifest-*.json")).read_bytes()
    for name in (
        "00001", "1e3", "\u0663", "-1", "+1", " 8", "8 ", "8\n", "0x8", "1_0", digits, "\udcff", "a\nb",
    ):  # fmt: skip
        if draw.random() < 0.5:
            (root / name).mkdir(exist_ok=True)
            (root / name / "manifest-00000002.json").write_bytes(manifest)
    if draw.random() < 0.5:
        (root / "8").mkdir(exist_ok=True)
        for name in (f"manifest-{digits}.json", "manifest-1.json", "manifest--1.json", "manifest-\u0663.json"):
            (root / "8" / name).write_bytes(manifest)
        (root / "8" / f"{digits}-{'a' * 16}").mkdir()
        (root / "8" / f"{digits}-{'a' * 16}" / "data").write_bytes(b"x")
    for name in ("code.pkl", "__init__.py", "conftest.py", "manifest.pkl", "manifest-00000001.json.pkl"):
        (root / str(STEP) / name).write_bytes(bomb(draw))


def links(root: Path, draw: Draw) -> None:
    """What lies outside is linked to from the inside."""
    folder, outside = root / str(STEP), root.parent / OUTSIDE
    attempt = next(path for path in folder.iterdir() if path.is_dir())
    data = sorted(attempt.iterdir())[0]
    kind = draw.choice(
        ["file", "attempt", "manifest", "pipe", "loop", "device", "hard"]
    )  # not the step's own folder: ShardReader's root may be a link
    if kind in ("file", "hard", "loop", "device", "pipe"):
        shutil.copy(data, outside / "secret")
        data.unlink()
    if kind == "file":
        data.symlink_to(outside / "secret")
    if kind == "loop":
        data.symlink_to(data)
    if kind == "device":
        data.symlink_to("/dev/zero")
    if kind == "hard":
        data.symlink_to(os.path.relpath(outside / "secret", attempt))
    if kind == "pipe":
        os.mkfifo(data)
    if kind == "attempt":
        shutil.move(attempt, outside / "moved")
        attempt.symlink_to(outside / "moved")
    if kind == "manifest":
        path = max(folder.glob("manifest-*.json"))
        shutil.move(path, outside / "manifest")
        path.symlink_to(outside / "manifest")


# -- stock metadata


def stock_metadata(pickled: Callable[[Draw], bytes]) -> Callable[[Path, Draw], None]:
    def make(root: Path, draw: Draw) -> None:
        (root / str(FOREIGN) / ".metadata").write_bytes(pickled(draw))

    return make


def stock_object(data: Callable[[Draw], bytes]) -> Callable[[Path, Draw], None]:
    """In place of the object, or of a tensor."""

    def make(root: Path, draw: Draw) -> None:
        path, item = root / str(FOREIGN) / ".metadata", data(draw)
        metadata = pickle.loads(path.read_bytes())
        fqn = draw.choice(["o", "w"])
        (root / str(FOREIGN) / "extra").write_bytes(item)
        for index in metadata.storage_data:
            if index.fqn == fqn:
                metadata.storage_data[index] = _StorageInfo("extra", 0, len(item))
        path.write_bytes(pickle.dumps(metadata))

    return make


def stock_values(root: Path, draw: Draw) -> None:
    """Metadata of the right classes that says what cannot be."""
    path = root / str(FOREIGN) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "w")
    info, entry = metadata.storage_data[index], metadata.state_dict_metadata["w"]
    shutil.copy(root / str(FOREIGN) / info.relative_path, root.parent / OUTSIDE / "secret")
    kind = draw.randrange(14)
    paths = [f"../../{OUTSIDE}/secret", f"../../../{OUTSIDE}/secret", "/etc/passwd",
             str(root.parent / OUTSIDE / "secret"), "a\0b", "", ".", "..", "x" * 5000, "a\nb", "\udcff", b"bytes", 7,
             None]  # fmt: skip
    odd: list[Any] = [-1, 2**62, 2**63, 10**30, 1.5, "1", None, True, 10**12]
    if kind < 3:
        info.relative_path = draw.choice(paths)
    elif kind == 3:
        info.offset = draw.choice(odd)
    elif kind == 4:
        info.length = draw.choice(odd)
    elif kind == 5:
        entry.size = draw.choice([(10**18,) * 3, torch.Size([12, 4]), [6, 4], (6, "4"), (0.5,), None, (1,) * 100])
    elif kind == 6:
        entry.chunks = draw.choice([[], None, [None], entry.chunks * 2, (1,), [ChunkStorageMetadata((0, 0), (3, 4))]])  # type: ignore[arg-type]
    elif kind == 7:
        entry.properties = draw.choice([None, TensorProperties(None), TensorProperties("float32")])  # type: ignore[arg-type]
    elif kind == 8:
        metadata.storage_data = draw.choice([None, {}, [], {1: info}, {index: "x"}, {MetadataIndex(("w",)): info}])  # type: ignore[arg-type]
    elif kind == 9:
        metadata.state_dict_metadata = draw.choice([None, {}, {1: entry}, {"w": None}, {"w": BytesStorageMetadata()}])
    elif kind == 10:
        metadata.planner_data = draw.choice([7, {1: 2}, {"w": ["a"]}, {"w": (None,)}, {"w": ()}, {"w": ("w", 10**30)}])
    elif kind == 11:
        metadata.planner_data = {"w": ("o", 10**7), "o": ("o",)}
    elif kind == 12:
        entry.chunks = [ChunkStorageMetadata(torch.Size([2**40, 0]), torch.Size([6, 4]))]
    else:
        metadata = draw.choice([{}, [], None, 7, "x", entry, index, Metadata, TensorStorageMetadata])
    path.write_bytes(pickle.dumps(metadata))


def any_object(draw: Draw) -> bytes:
    return archive(draw.choice([*PICKLES.values(), greedy])(draw))


CASES = [
    *(Case(f"metadata-{name.replace(' ', '-')}", stock_metadata(made), FOREIGN) for name, made in PICKLES.items()),
    Case("metadata-values", stock_values, FOREIGN, fails=False),
    *(
        Case(
            f"object-{name.replace(' ', '-')}",
            with_object(lambda draw, made=made: archive(made(draw))),  # type: ignore[misc]
            fails=name not in ("laughs", "claims"),
        )
        for name, made in (PICKLES | {"greedy": greedy}).items()
    ),
    Case("object-archive", with_object(archives), fails=False),
    Case("stock-object", stock_object(any_object), FOREIGN, fails=False),
    Case("stock-archive", stock_object(archives), FOREIGN, fails=False),
    *(
        Case(f"manifest-{name.replace(' ', '-')}", changed(lambda document, draw, change=change: change(document)))  # type: ignore[misc]
        for name, change in CHANGES.items()
    ),
    Case("manifest-paths", changed(lambda document, draw: colliding_paths(document)), fails=False),
    Case("manifest-weird", changed(weird_value), fails=False),
    Case("manifest-text", odd_text),
    Case("names", odd_names, fails=False),
    Case("links", links),
]  # fmt: skip


def manifest_of(item: bytes) -> tuple[Manifest, bytes]:
    """A whole step of one object, small enough for a million of them."""
    chunk = Chunk("o", None, None, 0, "extra", 0, len(item), crc32(item), crc32(item))
    head = Head(STEP, 1, ATTEMPT, "id", 1, "2", "0")
    return make_manifest(
        head, {"o": Key(("o",), None, None)}, ChunkTable.of([chunk]), [FileRecord("extra", len(item), 1)]
    )


__all__ = ["CASES", "Case", "attack", "encode_manifest", "make_base", "manifest_name", "manifest_of", "ways_in"]
