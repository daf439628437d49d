"""What both ends of a channel share: the area in memory, its words, and how the two wake each other (layout: :mod:`.channel`)."""

from __future__ import annotations

import platform
import struct
import time
from typing import TYPE_CHECKING, Any, Self

from ..errors import PeerClosedError, PeerError, SharedMemoryError, UnknownPeerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from .peer import Peer

MAGIC = 0x48435649
VERSION = 1
HEADER_BYTES = 128
RECORD_BYTES = 16
SMALLEST_RING_BYTES = 256
LARGEST_RING_BYTES = 1 << 31
POLL_S = 0.0005
"""How long a side without doorbell sleeps between two looks."""

SKIP = 0xFFFFFFFF
U32 = 0xFFFFFFFF
_LOOK_S = 0.5  # how often one that waits for a doorbell looks whether the other is still there
_ABSENT_S = 0.1  # how long the server may take to tell of a peer that has already written into the memory
RECEIVER = 16  # index of the receiver's first word
HEAD, SENDER_CLOSED, SENDER_SESSION = 4, 5, 6
TAIL, RECEIVER_CLOSED, RECEIVER_SESSION = RECEIVER + 2, RECEIVER + 3, RECEIVER + 4
_RECORD = struct.Struct("<4I")
pack_record, unpack_record = _RECORD.pack_into, _RECORD.unpack_from  # length, position, session, 0


class ChannelError(PeerError):
    """Something about a channel."""


class ChannelCorruptError(ChannelError):
    """The other side, or somebody else, wrote what cannot be; `field` names it."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"channel's {field}: {detail}")
        self.field = field


class ChannelClosedError(ChannelError, PeerClosedError):
    """The other side is gone."""


class ChannelFullError(ChannelError):
    """There was no room for the message in time."""


class ChannelEnd:
    """What both sides have in common.

    Parameters
    ----------
    memory
        The shared memory, uint8.
    offset
        Where the channel's area begins, a multiple of 64.
    size_bytes
        Size of the area: 128 bytes more than a power of two; see :func:`area_bytes`.
    peer
        Who rings and waits; None to look every :data:`POLL_S` instead.
    vector
        The vector to ring and to wait for. It should serve nothing but channels.

    Attributes
    ----------
    longest_bytes
        The longest message.
    copied_bytes
        Bytes of messages that this side has copied: none by reserve, commit, peek and release.

    Raises
    ------
    UsageError
        When the area is not inside the memory, is misplaced, or has no such size; on a machine other than x86-64.
    SharedMemoryError
        When the memory is read-only.
    UnknownPeerError
        When the peer has no such vector.
    """

    _other_peer: int  # index of the word with the other side's peer id + 1

    def __init__(
        self, memory: NDArray[np.uint8], offset: int, size_bytes: int, *, peer: Peer | None = None, vector: int = 0
    ) -> None:
        data_bytes = size_bytes - HEADER_BYTES
        if not SMALLEST_RING_BYTES <= data_bytes <= LARGEST_RING_BYTES or data_bytes & (data_bytes - 1):
            raise UsageError(
                f"size {size_bytes} is not allowed for a channel: {HEADER_BYTES} and a power of two, "
                f"{SMALLEST_RING_BYTES} to {LARGEST_RING_BYTES}"
            )
        if offset % 64 or not 0 <= offset <= memory.size - size_bytes:
            raise UsageError(
                f"a channel of {size_bytes} bytes at offset {offset} is not inside the {memory.size} bytes of memory "
                "at a multiple of 64"
            )
        if platform.machine() != "x86_64":
            raise UsageError(
                f"channels rely on x86-64, which keeps the order of stores; this machine is {platform.machine()}"
            )
        if not memory.flags.writeable:
            raise SharedMemoryError("a channel writes into the memory on both sides; this memory is read-only")
        if peer is not None:
            peer.check_vector(vector)
        self.offset = offset
        self.size_bytes = size_bytes
        self.longest_bytes = data_bytes // 2 - RECORD_BYTES
        self.copied_bytes = 0
        self.peer = peer
        self.vector = vector
        self._shared = memory
        self._capacity, self._mask = data_bytes, data_bytes - 1
        self._data = memory[offset + HEADER_BYTES : offset + size_bytes]
        self._bytes = self._data.data
        self._words: memoryview[int] = memory[offset : offset + HEADER_BYTES].data.cast("I")
        self._absent = False
        self._session = 0
        self._closed = False

    def close(self) -> None:
        """Tell the other side that this one is gone. May be called twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"session {self._session}"
        return f"<{type(self).__name__} of {self._capacity} bytes at {self.offset:#x}: {state}>"

    def _own_id(self) -> int:
        return 0 if self.peer is None else self.peer.peer_id + 1

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosedError(f"this end of the channel at {self.offset:#x} is closed; make a new one")

    def _joined(self) -> bool:
        """Tell whether the other side's words belong to our session."""
        raise NotImplementedError

    def _other(self) -> int:
        """Return the other side's peer id + 1; 0 when nobody there can be rung."""
        number = self._words[self._other_peer]
        if not self._joined():  # not there yet: what stands there may be anything
            return number if number <= 1 << 16 else 0
        if number > 1 << 16:
            raise ChannelCorruptError("peer", f"number {number}; allowed are 0 and peer ids + 1, up to 65536")
        return number

    def _ring(self) -> None:
        """Ring the other side, when it is a peer and there."""
        number = self._other()
        if self.peer is None or not number:
            return
        try:
            self.peer.ring(number - 1, self.vector)
        except UnknownPeerError as error:
            if self._joined():
                raise ChannelClosedError(f"the other side of the channel is not there: {error}") from error

    def _ring_if_there(self) -> None:
        """Ring one that may be gone without having to know it."""
        try:
            self._ring()
        except PeerClosedError:
            return

    def check_alive(self) -> float:
        """Look whether the other side can still be there; return how long to wait before the next look."""
        if self.peer is None:
            return POLL_S
        if self.peer.memory is not self._shared:
            raise ChannelClosedError("the peer has reconnected to other memory; make a new channel there")
        number = self._other()
        if not number:
            return POLL_S
        if not self._joined() or number - 1 == self.peer.peer_id or number - 1 in self.peer.peers:
            self._absent = False
            return _LOOK_S
        if self._absent:
            raise ChannelClosedError(f"peer {number - 1}, the other side of the channel, has left")
        self._absent = True  # or the server has not told us of it yet
        return _ABSENT_S

    def _wait(self, condition: Callable[[], Any], timeout_s: float | None) -> bool:
        """Wait until a condition holds; False when the time is over."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not condition():
            step_s = self.check_alive()
            if deadline is not None:
                step_s = min(step_s, deadline - time.monotonic())
                if step_s <= 0:
                    return False
            self.pause(step_s)
        return True

    def pause(self, step_s: float) -> None:
        """Wait for the doorbell, or without one for this time."""
        if self.peer is not None:
            self.peer.wait(self.vector, step_s)
        else:
            time.sleep(step_s)
