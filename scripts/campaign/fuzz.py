"""The parsers by the million, and whole restores by the thousand, on bytes that nearly are right.

An execution is one call of a parser with one input, or one `manager.restore` of a step whose files were changed; it
must return or raise the parser's own error. What is made for it follows the structure (JSON with the checksum set
right, opcodes of pickles, names of files), or is a sample with bytes changed. fuzz_atheris.py runs the same parsers
with inputs that follow coverage.
"""

from __future__ import annotations

import json
import logging
import pickle
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from asyncckpt import CheckpointError, CheckpointManager
from asyncckpt.dcp_metadata import pickle_metadata, unpickle_metadata
from asyncckpt.errors import UnsafeObjectError
from asyncckpt.framing import crc32, encode_object
from asyncckpt.manifest import ManifestError, decode_manifest, decode_records, encode_manifest, encode_records
from asyncckpt.objects import _load_records, load_object
from asyncckpt.steps import may_be_swept, read_listing, summarise
from asyncckpt.storage import redact
from asyncckpt.unpickle import check_nesting
from scripts.campaign.row import Outcome, Row, draws
from tests import hostile
from tests.hostile import FOREIGN, STEP, Draw, make_base, seal, target, weird_value

EXECUTIONS = 5000  # of one attempt
RESTORES = 25
GROWTH_BYTES = 400 << 20
"""Of this process in one attempt; more is a parser that takes memory which its input does not have."""
CANARY = "c4n4ry"


@dataclass(frozen=True)
class Target:
    """make: an input. run: the parser; raises what it must not. refused: the errors that it may."""

    what: str
    make: Callable[[Draw], bytes]
    run: Callable[[bytes], Any]
    refused: tuple[type[Exception], ...]


@contextmanager
def rows(scratch: Path, seed: int) -> Iterator[list[Row]]:
    logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)
    base = scratch / "base"
    made = []
    for name, target_ in TARGETS.items():
        quick, full = _ATTEMPTS[name]
        made.append(Row(f"fuzz.{name}", target_.what, quick, full, partial(_attempt, target_, seed, f"fuzz.{name}")))
    made.append(Row("fuzz.restore", "whole restores of changed steps", 1, 60, partial(_restores, scratch, base, seed)))
    yield made


def _attempt(target_: Target, seed: int, key: str, number: int) -> Counter[Outcome]:
    draw, tally, before = draws(seed, key, number), Counter[Outcome](), _peak_bytes()
    for _ in range(EXECUTIONS):
        data = target_.make(draw)
        try:
            target_.run(data)
        except target_.refused:
            tally["detected"] += 1
        except BaseException as exc:
            exc.add_note(f"the input was {data[:4000]!r}")
            raise
        else:
            tally["survived"] += 1
    _check_growth(before)
    return tally


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _check_growth(before: int) -> None:
    if (grown := _peak_bytes() - before) > GROWTH_BYTES:
        raise AssertionError(f"memory grew by {grown:,} bytes")


# -- bytes that nearly are right

_INTERESTING = [0, 1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63]
_WORDS = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b"9" * 30,
    b"[" * 50,
    b",",
    b'"a":',
    b"\\u0000",
    b"\\ud800",
]


def havoc(data: bytes, draw: Draw, others: list[bytes]) -> bytes:
    """Some bytes of it changed, moved, doubled, cut out, or from another sample."""
    out = bytearray(data)
    for _ in range(1 << draw.randrange(4)):
        at, other = draw.randrange(len(out) + 1), draw.choice(others)
        match draw.randrange(8):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 1 if at < len(out):
                out[at] = draw.randrange(256)
            case 2:
                out[at:at] = draw.choice(_WORDS)
            case 3:
                del out[at : at + draw.choice([1, 2, 4, 8, 40])]
            case 4:
                start = draw.randrange(len(out) + 1)
                out[at:at] = out[start : start + draw.choice([1, 4, 16, 64])]
            case 5:
                size = draw.choice([1, 2, 4, 8])
                out[at : at + size] = (draw.choice(_INTERESTING) & (1 << 8 * size) - 1).to_bytes(size, "little")
            case 6:
                start = draw.randrange(len(other) + 1)
                out[at:at] = other[start : start + draw.choice([4, 16, 100])]
            case 7 if at < len(out) and chr(out[at]).isdigit():
                out[at : at + 1] = str(draw.choice(_INTERESTING)).encode()
    return bytes(out)


# -- manifests


