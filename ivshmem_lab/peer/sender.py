"""The end of a channel that writes (layout: :mod:`.channel`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from .ring import (
    HEAD,
    MAGIC,
    RECEIVER,
    RECEIVER_CLOSED,
    RECEIVER_SESSION,
    RECORD_BYTES,
    SENDER_CLOSED,
    SENDER_SESSION,
    SKIP,
    TAIL,
    U32,
    VERSION,
    ChannelClosedError,
    ChannelCorruptError,
    ChannelEnd,
    ChannelFullError,
    pack_record,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from .peer import Peer


class Sender(ChannelEnd):
    """The side that writes. Making it begins a new session: what was in the ring is gone."""

    _other_peer = RECEIVER + 1

    def __init__(
        self, memory: NDArray[np.uint8], offset: int, size_bytes: int, *, peer: Peer | None = None, vector: int = 0
    ) -> None:
        super().__init__(memory, offset, size_bytes, peer=peer, vector=vector)
        words = self._words
        last = words[SENDER_SESSION]
        self._head = self._tail = 0  # not modulo 2^32 here
        self._limit = self._capacity  # as far as we know, there is room up to here
        self._reserved: tuple[int, int] | None = None
        words[SENDER_SESSION] = 0  # not valid while it changes
        words[0], words[1], words[2], words[3] = MAGIC, VERSION, self._capacity, self._own_id()
        words[HEAD] = words[SENDER_CLOSED] = 0
        self._session = last % U32 + 1
        words[SENDER_SESSION] = self._session

    def send(self, data: bytes | bytearray | memoryview | NDArray[Any], timeout_s: float | None = None) -> None:
        """Send one message: one copy, into the ring.

        Parameters
        ----------
        data
            Bytes, or an array that lies in one piece.
        timeout_s
            How long to wait for room; None: no limit.

        Raises
        ------
        UsageError
            When it is longer than `longest_bytes`.
        ChannelFullError
            When there was no room in time.
        ChannelClosedError
            When the receiver is gone.
        ChannelCorruptError
            When the receiver's words cannot be right.
        """
        self.send_all((data,), timeout_s)

    def send_all(
        self, messages: Iterable[bytes | bytearray | memoryview | NDArray[Any]], timeout_s: float | None = None
    ) -> None:
        """Send several messages and ring once: a message costs a third less. Arguments and errors as :meth:`send`'s.

        After an error those before the one that failed have been sent.
        """
        self._check_open()
        # No calls and no attributes in the loop but where it has to wait: a message of 64 KiB is copied in 2 us.
        memory, words, mask, capacity = self._bytes, self._words, self._mask, self._capacity
        session, longest, limit, head = self._session, self.longest_bytes, self._limit, self._head
        self._reserved, copied_bytes = None, 0
        if words[RECEIVER_CLOSED]:
            self._look()
        try:
            for message in messages:
                size = len(message)
                at = (head & mask) + RECORD_BYTES
                after = head + size + RECORD_BYTES + 15 & -RECORD_BYTES
                if after > limit or size > longest or at + size > capacity:
                    at = self._make_room(size, timeout_s)
                    limit = self._limit
                    after = self._head + size + RECORD_BYTES + 15 & -RECORD_BYTES
                try:
                    memory[at : at + size] = message  # type: ignore[assignment]  # numpy's stubs
                except (ValueError, TypeError):  # not one dimension of bytes
                    self.send(_as_bytes(message), timeout_s)
                    limit, head = self._limit, self._head
                    continue
                pack_record(memory, at - RECORD_BYTES, size, self._head & U32, session, 0)
                self._head = head = after
                words[HEAD] = head & U32
                copied_bytes += size
        finally:
            self.copied_bytes += copied_bytes
            self._ring()

    def reserve(self, size: int, timeout_s: float | None = None) -> NDArray[np.uint8]:
        """Return room in the ring to fill in place: shape ``(size,)``; :meth:`commit` sends it.

        Reserving again without a commit gives up the first. Raises as :meth:`send`.
        """
        at = self._make_room(size, timeout_s)
        self._reserved = at, size
        return self._data[at : at + size]

    def commit(self, size: int | None = None) -> None:
        """Send what was reserved, or its first `size` bytes. Nothing is copied.

        Raises
        ------
        UsageError
            When nothing is reserved, or less.
        ChannelClosedError
            When the receiver is gone; the message may be lost.
        """
        self._check_open()
        if self._reserved is None:
            raise UsageError("nothing is reserved; call reserve() first")
        at, room = self._reserved
        length = room if size is None else size
        if not 0 <= length <= room:
            raise UsageError(f"cannot commit {length} bytes: {room} were reserved")
        self._reserved = None
        self._publish(at, length)

    def close(self) -> None:
        """Say that nothing more will come; the receiver still gets what was sent. May be called twice."""
        if not self._closed:
            self._closed = True
            self._limit = -1
            self._words[SENDER_CLOSED] = 1
            self._ring_if_there()

    def _joined(self) -> bool:
        return self._words[RECEIVER_SESSION] == self._session

    def _publish(self, at: int, size: int) -> None:
        """Let the receiver see a message that lies in its place."""
        pack_record(self._bytes, at - RECORD_BYTES, size, self._head & U32, self._session, 0)
        self._head = head = self._head + size + RECORD_BYTES + 15 & -RECORD_BYTES
        self._words[HEAD] = head & U32
        self._ring()

    def _make_room(self, size: int, timeout_s: float | None) -> int:
        """Wait for room for a message, and go to the ring's start when it does not fit before the end.

        Returns
        -------
        int
            Where in the ring the message is to lie.
        """
        self._check_open()
        if not 0 <= size <= self.longest_bytes:
            raise UsageError(f"a message of {size} bytes does not fit; this channel takes 0 to {self.longest_bytes}")
        need = size + RECORD_BYTES + 15 & -RECORD_BYTES
        before_end = self._capacity - (self._head & self._mask)
        skip = before_end if need > before_end else 0
        wanted = self._head + skip + need
        if self._look() < wanted:
            self._ring()  # for those of send_all() that are there already
        if not self._wait(lambda: self._look() >= wanted, timeout_s):
            raise ChannelFullError(f"no room for {size} bytes within {timeout_s} s; the receiver has not read enough")
        if skip:
            pack_record(self._bytes, self._head & self._mask, SKIP, self._head & U32, self._session, 0)
            self._head += skip  # published together with the message
        return (self._head & self._mask) + RECORD_BYTES

    def _look(self) -> int:
        """Return how far there is room, after checking the receiver's words."""
        words = self._words
        if not self._joined():  # it has not come, or is beginning anew
            return self._limit
        if words[RECEIVER] != MAGIC:
            raise ChannelCorruptError("receiver magic", f"{words[RECEIVER]:#x} instead of {MAGIC:#x}")
        if words[RECEIVER_CLOSED]:
            raise ChannelClosedError("the receiver has closed the channel")
        value = words[TAIL]
        tail = self._tail + (value - self._tail & U32)
        if tail % RECORD_BYTES or tail > self._head:
            raise ChannelCorruptError(
                "tail", f"{value} is not a multiple of {RECORD_BYTES} from {self._tail} to {self._head} (modulo 2^32)"
            )
        self._tail = tail
        self._limit = tail + self._capacity
        return self._limit


def _as_bytes(data: bytes | bytearray | memoryview | NDArray[Any]) -> bytes | memoryview:
    view = data.data if isinstance(data, np.ndarray) else memoryview(data)
    try:
        return view.cast("B") if view.nbytes else b""
    except TypeError as error:
        raise UsageError(f"a message has to lie in one piece in memory: {error}") from error
