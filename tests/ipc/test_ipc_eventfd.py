"""Eventfds count, coalesce, time out and never block."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ivshmem_lab.errors import UsageError
from ivshmem_lab.ipc.eventfd import MAX_COUNT, EventFd, is_eventfd


def test_rings_are_counted_and_taken_once() -> None:
    with EventFd.create() as event:
        assert event.take() == 0
        for _ in range(5):
            event.ring()
        event.ring(3)
        assert event.take() == 8
        assert event.take() == 0


def test_taking_over_a_descriptor_makes_it_non_blocking() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    with EventFd(fd) as event:
        assert not os.get_blocking(event.fileno())
        assert event.take() == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_full_counter_keeps_the_interrupt_pending() -> None:
    with EventFd.create() as event:
        event.ring(MAX_COUNT)
        event.ring()
        assert event.take() == MAX_COUNT


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1])
def test_counts_out_of_range_are_refused(count: int) -> None:
    with EventFd.create() as event, pytest.raises(UsageError, match=str(count)):
        event.ring(count)


def test_wait_ends_after_its_time_and_not_before() -> None:
    with EventFd.create() as event:
        start = time.monotonic()
        assert event.wait(0.03) == 0
        assert time.monotonic() - start >= 0.03
        event.ring(2)
        assert event.wait(0) == 2


def test_wait_is_woken_by_another_process() -> None:
    with EventFd.create() as event:
        program = f"import os; os.eventfd_write({event.fileno()}, 4)"
        with subprocess.Popen([sys.executable, "-c", program], pass_fds=[event.fileno()]) as child:
            assert event.wait(20) == 4
            assert child.wait(20) == 0


def test_every_ring_reaches_exactly_one_of_two_waiters() -> None:
    with EventFd.create() as event:
        taken = [0, 0]

        def collect(slot: int) -> None:
            while sum(taken) < 200:
                taken[slot] += event.wait(0.05)

        threads = [threading.Thread(target=collect, args=(slot,)) for slot in (0, 1)]
        for thread in threads:
            thread.start()
        for _ in range(200):
            event.ring()
        for thread in threads:
            thread.join(20)
        assert sum(taken) == 200
        assert event.take() == 0


def test_is_eventfd_knows_the_difference() -> None:
    with EventFd.create() as event, socket.socket() as other:
        assert is_eventfd(event.fileno())
        assert not is_eventfd(other.fileno())
    assert not is_eventfd(-1)


def test_an_empty_counter_that_somebody_made_blocking_is_not_waited_for() -> None:
    with EventFd.create() as line:
        os.set_blocking(line.fileno(), True)  # as real QEMU does for a moment when it joins
        assert line.take() == 0
        line.ring()
        assert line.take() == 1
