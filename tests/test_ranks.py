"""ranks.py on real processes: everything arrives, every wait ends, and every failure names its ranks."""

from __future__ import annotations

import random
import signal
import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from asyncckpt.errors import CheckpointError
from asyncckpt.ranks import Ranks, _route
from tests.processes import Job, Link

LARGE = 9 << 20  # TCPStore refuses a single value of this size


def failure(call: Any) -> str:
    """The text of the CheckpointError or TimeoutError that `call` raises."""
    try:
        call()
    except (CheckpointError, TimeoutError) as exc:
        return f"{type(exc).__name__}: {exc}"
    raise AssertionError("no failure")


# -- world size 1


def test_a_job_of_one_takes_every_call_and_starts_no_thread() -> None:
    """Without torch.distributed there is nobody to talk to, and the caller need not know."""
    num_threads = threading.active_count()
    ranks = Ranks.join()
    assert (ranks.rank, ranks.world_size, ranks.is_coordinator) == (0, 1, True)
    assert ranks.agree([3, -1], phase="save") == [[3, -1]]
    assert ranks.gather_objects("plan", phase="plan") == ["plan"]
    assert ranks.scatter_objects(["plan"], phase="plan") == "plan"
    assert ranks.broadcast_object("name", phase="name") == "name"
    ranks.post("save-1", b"written")
    assert ranks.collect("save-1", 1.0) == [b"written"]
    assert ranks.announced("save-1") is None
    ranks.announce("save-1", b"committed")
    assert ranks.await_announcement("save-1", 1.0) == b"committed"
    ranks.forget("save-1")
    assert ranks.missing("save-1") == [0]
    assert threading.active_count() == num_threads
    ranks.close()


def test_a_timeout_that_is_no_time_is_refused() -> None:
    """Waiting for ever is not on offer."""
    with pytest.raises(ValueError, match="0"):
        Ranks.join(timeout_s=0)


def test_closing_ends_a_wait_on_another_thread() -> None:
    """The writer thread must not keep `close()` waiting for its deadline."""
    ranks = Ranks.join()
    messages: list[str] = []
    waiter = threading.Thread(
        target=lambda: messages.append(failure(lambda: ranks.await_announcement("save-1", 600.0))), daemon=True
    )
    waiter.start()
    ranks.close()
    waiter.join(timeout=60)
    assert messages == ["CheckpointError: closed while waiting for 'save-1/all'"]


# -- what arrives


def converse(link: Link) -> dict[str, Any]:
    torch.set_default_device("meta")  # a user's default must not reach our messages
    ranks = Ranks.join()
    me = ranks.rank
    seen: dict[str, Any] = {
        "agreed": ranks.agree([me, 10 * me], phase="save"),
        "gathered": ranks.gather_objects({"rank": me, "pad": "x" * me}, phase="plan"),
        "scattered": ranks.scatter_objects(
            [f"part {rank}" for rank in range(3)] if ranks.is_coordinator else None, phase="plan"
        ),
        "broadcast": ranks.broadcast_object(f"from {me}", phase="name"),
    }
    ranks.post("save-1", bytes([me]) * (LARGE if me == 1 else me))
    if ranks.is_coordinator:
        posts = ranks.collect("save-1", 60.0)
        seen["posted"] = [len(post) for post in posts]
        ranks.announce("save-1", posts[1])
    seen["announced"] = ranks.await_announcement("save-1", 60.0) == b"\1" * LARGE
    ranks.close()
    return seen


def test_what_one_rank_says_every_rank_that_should_hears() -> None:
    """Collectives and keys, values of 0 bytes and of more than the store takes at once."""
    with Job(3, converse) as job:
        results = job.results()
    for rank, seen in enumerate(results):
        assert seen["agreed"] == [[0, 0], [1, 10], [2, 20]]
        assert seen["scattered"] == f"part {rank}"
        assert seen["broadcast"] == "from 0"
        assert seen["announced"]
    assert results[0]["gathered"] == [{"rank": rank, "pad": "x" * rank} for rank in range(3)]
    assert results[0]["posted"] == [0, LARGE, 2]
    assert results[1]["gathered"] == results[2]["gathered"] == []


