"""What fails in the background reaches the training loop once, harms nothing that is committed, and passes.

Injected faults go through `asyncckpt.testing`; full disks, lost servers and lost permissions are real ones.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from asyncckpt import (
    CheckpointManager,
    CommitError,
    Committed,
    CommittedStep,
    Event,
    Failed,
    Pruned,
    SaveError,
    Staged,
    WriteError,
    Written,
)
from asyncckpt.steps import manifest_name
from asyncckpt.storage import Storage, open_storage
from asyncckpt.testing import FaultyStorage, GatedStorage, RecordingStorage
from stagers import BlockingAsyncStager, StagingError
from tests.faults.harness import TIMEOUT_S, Place, open_manager, strays
from tests.faults.line import Line
from tests.servers import S3Server
from tests.states import assert_same


def state(step: int, num_bytes: int = 4000) -> dict[str, Any]:
    return {"w": torch.full((num_bytes // 4,), float(step)), "n": step}


def restored(manager: CheckpointManager, step: int, num_bytes: int = 4000) -> dict[str, Any]:
    target = {"w": torch.zeros(num_bytes // 4), "n": -1}
    manager.restore(step, target)
    return target


def use(manager: CheckpointManager, wrap: Callable[[Storage], Storage]) -> Any:
    """From now on `manager` sees its storage through `wrap`."""
    manager._storage = manager._saver.committer.storage = wrap(manager._storage)
    return manager._storage


# -- how a failure reaches the training loop


@pytest.mark.parametrize("call", ["save", "save_async", "join", "close"])
def test_a_failure_is_raised_once_by_the_call_that_comes_next(tmp_path: Path, call: str) -> None:
    """With step, URL, rank and cause; it says what is safe, and the step that could not be taken can be taken again."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state(1))
        cause = OSError(errno.EIO, "the disk is on fire")
        use(manager, lambda storage: FaultyStorage(storage, "write_file", nth=1, error=cause))
        assert manager.save_async(2, state(2))
        arguments = (3, state(3)) if call.startswith("save") else ()
        with pytest.raises(WriteError, match="Nothing committed is lost; the newest committed step is 1") as raised:
            getattr(manager, call)(*arguments)
        assert (raised.value.step, raised.value.url, raised.value.rank) == (2, str(tmp_path), 0)
        assert raised.value.__cause__ is cause
        assert "the disk is on fire" in str(raised.value)
        if call != "close":
            manager.join()
            assert manager.save(3, state(3))
            assert manager.all_steps() == [1, 3]
    with CheckpointManager(str(tmp_path)) as manager:
        assert_same(state(1), restored(manager, 1))
        assert strays(Place(str(tmp_path), {}), manager._storage, manager.all_steps()) == []


def test_close_raises_once_and_lets_go_of_everything(tmp_path: Path) -> None:
    """Also of the signal handler, and when it fails."""
    before = signal.getsignal(signal.SIGTERM)
    manager = CheckpointManager(str(tmp_path))
    use(manager, lambda storage: FaultyStorage(storage, "create"))
    manager.save_async(1, state(1))
    with pytest.raises(CommitError):
        manager.close()
    manager.close()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not [thread for thread in threading.enumerate() if thread.name == "asyncckpt-writer"]


def test_leaving_the_block_with_an_error_keeps_that_error(tmp_path: Path) -> None:
    """And notes what failed in the background."""

    def fail() -> None:
        with CheckpointManager(str(tmp_path)) as manager:
            use(manager, lambda storage: FaultyStorage(storage, "write_file"))
            manager.save_async(1, state(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        fail()
    assert "step 1" in raised.value.__notes__[0]


@pytest.mark.parametrize("num_failing", [1, 2])
def test_a_failure_leaves_the_saves_behind_it_in_the_queue(tmp_path: Path, num_failing: int) -> None:
    """Those that fail too are notes on the first."""
    with CheckpointManager(str(tmp_path), max_pending_async=2) as manager:
        use(manager, lambda storage: FaultyStorage(storage, "write_file", matches=lambda call: fails(call.path)))
        fails = lambda path: int(path.split("/")[0]) <= num_failing  # noqa: E731
        with use(manager, lambda storage: GatedStorage(storage, "write_file")):
            assert manager.save_async(1, state(1))
            assert manager.save_async(2, state(2))
        with pytest.raises(WriteError) as raised:
            manager.join()
        assert raised.value.step == 1
        notes = getattr(raised.value, "__notes__", [])
        assert ["step 2" in note for note in notes] == [True] * (num_failing - 1)
        manager.join()
        assert manager.all_steps() == [2][num_failing - 1 :]
        assert manager.save(3, state(3))


def test_a_user_exception_in_state_dict_comes_through_as_it_is(tmp_path: Path) -> None:
    """Nothing was written, and the place in the queue is free again."""

    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise LookupError("of the user")

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), events=[seen.append]) as manager:
        with pytest.raises(LookupError, match="of the user"):
            manager.save_async(1, {"broken": Broken()})
        assert manager._storage.list_files() == {}
        assert [(event.step, event.phase) for event in seen if isinstance(event, Failed)] == [(1, "stage")]
        assert manager.save(1, state(1))


