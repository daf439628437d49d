"""Which peers have left or have room again, looked at with one epoll(7) for all of them.

The event loop watches this one descriptor. Registering each peer with the loop itself costs a
handle and 10 us in Python each time, which a crowd's joining feels.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from .connection import Connection

_TURN = 64  # events before the loop does something else


class Watch:
    """The sockets of all peers of one server.

    Parameters
    ----------
    loop
        The server's loop.
    on_readable
        Called with a connection that has ended, or has sent what it should not.
    on_writable
        Called with a connection that has room, while :meth:`want_room` asks for it.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_readable: Callable[[Connection], None],
        on_writable: Callable[[Connection], None],
    ) -> None:
        self._loop = loop
        self._on_readable = on_readable
        self._on_writable = on_writable
        self._connections: dict[int, Connection] = {}
        self._epoll = select.epoll()
        loop.add_reader(self._epoll.fileno(), self._turn)

    def add(self, connection: Connection) -> None:
        """Begin to watch a connection."""
        self._connections[connection.fileno] = connection
        self._epoll.register(connection.fileno, select.EPOLLIN)

    def want_room(self, connection: Connection, *, wanted: bool) -> None:
        """Say whether it matters that a connection has room."""
        self._epoll.modify(connection.fileno, select.EPOLLIN | select.EPOLLOUT if wanted else select.EPOLLIN)

    def remove(self, connection: Connection) -> None:
        """Stop watching a connection, before its socket is closed."""
        del self._connections[connection.fileno]
        self._epoll.unregister(connection.fileno)

    def close(self) -> None:
        """Stop. Connections that are left are not closed."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._connections.clear()

    def _turn(self) -> None:
        for fileno, events in self._epoll.poll(0, _TURN):
            connection = self._connections.get(fileno)
            if connection is None:  # an earlier one of this turn had it removed
                continue
            if events & select.EPOLLOUT:
                self._on_writable(connection)
            if events & ~select.EPOLLOUT and self._connections.get(fileno) is connection:
                self._on_readable(connection)
