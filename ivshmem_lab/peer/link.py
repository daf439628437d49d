"""A peer's end of the connection: the socket, and all that came through it. No locks, no waiting."""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING, Self

from ..errors import PeerError, RemoteProtocolError
from ..ipc.eventfd import EventFd, is_eventfd
from ..ipc.fdpass import close_all, receive_message
from ..ipc.memory import SharedMemory
from ..ipc.sockets import connect_unix
from ..wire.client import ClientProtocol, MemoryArrived, PeerLeft, VectorAdded
from ..wire.lease import lease_address

if TYPE_CHECKING:
    import socket

    from ..wire.client import Event

_READ_BYTES = 4096
_TURN_READS = 64  # a server that never stops talking does not keep a caller for ever


class Link:
    """What a server told us.

    Attributes
    ----------
    sock
        The connection, None once it ended.
    lines
        The vectors of every peer that is there, ours too.
    memory
        The shared memory, None before it came.
    heard
        How many reads brought something.
    changes
        Peers that came (True) and left (False) since somebody took them from here.
    departed
        The vectors of those who left; closed by the next :meth:`read`, if the owner does not do it before.

    Parameters
    ----------
    sock
        Connected, non-blocking.
    news
        An epoll(7) that shall tell when the server has said something.
    """

    def __init__(self, sock: socket.socket, news: select.epoll) -> None:
        self.sock: socket.socket | None = sock
        self.heard = 0
        self.changes: list[tuple[int, bool]] = []
        self.departed: list[EventFd] = []
        self.lines: dict[int, list[EventFd]] = {}
        self.memory: SharedMemory | None = None
        self._protocol: ClientProtocol[int] = ClientProtocol()
        self._news = news
        news.register(sock, select.EPOLLIN)

    @classmethod
    def connect(cls, path: str, timeout_s: float, news: select.epoll, lease: str | None = None) -> Self:
        """Connect to the server's socket, asking for a lease if one is named.

        Raises
        ------
        PeerError
            When nobody accepts there in time.
        """
        try:
            sock = connect_unix(
                path, timeout_s, None if lease is None else lease_address(lease, f"{os.getpid()}-{os.urandom(8).hex()}")
            )
        except OSError as error:
            raise PeerError(
                f"no ivshmem server answers on {path!r}: {error.strerror}; start one with: ivshmem-server -F -S {path}"
            ) from error
        sock.setblocking(False)
        return cls(sock, news)

    @property
    def peer_id(self) -> int:
        """Our id, -1 before it came."""
        return -1 if self._protocol.peer_id is None else self._protocol.peer_id

    @property
    def missing(self) -> str:
        """What of the introduction has not come yet, in words."""
        return self._protocol.missing

    @property
    def silent(self) -> bool:
        """Whether the server has not said a single message."""
        return not self._protocol.version_seen

    @property
    def gone(self) -> bool:
        """Whether the connection has ended."""
        return self.sock is None

    @property
    def own(self) -> list[EventFd]:
        """Our vectors."""
        return self.lines.get(self.peer_id, [])

    @property
    def others(self) -> dict[int, int]:
        """The other peers: id and number of vectors."""
        return {peer_id: len(lines) for peer_id, lines in self.lines.items() if peer_id != self.peer_id}

    def read(self) -> None:
        """Learn what the server has said by now. At its end, or when it errs, the connection ends.

        Raises
        ------
        RemoteProtocolError
            When it broke the protocol.
        SharedMemoryError
            When the memory cannot be mapped.
        PassedFdLostError
            When we may open no more descriptors.
        """
        self._close_departed()
        try:
            for _ in range(_TURN_READS):
                if self.sock is None:
                    return
                try:
                    data, fds = receive_message(self.sock, _READ_BYTES)
                except BlockingIOError:
                    return
                except ConnectionResetError:  # it ended with something of ours unread
                    data, fds = b"", []
                self.heard += 1
                if not data:
                    self._protocol.eof()
                    self._disconnect()
                    return
                self._learn(self._protocol.receive(data, fds))
        except BaseException:
            self._disconnect()
            raise

    def close(self) -> None:
        """Leave, and close everything; arrays of the memory stay usable."""
        self._disconnect()
        for lines in self.lines.values():
            self.departed += lines
        self.lines.clear()
        self._close_departed()
        if self.memory is not None:
            self.memory.close()

    def _close_departed(self) -> None:
        while self.departed:
            self.departed.pop().close()

    def _learn(self, events: list[Event[int]]) -> None:
        unclaimed = [event.fd for event in events if isinstance(event, (MemoryArrived, VectorAdded))]
        try:
            for event in events:
                if isinstance(event, PeerLeft):
                    self.changes.append((event.peer_id, False))
                    self.departed += self.lines.pop(event.peer_id)
                elif isinstance(event, MemoryArrived):
                    self.memory = SharedMemory.from_fd(unclaimed.pop(0), read_only_too=True)
                elif isinstance(event, VectorAdded):
                    if not is_eventfd(event.fd):
                        raise RemoteProtocolError(
                            "vector",
                            f"the descriptor of peer {event.peer_id}'s vector {event.vector} is not an eventfd",
                        )
                    self.lines.setdefault(event.peer_id, []).append(EventFd(unclaimed.pop(0)))
                    if event.vector == 0 and event.peer_id != self.peer_id:
                        self.changes.append((event.peer_id, True))
        except BaseException:
            close_all(unclaimed)
            raise

    def _disconnect(self) -> None:
        if self.sock is not None:
            # closing alone does not end the watching when a forked child has the socket too (epoll(7))
            with contextlib.suppress(ValueError):  # the epoll is closed
                self._news.unregister(self.sock)
            self.sock.close()
            self.sock = None
        close_all(self._protocol.abandon())