def test_a_pool_that_is_too_small_is_a_staging_error_and_passes(tmp_path: Path) -> None:
    """Room for one snapshot: the second is refused while the first is being written."""
    stager = BlockingAsyncStager(max_bytes=3 * 4096)
    with CheckpointManager(str(tmp_path), max_pending_async=2, stager=stager) as manager:
        with use(manager, lambda storage: GatedStorage(storage, "write_file")) as gate:
            manager.save_async(1, state(1, 8192))
            gate.wait_reached()
            with pytest.raises(StagingError, match="Nothing was copied"):
                manager.save_async(2, state(2, 8192))
        manager.join()
        manager.save(3, state(3, 8192))
        assert manager.all_steps() == [1, 3]


def test_a_save_waits_for_its_place_before_it_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may be pending: the third is not copied before the first is committed."""
    log: list[str] = []

    class Stager(BlockingAsyncStager):
        def snapshot(self, state_dict: dict[str, Any]) -> Any:
            log.append(f"snapshot {state_dict['n']}")
            return super().snapshot(state_dict)

    def record(event: Event) -> None:
        if isinstance(event, Committed):
            log.append(f"committed {event.step}")

    with CheckpointManager(str(tmp_path), max_pending_async=2, stager=Stager(), events=[record]) as manager:
        with use(manager, lambda storage: GatedStorage(storage, "create")) as gate:
            manager.save_async(1, state(1))
            manager.save_async(2, state(2))
            gate.wait_reached()
            acquire = manager._writer.acquire

            def open_and_acquire() -> float:
                gate.let_pass()  # from here on nothing but the wait keeps the third from being copied
                return acquire()

            monkeypatch.setattr(manager._writer, "acquire", open_and_acquire)
            manager.save_async(3, state(3))
        manager.join()
    assert log.index("committed 1") < log.index("snapshot 3")


@pytest.mark.parametrize("error", [RuntimeError("of a sink"), SystemExit("of a sink")])
def test_an_event_sink_that_raises_on_the_writer_thread_hangs_nobody(tmp_path: Path, error: BaseException) -> None:
    """An exception is only logged; what asks the interpreter to end is raised where that can happen."""

    def sink(event: Event) -> None:
        if isinstance(event, Committed) and event.step == 1:
            raise error

    with CheckpointManager(str(tmp_path), events=[sink]) as manager:
        manager.save_async(1, state(1))
        with pytest.raises(SystemExit) if isinstance(error, SystemExit) else contextlib.nullcontext():
            manager.join()
        manager.save(2, state(2))
        assert manager.all_steps() == [1, 2]


@pytest.mark.parametrize("kind", [Staged, Written, Committed])
def test_no_way_out_of_an_event_sink_harms_a_save(tmp_path: Path, kind: type[Event]) -> None:
    """sys.exit() in any phase: raised once, and the save goes on, retention too."""
    calls = []

    def sink(event: Event) -> None:
        if isinstance(event, kind) and event.step == 2:
            calls.append(event)
            sys.exit("of a sink")

    with CheckpointManager(str(tmp_path), max_to_keep=1, events=[sink]) as manager:
        manager.save(1, state(1))
        with pytest.raises(SystemExit, match="of a sink"):
            _save_and_join(manager, 2)
        manager.join()
        assert manager.all_steps() == [2]
        assert strays(Place(str(tmp_path), {}), manager._storage, [2]) == []
        manager.save(3, state(3))
    assert len(calls) == 1


def _save_and_join(manager: CheckpointManager, step: int) -> None:
    manager.save_async(step, state(step))
    manager.join()


@pytest.mark.parametrize("call", ["save_async", "join", "close"])
def test_an_event_sink_that_waits_for_its_own_thread_hangs_nobody(
    tmp_path: Path, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It gets an error, which is logged; the save is committed."""

    def sink(event: Event) -> None:
        if isinstance(event, Written):
            assert manager.all_steps() == []
            getattr(manager, call)(*([2, state(2)] if call == "save_async" else []))

    with CheckpointManager(str(tmp_path), events=[sink]) as manager:
        manager.save(1, state(1))
        assert manager.all_steps() == [1]
        assert "an event sink, which runs on the writer thread" in caplog.text


