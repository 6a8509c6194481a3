"""Object stores that run on this machine, each a context manager around real server processes on loopback.

`RadosGateway` (S3: Ceph's production gateway), `MotoServer` (S3: a mock, where Ceph is not installed) and `GcsEmulator`
(GCS). They hold everything in memory and vanish on exit. conftest.py starts them for the suite, `scripts/serve` runs
this file for a user; nothing here knows of checkpoints.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import botocore.session

START_TIMEOUT_S = 60.0  # a guess: radosgw takes 2 s on two idle cores, tests share them with other work


class Server:
    """One store, running between `__enter__` and `__exit__`; its files are in a folder that is removed too."""

    name: ClassVar[str]
    """What stands in the reports of the suite."""
    endpoint: str
    """http:// URL, without a trailing slash."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Short, in the system's own temporary folder: a unix socket's path ends at 107 bytes.
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="asyncckpt-")))
            self._start(stack, folder)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack, folder: Path) -> None:
        """Start the processes, each one's end on the stack, and set `endpoint`; it answers on return."""
        raise NotImplementedError

    @property
    def storage_options(self) -> dict[str, Any]:
        """What fsspec needs to reach this server, a new dict each time."""
        raise NotImplementedError

    @property
    def env(self) -> dict[str, str]:
        """The variables that a user sets to reach this server with a plain URL and no options."""
        raise NotImplementedError

    def make_bucket(self, name: str) -> str:
        """Create a bucket that does not exist yet; returns its URL."""
        raise NotImplementedError


class S3Server(Server):
    """What S3 servers share: the client's side of things."""

    key = "testkey"
    secret = "testsecret"
    # Over plain http botocore signs the body as well (SHA256), which it does not over https: 67 instead of 125 MiB/s,
    # and 6 s more CPU per GiB.
    unsigned_body: ClassVar = {"config_kwargs": {"s3": {"payload_signing_enabled": False}}}

    @property
    def storage_options(self) -> dict[str, Any]:
        # No region: s3fs.mkdir sends "us-east-1" as LocationConstraint, which S3 servers refuse.
        return {
            "key": self.key,
            "secret": self.secret,
            "client_kwargs": {"endpoint_url": self.endpoint},
            **copy.deepcopy(self.unsigned_body),
        }

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "FSSPEC_S3": json.dumps(self.unsigned_body),
        }

    def make_bucket(self, name: str) -> str:
        client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
        )
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return f"s3://{name}"


class RadosGateway(S3Server):
    """Ceph's S3 gateway over one monitor and one in-memory OSD; Debian packages radosgw, ceph-mon and ceph-osd.

    Real authentication, multipart rules and create-if-absent; version 16 ignores the condition on a multipart's
    completion, and accepts x-amz-checksum-* without verifying.
    """

    name = "radosgw"
    PROGRAMS: ClassVar = ("ceph-authtool", "monmaptool", "ceph-mon", "ceph", "ceph-osd", "radosgw", "radosgw-admin")

    def __init__(self, *, memory_bytes: int = 6 << 30, min_part_bytes: int = 5 << 20) -> None:
        """min_part_bytes: of a multipart upload's part that is not its last; the default is Amazon's."""
        self._memory_bytes = memory_bytes
        self._min_part_bytes = min_part_bytes

    @classmethod
    def missing(cls) -> str:
        """Why it cannot run here, or "" when it can."""
        absent = [program for program in cls.PROGRAMS if not shutil.which(program)]
        return f"not installed: {', '.join(absent)}" if absent else ""

    def _start(self, stack: ExitStack, folder: Path) -> None:
        rgw_port, mon_port = _free_ports(2)
        self.endpoint = f"http://127.0.0.1:{rgw_port}"
        cluster_id, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        for name in ("mon", "osd", "rgw"):
            (folder / name).mkdir()
        conf, keyring, monmap = (folder / name for name in ("ceph.conf", "keyring", "monmap"))
        conf.write_text(_ceph_conf(folder, cluster_id, mon_port, rgw_port, self._memory_bytes, self._min_part_bytes))

        def run(program: str, *args: object) -> None:
            _run([program, "-c", conf, *args], folder)

        def daemon(program: str, *args: object) -> subprocess.Popen[bytes]:
            return stack.enter_context(_process([program, "-c", conf, *args, "-f"], folder / f"{program}.out"))

        # With `auth none` the OSD refuses its own store ("wrong fsid"), so the cluster has keys.
        allow_all = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
        _run(["ceph-authtool", "--create-keyring", keyring], folder)
        for user in ("mon.", "client.admin", "client.rgw", "osd.0"):
            _run(["ceph-authtool", keyring, "--gen-key", "-n", user, *allow_all], folder)
        address = f"[v1:127.0.0.1:{mon_port}]"
        _run(["monmaptool", "--create", "--addv", "a", address, "--fsid", cluster_id, monmap], folder)

        run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        daemon("ceph-mon", "-i", "a")
        run("ceph", "osd", "new", osd_id)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        daemon("ceph-osd", "-i", "0")
        gateway = daemon("radosgw", "-n", "client.rgw")
        _wait_until_it_answers(self.endpoint, gateway, folder)
        keys = ("--access-key", self.key, "--secret", self.secret)
        run("radosgw-admin", "user", "create", "--uid", "test", "--display-name", "test", *keys)


