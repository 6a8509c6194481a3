"""sync_point.py: every rank saves at the same step, whoever asks, and nobody waits for the dead.

The protocol runs on threads that share a store; signals and deaths are tried on real processes.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from asyncckpt.preemption import SigtermHandler
from asyncckpt.ranks import Ranks
from asyncckpt.sync_point import SyncPoint
from tests.processes import Job, Link


@contextmanager
def crew(
    world_size: int, store: Any, *, here: Sequence[int] | None = None, timeout_s: float = 60.0
) -> Iterator[list[SyncPoint]]:
    """The sync points of a job whose ranks are threads of this process. here: the ranks that exist at all."""
    points = [
        SyncPoint(Ranks(None, store, store, rank=rank, world_size=world_size, timeout_s=timeout_s), timeout_s=timeout_s)
        for rank in (range(world_size) if here is None else here)
    ]
    try:
        yield points
    finally:
        for point in points:
            point.close()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def failure_of(point: SyncPoint) -> str:
    """Why there is no sync point, once it is known."""
    failure = None

    def failed() -> bool:
        nonlocal failure
        failure = point.take_failure()
        return failure is not None

    eventually(failed)
    return str(failure)


def fires(point: SyncPoint, steps: range) -> list[int]:
    return [step for step in steps if point.reached(step)]


# -- world size 1


def test_alone_a_request_is_reached_at_the_next_step_once() -> None:
    """No thread, no store on a network, and it works again."""
    num_threads = threading.active_count()
    point = SyncPoint(Ranks.join())
    assert fires(point, range(5)) == []
    point.request("preemption")
    point.request("preemption")
    assert fires(point, range(4, 10)) == [5]
    assert point.reasons == {"preemption"}
    point.request("clock")
    assert fires(point, range(10, 100, 10)) == [10]
    assert point.reasons == {"clock"}
    assert threading.active_count() == num_threads
    point.close()


def test_a_request_before_the_first_step_is_reached_at_the_first_step() -> None:
    """SIGTERM may come while the model is still being built."""
    point = SyncPoint(Ranks.join())
    point.request("preemption")
    assert fires(point, range(3)) == [0]


def test_a_signal_handler_may_ask() -> None:
    """While the main thread is inside `reached` itself, as often as not."""
    point = SyncPoint(Ranks.join())
    handler = SigtermHandler(lambda: point.request("preemption"))
    try:
        for step in range(0, 1000, 2):
            point.reached(step)
            os.kill(os.getpid(), signal.SIGTERM)
            assert point.reached(step + 1)
    finally:
        handler.uninstall()


# -- the protocol, on threads


@pytest.mark.parametrize("asking", [[0], [1], [2], [0, 1, 2]])
def test_the_point_is_one_past_the_furthest_rank_whoever_asks(asking: list[int]) -> None:
    """Ranks at steps 10, 3 and 7 all save at 11: the first step that none of them has passed."""
    with crew(3, HashStore()) as points:
        for point, step in zip(points, (10, 3, 7), strict=True):
            point.reached(step)
        for rank in asking:
            points[rank].request("preemption")
        for point in points:
            eventually(lambda point=point: "saving at [11]" in repr(point))  # type: ignore[misc]
        assert [fires(point, range(step + 1, 20)) for point, step in zip(points, (10, 3, 7), strict=True)] == [[11]] * 3
        assert [point.reasons for point in points] == [{"preemption"}] * 3


def test_a_point_between_two_calls_is_reached_at_the_later_one() -> None:
    """A trainer that calls save every ten steps: tsl's protocol would miss it for ever."""
    with crew(2, HashStore()) as points:
        for point in points:
            point.reached(40)
        points[1].request("clock")
        for point in points:
            eventually(lambda point=point: "saving at [41]" in repr(point))  # type: ignore[misc]
        assert [fires(point, range(40, 90, 10)) for point in points] == [[50], [50]]


