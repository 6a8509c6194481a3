"""Several runs, readers, threads and processes around one path: what each is promised, and what it is told.

Interleavings by the hundred are `scripts/torture --only runs`; here is one test for each promise.
"""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from asyncckpt import (
    CheckpointError,
    CheckpointManager,
    CommitError,
    Committed,
    Event,
    SaveError,
    StepNotFoundError,
    Unguarded,
)
from asyncckpt.steps import DEAD_MARK
from asyncckpt.storage import Storage
from asyncckpt.testing import Call, FaultyStorage, GatedStorage, RecordingStorage
from tests.crew import Crew
from tests.endings import AT_ONCE, DRAINED, HANGING, assert_as_promised
from tests.faults.harness import Place, strays
from tests.processes import Link
from tests.states import assert_same, restored, state

TIMEOUT_S = 60.0


def use(manager: CheckpointManager, wrap: Callable[[Storage], Any]) -> Any:
    """From now on `manager` sees its storage through `wrap`."""
    manager._storage = manager._saver.committer.storage = wrap(manager._storage)
    return manager._storage


# -- two runs on one path


def test_two_runs_that_save_one_step_under_other_numbers(tmp_path: Path) -> None:
    """The first to commit keeps it; the other is told, and takes it up by refresh()."""
    with CheckpointManager(str(tmp_path)) as first, CheckpointManager(str(tmp_path)) as second:
        second.save(1, state(1))  # their numbers are no longer the same
        second.save(2, state(2))
        with pytest.raises(CommitError, match=r"another run committed 2/manifest-0+2\.json.*refresh\(\) takes up"):
            first.save(2, state(7))
        second.verify(2)
        assert_same(state(2), restored(second, 2))
        first.refresh()
        first.save(2, state(8))
        first.join()
        assert strays(Place(str(tmp_path), {}), first._storage, [1, 2]) == []
        first.verify(2)


@pytest.mark.parametrize("number", [1, 2])
def test_two_runs_that_look_before_either_commits(tmp_path: Path, number: int) -> None:
    """Both saw an empty folder: who finds the other's manifest after its own takes its own back."""
    with CheckpointManager(str(tmp_path)) as first, CheckpointManager(str(tmp_path)) as second:
        second._index.take_sequence()
        late, other = (first, second) if number == 1 else (second, first)
        with use(late, lambda storage: GatedStorage(storage, "create")) as gate:
            late.save_async(5, state(50))
            gate.wait_reached()
            other.save(5, state(5))
        with pytest.raises(CommitError, match="two runs must not write to one path"):
            late.join()
        other.verify(5)
        assert_same(state(5), restored(other, 5))
        assert strays(Place(str(tmp_path), {}), other._storage, [5]) == []


def test_retention_spares_what_another_run_is_about_to_commit(tmp_path: Path) -> None:
    """It knew the step, and saw the data of the other's new save of it before they were committed."""
    with CheckpointManager(str(tmp_path)) as before:
        before.save(1, state(1))
    with CheckpointManager(str(tmp_path)) as other, use(other, lambda s: GatedStorage(s, "create")) as gate:
        other.save_async(1, state(10))
        gate.wait_reached()
        with CheckpointManager(str(tmp_path), max_to_keep=1) as manager:
            gate.open()
            other.join()
            manager.save(2, state(2))
            manager.join()
            manager.refresh()
            assert manager.all_steps() == [1, 2]
            assert_same(state(10), restored(manager, 1))
            manager.verify(1)


def test_retention_mends_what_stock_readers_read_where_another_run_could_not(tmp_path: Path) -> None:
    """It deletes the older save of a step; that is what `.metadata` speaks of if the other died before it wrote it."""
    with CheckpointManager(str(tmp_path)) as before:
        before.save(1, state(1))
    with CheckpointManager(str(tmp_path), max_to_keep=1) as manager, CheckpointManager(str(tmp_path)) as other:
        use(other, lambda s: FaultyStorage(s, "replace"))
        other.save(1, state(10))
        manager.save(2, state(2))
        manager.join()
    with CheckpointManager(str(tmp_path)) as reader:
        assert reader.all_steps() == [1, 2]
        reader.verify(1)