@cache
def _documents() -> list[bytes]:
    """Small ones, without their checksum."""
    tensors = {"a.w": torch.zeros(2, 2), "a.b": torch.zeros(3), "n": torch.tensor(1.0)}
    bodies = []
    for keys in ([], ["n"], list(tensors)):
        manifest, _ = small_manifest({key: tensors[key] for key in keys})
        bodies.append(encode_manifest(manifest).rpartition(b',"crc32"')[0])
    manifest, _ = hostile.manifest_of(b"x" * 100)
    return [*bodies, encode_manifest(manifest).rpartition(b',"crc32"')[0]]


def small_manifest(tensors: dict[str, torch.Tensor]) -> Any:
    from asyncckpt.chunks import Chunk, ChunkTable, Key
    from asyncckpt.commit import make_manifest
    from asyncckpt.framing import Layout, frame_of
    from asyncckpt.manifest import FileRecord, Head

    chunks, keys, at = [], {}, 0
    for key, value in tensors.items():
        layout = Layout.of(value)
        frame = frame_of(layout)
        chunks.append(Chunk(key, (0,) * value.dim(), layout, len(frame.head), "f", at, frame.num_bytes, 1, 2))
        keys[key] = Key(tuple(key.split(".")), layout.dtype, layout.shape)
        at += frame.num_bytes
    head = Head(STEP, 1, hostile.ATTEMPT, "id", 1, "2", "0", {"a": [1]}, {"loss": 0.5})
    return make_manifest(head, keys, ChunkTable.of(chunks), [FileRecord("f", at, 3)] if chunks else [])


def _manifest_bytes(draw: Draw) -> bytes:
    return havoc(draw.choice(_documents()), draw, _documents())


def _manifest_values(draw: Draw) -> bytes:
    document = json.loads(draw.choice(_documents()) + b"}")
    weird_value(document, draw)
    return json.dumps(document, separators=(",", ":")).encode("utf-8", "surrogatepass")[:-1]


def _decode_sealed(body: bytes) -> None:
    manifest = decode_manifest(seal(body))
    for key, chunk in zip(manifest.keys.values(), manifest.chunks, strict=False):
        repr((key, chunk, manifest.head.time_s))
    pickle_metadata(manifest.keys, manifest.chunks, manifest.head.attempt, manifest.head.save_id)


# -- a rank's report


@cache
def _reports() -> list[bytes]:
    tensors = {"a.w": torch.zeros(2, 2), "a.b": torch.zeros(3)}
    found = [small_manifest(part)[0] for part in (tensors, {"n": torch.tensor(1.0)}, {})]
    return [encode_records(manifest.chunks, manifest.files) for manifest in found]


def _report(draw: Draw) -> bytes:
    return havoc(draw.choice(_reports()), draw, _reports())


# -- pickles


@cache
def _stock_pickles() -> list[bytes]:
    from asyncckpt.dcp_metadata import metadata_of

    found = []
    for tensors in ({}, {"a.w": torch.zeros(2, 2), "n": torch.tensor(1.0)}):
        manifest, stock = small_manifest(tensors)
        found += [stock, pickle.dumps(metadata_of(manifest.keys, [])), pickle.dumps(metadata_of(manifest.keys, []), 2)]
    return found


@cache
def _object_pickles() -> list[bytes]:
    values = [{"a": [1, 2.5, None, True]}, (1, "text", b"bytes", 10**30), {1, 2}, torch.arange(4.0), torch.Size([1])]
    return [bytes(hostile_records(encode_object(value))) for value in values]


def hostile_records(item: bytes) -> memoryview:
    from asyncckpt.objects import archive_records

    return archive_records(item)["data.pkl"]


_NAMES = [
    ("torch.distributed.checkpoint.metadata", "Metadata"), ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"), ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"), ("torch", "Size"), ("torch", "float32"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch", "FloatStorage"),
    ("builtins", "set"), ("builtins", "bytearray"), ("_codecs", "encode"), ("torch", "device"), ("os", "system"),
    ("collections", "Counter"), ("torch._tensor", "_rebuild_from_type_v2"), ("torch", "Tensor"),
    ("builtins", "complex"),
]  # fmt: skip
_PLAIN_OPCODES = [b"N", b"\x88", b"\x89", b"(", b"(", b")", b"]", b"}", b"\x8f", b"t", b"\x85", b"\x86", b"\x87", b"a",
                  b"e", b"s", b"u", b"R", b"R", b"\x81", b"b", b"Q", b"0", b"2", b"\x94", b"\x93", b"\x90"]  # fmt: skip


