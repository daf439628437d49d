"""The host's side of what the guest programs do: the mailboxes, the stream's pattern and checksum, and both ends of a stream.

The pattern and the checksum are those of ``src/stream.c``; the layout in memory is :mod:`.layout`, whose names are here too.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from ..errors import PeerError, UsageError
from ..units import KIB, MIB
from .layout import (
    MAILBOX_AREA_BYTES,
    STATE_ABSENT,
    STATE_BUSY,
    STATE_READY,
    STATUS_TEXTS,
    ConsumerLine,
    Mailbox,
    ProducerLine,
    StreamRing,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = [
    "CHUNK_STRIDE",
    "MAILBOX_AREA_BYTES",
    "STATE_ABSENT",
    "STATE_BUSY",
    "STATE_READY",
    "STATUS_TEXTS",
    "ConsumerLine",
    "ExchangePeer",
    "Mailbox",
    "ProducerLine",
    "StreamResult",
    "StreamRing",
    "add_checksum",
    "chunk_checksum",
    "consume",
    "produce",
    "stream_checksum",
    "write_pattern",
]

CHUNK_STRIDE: Final = 0x9E3779B1
"""What the first word of the stream's pattern grows by from chunk to chunk."""

_U32 = 0xFFFFFFFF
_POLL_S = 0.001  # while the other side is not there yet, nobody rings


@functools.lru_cache(maxsize=8)
def _ramp(words: int) -> NDArray[np.uint32]:
    ramp = np.arange(words, dtype=np.uint32)
    ramp.flags.writeable = False
    return ramp


def write_pattern(out: NDArray[np.uint32], seed: int, chunk: int) -> None:
    """Fill a chunk: word i is ``seed + chunk * CHUNK_STRIDE + i`` modulo 2^32."""
    np.add(_ramp(out.size), np.uint32((seed + chunk * CHUNK_STRIDE) & _U32), out=out)


