"""Work on a few threads: all of it, once, and none of it after the end."""

from __future__ import annotations

import threading

import pytest

from asyncckpt.parallel import for_each

TIMEOUT_S = 60.0


@pytest.mark.parametrize("num_threads", [1, 3, 100])
def test_everything_is_done_once(num_threads: int) -> None:
    """With fewer, as many and more threads than things."""
    done: list[int] = []
    for_each(done.append, range(50), num_threads)
    assert sorted(done) == list(range(50))


def test_one_thing_needs_no_thread() -> None:
    """Nor does nothing."""
    threads: list[threading.Thread] = []
    for_each(lambda _: threads.append(threading.current_thread()), [1], 8)
    for_each(lambda _: threads.append(threading.current_thread()), [], 8)
    assert threads == [threading.current_thread()]


def test_an_error_ends_the_work_and_waits_for_what_is_under_way() -> None:
    """The error itself is raised; what had not begun never does."""
    error, failed = RuntimeError("second"), threading.Event()
    begun: list[int] = []
    ended: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            failed.set()
            raise error
        assert failed.wait(TIMEOUT_S)
        ended.append(number)

    with pytest.raises(RuntimeError, match="second") as raised:
        for_each(work, range(100), 2)
    assert raised.value is error
    assert ended == [number for number in sorted(begun) if number != 1]
    assert len(begun) < 100


def test_long_work_hears_that_it_is_to_end() -> None:
    """Of an error elsewhere."""
    ends, begun = threading.Event(), threading.Event()

    def work(number: int) -> None:
        if number == 0:
            begun.set()
            assert ends.wait(TIMEOUT_S)
        else:
            assert begun.wait(TIMEOUT_S)
            raise RuntimeError("elsewhere")

    with pytest.raises(RuntimeError, match="elsewhere"):
        for_each(work, range(2), 2, ends)