def test_a_different_reason_is_not_swallowed_by_a_point_under_way() -> None:
    """A preemption that comes just after a save by the clock was agreed on is still told to all ranks."""
    with crew(2, HashStore()) as points:
        for point in points:
            point.reached(5)
        points[0].request("clock")
        eventually(lambda: all("saving at [6]" in repr(point) for point in points))
        points[0].request("clock")
        points[1].request("preemption")
        eventually(lambda: all("saving at [6, 6]" in repr(point) for point in points))
        assert [fires(point, range(5, 20)) for point in points] == [[6], [6]]
        assert [point.reasons for point in points] == [{"clock", "preemption"}] * 2


def test_a_rank_waits_at_its_next_step_until_the_point_is_known() -> None:
    """Otherwise it could pass the step that the others are about to agree on. Rank 1 is played by hand."""
    store = HashStore()
    other = Ranks(None, store, store, rank=1, world_size=2, timeout_s=60.0)
    with crew(2, store, here=[0]) as [point], ThreadPoolExecutor(1) as trainer:
        point.reached(4)
        point.request("preemption")
        eventually(lambda: "asking" in repr(point))
        held = trainer.submit(point.reached, 5)
        with pytest.raises(TimeoutError):
            held.result(timeout=0.1)
        other.post("sync/0", b'{"last_step": 8, "reasons": []}')
        assert held.result(timeout=60) is False
        assert fires(point, range(6, 12)) == [9]


@pytest.mark.parametrize("seed", range(4))
def test_all_ranks_save_at_the_same_steps_for_the_same_reasons(seed: int) -> None:
    """Ranks run at random speeds and ask at random moments; some ask again at once."""
    world_size, num_steps = 3, 400
    everyone_past = threading.Barrier(world_size)

    def train(rank: int, point: SyncPoint) -> list[tuple[int, frozenset[str]]]:
        chance, saved = random.Random(1000 * seed + rank), []
        for step in range(0, num_steps, 1 + seed % 2):
            if chance.random() < 0.02:
                point.request(chance.choice(["clock", "preemption"]))
            time.sleep(chance.choice([0, 0.001, 0.002]))  # a step of training
            if point.reached(step):
                saved.append((step, point.reasons))
        everyone_past.wait(timeout=60)
        return saved

    store = HashStore()
    with crew(world_size, store) as points, ThreadPoolExecutor(world_size) as trainers:
        saved = list(trainers.map(train, range(world_size), points))
        assert [point.take_failure() for point in points] == [None] * world_size
    assert saved[0] == saved[1] == saved[2]
    assert saved[0]
    assert store.num_keys() <= 2 * (2 + world_size)  # of at most two rounds


@pytest.mark.parametrize(
    ("survivor", "reason"), [(0, "ranks [1] did not answer in 0.2 s"), (1, "rank 0 did not answer within 0.3 s")]
)
def test_a_rank_that_never_answers_ends_the_attempt_but_not_the_others(survivor: int, reason: str) -> None:
    """The other one of two does not exist: training goes on, and the reason is told once."""
    with crew(2, HashStore(), here=[survivor], timeout_s=0.2) as [point]:
        point.request("preemption")
        eventually(lambda: "asking" in repr(point))
        assert fires(point, range(10)) == []
        assert point.take_failure() == f"no step to save at was agreed on: {reason}"
        assert point.take_failure() is None


def test_after_a_failed_attempt_the_next_request_works() -> None:
    """A rank that was only slow takes part again."""
    store = HashStore()
    with crew(2, store, here=[0], timeout_s=0.2) as [point]:
        point.request("preemption")
        failure_of(point)
        with crew(2, store, here=[1]) as [slow]:
            failure_of(slow)
            point.request("preemption")
            eventually(lambda: all("saving at [0]" in repr(each) for each in (point, slow)))
            assert (fires(point, range(3)), fires(slow, range(3))) == ([0], [0])
    assert store.num_keys() <= 2 + 2  # of the last round alone


def test_closing_ends_the_watcher_even_while_it_waits_for_others() -> None:
    """`manager.close()` on the way out of a failed run must not wait for a deadline of minutes."""
    with crew(2, HashStore(), here=[0], timeout_s=600.0) as [point]:
        point.request("preemption")
        eventually(lambda: "asking" in repr(point))
        point.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "asyncckpt-sync"]