def _rotate_left(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _U32


def chunk_checksum(words: NDArray[np.uint32]) -> int:
    """Return a chunk's checksum: words by index modulo 4 summed modulo 2^32, the four sums folded.

    Parameters
    ----------
    words
        u32, contiguous; the number of words is a multiple of 4.
    """
    # Rows as wide as possible: numpy adds whole rows with SIMD, and sums four columns one by one.
    width = min(words.size & -words.size, 1024)
    row = np.add.reduce(words.reshape(-1, width), axis=0, dtype=np.uint32)
    while row.size > 4:
        row = row[: row.size // 2] + row[row.size // 2 :]
    lanes = row.tolist()
    return int(lanes[0] ^ _rotate_left(lanes[1], 8) ^ _rotate_left(lanes[2], 16) ^ _rotate_left(lanes[3], 24))


def add_checksum(checksum: int, chunk: int) -> int:
    """Return a stream's checksum after one more chunk's; a stream starts at 0."""
    return _rotate_left(checksum, 1) ^ chunk


def stream_checksum(seed: int, chunks: int, chunk_bytes: int = 64 * KIB) -> int:
    """Compute what both sides of a stream have to arrive at.

    >>> hex(stream_checksum(seed=1, chunks=2, chunk_bytes=64))
    '0xffe3e79b'
    """
    words = np.empty(chunk_bytes // 4, dtype=np.uint32)
    checksum = 0
    for chunk in range(chunks):
        write_pattern(words, seed, chunk)
        checksum = add_checksum(checksum, chunk_checksum(words))
    return checksum


class ExchangePeer(Protocol):
    """What a host peer has to be able to do here; ``ivshmem_lab.Peer`` is one."""

    @property
    def peer_id(self) -> int:
        """Its own id."""

    def ring(self, peer_id: int, vector: int = 0) -> None:
        """Interrupt another peer."""

    def wait(self, vector: int = 0, timeout_s: float | None = None) -> int:
        """Wait for interrupts; returns their number, 0 when the time is over."""


@dataclass(frozen=True, slots=True)
class StreamResult:
    """One side's view of a finished stream."""

    chunks: int
    size_bytes: int
    checksum: int
    total_s: float
    """From both sides being there to the last chunk having been consumed."""
    touch_s: float
    """Writing or reading (checksum included) alone."""


def _wait_until(condition: Callable[[], bool], peer: ExchangePeer, timeout_s: float, what: str, poll_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise PeerError(
                f"{what} for {timeout_s:g} s; look whether the other side runs with the same session and ring"
            )
        peer.wait(0, min(left_s, poll_s))


def produce(
    peer: ExchangePeer,
    ring: StreamRing,
    size_bytes: int = 64 * MIB,
    *,
    session: int = 1,
    chunk_bytes: int = 64 * KIB,
    slots: int = 16,
    seed: int = 1,
    timeout_s: float = 30.0,
) -> StreamResult:
    """Be the producer of a stream; options as the guest's.

    Parameters
    ----------
    timeout_s
        How long the other side may stand still.

    Raises
    ------
    UsageError
        A shape that does not fit the memory, or session 0.
    PeerError
        The consumer did not come, stood still, or broke the ring.
    """
    if not 0 < session <= _U32 or not ring.fits(chunk_bytes, slots) or size_bytes % chunk_bytes:
        raise UsageError(
            f"session {session}, {slots} slots of {chunk_bytes} bytes for {size_bytes} bytes do not fit a ring at {ring.offset} of "
            f"{ring.memory.size} bytes; session is 1 or more, chunks are multiples of 64 bytes and divide the whole"
        )
    line, other = ring.producer, ring.consumer
    total = size_bytes // chunk_bytes
    line.clear()
    line.producer, line.chunk_bytes, line.slots, line.total_chunks = peer.peer_id + 1, chunk_bytes, slots, total
    line.session = session
    _wait_until(lambda: other.session == session, peer, timeout_s, f"no consumer of session {session}", _POLL_S)
    consumer = other.consumer - 1
    buffers = [ring.slot(index, chunk_bytes) for index in range(slots)]

    def moved_beyond(tail: int) -> None:
        _wait_until(
            lambda: other.tail != tail, peer, timeout_s, f"the consumer stood at chunk {tail} of {total}", timeout_s
        )

    checksum, touch_s, start_s = 0, 0.0, time.perf_counter()
    for head in range(total):
        while (in_flight := head - (tail := other.tail)) == slots:
            moved_beyond(tail)
        if not 0 <= in_flight < slots:
            raise PeerError(
                f"the consumer's tail {tail} is not between {head - slots} and {head}, the chunks in flight"
            )
        before_s = time.perf_counter()
        words = buffers[head % slots]
        write_pattern(words, seed, head)
        checksum = add_checksum(checksum, chunk_checksum(words))
        touch_s += time.perf_counter() - before_s
        line.checksum = checksum
        line.head = head + 1
        peer.ring(consumer, 0)
    while (tail := other.tail) != total:
        moved_beyond(tail)
    return StreamResult(total, size_bytes, checksum, time.perf_counter() - start_s, touch_s)


def consume(peer: ExchangePeer, ring: StreamRing, *, session: int = 1, timeout_s: float = 30.0) -> StreamResult:
    """Be the consumer of a stream; its shape is what the producer says.

    Raises
    ------
    UsageError
        Session 0.
    PeerError
        The producer did not come, stood still, or broke the ring.
    """
    if not 0 < session <= _U32:
        raise UsageError(f"session {session} is not allowed; 1 to {_U32}")
    line, other = ring.consumer, ring.producer
    line.clear()
    line.consumer = peer.peer_id + 1
    line.session = session
    _wait_until(lambda: other.session == session, peer, timeout_s, f"no producer of session {session}", _POLL_S)
    # Read once: the other side may be anybody and may change them.
    producer, chunk_bytes, slots, total = other.producer - 1, other.chunk_bytes, other.slots, other.total_chunks
    if not ring.fits(chunk_bytes, slots):
        raise PeerError(f"the producer's {slots} slots of {chunk_bytes} bytes do not fit the ring at {ring.offset}")
    buffers = [ring.slot(index, chunk_bytes) for index in range(slots)]
    half = max(1, slots // 2)

    def published_beyond(tail: int) -> int:
        stood = f"the producer stood at chunk {tail} of {total}"
        _wait_until(lambda: other.head != tail, peer, timeout_s, stood, timeout_s)
        return other.head

    checksum, touch_s, start_s = 0, 0.0, time.perf_counter()
    for tail in range(total):
        if (head := other.head) == tail:
            head = published_beyond(tail)
        if not 0 < head - tail <= slots:
            raise PeerError(
                f"the producer's head {head} is not between {tail} and {tail + slots}, the chunks in flight"
            )
        before_s = time.perf_counter()
        checksum = add_checksum(checksum, chunk_checksum(buffers[tail % slots]))
        touch_s += time.perf_counter() - before_s
        line.checksum = checksum
        line.finished = int(tail + 1 == total)
        line.tail = tail + 1
        if (tail + 1) % half == 0 or tail + 1 == total:
            peer.ring(producer, 0)
    return StreamResult(total, total * chunk_bytes, checksum, time.perf_counter() - start_s, touch_s)
