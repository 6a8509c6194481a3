"""Events beside a run: there after a kill, out of the way of the steps, read back as what they were."""

from __future__ import annotations

import json
import logging
import pathlib
import signal
import subprocess
import sys
from typing import Any

import fsspec
import pytest

from asyncckpt import CheckpointError, CheckpointManager, Event, Failed, KeepLast, Pruned, Restored, Staged, Written
from asyncckpt.event_file import PART_BYTES, EventFile, EventLog, Started, log_files, read_logs
from asyncckpt.storage import open_storage
from asyncckpt.testing import FaultyStorage
from tests.states import state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
ROOT = pathlib.Path(__file__).parents[1]


def logs_of(url: str, options: dict[str, Any] | None = None) -> list[EventLog]:
    storage = open_storage(url, options)
    return read_logs(storage, log_files(storage.list_files()))


def failed(text: str, **values: Any) -> Failed:
    return Failed(
        **{"url": "u", "step": 1, "rank": 0, "time_s": 1.0, "phase": "write", "error": OSError(text)} | values
    )


def test_events_come_back_as_what_they_were(any_url: tuple[str, dict[str, Any]]) -> None:
    """On every storage, after a line that tells of the process; and an error as its text."""
    url, options = any_url
    seen: list[Event] = []
    sink = EventFile(url, options, flush_s=0.01)
    with CheckpointManager(url, storage_options=options, keep=KeepLast(1), events=[seen.append, sink]) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
        manager.restore(2, state(0))
    seen.append(failed("no space"))
    sink(seen[-1])
    sink.flush()
    [log] = logs_of(url, options)
    assert isinstance(log.events[0], Started)
    assert log.num_unreadable == 0
    assert log.events[1:-1] == seen[:-1]
    assert {Staged, Written, Pruned, Restored} <= set(map(type, log.events))
    assert isinstance(log.events[-1], Failed)
    assert (str(log.events[-1].error), log.events[-1].phase) == ("OSError: no space", "write")


@pytest.mark.parametrize("where", ["folder", pytest.param("s3", marks=[pytest.mark.s3, pytest.mark.slow])])
def test_nothing_takes_them_for_a_step_or_clears_them_away(where: str, request: pytest.FixtureRequest) -> None:
    """Not the constructor, retention, the tidying after another run, nor a sweep."""
    url = str(request.getfixturevalue("tmp_path")) if where == "folder" else request.getfixturevalue("s3_url")
    options = {} if where == "folder" else request.getfixturevalue("s3_options")
    for start in range(3):  # the second and third tidy up after the one before
        sink = EventFile(url, options)
        with CheckpointManager(url, max_to_keep=2, storage_options=options, events=[sink]) as manager:
            assert manager.all_steps() == [[], [1, 2], [11, 12]][start]
            for step in (10 * start, 10 * start + 1, 10 * start + 2):
                manager.save(step, state(1))
        manager._storage.sweep(lambda path: False)
        sink.flush()
    assert [type(log.events[0]) for log in logs_of(url, options)] == [Started] * 3


KILLED = """
import os, signal, sys, torch
from asyncckpt import CheckpointManager
from asyncckpt.event_file import EventFile
with CheckpointManager(sys.argv[1], events=[EventFile(sys.argv[1])]) as manager:
    manager.save(3, {"w": torch.zeros(10)})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_in_a_folder_loses_no_event(tmp_path: pathlib.Path) -> None:
    """Each is there when it is over."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    [log] = logs_of(str(tmp_path))
    assert [type(event).__name__ for event in log.events] == ["Started", "Staged", "Written", "Committed"]
    assert [path.name for path in tmp_path.iterdir()] == ["3", "events"] or (tmp_path / "3").is_dir()


LEFT = """
import sys, torch, json
from asyncckpt import CheckpointManager
from asyncckpt.event_file import EventFile
url, options = sys.argv[1], json.loads(sys.argv[2])
manager = CheckpointManager(url, storage_options=options, events=[EventFile(url, options, flush_s=1e6)])
manager.save_async(3, {"w": torch.zeros(10)})
"""


@pytest.mark.slow
@pytest.mark.s3
def test_a_process_that_ends_without_close_leaves_all_events(s3_url: str, s3_options: dict[str, Any]) -> None:
    """Also those of the save that the manager finishes at the end."""
    subprocess.run([sys.executable, "-c", LEFT, s3_url, json.dumps(s3_options)], cwd=ROOT, check=True)
    [log] = logs_of(s3_url, s3_options)
    assert [type(event).__name__ for event in log.events] == ["Started", "Staged", "Written", "Committed"]