@pytest.mark.parametrize("verb", ["list_files", "replace"])
def test_what_could_not_be_looked_for_is_cleared_away_after_a_later_save(tmp_path: Path, verb: str) -> None:
    """The data of a dead save, when the storage failed at the first look for them."""
    (tmp_path / "7" / "00000001-00000000000000ab").mkdir(parents=True)
    (tmp_path / "7" / "00000001-00000000000000ab" / "__0_0.distcp").write_bytes(b"dead")
    with CheckpointManager(str(tmp_path)) as manager:
        dead = {"list_files": ("",), "replace": (f"7/00000001-00000000000000ab/{DEAD_MARK}",)}[verb]
        use(manager, lambda s: FaultyStorage(s, verb, nth=1, matches=lambda call: call.paths == dead))
        manager.save(8, state(8))
        manager.join()
        assert (tmp_path / "7").exists()
        manager.save(9, state(9))
        manager.join()
        assert not (tmp_path / "7").exists()


def test_a_writer_that_is_taken_for_dead_at_its_commit_takes_it_back(tmp_path: Path) -> None:
    """It was stopped between its look and its manifest, and its successor cleared its data away meanwhile."""
    with CheckpointManager(str(tmp_path)) as stopped, use(stopped, lambda s: GatedStorage(s, "create")) as gate:
        stopped.save_async(1, state(1))
        gate.wait_reached()
        with CheckpointManager(str(tmp_path)) as successor:
            successor.save(2, state(2))
            successor.join()
            gate.open()
            with pytest.raises(CommitError, match="another run may have taken them for leftovers"):
                stopped.join()
            successor.refresh()
            assert successor.all_steps() == [2]
            assert strays(Place(str(tmp_path), {}), successor._storage, [2]) == []


def test_a_writer_that_finds_the_mark_of_the_dead_takes_its_commit_back(tmp_path: Path) -> None:
    """Its data are still there, but are going; who marks looks for a manifest afterwards, so one of both sees it."""
    with CheckpointManager(str(tmp_path)) as manager, use(manager, lambda s: GatedStorage(s, "create")) as gate:
        manager.save_async(1, state(1))
        gate.wait_reached()
        (attempt,) = (path for path in (tmp_path / "1").iterdir() if path.is_dir())
        (attempt / DEAD_MARK).touch()
        gate.open()
        with pytest.raises(CommitError, match="another run may have taken them for leftovers"):
            manager.join()
        manager.refresh()
        assert manager.all_steps() == []


def test_an_attempt_that_was_committed_after_it_was_marked_loses_the_mark_only(tmp_path: Path) -> None:
    """The marking run looks once more before it deletes."""
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(1, state(1))
    (manifest,) = (tmp_path / "1").glob("manifest-*.json")
    hidden = manifest.read_bytes()
    manifest.unlink()

    class Meanwhile(RecordingStorage):
        def replace(self, path: str, data: bytes) -> None:
            super().replace(path, data)
            if path.endswith(f"/{DEAD_MARK}"):
                manifest.write_bytes(hidden)

    with CheckpointManager(str(tmp_path)) as manager:
        use(manager, Meanwhile)
        manager.save(2, state(2))
        manager.join()
        manager.refresh()
        assert manager.all_steps() == [1, 2]
        assert strays(Place(str(tmp_path), {}), manager._storage, [1, 2]) == []
        assert_same(state(1), restored(manager, 1))


@pytest.mark.parametrize("how", ["next save", "close", "refresh"])
def test_a_commit_without_an_answer_is_found_later(memory_url: str, how: str) -> None:
    """The manifest is there, its answer is lost, and so is that of the look: the error says that nobody knows, the step
    is not listed, and then it is."""
    seen: list[Event] = []
    is_cut = False

    class Cut(RecordingStorage):
        def _around(self, call: Call, run: Callable[[], Any]) -> Any:
            nonlocal is_cut
            answer = run() if not is_cut or call.verb == "create" else None
            is_cut |= call.verb == "create" and call.path.startswith("2/")
            if is_cut:
                raise OSError(errno.ECONNRESET, "the line is cut")
            return answer

    with CheckpointManager(memory_url, events=[seen.append]) as manager:
        manager.save(1, state(1))
        whole = manager._storage
        use(manager, Cut)
        with pytest.raises(CommitError, match=r"step 2 .* may be saved or not"):
            manager.save(2, state(2))
        assert manager.all_steps() == [1]
        manager._storage = manager._saver.committer.storage = whole
        if how == "next save":
            manager.save(3, state(3))
            assert manager.all_steps() == [1, 2, 3]
        elif how == "refresh":
            manager.refresh()
            assert manager.all_steps() == [1, 2]
        else:
            manager.close()
            assert manager.all_steps() == [1, 2]
        if how != "refresh":
            assert [event.step for event in seen if isinstance(event, Committed)][:2] == [1, 2]
    with CheckpointManager(memory_url) as manager:
        assert_same(state(2), restored(manager, 2))
        manager.verify(2)


