"""The ivshmem server: joins any number of peers over one shared memory, and never drops a message.

What differs from QEMU's contrib server, each measured with 7.2: a queue per peer instead of sends
whose failure nobody looks at; no limit at 1024 descriptors; a rude client costs only itself; a
shortage of descriptors is waited out.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

from ..errors import LocalProtocolError, ServerError, UsageError
from ..ipc.runtime_dir import check_socket_path
from ..units import check_memory_size, format_size
from ..wire.server import Outgoing, ServerProtocol
from .connection import FIRST_DELAY_S, LAST_DELAY_S, SHORTAGES, Connection, Progress, SharedFd, credentials, why_gone
from .events import ClientRefused, PeerDeparted, PeerInfo, PeerJoined, PeerSettled, ServerEvent, ServerStrained
from .listener import Listener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..ipc.memory import SharedMemory

MAX_VECTORS = 2048
"""Vectors of an MSI-X table (PCI specification), the most that a device can use."""

_ACCEPT_TURN = 64  # newcomers before the peers get a turn


class Server:
    """An ivshmem server on an asyncio loop; all methods belong to the loop's thread.

    Parameters
    ----------
    path
        Where the Unix socket is to be: at most 107 bytes, mode 0600.
    memory
        What the peers will share; a power of two, at least 4096 bytes. It stays the caller's.
    vectors
        Interrupt vectors of every peer, 0 to 2048.
    on_event
        Called with every :data:`~ivshmem_lab.server.events.ServerEvent`, on the loop's thread.
    queue_limit
        A peer that lets more messages than this wait, its own introduction not counted, is disconnected.

    Raises
    ------
    UsageError
        When the path, the memory's size or the number of vectors is not allowed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: SharedMemory,
        vectors: int = 1,
        on_event: Callable[[ServerEvent], None] | None = None,
        *,
        queue_limit: int = 1_000_000,
    ) -> None:
        if not 0 <= vectors <= MAX_VECTORS:
            raise UsageError(f"{vectors} vectors are not allowed; 0 to {MAX_VECTORS}")
        check_memory_size(memory.size_bytes, "memory")
        self.path = check_socket_path(path)
        self.memory = memory
        self.vectors = vectors
        self._on_event = on_event
        self._queue_limit = queue_limit
        self._protocol: ServerProtocol[SharedFd] = ServerProtocol(SharedFd(memory.fd))  # our hold is never let go
        self._connections: dict[int, Connection] = {}
        self._listener: Listener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: socket.socket | None = None  # accepted, but no descriptors for its vectors yet
        self._resume: asyncio.TimerHandle | None = None
        self._delay_s = FIRST_DELAY_S

    @property
    def peers(self) -> dict[int, PeerInfo]:
        """The connected peers by id, in the order they joined."""
        return {
            peer_id: PeerInfo(peer_id, each.pid, each.uid, len(each.vectors), len(each.queue))
            for peer_id, each in self._connections.items()
        }

    async def start(self) -> None:
        """Begin to listen.

        Raises
        ------
        UsageError
            When no socket can be made at the path.
        ServerError
            When it is started already, or another program listens there.
        """
        if self._listener is not None:
            raise ServerError(f"the server on {self.path!r} is started already")
        self._listener = Listener.open(self.path)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener.sock, self._accept)

    async def close(self) -> None:
        """Disconnect everybody and remove the socket. The memory stays. May be called twice."""
        if self._listener is None or self._loop is None:
            return
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._listener.sock)
        self._listener.close()
        self._listener = None
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        for connection in list(self._connections.values()):
            self._forget(connection)
            self._tell(PeerDeparted(connection.peer_id, "the server closed"))

    def __repr__(self) -> str:
        state = f"peers {', '.join(map(str, self._connections)) or 'none'}" if self._listener else "not listening"
        return f"<Server {self.path}: memory {format_size(self.memory.size_bytes)}, vectors {self.vectors}; {state}>"

    def _tell(self, event: ServerEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    # Newcomers

    def _accept(self) -> None:
        for _ in range(_ACCEPT_TURN):
            if self._listener is None:
                return
            sock, self._waiting = self._waiting, None
            try:
                if sock is None:
                    sock, _ = self._listener.sock.accept()
                    sock.setblocking(False)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in SHORTAGES:
                    self._pause(f"no newcomer can be accepted: {error.strerror}")
                    return
                continue  # that client is gone (accept(2), ECONNABORTED)
            if not self._admit(sock):
                return

    def _admit(self, sock: socket.socket) -> bool:
        """Make a peer of a connected socket; False when newcomers must wait."""
        reason = why_gone(sock, socket.MSG_PEEK)
        if reason is not None:
            self._refuse(sock, reason)
            return True
        vectors: list[SharedFd] = []
        try:
            while len(vectors) < self.vectors:
                vectors.append(_new_eventfd())
        except OSError as error:
            for vector in vectors:
                vector.release()
            self._waiting = sock
            self._pause(f"no eventfds for a newcomer: {error.strerror}")
            return False
        try:
            peer_id, outgoing = self._protocol.join(vectors)
        except LocalProtocolError as error:
            for vector in vectors:
                vector.release()
            self._refuse(sock, str(error))
            return True
        self._delay_s = FIRST_DELAY_S
        connection = Connection(sock, peer_id, vectors)
        self._connections[peer_id] = connection
        self._running_loop.add_reader(sock, self._read, connection)
        recipients = self._enqueue(outgoing)
        connection.queue_limit = self._queue_limit + len(connection.queue)
        self._tell(PeerJoined(peer_id, connection.pid, connection.uid))
        self._send_all(recipients)
        return True

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        pid, uid = credentials(sock)
        sock.close()
        self._tell(ClientRefused(pid, uid, reason))

    def _pause(self, reason: str) -> None:
        """Let newcomers wait: 10 ms, doubled up to 100 ms."""
        assert self._listener is not None
        if self._delay_s == FIRST_DELAY_S:
            self._tell(ServerStrained(reason))
        self._running_loop.remove_reader(self._listener.sock)
        self._resume = self._running_loop.call_later(self._delay_s, self._go_on)
        self._delay_s = min(2 * self._delay_s, LAST_DELAY_S)

    def _go_on(self) -> None:
        if self._listener is not None:
            self._running_loop.add_reader(self._listener.sock, self._accept)
            self._accept()

    # Peers

    def _read(self, connection: Connection) -> None:
        reason = why_gone(connection.sock)
        if reason is not None:
            self._depart(connection, reason)

    def _enqueue(self, outgoing: Iterable[Outgoing[SharedFd]]) -> list[Connection]:
        recipients: dict[int, Connection] = {}
        for item in outgoing:
            connection = recipients[item.recipient] = self._connections[item.recipient]
            connection.enqueue(item.message)
        return list(recipients.values())

    def _send_all(self, recipients: list[Connection]) -> None:
        for connection in recipients:
            self._send(connection)

    def _send(self, connection: Connection) -> None:
        if connection.broken is not None or connection.retry is not None:
            return
        try:
            progress = connection.send_turn()
        except OSError as error:
            self._break(connection, f"its connection broke: {error.strerror}")
            return
        if len(connection.queue) > connection.queue_limit:
            self._break(connection, f"{len(connection.queue)} messages wait for it, more than {connection.queue_limit}")
            return
        self._watch(connection, writing=progress is Progress.MORE)
        if progress is Progress.SHORT:
            connection.retry = self._running_loop.call_later(connection.next_delay_s(), self._retry, connection)
        elif progress is Progress.DONE and not connection.settled:
            connection.settled = True
            self._tell(PeerSettled(connection.peer_id))

    def _retry(self, connection: Connection) -> None:
        connection.retry = None
        self._send(connection)

    def _watch(self, connection: Connection, *, writing: bool) -> None:
        if writing and not connection.writing:
            self._running_loop.add_writer(connection.sock, self._send, connection)
        elif connection.writing and not writing:
            self._running_loop.remove_writer(connection.sock)
        connection.writing = writing

    def _break(self, connection: Connection, reason: str) -> None:
        """Have a peer depart soon, not now: its departure makes us send, and those sends may break others."""
        connection.broken = reason
        self._watch(connection, writing=False)
        self._running_loop.call_soon(self._depart, connection, reason)

    def _depart(self, connection: Connection, reason: str) -> None:
        if self._connections.get(connection.peer_id) is not connection:
            return
        self._forget(connection)
        recipients = self._enqueue(self._protocol.leave(connection.peer_id))
        self._tell(PeerDeparted(connection.peer_id, reason))
        self._send_all(recipients)

    def _forget(self, connection: Connection) -> None:
        self._running_loop.remove_reader(connection.sock)
        self._watch(connection, writing=False)
        del self._connections[connection.peer_id]
        connection.close()

    @property
    def _running_loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None
        return self._loop


def _new_eventfd() -> SharedFd:
    return SharedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
