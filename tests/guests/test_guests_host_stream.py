"""Both ends of a stream in this process, over a memfd and eventfds."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import PeerError, UsageError
from ivshmem_lab.guests.exchange import StreamResult, StreamRing, consume, produce, stream_checksum
from ivshmem_lab.ipc.eventfd import EventFd
from ivshmem_lab.ipc.memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20


class Side:
    """A peer with one vector; the other side's line is known."""

    def __init__(self, peer_id: int, own: EventFd, others: dict[int, EventFd]) -> None:
        self.peer_id = peer_id
        self.own = own
        self.others = others
        self.rung = 0

    def ring(self, peer_id: int, vector: int = 0) -> None:
        assert vector == 0
        self.rung += 1
        self.others[peer_id].ring()

    def wait(self, vector: int = 0, timeout_s: float | None = None) -> int:
        assert vector == 0
        return self.own.wait(timeout_s)


class Pair:
    def __init__(self, memory: SharedMemory, lines: list[EventFd]) -> None:
        self.memory = memory
        self.producer = Side(3, lines[0], {7: lines[1]})
        self.consumer = Side(7, lines[1], {3: lines[0]})

    def ring(self, offset: int = MIB) -> StreamRing:
        return StreamRing(self.memory.array(), offset)

    def stream(self, size_bytes: int, offset: int = MIB, **options: int) -> tuple[StreamResult, StreamResult]:
        session = options.get("session", 1)
        with ThreadPoolExecutor(1) as pool:
            consumed = pool.submit(consume, self.consumer, self.ring(offset), session=session)
            return produce(self.producer, self.ring(offset), size_bytes, **options), consumed.result()


@pytest.fixture
def pair() -> Iterator[Pair]:
    lines = [EventFd.create(), EventFd.create()]
    with SharedMemory.create_memfd(2 * MIB) as memory:
        yield Pair(memory, lines)
    for line in lines:
        line.close()


@pytest.mark.parametrize(
    ("size_bytes", "chunk_bytes", "slots", "offset"),
    [
        (4 * MIB, 65536, 15, MIB),
        (MIB, 4096, 1, MIB),
        (640, 64, 3, MIB),
        (0, 64, 4, MIB),
        (MIB, 65536, 8, 65536),
        (64 * 1000, 64, 5, 2 * MIB - 4096 - 320),
    ],
)
def test_what_is_produced_is_what_is_consumed(
    pair: Pair, size_bytes: int, chunk_bytes: int, slots: int, offset: int
) -> None:
    sent, got = pair.stream(size_bytes, offset, chunk_bytes=chunk_bytes, slots=slots, seed=0xFFFFFFF0, session=9)
    chunks = size_bytes // chunk_bytes
    expected = stream_checksum(0xFFFFFFF0, chunks, chunk_bytes)
    assert (sent.checksum, got.checksum, sent.chunks, got.chunks) == (expected, expected, chunks, chunks)
    assert sent.size_bytes == got.size_bytes == size_bytes
    ring = pair.ring(offset)
    assert (ring.producer.head, ring.consumer.tail) == (chunks, chunks)
    assert ring.producer.checksum == ring.consumer.checksum == expected
    assert ring.consumer.finished == (chunks > 0)


def test_each_chunk_rings_the_consumer_and_each_half_ring_the_producer(pair: Pair) -> None:
    pair.stream(100 * 64, chunk_bytes=64, slots=8)
    assert pair.producer.rung == 100
    assert pair.consumer.rung == 25


def test_one_memory_carries_one_stream_after_the_other(pair: Pair) -> None:
    for session in (1, 2, 0xFFFFFFFF):
        sent, got = pair.stream(MIB, session=session, seed=session, slots=4)
        assert sent.checksum == got.checksum == stream_checksum(session, 16)


def test_a_corrupted_chunk_shows_in_the_checksum(pair: Pair) -> None:
    ring = pair.ring()
    ring.producer.chunk_bytes, ring.producer.slots, ring.producer.total_chunks = 64, 2, 2
    ring.producer.producer, ring.producer.session, ring.producer.head = 4, 1, 2
    ring.slot(1, 64)[5] = 1
    assert consume(pair.consumer, ring).checksum != 0