def test_a_file_that_is_rewritten_stays_small(memory_url: str) -> None:
    """Full parts are left alone."""
    sink = EventFile(memory_url, flush_s=1e6)
    for step in range(1200):
        sink(failed("x" * 2500, step=step))
    sink.flush()
    sizes = open_storage(memory_url).list_files()
    assert len(sizes) == 3
    assert max(sizes.values()) < PART_BYTES + 3000
    [log] = logs_of(memory_url)
    assert [event.step for event in log.events[1:]] == list(range(1200))


def test_storage_that_refuses_is_told_once_and_tried_again(memory_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """And no sink call fails for it."""
    sink = EventFile(memory_url, flush_s=0.0)
    plain = sink._storage
    sink._storage = FaultyStorage(plain, "replace")
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        for step in range(3):
            sink(failed("x", step=step))
            while (thread := sink._file._thread) is not None:  # type: ignore[union-attr]
                thread.join()
    assert [record.message for record in caplog.records if "injected fault" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1
    sink._file._storage = plain  # type: ignore[union-attr]
    sink.flush()
    assert [event.step for event in logs_of(memory_url)[0].events[1:]] == [0, 1, 2]


def test_a_folder_that_refuses_is_told_once(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reader's process may lack the permission. Once there is a folder it is written to."""
    (tmp_path / "events").write_text("in the way")
    sink = EventFile(str(tmp_path))
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        for step in range(3):
            sink(failed("x", step=step))
    assert len(caplog.records) == 1
    (tmp_path / "events").unlink()
    sink(failed("x", step=3))
    assert [event.step for event in logs_of(str(tmp_path))[0].events] == [-1, 3]


def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """Not of the URL, of the options, of the environment, nor of a URL in an error."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret-1")
    sink = EventFile(str(tmp_path), {"secret": "option-secret-2"})
    sink(failed("GET http://u:password-3@h/?X-Amz-Signature=query-4: env-secret-1 option-secret-2"))
    [path] = tmp_path.glob("events/*.jsonl")
    assert not [word for word in ("env-secret", "option-secret", "password", "query-4") if word in path.read_text()]


def test_lines_that_are_none_of_ours_are_counted_not_believed(memory_url: str) -> None:
    """Whoever may write to the bucket: wrong types, hostile JSON, an event of a newer version, half a line."""
    good = '{"event":"Failed","url":"u","step":1,"rank":0,"time_s":1.0,"phase":"write","error":"x","new":1}'
    bad = [
        "", "null", "[]", "{", "[" * 100_000, '{"event":"__init__"}', '{"event":"Failed"}', '{"event":["Failed"]}',
        good.replace('"step":1', '"step":"1"'), good.replace("1.0", "NaN"), good.replace("1.0", "1e999"),
        good.replace('"x"', '["x"]'), good.replace("Failed", "Fallen"), good.replace('"step":1', '"step":true'),
        '{"event":"Failed","url', good.replace('"step":1', f'"step":{"9" * 5000}'),
    ]  # fmt: skip
    data = "\n".join([good, *bad[1:], good]).encode() + b"\n\xff\xfe"
    open_storage(memory_url).replace("events/20260101T000000Z-0-0123abcd.0.jsonl", data)
    [log] = logs_of(memory_url)
    assert [str(event.error) for event in log.events] == ["x", "x"]  # type: ignore[attr-defined]
    assert isinstance(log.events[0].error, CheckpointError)  # type: ignore[attr-defined]
    assert log.num_unreadable == len(bad)


def test_names_sort_by_time_and_part() -> None:
    """And what is not named so is not read."""
    names = ["events/20260102T000000Z-0-00000000.2.jsonl", "events/20260102T000000Z-0-00000000.10.jsonl"]
    others = ["1/manifest-00000001.json", "events/notes.txt", "events/20260101T000000Z-0-00000000.0.jsonl.tmp"]
    assert log_files([*others, *reversed(names), "events/20260101T000000Z-1-00000000.jsonl"]) == [
        "events/20260101T000000Z-1-00000000.jsonl", *names
    ]  # fmt: skip


def test_two_processes_write_two_files(tmp_path: pathlib.Path) -> None:
    """Two sinks of one moment, too."""
    for rank in (0, 1):
        EventFile(str(tmp_path))(failed("x", rank=rank))
    assert sorted(log.rank for log in logs_of(str(tmp_path))) == [0, 1]
    assert fsspec.filesystem("file").exists(tmp_path / "events")