def test_a_commit_whose_answer_alone_is_lost_is_no_failure(tmp_path: Path) -> None:
    """One look at the manifest tells."""
    with CheckpointManager(str(tmp_path)) as manager:
        use(manager, lambda storage: FaultyStorage(storage, "create", moment="after"))
        manager.save(1, state(1))
        assert manager.all_steps() == [1]


# -- stores that overwrite


def test_a_store_that_overwrites_is_said_once_at_the_first_commit(gs_url: str, gs_options: dict[str, Any]) -> None:
    """The GCS emulator ignores the condition. Nothing is left of the question, and who only reads does not ask it."""
    seen: list[Event] = []
    with CheckpointManager(gs_url, storage_options=gs_options, events=[seen.append]) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
        assert [event.step for event in seen if isinstance(event, Unguarded)] == [1]
        assert manager._storage._filesystem.find(f"{gs_url.removeprefix('gs://')}/.tmp-") == []
        with CheckpointManager(gs_url, storage_options=gs_options) as reader:
            asked = use(reader, RecordingStorage)
            reader.restore_latest({"w": state(0)["w"], "n": 0})
            assert asked.count("is_create_exclusive") == 0
            manager.save(3, state(3))
            with pytest.raises(CommitError, match="another run committed"):  # it still looks first
                reader.save(3, state(30))


@pytest.mark.parametrize("kind", ["memory", "folder", pytest.param("s3", marks=pytest.mark.s3)])
def test_stores_that_refuse_are_not_complained_of(
    kind: str, tmp_path: Path, memory_url: str, request: pytest.FixtureRequest
) -> None:
    """Memory, a folder, radosgw."""
    url = {"memory": memory_url, "folder": str(tmp_path)}.get(kind) or request.getfixturevalue("s3_url")
    options = request.getfixturevalue("s3_options") if kind == "s3" else {}
    seen: list[Event] = []
    with CheckpointManager(url, storage_options=options, events=[seen.append]) as manager:
        manager.save(1, state(1))
        assert manager._saver.committer._is_guarded
    assert not any(isinstance(event, Unguarded) for event in seen)


# -- one run, several threads and signals


def test_a_step_saved_again_while_it_is_in_flight(tmp_path: Path) -> None:
    """Both are committed, in order; the last one is the step."""
    with CheckpointManager(str(tmp_path), max_pending_async=2) as manager:
        with use(manager, lambda storage: GatedStorage(storage, "write_file")):
            assert manager.save_async(1, state(10))
            assert manager.save_async(1, state(1))
        manager.join()
        assert_same(state(1), restored(manager, 1))
        assert strays(Place(str(tmp_path), {}), manager._storage, [1]) == []


def test_close_from_another_thread_waits_for_the_save_in_flight(tmp_path: Path) -> None:
    """And a second close, and what else is called afterwards, finds it closed."""
    manager = CheckpointManager(str(tmp_path))
    with use(manager, lambda storage: GatedStorage(storage, "write_file")) as gate:
        manager.save_async(1, state(1))
        gate.wait_reached()
        closer = threading.Thread(target=manager.close)
        closer.start()
    closer.join(TIMEOUT_S)
    manager.close()
    assert manager.all_steps() == [1]
    for call in (lambda: manager.save(2, state(2)), lambda: manager.restore(1, state(1)), manager.refresh):
        with pytest.raises(ValueError, match="is closed; make a new one"):
            call()