def test_nobody_to_consume_is_an_error_in_time(pair: Pair) -> None:
    with pytest.raises(PeerError, match=r"no consumer of session 5 for 0\.05 s; look whether"):
        produce(pair.producer, pair.ring(), 65536, slots=4, session=5, timeout_s=0.05)


def test_nobody_to_produce_is_an_error_in_time(pair: Pair) -> None:
    with pytest.raises(PeerError, match=r"no producer of session 5 for 0\.05 s; look whether"):
        consume(pair.consumer, pair.ring(), session=5, timeout_s=0.05)


def test_a_consumer_that_stands_still_is_an_error_in_time(pair: Pair) -> None:
    ring = pair.ring()
    ring.consumer.consumer, ring.consumer.session = 8, 1
    with pytest.raises(PeerError, match="the consumer stood at chunk 0 of 10"):
        produce(pair.producer, ring, 640, chunk_bytes=64, slots=4, timeout_s=0.05)


def test_a_producer_that_stands_still_is_an_error_in_time(pair: Pair) -> None:
    ring = pair.ring()
    ring.producer.producer, ring.producer.chunk_bytes, ring.producer.slots, ring.producer.total_chunks = 4, 64, 4, 10
    ring.producer.head, ring.producer.session = 3, 1
    with pytest.raises(PeerError, match="the producer stood at chunk 3 of 10"):
        consume(pair.consumer, ring, timeout_s=0.05)


def test_a_tail_that_runs_ahead_is_an_error(pair: Pair) -> None:
    ring = pair.ring()
    ring.consumer.consumer, ring.consumer.session, ring.consumer.tail = 8, 1, 1
    with pytest.raises(PeerError, match="tail 1 is not between"):
        produce(pair.producer, ring, 640, chunk_bytes=64, slots=4, timeout_s=0.05)


@pytest.mark.parametrize("head", [5, 0xFFFFFFFF])
def test_a_head_that_runs_ahead_is_an_error(pair: Pair, head: int) -> None:
    ring = pair.ring()
    ring.producer.producer, ring.producer.chunk_bytes, ring.producer.slots, ring.producer.total_chunks = 4, 64, 4, 10
    ring.producer.head, ring.producer.session = head, 1
    with pytest.raises(PeerError, match=f"head {head} is not between 0 and 4"):
        consume(pair.consumer, ring, timeout_s=0.05)


@pytest.mark.parametrize(("chunk_bytes", "slots"), [(0, 4), (63, 4), (64, 0), (65536, 17), (2**32 - 64, 2**32 - 1)])
def test_a_producer_s_shape_that_does_not_fit_is_an_error(pair: Pair, chunk_bytes: int, slots: int) -> None:
    ring = pair.ring()
    ring.producer.chunk_bytes, ring.producer.slots, ring.producer.total_chunks = chunk_bytes, slots, 1
    ring.producer.producer, ring.producer.session, ring.producer.head = 4, 1, 1
    with pytest.raises(PeerError, match=f"{slots} slots of {chunk_bytes} bytes do not fit"):
        consume(pair.consumer, ring, timeout_s=0.05)


@pytest.mark.parametrize(
    "options",
    [{"session": 0}, {"session": 2**32}, {"chunk_bytes": 96}, {"slots": 0}, {"slots": 16}, {"size_bytes": 65537}],
)
def test_a_wrong_option_is_refused_before_anything_is_written(pair: Pair, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="do not fit a ring at 1048576 of 2097152 bytes"):
        produce(pair.producer, pair.ring(), **{"size_bytes": 65536, "slots": 4} | options)
    if "session" in options:
        with pytest.raises(UsageError, match="session"):
            consume(pair.consumer, pair.ring(), session=options["session"])
    assert not pair.memory.array().any()


def test_interrupts_that_are_late_or_of_no_meaning_do_no_harm(pair: Pair) -> None:
    over = threading.Event()

    def disturb() -> None:
        while not over.wait(0.0005):
            pair.producer.own.ring()
            pair.consumer.own.ring(3)

    with ThreadPoolExecutor(1) as pool:
        disturbing = pool.submit(disturb)
        try:
            sent, got = pair.stream(2 * MIB, chunk_bytes=4096, slots=2)
        finally:
            over.set()
        disturbing.result()
    assert sent.checksum == got.checksum == stream_checksum(1, 512, 4096)