def save_often(link: Link) -> None:
    ranks = Ranks.join()
    for number in range(1, 20):
        ranks.agree([number], phase="save")
        ranks.post(f"save-{number}", b"x" * (LARGE if number == 1 else 1))
        if ranks.is_coordinator:
            ranks.collect(f"save-{number}", 60.0)
            ranks.announce(f"save-{number}", b"committed")
        ranks.await_announcement(f"save-{number}", 60.0)
        ranks.forget(f"save-{number - 1}")  # all have posted under the next key
        if number in (2, 19):
            ranks.agree([], phase="measure")
            link.send()
            link.receive()


def test_keys_that_are_forgotten_leave_nothing_in_the_store() -> None:
    """The store lives as long as the job: after 19 saves it holds what it held after 2."""
    with Job(2, save_often) as job:
        num_keys = []
        for _ in range(2):
            for rank in range(2):
                job.hear(rank)
            num_keys.append(job.num_store_keys())
            for rank in range(2):
                job.tell(rank)
        job.results()
    assert num_keys[0] == num_keys[1]


def use_two_managers(link: Link) -> list[Any]:
    one, two = Ranks.join(), Ranks.join()
    one.post("save-1", b"one")
    two.post("save-1", b"two")
    values: list[Any] = [rank.collect("save-1", 60.0) for rank in (one, two)]
    one.agree([], phase="all have read")
    one.close()  # leaves the other whole
    values.append(two.agree([7], phase="save"))
    two.close()
    third = Ranks.join()
    values += [third.missing("save-1"), third.agree([8], phase="save")]
    dist.destroy_process_group()
    third.close()  # its group went with the world
    return values


def test_managers_of_one_job_do_not_hear_each_other() -> None:
    """Side by side and one after the other; the trainer may destroy its groups before we close ours."""
    with Job(2, use_two_managers) as job:
        assert job.results() == [[[b"one"] * 2, [b"two"] * 2, [[7], [7]], [0, 1], [[8], [8]]]] * 2


def join_a_part(link: Link) -> Any:
    part = dist.new_group([1, 3])
    if link.rank not in (1, 3):
        with pytest.raises(ValueError, match=f"global rank {link.rank} is not in it"):
            Ranks.join(part)
        return None
    seen = []
    for _ in range(20):  # each must not find the addresses of the one before
        ranks = Ranks.join(part, timeout_s=60.0)
        ranks.post("save-1", bytes([link.rank]))
        seen += [ranks.rank, ranks.agree([link.rank], phase="save"), b"".join(ranks.collect("save-1", 60.0))]
        ranks.agree([], phase="all have read")
        ranks.close()
    alone = Ranks.join(dist.new_group([link.rank], use_local_synchronization=True))
    return [*seen, alone.world_size]


def test_a_part_of_the_world_is_a_world_of_its_own() -> None:
    """Ranks outside it take no part, not even in making the group."""
    with Job(4, join_a_part) as job:
        results = job.results()
    assert results == [None, [0, [[1], [3]], b"\1\3"] * 20 + [1], None, [1, [[1], [3]], b"\1\3"] * 20 + [1]]


# -- numbers and letters


def exchange_numbers(link: Link) -> list[Any]:
    ranks = Ranks.join()
    rounds = [[1000 * link.rank] * (5 * link.rank), [2**62] if link.rank == 2 else [], []]
    return [[found.tolist() for found in ranks.gather_numbers(np.array(mine, np.int64), phase="x")] for mine in rounds]