def test_close_in_a_signal_handler_in_the_middle_of_a_save_is_refused(tmp_path: Path) -> None:
    """It would wait for the save that it interrupts. The save goes on, and close works when it has returned."""
    refused: list[BaseException] = []

    class Interrupting:
        def state_dict(self) -> dict[str, Any]:
            signal.raise_signal(signal.SIGUSR1)
            return state(1)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def handle(*_: object) -> None:
        for call in (manager.close, manager.join):
            with pytest.raises(CheckpointError, match="in the middle of a save") as raised:
                call()
            refused.append(raised.value)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with CheckpointManager(str(tmp_path)) as manager:
            manager.save(1, {"its": Interrupting()})
            assert manager.all_steps() == [1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(refused) == 2


def test_ctrl_c_in_close_loses_nothing(tmp_path: Path) -> None:
    """The buffers of the save in flight stay its own, and a second close waits for it."""
    manager = CheckpointManager(str(tmp_path))
    with use(manager, lambda storage: GatedStorage(storage, "write_file")) as gate:
        manager.save_async(1, state(1))
        gate.wait_reached()
        plain = manager._writer._wait_for

        def interrupted(*args: Any) -> bool:
            manager._writer._wait_for = plain  # type: ignore[method-assign]
            signal.raise_signal(signal.SIGINT)
            return plain(*args)

        manager._writer._wait_for = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            manager.close()
    manager.close()
    with CheckpointManager(str(tmp_path)) as reader:
        assert_same(state(1), restored(reader, 1))


def test_leaving_the_block_by_an_exception_commits_what_was_taken(tmp_path: Path) -> None:
    """The exception comes through."""

    def fail() -> None:
        with CheckpointManager(str(tmp_path), max_pending_async=3) as manager:
            for step in (1, 2, 3):
                manager.save_async(step, state(step))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with CheckpointManager(str(tmp_path)) as manager:
        assert manager.all_steps() == [1, 2, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_in_a_state_dict_frees_the_place(tmp_path: Path, error: type[BaseException]) -> None:
    """Nothing was written, and the next save goes on."""

    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise error

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    with CheckpointManager(str(tmp_path)) as manager:
        with pytest.raises(error):
            manager.save_async(1, {"broken": Broken()})
        assert manager._storage.list_files() == {}
        manager.save(1, state(1))


# -- forked and spawned children


def test_a_forked_child_is_told_and_does_no_harm(tmp_path: Path) -> None:
    """It may not save, and does not hang, write, or tear down what is its parent's; leaving the block is allowed."""
    with CheckpointManager(str(tmp_path)) as manager:
        with use(manager, lambda storage: GatedStorage(storage, "write_file")) as gate:
            manager.save_async(1, state(1))
            gate.wait_reached()
            here, there = multiprocessing.Pipe()
            if (pid := os.fork()) == 0:
                try:
                    there.send(_tried_in_a_child(manager))
                finally:
                    os._exit(0)
            assert here.poll(TIMEOUT_S)
            told = here.recv()
            os.waitpid(pid, 0)
        assert all("was forked from process" in text for text in told[:-1]), told
        assert "of process" in told[-1]
        manager.join()
        manager.save(2, state(2))
        assert manager.all_steps() == [1, 2]
        assert strays(Place(str(tmp_path), {}), manager._storage, [1, 2]) == []


def _tried_in_a_child(manager: CheckpointManager) -> list[str]:
    told = []
    for call in (
        lambda: manager.save(3, state(3)),
        lambda: manager.save_async(3, state(3)),
        lambda: manager.restore(1, state(1)),
        lambda: manager.restore_latest(state(1)),
        lambda: manager.prewarm(state(1)),
        lambda: manager.verify(1),
        manager.join,
        manager.refresh,
        manager.all_steps,
        manager.latest_step,
    ):
        try:
            told.append(f"it worked: {call()}")
        except CheckpointError as exc:
            told.append(str(exc))
    with manager:
        pass
    manager.close()
    return [*told, repr(manager)]


def test_a_manager_is_not_sent_to_a_spawned_child(tmp_path: Path) -> None:
    """It says so, and what to do."""
    with CheckpointManager(str(tmp_path)) as manager, pytest.raises(TypeError, match="make one there"):
        pickle.dumps(manager)


# -- the end of the process


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DRAINED, *AT_ONCE, *HANGING])
def test_a_process_that_ends_without_close(kind: str, tmp_path: Path) -> None:
    """What was taken is committed, or said to be lost, and nothing hangs: at the end of the main thread, sys.exit,
    signals, threads, cycles, os._exit, storage that never answers."""
    assert_as_promised(kind, str(tmp_path / "run"))