def opcodes(draw: Draw) -> bytes:
    """A pickle of any opcodes, most of which find what they need on the stack."""
    out = [b"\x80\x02"]
    for _ in range(draw.randrange(1, 40)):
        match draw.randrange(9):
            case 0:
                out.append(hostile.named(*draw.choice(_NAMES)))
            case 1:
                out.append(hostile.text(draw.choice(["a", "storage", "cpu", "0", "latin1", "hex", "strided", ""])))
            case 2:
                out.append(hostile.integer(draw.choice([*_INTERESTING, -1, 4])))
            case 3:
                out.append(b"q" + bytes([draw.randrange(4)]))
            case 4:
                out.append(b"h" + bytes([draw.randrange(4)]))
            case 5:
                out.append(hostile.called(*draw.choice(_NAMES), *([draw.choice(out[1:])] if out[1:] else [])))
            case 6:
                out.append(
                    draw.choice([b"X", b"B", b"r", b"j", b"\x8b"])
                    + struct.pack("<I", draw.choice([0, 1, 5, 2**31 - 1]))
                )
            case _:
                out.append(draw.choice(_PLAIN_OPCODES))
    return b"".join(out) + b"."


def _stock_pickle(draw: Draw) -> bytes:
    if draw.random() < 0.4:
        return opcodes(draw)
    return havoc(draw.choice(_stock_pickles()), draw, _stock_pickles())


def _object_pickle(draw: Draw) -> bytes:
    if draw.random() < 0.5:
        return opcodes(draw)
    return havoc(draw.choice(_object_pickles()), draw, _object_pickles())


def _load_pickled(pickled: bytes) -> None:
    """Any error is `load_object`'s UnsafeObjectError."""
    records = {"data.pkl": memoryview(pickled), "data/0": memoryview(bytes(16)), "data/empty": memoryview(b"")}
    check_nesting(_load_records(records, ()))


@cache
def _archives() -> list[bytes]:
    return [encode_object(7), encode_object(torch.zeros(2)), hostile.archive(b"\x80\x02N.", packed=True)]


def _archive(draw: Draw) -> bytes:
    return havoc(draw.choice(_archives()), draw, _archives())


def _load_archive(data: bytes) -> None:
    load_object(data, (), "key")


# -- names

_PARTS = [
    "0", "1", "7", "07", "-1", "1e3", "٣", "9" * 18, "9" * 19, "9" * 400, "1_0", "", ".", "..",
    "manifest-00000001.json", "manifest-1.json", "manifest-.json", "manifest-٣.json", f"manifest-{'9' * 18}.json",
    f"manifest-{'9' * 400}.json",
    "manifest-00000001.json\n", "00000001-0123456789abcdef", f"{'9' * 30}-ab", "00000001-", "-ab", "00000002-ab",
    ".metadata", "__0_0.distcp", "dead", "\0", "\udcff", "a\nb", "x" * 300,
]  # fmt: skip


def _names(draw: Draw) -> bytes:
    paths = ["/".join(draw.choices(_PARTS, k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 6))]
    return "|".join(paths).encode("utf-8", "surrogatepass")


def _list(data: bytes) -> None:
    files = {path: len(path) for path in data.decode("utf-8", "replace").split("|")}
    steps = read_listing(files)
    listing = summarise(steps)
    for number in (*steps, *listing.sequences.values(), listing.next_sequence):
        if not 0 <= number < 2**62:
            raise AssertionError(f"the ranks cannot tell each other {number}")
    for found in steps.values():
        found.leftovers(10), found.in_deletion_order()
    for path in files:
        may_be_swept(path, 10)


# -- texts with secrets


def _secret_text(draw: Draw) -> bytes:
    secret = CANARY + "".join(draw.choices("aA1+/=._~-%$!*", k=draw.randrange(6)))
    path = "/".join(draw.choices(["a", "b c", "%20", "x@y", "2026"], k=draw.randrange(1, 4)))
    host = draw.choice(["h", "h:9000", "bucket.s3.amazonaws.com", "[::1]:80"])
    scheme = draw.choice(["s3", "gs", "http", "https", "ftp", "s3a", "abfs"])
    name = draw.choice(["token", "X-Amz-Signature", "X-Amz-Security-Token", "sig", "AWSAccessKeyId", "password"])
    quoted = secret.replace("+", "%2B").replace("/", "%2F")
    url = draw.choice(
        [
            f"{scheme}://key:{secret}@{host}/{path}",
            f"{scheme}://{quoted}@{host}/{path}",
            f"{scheme}://{host}/{path.replace(' ', '')}?{name}={quoted}",
            f"{scheme}://{host}/a?x=1&{name}={quoted}&y=2",
            f"{scheme}://:{quoted}@{host}",
        ]
    )
    around = draw.choice(["%s", "cannot open %s: no", "<%s>", "'%s'", '{"url": "%s"}', "%s\n%s", "(%s, %s)"])
    return (around.replace("%s", url)).encode()