def test_numbers_come_to_all_ranks_however_many_each_has() -> None:
    """Also none on some, and none on any."""
    with Job(3, exchange_numbers) as job:
        results = job.results()
    assert results == [[[[], [1000] * 5, [2000] * 10], [[], [], [2**62]], [[], [], []]]] * 3


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8, 13])
def test_a_letter_reaches_every_rank_once_in_few_steps(num_ranks: int) -> None:
    """From one that has it; as many steps as it takes to double one to all."""
    ranks = random.Random(num_ranks).sample(range(100), num_ranks)
    routes = {rank: _route(ranks, rank) for rank in ranks}
    assert routes[ranks[0]][0] is None
    assert sorted(target for _, targets in routes.values() for target in targets) == sorted(ranks[1:])
    for rank in ranks:
        steps, at = 0, rank
        while (source := routes[at][0]) is not None:
            assert at in routes[source][1]
            steps, at = steps + 1, source
        assert steps <= (num_ranks - 1).bit_length()
        assert len(routes[rank][1]) <= (num_ranks - 1).bit_length()


LETTERS = [(0, 1, 2, 3, 4), (3, 1), (2, 4, 0), (4, 3, 2, 1, 0), (1, 3), (3, 1)]


def pass_letters_on(link: Link) -> list[int]:
    ranks = Ranks.join()
    mine = [(number, to) for number, to in enumerate(LETTERS) if link.rank in to]
    sizes = {number: 1 if number == 1 else 3_000_000 + number for number, _ in mine}
    letters = [bytearray([number + 1] * sizes[number] if to[0] == link.rank else sizes[number]) for number, to in mine]
    arrived: list[int] = []
    together = [(to, memoryview(letter)) for (_, to), letter in zip(mine, letters, strict=True)]

    def note(place: int) -> None:
        assert letters[place][0] == letters[place][-1] == mine[place][0] + 1
        arrived.append(mine[place][0])

    ranks.pass_on(together, note, phase="letters")
    for (number, _), letter in zip(mine, letters, strict=True):
        assert letter == bytes([number + 1]) * sizes[number]
    ranks.pass_on([], note, phase="no letters")
    ranks.close()
    return arrived


def test_letters_go_from_memory_to_memory_of_all_they_name() -> None:
    """Large and small ones, several between the same ranks, each to others."""
    with Job(5, pass_letters_on) as job:
        assert job.results() == [[2, 3], [0, 1, 3, 5], [0, 3], [0, 3, 4], [0, 2]]


# -- what does not arrive


def wait_for_a_letter(link: Link) -> str:
    ranks = Ranks.join()
    link.send()
    ranks.timeout_s = link.receive()
    letter = memoryview(bytearray(10_000_000))
    if link.rank == 1:
        link.receive()
    message = failure(lambda: ranks.pass_on([((1, 0, 2), letter)], lambda place: None, phase="letters"))
    return message + failure(lambda: ranks.agree([], phase="later"))


@pytest.mark.parametrize("signum", [signal.SIGKILL, None])
def test_a_letter_whose_sender_died_or_stays_away_is_an_error_on_those_who_wait(signum: int | None) -> None:
    """It names the sender and the phase, at once or after the timeout; nothing later waits."""
    with Job(3, wait_for_a_letter) as job:
        for rank in range(3):
            job.hear(rank)
            job.tell(rank, 60.0 if signum else 2.0)
        if signum:
            job.signal(1, signum)
        for rank in (0, 2):
            message = job.result(rank)
            assert "letters failed on rank" in message
            assert "ranks [1] of 3 did not take part" in message
            assert "cannot start later" in message


def agree_until_someone_dies(link: Link) -> list[str]:
    ranks = Ranks.join(timeout_s=5.0)
    ranks.agree([1], phase="save 1")
    link.send()
    if link.rank == 2:
        link.receive()
    return [
        failure(lambda: ranks.agree([2], phase="save 2")),
        failure(lambda: ranks.gather_objects("plan", phase="plan")),
        failure(lambda: ranks.collect("save-2", 0.1)),
    ]


