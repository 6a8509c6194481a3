"""BufferPool: who has which slab. What stagers see of it is in conformance.py."""

from __future__ import annotations

import gc
import mmap
import os
import threading
import weakref

import pytest
import torch

from stagers import StagingError
from stagers.pool import BufferPool, format_bytes


def test_slabs_are_page_aligned_and_at_least_as_large_as_asked():
    """Also for a request of nothing."""
    pool = BufferPool()
    for num_bytes in (0, 1, 4097):
        slab = pool.lend(num_bytes)
        memory = torch.frombuffer(slab.memory, dtype=torch.uint8)
        assert memory.data_ptr() % mmap.PAGESIZE == 0
        assert memory.numel() == slab.num_bytes >= num_bytes


def test_the_smallest_idle_slab_that_fits_is_lent():
    """A small state does not take the buffer of a large one while its own is free."""
    pool = BufferPool()
    slabs = [pool.lend(size) for size in (1 << 20, 1 << 14, 1 << 16)]
    for slab in slabs:
        pool.give_back(slab)
    assert [pool.lend(1 << 15), pool.lend(100), pool.lend(1 << 15)] == [slabs[2], slabs[1], slabs[0]]


def test_a_forgotten_slab_makes_room_under_the_cap_and_is_freed_with_its_last_reader():
    """`forget` is for memory that somebody may still read."""
    pool = BufferPool(max_bytes=4096)
    slab = pool.lend(4096)
    freed = weakref.ref(slab.memory)
    reader = torch.frombuffer(slab.memory, dtype=torch.uint8)
    pool.forget(slab)
    del slab
    pool.give_back(pool.lend(4096))
    assert freed() is not None
    assert reader.sum() == 0
    del reader
    gc.collect()
    assert freed() is None


def test_a_failed_allocation_is_a_staging_error_and_takes_no_room():
    """The pool works on."""
    pool = BufferPool()
    with pytest.raises(StagingError, match=r"cannot allocate .* GiB"):
        pool.lend(1 << 62)
    assert repr(pool) == "<BufferPool 0 idle, 0 lent, 0 bytes>"
    pool.lend(1)


def test_threads_that_lend_and_give_back_never_share_a_slab():
    """Each marks its slab while it has it."""
    pool = BufferPool()
    shared = []

    def work() -> None:
        for _ in range(200):
            slab = pool.lend(4096)
            slab.memory[0] += 1
            if slab.memory[0] != 1:
                shared.append(slab)
            slab.memory[0] -= 1
            pool.give_back(slab)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not shared
    assert "0 lent" in repr(pool)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_slabs_are_shared_with_forks_so_that_no_page_is_copied():
    """A DataLoader worker is a fork; after it, private pages would be copied at the next write, inside a step."""
    slab = BufferPool().lend(4096)
    pid = os.fork()
    if pid == 0:
        slab.memory[7] = 42
        os._exit(0)
    os.waitpid(pid, 0)
    assert slab.memory[7] == 42


def test_the_cap_must_be_positive():
    """Zero would refuse every snapshot."""
    with pytest.raises(ValueError, match="max_bytes"):
        BufferPool(0)


def test_bytes_are_printed_in_the_unit_that_fits():
    """Binary units."""
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 20, 3 << 29)] == [
        "0 bytes", "1023 bytes", "1.5 KiB", "5.0 MiB", "1.5 GiB",
    ]  # fmt: skip


def test_a_state_that_grows_a_little_still_fits_its_buffer():
    """The state of a scheduler or dataloader does so after the first step, which must not undo a prewarm."""
    pool = BufferPool()
    slab = pool.lend(1 << 20)
    pool.give_back(slab)
    assert pool.lend((1 << 20) + 10_000) is slab


def test_headroom_never_passes_the_cap():
    """What is asked for fits, and no more is taken."""
    pool = BufferPool(1 << 20)
    assert pool.lend(1 << 20).num_bytes == 1 << 20
