"""One connected peer: its socket, its vectors and the messages that wait for it."""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

from ..ipc.fdpass import send_message
from ..wire.messages import Message, encode

if TYPE_CHECKING:
    import asyncio

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
"""Errors that pass: too few descriptors, too many of them in flight (unix(7)), too little memory."""

FIRST_DELAY_S = 0.010
LAST_DELAY_S = 0.100

_SEND_BUFFER_BYTES = 24576
"""Room for 64 messages (measured, Linux 6.18: 768 bytes each; the kernel doubles what is asked for).

What has been sent and not read counts against the descriptors that all of a user's processes may
have in flight (unix(7), ETOOMANYREFS): with the default of 278 messages, four peers that do not read
would use up a limit of 1024 and keep everybody waiting.
"""

_TURN_MESSAGES = 256  # sent to one peer before the others get a turn
_UCRED = struct.Struct("3i")


class SharedFd:
    """A descriptor with several holders; closed when the last lets go."""

    __slots__ = ("_holders", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._holders = 1

    def hold(self) -> None:
        """Add a holder."""
        self._holders += 1

    def release(self) -> None:
        """Take a holder away."""
        self._holders -= 1
        if self._holders == 0:
            os.close(self.fd)


class Progress(enum.Enum):
    """How a turn of sending ended."""

    DONE = "everything is sent"
    MORE = "the socket is full, or the turn is over"
    SHORT = "the kernel is short of descriptors or memory"


class Connection:
    """A peer's end as the server sees it.

    Attributes
    ----------
    settled
        The introduction has been sent whole.
    writing
        The loop watches for room in the socket.
    retry
        Timer of the next try after a shortage.
    broken
        Why it is about to be disconnected; nothing is sent any more.
    """

    def __init__(self, sock: socket.socket, peer_id: int, vectors: list[SharedFd]) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.sock = sock
        self.peer_id = peer_id
        self.pid, self.uid = credentials(sock)
        self.vectors = vectors
        self.queue: deque[Message[SharedFd]] = deque()
        self.queue_limit = 0
        self.settled = False
        self.writing = False
        self.retry: asyncio.TimerHandle | None = None
        self.delay_s = FIRST_DELAY_S
        self.broken: str | None = None

    def enqueue(self, message: Message[SharedFd]) -> None:
        """Queue a message; its descriptor stays open until it is sent or dropped with the peer."""
        if message.fd is not None:
            message.fd.hold()
        self.queue.append(message)

    def send_turn(self) -> Progress:
        """Send what the socket takes, one message per sendmsg: QEMU loses all but the first descriptor of one (measured, 7.2).

        Eight bytes are never split by the kernel: a message goes whole or not at all.

        Raises
        ------
        OSError
            When the connection is broken.
        """
        for _ in range(min(len(self.queue), _TURN_MESSAGES)):
            message = self.queue[0]
            try:
                send_message(self.sock, encode(message.value), () if message.fd is None else (message.fd.fd,))
            except BlockingIOError:
                return Progress.MORE
            except OSError as error:
                if error.errno in SHORTAGES:
                    return Progress.SHORT
                raise
            self.queue.popleft()
            self.delay_s = FIRST_DELAY_S
            if message.fd is not None:
                message.fd.release()
        return Progress.MORE if self.queue else Progress.DONE

    def next_delay_s(self) -> float:
        """Return how long to wait after a shortage: 10 ms, doubled up to 100 ms."""
        delay_s, self.delay_s = self.delay_s, min(2 * self.delay_s, LAST_DELAY_S)
        return delay_s

    def close(self) -> None:
        """Close the socket and let go of all descriptors."""
        if self.retry is not None:
            self.retry.cancel()
        self.sock.close()
        for message in self.queue:
            if message.fd is not None:
                message.fd.release()
        self.queue.clear()
        for vector in self.vectors:
            vector.release()
        self.vectors = []


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Return pid and uid of the process at the other end (unix(7), SO_PEERCRED)."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


def why_gone(sock: socket.socket, flags: int = 0) -> str | None:
    """Return why the client counts as gone, or None when it does not.

    A client only listens: whatever can be read from it means that it left (QEMU's contrib server
    sees it so too, 7.2). It also left when it no longer reads, which a send of nothing shows.
    """
    try:
        data = sock.recv(1, flags)
    except BlockingIOError:
        try:
            sock.send(b"")
        except OSError as error:
            return f"it does not read: {error.strerror}"
        return None
    except OSError as error:
        return f"its connection broke: {error.strerror}"
    return "it closed the connection" if not data else f"it sent a byte, 0x{data[0]:02x}; clients only listen"