def test_an_event_sink_that_blocks_holds_saves_up_and_loses_none(tmp_path: Path) -> None:
    """On the writer thread; the training loop waits when the queue is full, not before."""
    gate, reached = threading.Event(), threading.Event()

    def sink(event: Event) -> None:
        if isinstance(event, Written) and event.step == 1:
            reached.set()
            assert gate.wait(TIMEOUT_S)

    with CheckpointManager(str(tmp_path), max_pending_async=2, events=[sink]) as manager:
        manager.save_async(1, state(1))
        assert reached.wait(TIMEOUT_S)
        manager.save_async(2, state(2))
        gate.set()
        manager.join()
        assert manager.all_steps() == [1, 2]


# -- every call of storage fails once


def _train(manager: CheckpointManager, *, verify: bool = True) -> tuple[dict[int, int], int]:
    """Save steps 1, 2, 1 and 3; {step: which save it was} of those that were taken, and how many failed.

    verify: that where a step could not be saved again the older save is as it was, for stock readers too.
    """
    taken, num_failed = {}, 0
    for save, step in enumerate((1, 2, 1, 3)):
        try:
            manager.save(step, state(10 * step + save))
            taken[step] = save
        except SaveError:
            num_failed += 1
            if verify and step in manager.all_steps():
                manager.verify(step)
    manager.join()
    return taken, num_failed


def _calls_of_a_run() -> int:
    with open_manager(Place(f"memory://{secrets.token_hex(4)}/run", {}), RecordingStorage, max_to_keep=2) as manager:
        _train(manager)
        return len(manager._storage.calls)


@pytest.mark.parametrize("moment", ["before", "middle", "after"])
def test_any_one_failing_call_costs_at_most_its_own_save(moment: Any) -> None:
    """Fail each call of a run in turn, the answer to it lost or not: what was taken restores, once more from a new
    manager, which clears away what is left over."""
    for number in range(2, _calls_of_a_run() + 1):
        place = Place(f"memory://{secrets.token_hex(4)}/run", {})
        seen: list[Event] = []
        wrap = lambda storage, number=number: FaultyStorage(storage, nth=number, moment=moment)  # noqa: E731
        with open_manager(place, wrap, max_to_keep=2, events=[seen.append]) as manager:
            taken, num_failed = _train(manager, verify=moment != "after")  # then the new manifest may be there
            call = manager._storage.calls[number - 1]
            assert num_failed <= 1, call
            assert num_failed == sum(isinstance(event, Failed) and event.phase != "prune" for event in seen), call
            _assert_restorable(manager, taken, str(call))
        with open_manager(place, max_to_keep=2) as manager:
            _assert_restorable(manager, taken, str(call))
            assert len(manager.all_steps()) >= 2
            manager.save(4, state(4))
            manager.join()  # old steps and leftovers are gone
            assert strays(place, manager._storage, manager.all_steps()) == [], call
            for step in manager.all_steps():
                manager.verify(step)


def _assert_restorable(manager: CheckpointManager, taken: dict[int, int], message: str) -> None:
    """The two steps taken last are there as they were taken, and whatever else is listed is some save of its step."""
    assert {*sorted(taken, key=taken.__getitem__)[-2:]} <= {*manager.all_steps()}, message
    for step in manager.all_steps():
        found = restored(manager, step)
        assert_same(state(found["n"]), found)
        assert found["n"] // 10 == step
        if step in list(taken)[-2:]:
            assert found["n"] % 10 >= taken[step], message