def _redact(data: bytes) -> None:
    text = redact(data.decode("utf-8", "replace"))
    if CANARY in text:
        raise AssertionError(f"a secret is told: {text}")


TARGETS = {
    "manifest-bytes": Target("manifests, bytes changed", _manifest_bytes, _decode_sealed, (ManifestError,)),
    "manifest-values": Target("manifests, values changed", _manifest_values, _decode_sealed, (ManifestError,)),
    "report": Target("reports of a rank", _report, decode_records, (ManifestError,)),
    "metadata": Target("pickles of stock metadata", _stock_pickle, unpickle_metadata, (ValueError, UnsafeObjectError)),
    "object": Target("pickles of objects", _object_pickle, _load_pickled, (Exception,)),
    "archive": Target("archives of objects", _archive, _load_archive, (UnsafeObjectError,)),
    "names": Target("listings with odd names", _names, _list, ()),
    "redact": Target("texts with secrets", _secret_text, _redact, ()),
}
_ATTEMPTS = {
    "manifest-bytes": (1, 60), "manifest-values": (1, 30), "report": (1, 30), "metadata": (1, 30), "object": (1, 20),
    "archive": (1, 10), "names": (1, 20), "redact": (1, 10),
}  # fmt: skip


# -- whole restores


def _restores(scratch: Path, base: Path, seed: int, number: int) -> Counter[Outcome]:
    if not base.exists():
        make_base(base)
    draw, tally, before = draws(seed, "fuzz.restore", number), Counter[Outcome](), _peak_bytes()
    for _ in range(RESTORES):
        place = scratch / f"run-{number}"
        shutil.copytree(base, place)
        step = _change(place, draw)
        try:
            with CheckpointManager(str(place), 1, chkpt_on_preemption=False) as manager:
                manager.restore(step, target())
        except CheckpointError:
            tally["detected"] += 1
        else:
            tally["survived"] += 1
        shutil.rmtree(place)
    _check_growth(before)
    return tally


def _change(root: Path, draw: Draw) -> int:
    """Something of a step, with its checksums set right; the step."""
    manifest = max((root / str(STEP)).glob("manifest-*.json"))
    match draw.randrange(4):
        case 0:
            body = manifest.read_bytes().rpartition(b',"crc32"')[0]
            manifest.write_bytes(seal(havoc(body, draw, [body])))
        case 1:
            document = json.loads(manifest.read_bytes())
            weird_value(document, draw)
            document.pop("crc32", None)
            body = json.dumps(document, separators=(",", ":")).encode("utf-8", "surrogatepass")[:-1]
            manifest.write_bytes(seal(body))
        case 2:
            _change_object(manifest, draw)
        case _:
            path = root / str(FOREIGN) / ".metadata"
            data = path.read_bytes()
            path.write_bytes(havoc(data, draw, [data]))
            return FOREIGN
    return STEP


def _change_object(manifest: Path, draw: random.Random) -> None:
    """The item of "o", in place."""
    document = json.loads(manifest.read_bytes())
    chunks = document["chunks"]
    number = chunks["key"].index(document["keys"]["fqn"].index("o"))
    start, length = chunks["offset"][number], chunks["length"][number]
    name = document["files"]["name"][chunks["file"][number]]
    path = manifest.parent / document["head"]["attempt"] / name
    data = bytearray(path.read_bytes())
    item = havoc(bytes(data[start : start + length]), draw, [bytes(data)])[:length].ljust(length, b"\0")
    data[start : start + length] = item
    path.write_bytes(data)
    document["files"]["crc32"][chunks["file"][number]] = crc32(data)
    for column in ("payload_crc32", "item_crc32"):
        crcs = document[column]
        document[column] = crcs[: 8 * number] + f"{crc32(item):08x}" + crcs[8 * number + 8 :]
    manifest.write_bytes(hostile.sealed(document))
