"""Messages of the ivshmem server's protocol, version 0.

Source: QEMU docs/specs/ivshmem-spec, "Client-Server protocol"; the notes in brackets were
measured with QEMU 7.2.

1. The server sends messages of 8 bytes: one signed little-endian number, and at most one file
   descriptor. (More than one: QEMU keeps the first and loses the rest.)
2. A stream has no borders: a message can arrive in pieces, and its descriptor with either piece.
   (QEMU puts them together.)
3. The kernel never reads past bytes that carry a descriptor, so descriptors that come with a
   piece of the stream belong to the last message that the piece touches (unix(7)).

Descriptors are opaque here (type ``F``): tests use names, the server objects, a peer numbers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ..errors import LocalProtocolError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

F = TypeVar("F")

PROTOCOL_VERSION = 0
MESSAGE_BYTES = 8
MEMORY = -1
"""The number that announces the shared memory."""
MAX_PEER_ID = 0xFFFF
"""Peer ids are 16 bits: the doorbell register has no room for more."""
MAX_VECTORS = 1 << 16
"""Vectors of one peer: the doorbell register's 16 bits."""

_NUMBER = struct.Struct("<q")


def encode(value: int) -> bytes:
    """Write the 8 bytes of a message.

    Raises
    ------
    LocalProtocolError
        When the number does not fit in 64 bits.
    """
    try:
        return _NUMBER.pack(value)
    except struct.error as error:
        raise LocalProtocolError(f"message {value} does not fit in a signed 64-bit number") from error


@dataclass(frozen=True, slots=True)
class Message(Generic[F]):
    """One message: its number, and the descriptor that rides on it."""

    value: int
    fd: F | None = None


class Decoder(Generic[F]):
    """Puts messages together from any split of the stream (rules 2 and 3)."""

    def __init__(self) -> None:
        self._bytes = b""
        self._fd: F | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes of a message that is not complete yet, 0 to 7."""
        return len(self._bytes)

    def feed(self, data: bytes, fds: Sequence[F] = ()) -> list[Message[F]]:
        """Take what one read returned; give the messages that it completed.

        Raises
        ------
        RemoteProtocolError
            Field ``"message"``, when a message has more than one descriptor, or a descriptor came
            without bytes. The decoder then holds nothing of this piece; the caller closes `fds`.
        """
        if fds and (not data or len(fds) > 1):
            raise RemoteProtocolError(
                "message", f"{len(fds)} file descriptors with {len(data)} bytes; at most one comes with a message"
            )
        stream = self._bytes + data
        count, rest = divmod(len(stream), MESSAGE_BYTES)
        last = count if rest else count - 1  # the message that the piece ends in
        if fds and self._fd is not None and last == 0:
            raise RemoteProtocolError("message", "a second file descriptor with one message; at most one is allowed")
        riders = {0: self._fd}
        if fds:
            riders[last] = fds[0]
        self._fd = riders.get(count)
        self._bytes = stream[count * MESSAGE_BYTES :]
        return [
            Message(_NUMBER.unpack_from(stream, index * MESSAGE_BYTES)[0], riders.get(index)) for index in range(count)
        ]

    def abandon(self) -> list[F]:
        """Forget an incomplete message; its descriptor, if any, goes back to the caller."""
        fd, self._fd, self._bytes = self._fd, None, b""
        return [] if fd is None else [fd]