def test_a_killed_rank_is_named_with_the_phase_by_all_others() -> None:
    """And what comes after fails at once: the ranks can no longer be in step."""
    with Job(4, agree_until_someone_dies) as job:
        for rank in range(4):
            job.hear(rank)
        job.signal(2, signal.SIGKILL)
        results = {rank: job.result(rank) for rank in (0, 1, 3)}
    for rank, (first, second, posts) in results.items():
        assert f"save 2 failed on rank {rank}" in first
        assert "ranks [2] of 4 did not take part" in first
        assert "restart the job" in first
        assert "cannot start plan: save 2 failed" in second
        assert posts == "TimeoutError: 'save-2': ranks [0, 1, 2, 3] of 4 did not report in 0.1 s"


def come_too_late(link: Link) -> str:
    ranks = Ranks.join(timeout_s=3.0)
    if link.rank == 1:
        link.receive()
        ranks.close()
        return failure(lambda: ranks.agree([1], phase="save 1"))
    message = failure(lambda: ranks.agree([1], phase="save 1"))
    ranks.post("save-1", b"")
    return message + failure(lambda: ranks.collect("save-1", 0.1))


def test_a_rank_that_lives_but_does_not_come_is_named_after_the_timeout() -> None:
    """One rank skips a collective call: the commonest bug of a training script."""
    with Job(2, come_too_late) as job:
        message = job.result(0)
        job.tell(1)
        assert "cannot start save 1: closed" in job.result(1)
    assert "save 1 failed on rank 0" in message
    assert "ranks [1] of 2 did not take part" in message
    assert "'save-1': ranks [1] of 2 did not report in 0.1 s" in message


def construct_on_one_rank_only(link: Link) -> str:
    if link.rank == 0:
        message = failure(lambda: Ranks.join(timeout_s=1.0))
        link.send()
        return message
    link.receive()
    return ""


def test_a_manager_constructed_on_some_ranks_only_says_so() -> None:
    """`if rank == 0: manager = ...` is an easy mistake."""
    with Job(3, construct_on_one_rank_only) as job:
        message = job.result(0) if job.hear(0) is None else ""
    assert "constructing the manager (every rank must)" in message
    assert "ranks [1, 2] of 3 did not take part" in message


def join_where_others_were(link: Link) -> list[Any]:
    message = failure(lambda: Ranks.join(timeout_s=1.0)) if link.rank < 2 else ""
    link.send()
    link.receive()
    ranks = Ranks.join(timeout_s=60.0)
    seen = [message, ranks.agree([link.rank], phase="save")]
    link.send()
    link.receive()
    ranks.close()
    return seen


def test_what_an_earlier_launch_left_in_the_store_misleads_nobody() -> None:
    """torchrun starts ranks again beside the same store: here two had begun to construct a manager, and one had not."""
    with Job(3, join_where_others_were) as job:
        for _ in range(2):
            for rank in range(3):
                job.hear(rank)
            for rank in range(3):
                job.tell(rank)
        results = job.results()
    assert [agreed for _, agreed in results] == [[[0], [1], [2]]] * 3
    assert "ranks [2] of 3 did not take part" in results[0][0]
    assert "constructing the manager (every rank must) failed on rank 1" in results[1][0]


def outlive_the_store(link: Link) -> str:
    ranks = Ranks.join()
    link.send()
    link.receive()
    return failure(lambda: ranks.await_announcement("save-1", 600.0))


def test_a_store_that_is_gone_ends_a_wait_at_once() -> None:
    """Its host died: nobody will answer, so there is no point in waiting for the deadline."""
    with Job(2, outlive_the_store) as job:
        for rank in range(2):
            job.hear(rank)
        job.end_store()
        for rank in range(2):
            job.tell(rank)
        for rank, message in enumerate(job.results()):
            assert f"'save-1/all' on rank {rank}" in message