class MotoServer(S3Server):
    """A mock in Python: it takes any key and any checksum, so passing on it proves less than passing on Ceph."""

    name = "moto"

    def _start(self, stack: ExitStack, folder: Path) -> None:
        (port,) = _free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
        server = stack.enter_context(_process(command, folder / "moto.out"))
        _wait_until_it_answers(self.endpoint, server, folder)


class GcsEmulator(Server):
    """One request at a time, and ifGenerationMatch is ignored: create-if-absent overwrites."""

    name = "gcp-storage-emulator"
    project = "test"

    def _start(self, stack: ExitStack, folder: Path) -> None:
        (port,) = _free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1", "--port", port]
        server = stack.enter_context(_process([*command, "--in-memory", "--quiet"], folder / "gcs.out"))
        _wait_until_it_answers(self.endpoint, server, folder)

    @property
    def storage_options(self) -> dict[str, Any]:
        return {"endpoint_url": self.endpoint, "token": "anon", "project": self.project}

    @property
    def env(self) -> dict[str, str]:
        return {
            "STORAGE_EMULATOR_HOST": self.endpoint,
            # Else gcsfs asks every bucket it meets for its layout over gRPC, which no emulator speaks: 81 s of retries.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def make_bucket(self, name: str) -> str:
        request = urllib.request.Request(
            f"{self.endpoint}/storage/v1/b?project={self.project}",
            data=json.dumps({"name": name}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=START_TIMEOUT_S).close()
        return f"gs://{name}"


def best_s3_server() -> S3Server:
    """Ceph where it is installed, else the mock."""
    return MotoServer() if RadosGateway.missing() else RadosGateway()


def main(arguments: list[str]) -> int:
    """`scripts/serve [s3] [gs] [-- COMMAND...]`: serve until a signal, or for as long as the command runs."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, command = arguments[:split] or ["s3", "gs"], arguments[split + 1 :]
    if set(names) - {"s3", "gs"} or (split < len(arguments) and not command):
        print("usage: scripts/serve [s3] [gs] [-- COMMAND...]", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    env: dict[str, str] = {}
    with ExitStack() as stack:
        for name in names:
            server = stack.enter_context(best_s3_server() if name == "s3" else GcsEmulator())
            print(f"# {server.name} at {server.endpoint}, empty: {server.make_bucket('asyncckpt')}/run", flush=True)
            env |= server.env
        if command:
            return _run_to_its_end(command, env)
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items()), flush=True)
        signal.pause()
    return 0


def _run_to_its_end(command: list[str], env: Mapping[str, str]) -> int:
    """Its exit status. When a signal ends us, it gets TERM and the servers wait for it: it may still save."""
    with subprocess.Popen(command, env={**os.environ, **env}) as process:
        try:
            return process.wait()
        finally:
            process.terminate()


def _ceph_conf(
    folder: Path, cluster_id: str, mon_port: int, rgw_port: int, memory_bytes: int, min_part_bytes: int
) -> str:
    return f"""\
[global]
fsid = {cluster_id}
mon_host = [v1:127.0.0.1:{mon_port}]
public_addr = 127.0.0.1
ms_bind_msgr2 = false
keyring = {folder}/keyring
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/rgw
run_dir = {folder}
log_file = {folder}/$name.log
pid_file = {folder}/$name.pid
admin_socket = {folder}/$name.asok

# one OSD, one copy
osd_pool_default_size = 1
osd_pool_default_min_size = 1
mon_allow_pool_size_one = true
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1

osd_objectstore = memstore
memstore_device_bytes = {memory_bytes}
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
osd_fast_shutdown = true

# a start in 1.5 s instead of 12
paxos_propose_interval = 0.02
paxos_min_wait = 0.01

rgw_frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw_dns_name = localhost
rgw_thread_pool_size = 64
rgw_multipart_min_part_size = {min_part_bytes}
rgw_run_sync_thread = false
# deleted data would stay in memory for two hours
rgw_gc_obj_min_wait = 2
rgw_gc_processor_period = 2
rgw_gc_processor_max_time = 2
"""


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago: none of these servers can choose its own and say which it took."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _run(command: Sequence[object], folder: Path) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr.strip()}")


@contextmanager
def _process(command: Sequence[object], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child in the foreground; on exit TERM, then KILL. Where setpriv exists it dies with us however we end."""
    words = [str(word) for word in command]
    if setpriv := shutil.which("setpriv"):
        words = [setpriv, "--pdeathsig", "KILL", *words]
    with output.open("wb") as log:
        # A session of its own: Ctrl-C is for the tests, which then stop their servers in order.
        process = subprocess.Popen(
            words, cwd=output.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(endpoint: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-2000:]}" for path in sorted(folder.glob("*.*")))
    raise RuntimeError(f"no answer at {endpoint} (server's exit status: {process.poll()}). Its files:\n{logs}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