def test_a_manager_that_is_collected_ends_its_thread(tmp_path: Path) -> None:
    """After the last save; without close, and without a handler for SIGTERM, which would hold it."""
    manager = CheckpointManager(str(tmp_path), chkpt_on_preemption=False)
    manager.save(1, state(1))
    manager.join()
    thread = manager._writer._thread
    assert thread is not None
    del manager
    gc.collect()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()


# -- ranks


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(2) as crew:
        yield crew


class Broken:
    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def state_dict(self) -> dict[str, Any]:
        raise self._error("of the user")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def _fail_on_one_rank(link: Link, folder: str) -> str:
    with CheckpointManager(folder, chkpt_on_preemption=False) as manager:
        told = ""
        try:
            manager.save(1, {"it": Broken(LookupError) if link.rank else {}, **state(1)})
        except (LookupError, SaveError) as exc:
            told = f"{type(exc).__name__}: {exc}"
        manager.save(2, state(2))
        assert manager.all_steps() == [2]
        return told


def test_an_exception_in_the_state_dict_of_one_rank_is_heard_by_all(tmp_path: Path, crew: Crew) -> None:
    """The rank has its own error, the other hears which rank it was; the next save goes on."""
    first, second = crew.run(_fail_on_one_rank, str(tmp_path))
    assert "SaveError: step 1" in first
    assert "rank 1 could not stage its state" in first
    assert second == "LookupError: of the user"


# -- readers


def test_a_reader_never_writes(tmp_path: Path) -> None:
    """Nor deletes, probes or mends, whatever it finds."""
    with CheckpointManager(str(tmp_path), max_to_keep=2) as manager:
        for step in (1, 2):
            manager.save(step, state(step))
    (tmp_path / "2" / ".metadata").write_bytes(b"stale")
    (tmp_path / "3" / "00000009-00000000000000aa").mkdir(parents=True)
    (tmp_path / "3" / "00000009-00000000000000aa" / "__0_0.distcp").write_bytes(b"half")
    with CheckpointManager(str(tmp_path), max_to_keep=1) as reader:
        calls = use(reader, RecordingStorage).calls
        reader.refresh()
        target = state(0)
        assert reader.restore_latest(target) == 2
        assert_same(state(2), target)
        assert_same(state(1), restored(reader, 1))
    assert {call.verb for call in calls} <= {"list_files", "read_file", "read_into"}


def test_a_reader_is_told_of_a_step_that_was_dropped_since_it_looked(tmp_path: Path) -> None:
    """And of refresh(), after which it has the newest."""
    with CheckpointManager(str(tmp_path), max_to_keep=1) as writer:
        writer.save(1, state(1))
        with CheckpointManager(str(tmp_path)) as reader:
            writer.save(2, state(2))
            writer.join()
            with pytest.raises(StepNotFoundError, match=r"call refresh\(\) first"):
                restored(reader, 1)
            reader.refresh()
            assert_same(state(2), restored(reader, 2))


@pytest.mark.slow
def test_an_eval_job_follows_a_run_of_three_hundred_saves(tmp_path: Path) -> None:
    """Two processes; each state that it restores is the one that was saved under its step, bit for bit."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_save_and_drop, args=(there, str(tmp_path)), daemon=True)
    process.start()
    assert here.poll(TIMEOUT_S)
    here.recv()
    seen: set[int] = set()
    with CheckpointManager(str(tmp_path)) as reader:
        while not here.poll():
            reader.refresh()
            target = state(-1)
            try:
                step = reader.restore_latest(target)
            except CheckpointError as exc:  # dropped between the two
                assert "refresh()" in str(exc) or "is gone" in str(exc)  # noqa: PT017
                continue
            assert step is not None
            assert_same(state(step), target)
            seen.add(step)
    assert len(seen) > 1
    process.join(TIMEOUT_S)
    assert process.exitcode == 0


def _save_and_drop(link: Connection, folder: str) -> None:
    with CheckpointManager(folder, max_to_keep=2) as manager:
        for step in range(300):
            manager.save_async(step, state(step))
            if step == 1:
                link.send("begun")
    link.send("done")