def test_a_process_that_forgets_to_close_still_ends_cleanly() -> None:
    """Without care torch aborts it: "terminate called without an active exception", seen in 5 of 5 runs."""
    script = """
from torch._C._distributed_c10d import TCPStore
from asyncckpt.ranks import Ranks
from asyncckpt.sync_point import SyncPoint
store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
for job in range(4):
    ranks = Ranks(None, store, store, rank=0, world_size=2, timeout_s=600.0)
    ranks.poll_s = 0.0  # so that the watchers are inside the store all the time
    point = SyncPoint(ranks)
    point.request("preemption")
while "asking" not in repr(point):
    pass
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


# -- signals and deaths, on processes


def train_until_saved(link: Link, last_steps: list[int], stride: int) -> list[Any]:
    ranks = Ranks.join(timeout_s=60.0)
    point = SyncPoint(ranks, timeout_s=60.0)
    SigtermHandler(lambda: point.request("preemption"))
    step, saved = last_steps[ranks.rank], []
    for _ in range(2):
        point.reached(step)
        link.send()
        link.receive()
        while not point.reached(step := step + stride):
            time.sleep(0.001)  # a step of training
        saved.append((step, sorted(point.reasons)))
        step += stride * ranks.rank  # the ranks drift apart before the second time
    ranks.agree([], phase="close")
    point.close()
    return [*saved, point.take_failure()]


@pytest.mark.parametrize(("signalled", "stride"), [([[1], [0]], 1), ([[2], [0, 1, 2]], 10)])
def test_sigterm_on_any_ranks_saves_at_one_step_on_all(signalled: list[list[int]], stride: int) -> None:
    """Twice in a row, with the ranks at different steps; called at every step or at every tenth."""
    with Job(3, train_until_saved, [100, 30, 70], stride) as job:
        for ranks in signalled:
            for rank in range(3):
                job.hear(rank)
            for rank in ranks:
                job.signal(rank, signal.SIGTERM)
            for rank in range(3):
                job.tell(rank)
        results = job.results()
    assert results[0] == results[1] == results[2]
    first, second, failure = results[0]
    assert first[0] > 100
    assert second[0] > first[0]
    assert first[1] == second[1] == ["preemption"]
    assert failure is None


def train_among_the_dying(link: Link) -> tuple[list[int], str | None]:
    point = SyncPoint(Ranks.join(timeout_s=60.0), timeout_s=1.0)
    point.reached(0)
    link.send()
    link.receive()
    point.request("preemption")
    eventually(lambda: "asking" in repr(point))
    saved = fires(point, range(1, 1000))
    failure = point.take_failure()
    point.close()
    return saved, failure


@pytest.mark.parametrize(("victim", "reason"), [(2, "ranks [2] did not answer"), (0, "rank 0 did not answer")])
def test_a_killed_rank_costs_the_others_the_save_and_no_more(victim: int, reason: str) -> None:
    """They learn why within the timeout, name the rank, and go on."""
    survivors = [rank for rank in range(3) if rank != victim]
    with Job(3, train_among_the_dying) as job:
        for rank in range(3):
            job.hear(rank)
        job.signal(victim, signal.SIGKILL)
        for rank in survivors:
            job.tell(rank)
        for saved, failure in map(job.result, survivors):
            assert saved == []
            assert reason in failure


def outlive_the_store(link: Link) -> tuple[list[int], str | None]:
    point = SyncPoint(Ranks.join(), timeout_s=60.0)
    link.send()
    failure = failure_of(point)
    point.request("preemption")
    saved = fires(point, range(1000))
    point.close()
    return saved, failure


def test_a_store_that_is_gone_is_reported_and_never_waited_for() -> None:
    """The host of the store died; the training threads are not held up by a watcher that has ended."""
    with Job(2, outlive_the_store) as job:
        for rank in range(2):
            job.hear(rank)
        job.end_store()
        for saved, failure in job.results():
            assert saved == []
            assert "the store of torch.distributed failed" in failure
