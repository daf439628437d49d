"""What guests and host keep in shared memory: mailboxes and the header of the stream's ring (``src/exchange.h``).

All words are u32, little endian, and each has one writer, because a guest's locked instructions are
not atomic against other processes under Unicorn; the doorbell orders them. Nothing here copies:
``memory`` is the shared memory as a uint8 array, for example ``Peer.memory``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self, overload

from ..errors import UsageError
from ..units import MIB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LINE_BYTES: Final = 64
MAILBOXES: Final = 1024
MAILBOX_AREA_BYTES: Final = MAILBOXES * LINE_BYTES
"""The mailboxes lie at the start of the memory; logs and rings lie behind them."""

STATE_ABSENT, STATE_READY, STATE_BUSY = 0, 1, 2
STATUS_TEXTS: Final = {
    0: "ok",
    1: "the target's mailbox is not ready",
    2: "the log does not fit between the mailboxes and the end of the memory",
    3: "the target is the guest itself",
}
"""What a mailbox's ``status`` says after a ping block."""

RING_DATA_BYTES: Final = 4096
"""From the start of a ring to its slot 0."""

CHUNK_ALIGNMENT_BYTES: Final = 64
"""A chunk is a multiple of this: the guests' loops are unrolled."""


class Line:
    """64 bytes of shared memory as 16 words.

    Raises
    ------
    UsageError
        The line does not lie inside the memory.
    """

    def __init__(self, memory: NDArray[np.uint8], offset: int) -> None:
        if offset % 4 or not 0 <= offset <= memory.size - LINE_BYTES:
            raise UsageError(
                f"offset {offset} of a line of {LINE_BYTES} bytes is not a multiple of 4 inside the {memory.size} bytes of memory"
            )
        self.offset = offset
        self.words: NDArray[np.uint32] = memory[offset : offset + LINE_BYTES].view("<u4")

    def clear(self) -> None:
        """Set all 16 words to 0."""
        self.words[:] = 0

    def as_dict(self) -> dict[str, int]:
        """Return all named words, in their order in memory."""
        return {name: getattr(self, name) for name, field in vars(type(self)).items() if isinstance(field, Word)}

    def __repr__(self) -> str:
        words = " ".join(f"{name}={value}" for name, value in self.as_dict().items())
        return f"<{type(self).__name__} at {self.offset:#x}: {words}>"


class Word:
    """One named u32 of a :class:`Line`."""

    def __init__(self, index: int, doc: str) -> None:
        self.index = index
        self.__doc__ = doc

    @overload
    def __get__(self, line: None, owner: type[Line]) -> Self: ...
    @overload
    def __get__(self, line: Line, owner: type[Line]) -> int: ...
    def __get__(self, line: Line | None, owner: type[Line]) -> Self | int:
        return self if line is None else int(line.words[self.index])

    def __set__(self, line: Line, value: int) -> None:
        line.words[self.index] = value


class Wide(Word):
    """A named 64-bit count in two words, low first; not read in one piece, so only for values that are final."""

    @overload
    def __get__(self, line: None, owner: type[Line]) -> Self: ...
    @overload
    def __get__(self, line: Line, owner: type[Line]) -> int: ...
    def __get__(self, line: Line | None, owner: type[Line]) -> Self | int:
        return self if line is None else int(line.words[self.index]) | int(line.words[self.index + 1]) << 32

    def __set__(self, line: Line, value: int) -> None:
        line.words[self.index] = value & 0xFFFFFFFF
        line.words[self.index + 1] = value >> 32