# -- real faults


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", folder]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, leave_bytes: int) -> Path:
    """Occupy a disk but for some bytes."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(shutil.disk_usage(disk).free - leave_bytes))
    return ballast


MIB = 1 << 20


@pytest.mark.parametrize("leave_bytes", [MIB // 2, MIB + 8192])
def test_a_full_disk(small_disk: Path, leave_bytes: int) -> None:
    """Too full for the data, or only for the manifest: half a save does not keep the disk full."""
    with CheckpointManager(f"{small_disk}/run", max_to_keep=1) as manager:
        manager.save(1, state(1, MIB))
        ballast = fill(small_disk, leave_bytes)
        manager.save_async(2, state(2, MIB))
        with pytest.raises(SaveError, match=r"No space left on device.*newest committed step is 1") as raised:
            manager.join()
        assert isinstance(raised.value.__cause__, OSError)
        assert raised.value.__cause__.errno == errno.ENOSPC
        assert_same(state(1, MIB), restored(manager, 1, MIB))
        assert shutil.disk_usage(small_disk).free >= leave_bytes - 8192
        ballast.unlink()
        manager.save(3, state(3, MIB))
        manager.join()
        assert manager.all_steps() == [3]
        assert strays(Place(manager.url, {}), manager._storage, [3]) == []


def test_a_folder_made_immutable(tmp_path: Path) -> None:
    """Permission denied, to root too."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state(1))
        if subprocess.run(["chattr", "+i", tmp_path], capture_output=True, check=False).returncode:
            pytest.skip("chattr +i does not work here")
        try:
            manager.save_async(2, state(2))
            with pytest.raises(WriteError, match="Operation not permitted") as raised:
                manager.join()
        finally:
            subprocess.run(["chattr", "-i", tmp_path], check=True)
        assert isinstance(raised.value.__cause__, PermissionError)
        manager.save(2, state(2))
        assert manager.all_steps() == [1, 2]


def test_a_disk_that_is_read_only_from_the_start(small_disk: Path) -> None:
    """Said at the first save, with its step, and nothing is queued; the same manager saves once that has changed."""
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with CheckpointManager(str(small_disk)) as manager:
        with pytest.raises(SaveError, match=r"Read-only file system.*Nothing was written") as raised:
            manager.save_async(1, state(1))
        assert (raised.value.step, raised.value.url) == (1, str(small_disk))
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        manager.save(1, state(1))
        assert manager.all_steps() == [1]


def test_a_folder_removed_between_saves(tmp_path: Path) -> None:
    """The next save makes it again."""
    run = tmp_path / "run"
    with CheckpointManager(str(run), max_to_keep=2) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
        shutil.rmtree(run)
        for step in (3, 4):
            manager.save(step, state(step))
        assert manager.all_steps() == [3, 4]
        assert_same(state(4), restored(manager, 4))


def test_a_folder_removed_before_the_commit(tmp_path: Path) -> None:
    """The step is not committed: it would be listed, and its data are gone."""
    run = tmp_path / "run"
    with CheckpointManager(str(run)) as manager:
        with use(manager, lambda storage: GatedStorage(storage, "list_files")) as gate:
            manager.save_async(1, state(1))
            gate.wait_reached()
            shutil.rmtree(run)
        with pytest.raises(CommitError, match=r"__0_0\.distcp"):
            manager.join()
        manager.save(2, state(2))
        manager.refresh()
        assert manager.all_steps() == [2]


@pytest.fixture
def line(s3_server: S3Server) -> Iterator[Line]:
    address = urlsplit(s3_server.endpoint)
    assert address.hostname
    assert address.port
    with Line(address.hostname, address.port) as line:
        yield line


