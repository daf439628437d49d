"""The end of a channel that reads (layout: :mod:`.channel`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    unpack_record,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .peer import Peer


class Receiver(ChannelEnd):
    """The side that reads. A new one goes on where the last one of the same session stopped."""

    _other_peer = 3

    def __init__(
        self, memory: NDArray[np.uint8], offset: int, size_bytes: int, *, peer: Peer | None = None, vector: int = 0
    ) -> None:
        super().__init__(memory, offset, size_bytes, peer=peer, vector=vector)
        self._tail = self._head = 0  # as far as we have read, and may read; not modulo 2^32 here
        self._peeked: int | None = None  # the tail after the message that is shown
        self._shown = self._data[:]
        self._shown.flags.writeable = False
        self._words[RECEIVER + 1] = self._own_id()  # to be rung for the first message already
        self._attach()

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """Take the next message: one copy, out of the ring.

        Returns
        -------
        bytes or None
            None when the time is over (None: no limit).

        Raises
        ------
        ChannelClosedError
            When the sender is gone and everything has been read, or a new session has begun.
        ChannelCorruptError
            When what is in the ring or its header cannot be right.
        """
        view = self.peek(timeout_s)
        if view is None:
            return None
        data = view.tobytes()
        self.copied_bytes += len(data)
        self.release()
        return data

    def receive_now(self) -> bytes | None:
        """Take the next message if it is there already. Raises as :meth:`receive`."""
        return self.receive(0) if self._head != self._tail or self._available() else None

    def peek(self, timeout_s: float | None = None) -> NDArray[np.uint8] | None:
        """Return the next message where it lies, read-only; :meth:`release` takes it off. Raises as :meth:`receive`.

        Peeking again without a release shows the same message.
        """
        if self._head == self._tail and not self._wait(self._available, timeout_s):
            return None
        return self._show(only_one=True)[0]

    def peek_all(self, timeout_s: float | None = None) -> list[NDArray[np.uint8]]:
        """Return all messages that are there, where they lie; waits for the first only. Raises as :meth:`receive`.

        Parameters
        ----------
        timeout_s
            How long to wait; None: no limit. The list is empty when the time is over.
        """
        return self._show(only_one=False) if self._wait(self._available, timeout_s) else []

    def release(self) -> None:
        """Give the room of what was peeked back to the sender; the views show other things from now on.

        Raises
        ------
        UsageError
            When nothing was peeked.
        """
        tail = self._peeked
        if tail is None:
            self._check_open()
            raise UsageError("nothing is peeked; call peek() first")
        before, self._tail, self._peeked = self._tail, tail, None
        self._words[TAIL] = tail & U32
        if tail == self._head or (before ^ tail) & ~(self._mask >> 2):
            self._ring_if_there()  # a sender that is gone may have left messages

    def close(self) -> None:
        """Say that nothing more will be read: the sender gets ChannelClosedError. May be called twice."""
        if not self._closed:
            self._closed = True
            self._head, self._peeked = self._tail, None
            if self._joined():
                self._words[RECEIVER_CLOSED] = 1
                self._ring_if_there()

    def _attach(self) -> None:
        """Join the sender's session, once there is one."""
        words = self._words
        session = words[SENDER_SESSION]
        if not session:
            return
        for field, index, wanted in (("magic", 0, MAGIC), ("version", 1, VERSION), ("data_bytes", 2, self._capacity)):
            if (value := words[index]) != wanted:
                raise ChannelCorruptError(field, f"{value:#x} instead of {wanted:#x}; have both sides the same size?")
        goes_on = words[RECEIVER_SESSION] == session and words[RECEIVER] == MAGIC
        tail = words[TAIL] if goes_on else 0
        if tail % RECORD_BYTES:
            raise ChannelCorruptError("tail", f"{tail} is not a multiple of {RECORD_BYTES}")
        self._tail = self._head = tail
        self._read_head()
        words[RECEIVER_SESSION] = 0
        words[RECEIVER], words[RECEIVER + 1] = MAGIC, self._own_id()
        words[TAIL], words[RECEIVER_CLOSED] = tail, 0
        words[RECEIVER_SESSION] = self._session = session

    def _joined(self) -> bool:
        return self._session != 0 and self._words[SENDER_SESSION] == self._session

    def _show(self, *, only_one: bool) -> list[NDArray[np.uint8]]:
        """Check the records that the sender has published, and return where they lie; at least one."""
        self._peeked = None
        memory, mask, session, shown, longest = self._bytes, self._mask, self._session, self._shown, self.longest_bytes
        views: list[NDArray[np.uint8]] = []
        tail, head, capacity = self._tail, self._head, self._capacity
        while tail != head:
            at = tail & mask
            length, position, of_session, zero = unpack_record(memory, at)
            if position != tail & U32 or of_session != session or zero:
                raise ChannelCorruptError(
                    "record", f"position {position}, session {of_session}, {zero} at {tail} of session {session}"
                )
            after = tail + length + RECORD_BYTES + 15 & -RECORD_BYTES
            if length == SKIP:
                after = tail + capacity - at
                if at == 0 or after >= head:
                    raise ChannelCorruptError("length", f"a skip at {at} with {head - tail} bytes in the ring")
            elif length > longest or after > head or at + RECORD_BYTES + length > capacity:
                raise ChannelCorruptError("length", f"{length} with {head - tail} bytes in the ring; at most {longest}")
            else:
                views.append(shown[at + RECORD_BYTES : at + RECORD_BYTES + length])
                tail = after
                if only_one:
                    break
                continue
            tail = after
        self._peeked = tail
        return views

    def _read_head(self) -> None:
        value = self._words[HEAD]
        head = self._head + (value - self._head & U32)
        if head % RECORD_BYTES or head - self._tail > self._capacity:
            raise ChannelCorruptError(
                "head",
                f"{value} is not a multiple of {RECORD_BYTES} from {self._head} to {self._tail + self._capacity} (modulo 2^32)",
            )
        self._head = head

    def _available(self) -> bool:
        """Tell whether there is a message, after checking the sender's words."""
        self._check_open()
        if self._session == 0:
            self._attach()
            if self._session == 0:
                return False
        words = self._words
        if (session := words[SENDER_SESSION]) != self._session:
            raise ChannelClosedError(
                f"the sender has begun session {session}, ours is {self._session}; make a new receiver"
            )
        closed = words[SENDER_CLOSED]  # before head: what was sent before closing is seen
        self._read_head()
        if self._head != self._tail:
            return True
        if closed:
            raise ChannelClosedError("the sender has closed the channel, and everything has been read")
        return False