class Mailbox(Line):
    """The line of a ``pingpong`` guest with a given peer id.

    Parameters
    ----------
    memory
        The shared memory, uint8, at least 64 KiB.
    peer_id
        Whose line: 0 to 65535; ids that are equal modulo 1024 share one.

    Raises
    ------
    UsageError
        The memory does not hold the line.
    """

    state = Word(0, "0 absent, 1 ready, 2 busy with a ping block")
    owner = Word(1, "peer id + 1")
    reply_to = Word(2, "peer id + 1 that is rung back on the same vector for each interrupt; 0 = nobody")
    command = Word(3, "count it up, then ring vector 0: the guest runs one ping block")
    done = Word(4, "the last command finished")
    target = Word(5, "peer id to ping")
    rounds = Word(6, "timed round trips of a block")
    warmup = Word(7, "round trips before the timed ones")
    log_offset = Word(8, "byte offset of one u32 per timed round trip, TSC cycles; 0 = no log")
    received = Word(9, "interrupts taken since the guest started")
    sent = Word(10, "doorbells rung since the guest started")
    controller = Word(11, "peer id + 1 to ring on vector 0 when a block is done; 0 = nobody")
    status = Word(12, "result of the last block, see STATUS_TEXTS")

    def __init__(self, memory: NDArray[np.uint8], peer_id: int) -> None:
        super().__init__(memory, peer_id % MAILBOXES * LINE_BYTES)
        self._memory = memory
        self.peer_id = peer_id

    @property
    def ready(self) -> bool:
        """Whether this very peer has set up its mailbox and is not busy."""
        return self.state == STATE_READY and self.owner == self.peer_id + 1

    def log_cycles(self) -> NDArray[np.uint32]:
        """Return the round trips of the last block in TSC cycles, zero copy, shape ``(rounds,)``.

        Raises
        ------
        UsageError
            The block had no log inside the memory.
        """
        start, size_bytes = self.log_offset, 4 * self.rounds
        if start % 4 or start < MAILBOX_AREA_BYTES or start + size_bytes > self._memory.size:
            raise UsageError(f"log_offset {start} names no log of {size_bytes} bytes behind the mailboxes")
        return self._memory[start : start + size_bytes].view("<u4")


class ProducerLine(Line):
    """Line 0 of a ring; only the producer writes it."""

    session = Word(0, "number of this run, written last; 0 = line not valid")
    producer = Word(1, "peer id + 1")
    head = Word(2, "chunks published, modulo 2^32")
    chunk_bytes = Word(3, "bytes of a chunk, a multiple of 64")
    slots = Word(4, "chunks that fit into the ring")
    total_chunks = Word(5, "chunks of this run")
    checksum = Word(6, "checksum of the chunks published")
    total_cycles = Wide(7, "first write to last chunk consumed, the guest's TSC; 0 from a host")
    write_cycles = Wide(9, "writing alone, the guest's TSC; 0 from a host")


class ConsumerLine(Line):
    """Line 1 of a ring; only the consumer writes it."""

    session = Word(0, "number of this run, written last; 0 = line not valid")
    consumer = Word(1, "peer id + 1")
    tail = Word(2, "chunks consumed, modulo 2^32")
    checksum = Word(3, "checksum of the chunks consumed")
    read_cycles = Wide(4, "reading alone, the guest's TSC; 0 from a host")
    total_cycles = Wide(6, "session to last chunk, the guest's TSC; 0 from a host")
    finished = Word(8, "1 when all chunks are consumed")


class StreamRing:
    """A single-producer, single-consumer ring of chunks, as the ``stream`` guest has it.

    Parameters
    ----------
    memory
        The shared memory, uint8.
    offset
        Bytes from its start, a multiple of 64; the guest's option ``ring``.

    Raises
    ------
    UsageError
        The two header lines do not fit.
    """

    def __init__(self, memory: NDArray[np.uint8], offset: int = MIB) -> None:
        if offset % LINE_BYTES:
            raise UsageError(f"ring offset {offset} is not a multiple of {LINE_BYTES}")
        self.memory = memory
        self.offset = offset
        self.producer = ProducerLine(memory, offset)
        self.consumer = ConsumerLine(memory, offset + LINE_BYTES)

    def fits(self, chunk_bytes: int, slots: int) -> bool:
        """Tell whether chunks of this size and number are allowed here."""
        room_bytes = self.memory.size - self.offset - RING_DATA_BYTES
        return (
            slots > 0 < chunk_bytes and chunk_bytes % CHUNK_ALIGNMENT_BYTES == 0 and chunk_bytes * slots <= room_bytes
        )

    def slot(self, index: int, chunk_bytes: int) -> NDArray[np.uint32]:
        """Return the words of one slot, zero copy."""
        start = self.offset + RING_DATA_BYTES + index * chunk_bytes
        return self.memory[start : start + chunk_bytes].view("<u4")

    def __repr__(self) -> str:
        return f"<StreamRing at {self.offset:#x}: {self.producer!r} {self.consumer!r}>"
