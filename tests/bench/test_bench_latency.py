"""Round trips: every interrupt is counted, and what cannot be measured says why."""

from __future__ import annotations

import dataclasses
import os
import signal
import time

import numpy as np
import pytest

from ivshmem_lab import Lab
from ivshmem_lab.bench import latency
from ivshmem_lab.bench.clock import measure_tsc
from ivshmem_lab.bench.host import MeasurementError, Pinning
from ivshmem_lab.errors import UsageError
from ivshmem_lab.guests.layout import Mailbox


@pytest.fixture(scope="module")
def clock():
    return measure_tsc(0.01)


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture
def trio(lab):
    """Two guests and a host peer that all wait for interrupts."""
    board = lab.server("board", size="128K", vectors=1)
    cpu = Pinning.choose().measured
    guests = [lab.vm(name, connect=board, cpu=cpu) for name in ("alice", "bob")]
    me = lab.peer("me", connect=board)
    lab.start()
    return me, *guests


def test_paths_are_measured_in_turns_and_every_interrupt_is_counted(trio, clock) -> None:
    me, alice, bob = trio
    pinning = Pinning.choose()
    before = os.sched_getaffinity(0)
    paths = [
        latency.GuestPath(me, alice, bob, clock, pinning),
        latency.HostPath(me, bob, pinning=pinning),
        latency.GuestPath(me, bob, alice, clock),
    ]
    told = []
    results = latency.measure(
        paths, rounds=50, warmup=3, blocks=4, on_block=lambda *news: told.append((news[0], *news[1].between))
    )
    ends = [("alice", "bob"), ("me", "bob"), ("bob", "alice")]
    assert told == [(turn, *end) for turn in range(4) for end in ends]
    assert [result.between for result in results] == ends
    for result in results:
        assert (result.interrupts_sent, result.interrupts_received, result.complete) == (100, 100, True)
        assert [block.size for block in result.blocks_ns] == [13, 13, 12, 12]
        assert result.latency_ns.shape == (50,)
        assert (result.latency_ns > 0).all()
        assert (result.latency_us == result.latency_ns / 1000).all()
        assert result.summary().n == 50
        assert "none lost" in repr(result)
    assert Mailbox(me.memory, bob.peer_id).reply_to == 0
    assert os.sched_getaffinity(0) == before


def test_the_guests_times_fit_into_the_time_it_took(trio, clock) -> None:
    me, alice, bob = trio
    start_us = clock_us()
    result = latency.ping(me, alice, bob, clock, rounds=100, blocks=1)
    assert result.latency_us.sum() < clock_us() - start_us


def clock_us() -> float:
    return time.perf_counter() * 1e6


def test_a_host_path_takes_the_wrong_answer_for_no_lost_one(trio) -> None:
    me, alice, _bob = trio
    me.ring(me.peer_id, 0)  # an interrupt from before is not an answer
    assert latency.ping_from_here(me, alice, rounds=5, warmup=0, blocks=1).complete


@pytest.mark.parametrize("lost", ["interrupts_sent", "interrupts_received"])
def test_a_result_with_an_interrupt_lost_is_not_complete(lost) -> None:
    result = latency.LatencyResult(("a", "b"), (np.ones(3), np.ones(2)), 10, 10, "")
    assert result.complete
    short = dataclasses.replace(result, **{lost: 9})
    assert not short.complete
    assert "NOT complete" in repr(short)


def test_a_guest_that_dies_ends_the_measurement_by_name(trio, clock) -> None:
    me, alice, bob = trio
    guests, host = latency.GuestPath(me, alice, bob, clock), latency.HostPath(me, bob)
    os.kill(bob.pid, signal.SIGKILL)
    with pytest.raises(MeasurementError, match="alice ↔ bob: bob is failed, killed by SIGKILL"):
        guests.block(10)
    with pytest.raises(MeasurementError, match=r"me ↔ bob: there is no peer 2; .*has the machine ended"):
        host.block(10)


def test_a_guest_that_is_stopped_ends_the_measurement_by_name(trio, clock) -> None:
    me, alice, bob = trio
    path = latency.GuestPath(me, alice, bob, clock)
    alice.execute("stop")
    with pytest.raises(MeasurementError, match="alice ↔ bob: alice is paused"):
        path.block(10)


def test_a_guest_that_refuses_says_why(trio, clock) -> None:
    me, alice, bob = trio
    path = latency.GuestPath(me, alice, bob, clock)
    Mailbox(me.memory, bob.peer_id).owner = 0
    with pytest.raises(MeasurementError, match="alice did not ping bob: the target's mailbox is not ready"):
        path.block(10)


@pytest.mark.parametrize("numbers", [{"rounds": 0}, {"warmup": -1}, {"blocks": 0}])
def test_numbers_that_are_not_allowed_are_refused(numbers) -> None:
    with pytest.raises(UsageError, match="at least 1, 0 and 1"):
        latency.measure([], **numbers)


def test_more_rounds_than_the_log_holds_are_refused(trio, clock) -> None:
    me, alice, bob = trio
    with pytest.raises(UsageError, match=r"rounds 16385 of a block do not fit: 1 to 16384"):
        latency.GuestPath(me, alice, bob, clock).block(16385)


def test_a_guest_of_another_server_is_refused(lab, clock) -> None:
    here, there = lab.server("here", size="128K"), lab.server("there", size="128K")
    alice = lab.vm("alice", connect=there)
    me = lab.peer("me", connect=here)
    lab.start()
    with pytest.raises(UsageError, match="alice has no mailbox in this memory"):
        latency.HostPath(me, alice)


def test_a_guest_with_two_devices_is_refused(lab) -> None:
    boards = [lab.server(name, size="128K") for name in ("one", "two")]
    alice = lab.vm("alice", connect=boards)
    me = lab.peer("me", connect=boards[0])
    lab.start()
    with pytest.raises(UsageError, match="alice is connected to 2 servers"):
        latency.HostPath(me, alice)