def no_patience(options: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """Arguments for a server that may be gone."""
    options["client_kwargs"]["endpoint_url"] = endpoint
    options["config_kwargs"] |= {"connect_timeout": 2, "read_timeout": 10}
    return {"storage_options": options, "retry_timeout": 0.5}


def test_a_server_that_is_gone_and_comes_back(s3_url: str, s3_options: dict[str, Any], line: Line) -> None:
    """In the middle of a run; errors and what is logged hold no credential."""
    with CheckpointManager(s3_url, **no_patience(s3_options, line.endpoint)) as manager:
        manager.save(1, state(1))
        line.cut()
        manager.save_async(2, state(2))
        with pytest.raises(WriteError, match=r"newest committed step is 1") as raised:
            manager.join()
        assert isinstance(raised.value.__cause__, ConnectionError)
        text = "".join(traceback.format_exception(raised.value))
        assert s3_options["secret"] not in text
        assert s3_options["key"] not in text
        line.mend()
        manager.save(3, state(3))
        assert manager.all_steps() == [1, 3]
        assert_same(state(1), restored(manager, 1))
        assert strays(Place(s3_url, s3_options), manager._storage, [1, 3]) == []


@pytest.mark.parametrize(("verb", "step"), [("replace", 2), ("create", 2), ("create", 1)])
def test_a_server_that_goes_at_the_commit(
    s3_url: str, s3_options: dict[str, Any], line: Line, verb: str, step: int
) -> None:
    """The data are there, the manifest is not: nor is the step, an older save of it stays, and the data go after the
    next commit."""
    with CheckpointManager(s3_url, **no_patience(s3_options, line.endpoint)) as manager:
        manager.save(1, state(1))
        with use(manager, lambda storage: GatedStorage(storage, verb)) as gate:
            manager.save_async(step, state(2))
            gate.wait_reached()
            line.cut()
        with pytest.raises(CommitError, match=r"newest committed step is 1"):
            manager.join()
        line.mend()
        assert_same(state(1), restored(manager, 1))
        manager.save(3, state(3))
        manager.verify(1)
        assert strays(Place(s3_url, s3_options), manager._storage, [1, 3]) == []


def test_a_bucket_that_takes_no_more_writes(s3_server: S3Server, s3_options: dict[str, Any]) -> None:
    """Permission denied by a policy of the bucket."""
    if s3_server.name == "moto":
        pytest.skip("moto enforces no policies")
    bucket = f"denied-{secrets.token_hex(4)}"
    with CheckpointManager(f"{s3_server.make_bucket(bucket)}/run", storage_options=s3_options) as manager:
        manager.save(1, state(1))
        filesystem = manager._storage._filesystem
        deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{bucket}/*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
        filesystem.call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
        manager.save_async(2, state(2))
        with pytest.raises(WriteError, match="AccessDenied") as raised:
            manager.join()
        assert isinstance(raised.value.__cause__, PermissionError)
        filesystem.call_s3("delete_bucket_policy", Bucket=bucket)
        manager.save(3, state(3))
        assert manager.all_steps() == [1, 3]


# -- deleting, two runs, the end of the process


def test_a_step_is_whole_though_pruning_fails_and_that_is_tried_again(any_url: tuple[str, dict[str, Any]]) -> None:
    """After the next commit; an event tells of it, nothing is raised."""
    url, options = any_url
    seen: list[Event] = []
    with CheckpointManager(url, max_to_keep=1, storage_options=options, events=[seen.append]) as manager:
        storage = use(manager, lambda storage: FaultyStorage(storage, "delete", nth=2))
        for step in (1, 2):
            manager.save(step, state(step))
        manager.join()
        assert manager.all_steps() == [2]
        assert [(event.step, event.phase) for event in seen if isinstance(event, Failed)] == [(1, "prune")]
        assert strays(Place(url, options), storage, [2]) != []
        manager.save(3, state(3))
        manager.join()
        assert [event.step for event in seen if isinstance(event, Pruned)] == [1, 2]
        assert strays(Place(url, options), storage, [3]) == []


def test_a_bucket_that_lets_nothing_be_deleted_is_told_of_once(tmp_path: Path) -> None:
    """Not at each save, nor does each save ask for all of it; when it may be deleted, all goes."""
    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), max_to_keep=1, events=[seen.append]) as manager:
        refused = PermissionError(errno.EACCES, "no")
        storage = use(manager, lambda storage: FaultyStorage(storage, "delete", error=refused))
        for step in range(6):
            manager.save(step, state(step))
        manager.join()
        assert [event.phase for event in seen if isinstance(event, Failed)] == ["prune"]
        assert storage.count("delete") <= 6
        assert manager.all_steps() == [5]
        manager._storage = manager._saver.committer.storage = storage.inner
        manager.save(6, state(6))
        manager.join()
        assert strays(Place(str(tmp_path), {}), storage.inner, [6]) == []
        assert sorted(event.step for event in seen if isinstance(event, Pruned)) == [0, 1, 2, 3, 4, 5]


def test_a_keep_policy_that_raises_keeps_everything(tmp_path: Path) -> None:
    """And is an event."""

    class Broken:
        def keep(self, steps: list[CommittedStep], now_s: float) -> set[int]:
            raise LookupError("of the user")

    seen: list[Event] = []
    with CheckpointManager(str(tmp_path), keep=Broken(), events=[seen.append]) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
        assert manager.all_steps() == [1, 2]
    assert [event.phase for event in seen if isinstance(event, Failed)] == ["prune", "prune"]


def test_a_step_with_half_a_manifest_is_none_of_those_to_keep(memory_url: str) -> None:
    """A killed writer leaves that where a file is not created in one go: whole steps stay, as many as asked."""

    class Unguarded(RecordingStorage):
        def is_create_exclusive(self) -> bool:
            return False

    place = Place(memory_url, {})
    with open_manager(place, Unguarded, max_to_keep=2) as manager:
        for step in (1, 2, 3):
            manager.save(step, state(step))
    manifest = f"3/{manifest_name(3)}"
    storage = open_storage(memory_url)
    storage.replace(manifest, storage.read_file(manifest)[:100])
    with open_manager(place, Unguarded, max_to_keep=2) as manager:
        manager.save(4, state(4))
        manager.join()
        assert manager.all_steps() == [2, 3, 4]
        assert_same(state(2), restored(manager, 2))
        manager.save(5, state(5))
        manager.join()
        assert manager.all_steps() == [3, 4, 5]


def test_a_save_that_an_ending_process_still_commits_is_kept(any_url: tuple[str, dict[str, Any]]) -> None:
    """A preempted run drains while its successor has begun: what looked dead in the successor's listing is not."""
    url, options = any_url
    with (
        CheckpointManager(url, storage_options=options) as ending,
        use(ending, lambda storage: GatedStorage(storage, "create")) as gate,
    ):
        ending.save_async(1, state(1))
        gate.wait_reached()
        with CheckpointManager(url, storage_options=options) as successor:
            gate.open()
            ending.join()
            successor.save(2, state(2))
            successor.refresh()
            assert successor.all_steps() == [1, 2]
            assert_same(state(1), restored(successor, 1))


def test_a_save_that_was_cleared_away_is_not_committed(tmp_path: Path) -> None:
    """The other way round: the successor has committed, and took the half-made save for a dead one."""
    with (
        CheckpointManager(str(tmp_path)) as ending,
        use(ending, lambda storage: GatedStorage(storage, "list_files")) as gate,
    ):
        ending.save_async(1, state(1))
        gate.wait_reached()
        with CheckpointManager(str(tmp_path)) as successor:
            successor.save(2, state(2))
            successor.join()  # it has cleared away
            gate.open()
            with pytest.raises(CommitError, match=r"__0_0\.distcp"):
                ending.join()
            successor.refresh()
            assert successor.all_steps() == [2]
            assert strays(Place(str(tmp_path), {}), successor._storage, [2]) == []


@pytest.mark.parametrize("verb", ["replace", "create"])
def test_two_managers_that_commit_the_same_save(any_url: tuple[str, dict[str, Any]], verb: str) -> None:
    """One wins, the other is told, and what the winner wrote stays as it is, for stock readers too."""
    url, options = any_url
    if url.startswith("gs://"):
        pytest.skip("the emulator's create overwrites")
    with (
        CheckpointManager(url, storage_options=options) as winner,
        CheckpointManager(url, storage_options=options) as loser,
    ):
        with use(loser, lambda storage: GatedStorage(storage, verb)) as gate:
            loser.save_async(1, state(7))
            gate.wait_reached()
            winner.save(1, state(1))
        with pytest.raises(CommitError, match="two runs must not write to one path") as raised:
            loser.join()
        assert isinstance(raised.value.__cause__.__cause__, FileExistsError)
        winner.verify(1)
        assert_same(state(1), restored(winner, 1))
        assert strays(Place(url, options), winner._storage, [1]) == []
        loser.save(2, state(2))
        loser.refresh()
        assert loser.all_steps() == [1, 2]


def test_the_end_of_the_process_waits_for_saves_in_flight(
    tmp_path: Path, s3_server: S3Server, s3_url: str, s3_options: dict[str, Any]
) -> None:
    """Without close(), to a folder and to S3, though a third manager fails at that moment; that is logged."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    urls = [str(tmp_path / "run"), s3_url, str(tmp_path / "failing")]
    env = {**os.environ, **s3_server.env}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script, *urls], cwd=root, env={**env, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 3 at" in done.stderr
    assert "Traceback" not in done.stderr
    for url, options in ((urls[0], {}), (urls[1], s3_options)):
        with CheckpointManager(url, storage_options=options) as manager:
            assert manager.all_steps() == [1, 2, 3]
            assert_same(state(3, 8 * MIB), restored(manager, 3, 8 * MIB))


_SCRIPT = """
import sys
from asyncckpt import CheckpointManager
from asyncckpt.testing import FaultyStorage
from tests.faults.test_failures import MIB, state

managers = [CheckpointManager(url, max_pending_async=3) for url in sys.argv[1:]]
managers[2]._saver.committer.storage = FaultyStorage(managers[2]._storage, "create")
for step in (1, 2, 3):
    for manager in managers[:2]:
        manager.save_async(step, state(step, 8 * MIB))
managers[2].save_async(3, state(step, 8 * MIB))
"""
