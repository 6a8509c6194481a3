"""S3: the raw clients that are the limit, and stock writers and readers, against one server.

A server is anything with `storage_options` for fsspec: tests/servers.py's, or ../bench_sink.py's. Each contender moves
the same bytes; who saves is a function (server, number) -> None that returns when all is there. Imports when called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from .frame import MIB

BUCKET = "bench"
PART_BYTES, PARTS_IN_FLIGHT = 16 * MIB, 8  # the best of obstore's, see shared facts: smaller parts cost more CPU
REGION = "us-east-1"


class Server(Protocol):
    @property
    def storage_options(self) -> dict[str, Any]: ...


def url(name: str) -> str:
    return f"s3://{BUCKET}/{name}"


def state_of(num_bytes: int, *, num_tensors: int = 16, zeros: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of equal size, of random bytes or of zeros."""
    numel = max(1, num_bytes // num_tensors // 4)
    make = torch.zeros if zeros else torch.rand
    return {f"w{number}": make(numel) for number in range(num_tensors)}


def bytes_of(num_bytes: int) -> memoryview:
    return memoryview(np.random.default_rng(0).bytes(num_bytes))


def num_bytes_of(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def filesystem(server: Server) -> Any:
    """The same one for each server, as s3fs keeps it: a new one costs 0.3 s."""
    import s3fs

    return s3fs.S3FileSystem(**server.storage_options, use_listings_cache=False)


def empty(server: Server, name: str) -> None:
    """Delete what a contender wrote."""
    fs = filesystem(server)
    if found := fs.find(f"{BUCKET}/{name}"):
        fs.rm(found)


def obstore_store(server: Server) -> Any:
    from obstore.store import S3Store

    options = server.storage_options
    return S3Store(
        BUCKET,
        endpoint=options["client_kwargs"]["endpoint_url"],
        access_key_id=options["key"],
        secret_access_key=options["secret"],
        region=REGION,
        virtual_hosted_style_request=False,
        unsigned_payload=True,
        client_options={"allow_http": True, "timeout": "120s"},
    )


def put_by_obstore(store: Any, path: str, data: memoryview) -> None:
    import obstore

    obstore.put(store, path, data, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT)


def get_by_obstore(store: Any, path: str, num_bytes: int) -> None:
    import obstore

    starts = list(range(0, num_bytes, PART_BYTES))
    ends = [min(start + PART_BYTES, num_bytes) for start in starts]
    obstore.get_ranges(store, path, starts=starts, ends=ends, coalesce=0)


def put_by_s3fs(fs: Any, path: str, data: memoryview) -> None:
    fs.pipe_file(f"{BUCKET}/{path}", bytes(data), chunksize=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT)


def get_by_s3fs(fs: Any, path: str, num_bytes: int) -> None:
    starts = list(range(0, num_bytes, PART_BYTES))
    ends = [min(start + PART_BYTES, num_bytes) for start in starts]
    fs.cat_ranges([f"{BUCKET}/{path}"] * len(starts), starts, ends, batch_size=PARTS_IN_FLIGHT)


def save_by_fsspec_writer(server: Server, name: str, state: Mapping[str, torch.Tensor]) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    dcp.save(dict(state), storage_writer=FsspecWriter(url(name), **server.storage_options))


def load_by_fsspec_reader(server: Server, name: str, state: Mapping[str, torch.Tensor]) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    dcp.load(dict(state), storage_reader=FsspecReader(url(name), **server.storage_options))


def save_by_s3torchconnector(server: Server, name: str, state: Mapping[str, torch.Tensor]) -> None:
    from s3torchconnector.dcp import S3StorageWriter

    _as_in_environment(server)
    dcp.save(dict(state), storage_writer=S3StorageWriter(REGION, url(name), s3client_config=_connector_config()))


def load_by_s3torchconnector(server: Server, name: str, state: Mapping[str, torch.Tensor]) -> None:
    from s3torchconnector.dcp import S3StorageReader

    _as_in_environment(server)
    dcp.load(dict(state), storage_reader=S3StorageReader(REGION, url(name), s3client_config=_connector_config()))


def _connector_config() -> Any:
    from s3torchconnector import S3ClientConfig

    return S3ClientConfig(force_path_style=True, part_size=PART_BYTES, max_attempts=1)


def _as_in_environment(server: Server) -> None:
    """The connector's DCP classes take neither endpoint nor keys."""
    options = server.storage_options
    os.environ["AWS_ENDPOINT_URL"] = options["client_kwargs"]["endpoint_url"]
    os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = options["key"], options["secret"]
