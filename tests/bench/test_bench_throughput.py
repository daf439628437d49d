"""Bytes through shared memory: all arrive as they were sent, or it is said that they did not."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.bench import throughput
from ivshmem_lab.bench.clock import measure_tsc
from ivshmem_lab.bench.host import MeasurementError, Pinning
from ivshmem_lab.errors import UsageError
from ivshmem_lab.guests.exchange import stream_checksum
from ivshmem_lab.guests.layout import StreamRing

SIZE = 40 * throughput.CHUNK_BYTES
UNICORN = "unicorn"


@pytest.fixture(scope="module")
def clock():
    return measure_tsc(0.01)


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture
def board(lab):
    return lab.server("board", size="4M")


def test_streams_are_measured_in_turns_and_arrive_whole(lab, board, clock) -> None:
    me = lab.peer("me", connect=board)
    pinning = Pinning.choose()
    streams = [
        throughput.GuestStream(lab, board, ("alice", UNICORN), ("bob", UNICORN), clock, pinning),
        throughput.HostStream(lab, board, me, ("alice", UNICORN), clock, pinning),
    ]
    told = []
    results = throughput.measure(streams, SIZE, turns=2, on_run=lambda *news: told.append((news[0], *news[1].between)))
    assert told == [(turn, *ends) for turn in range(2) for ends in (("alice", "bob"), ("me", "alice"))]
    expected = stream_checksum(1, 40)
    for result in results:
        assert (result.bytes_moved, result.checksum_ok, len(result.runs)) == (2 * SIZE, True, 2)
        for run in result.runs:
            assert (run.written, run.read, run.size_bytes) == (expected, expected, SIZE)
            assert 0 < run.write_s < run.total_s
            assert 0 < run.read_s < run.total_s
            assert run.gbytes_per_s == SIZE / run.total_s / 1e9
        assert result.gbytes_per_s in [run.gbytes_per_s for run in result.runs]
        assert "checksum ok" in repr(result)
    assert [run.peer_ids for result in results for run in result.runs] == [(1, 2), (4, 5), (0, 3), (0, 6)]
    assert str(lab).count(" VM ") == 0  # their machines are gone


def run_of(total_s: float, **changes: int) -> throughput.StreamRun:
    return throughput.StreamRun(
        10**9, total_s, 0.1, 0.1, *({"written": 5, "read": 5, "expected": 5} | changes).values(), (0, 1)
    )


@pytest.mark.parametrize("wrong", ["written", "read", "expected"])
def test_a_run_with_another_checksum_is_not_ok(wrong) -> None:
    good, bad = run_of(1.0), run_of(1.0, **{wrong: 6})
    assert (good.checksum_ok, bad.checksum_ok) == (True, False)
    result = throughput.ThroughputResult(("a", "b"), (good, bad, good))
    assert not result.checksum_ok
    assert "checksum WRONG" in repr(result)


def test_the_throughput_of_a_result_is_that_of_its_middle_run() -> None:
    result = throughput.ThroughputResult(("a", "b"), (run_of(1.0), run_of(0.1), run_of(0.5)))
    assert (result.gbytes_per_s, result.middle.total_s) == (2.0, 0.5)
    assert dataclasses.replace(result, runs=(run_of(1.0), run_of(0.5))).gbytes_per_s == 1.0


@pytest.mark.parametrize("size_bytes", [0, 1, 65537, 1 << 32])
def test_bytes_that_are_no_whole_chunks_are_refused(size_bytes) -> None:
    with pytest.raises(UsageError, match=r"whole chunks of 64K, less than 4G"):
        throughput.measure([], size_bytes)


def test_no_turns_are_refused() -> None:
    with pytest.raises(UsageError, match="turns 0"):
        throughput.measure([], SIZE, turns=0)


def test_a_memory_without_room_for_the_ring_is_refused(lab, clock) -> None:
    small = lab.server("small", size="2M")
    with pytest.raises(UsageError, match=r"the memory of small \(2M\) is too small .* size='4M'"):
        throughput.GuestStream(lab, small, ("alice", UNICORN), ("bob", UNICORN), clock)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("kill alice", "the console of alice ended without"),
        ("kill bob", "bob is failed: "),
        ("break head", "bob is stopped: stream: the producer's head is not between the chunks in flight"),
        ("break tail", "the console of alice .*stream: the consumer.s tail is not between the chunks in flight"),
    ],
)
def test_a_guest_that_ends_ends_the_measurement_by_name(lab, board, clock, harm, words) -> None:
    stream = throughput.GuestStream(lab, board, ("alice", UNICORN), ("bob", UNICORN), clock)
    harmer = threading.Thread(target=harm_when_it_streams, args=(lab, board, *harm.split()))
    harmer.start()
    with pytest.raises(MeasurementError, match=f"alice → bob: .*{words}"):
        stream.run(throughput.MOST_BYTES, 0)
    harmer.join()
    assert str(lab).count(" VM ") == 0


def harm_when_it_streams(lab, board, what, whom) -> None:
    watcher = lab.peer("watcher", connect=board)
    ring = StreamRing(watcher.memory)
    while not ring.consumer.tail:
        watcher.wait(0, 0.001)
    if what == "kill":
        pids = [each.pid for each in board.peers.values() if each.pid != os.getpid()]
        os.kill(pids[["alice", "bob"].index(whom)], signal.SIGKILL)
        return
    line = ring.producer if whom == "head" else ring.consumer
    while len(board.peers) == 3:  # its owner writes it, too
        setattr(line, whom, 0x7FFFFFFF)


def test_the_host_stream_says_what_the_guest_said(lab, board, clock) -> None:
    me = lab.peer("me", connect=board)
    stream = throughput.HostStream(lab, board, me, ("alice", UNICORN), clock, standstill_s=0.5)
    harmer = threading.Thread(target=break_the_head, args=(lab, board))
    harmer.start()
    with pytest.raises(MeasurementError, match=r"me → alice: .*alice is stopped: stream: the producer's head"):
        stream.run(throughput.MOST_BYTES, 0)
    harmer.join()


def break_the_head(lab, board) -> None:
    harm_when_it_streams(lab, board, "break", "head")
