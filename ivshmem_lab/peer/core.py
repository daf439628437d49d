"""What every way of waiting for interrupts shares: the link to the server, who may touch it, and what wakes whom.

There is no thread here: what the server has to say is read whenever the peer is asked something.

Each vector that somebody waits for has an epoll(7) with two things in it: its eventfd, and the epoll of
all news (the server's socket, and an eventfd that :meth:`Core.close` rings). Those stay when a peer
reconnects; what is in them changes.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from ..errors import PeerClosedError, PeerError, RemoteProtocolError, UnknownPeerError
from ..ipc.eventfd import EventFd
from .events import Reconnected, ServerGone
from .joining import Introduction, Rejoining
from .link import Link
from .words import Words

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray


class Core:
    """The state of a peer; see :class:`~ivshmem_lab.peer.peer.Peer`."""

    path: str
    peer_id: int

    def __init__(self, path: str, timeout_s: float, *, reconnect: bool, lease: str | None) -> None:
        self.path = path
        self.peer_id = -1
        self._reconnect = reconnect
        self._lease = lease
        self._rejoining: Rejoining | None = None
        self._array: NDArray[np.uint8] | None = None
        self._words: Words | None = None
        self._pollers: dict[int, select.epoll] = {}
        self._lock = threading.RLock()  # held by every call, but not while it polls
        self._nobody_polls = threading.Condition(self._lock)
        # The short ways of ring() and wait() use what stands in these two without the lock, which costs more than
        # the rest. While they do, there is an item in the list below it. Who wants to close a descriptor takes it
        # out of the dictionary first, and looks at the list then.
        self._fds: dict[tuple[int, int], int] = {}  # vectors that were rung before
        self._touching: list[None] = []
        self._ways: dict[
            int, tuple[Callable[[float | None, int], list[tuple[int, int]]], int]
        ] = {}  # vectors that were waited for
        self._quick: dict[int, int] = {}  # vectors that a wait for nothing else reads: blocking descriptors
        self._blocked: set[int] = (
            set()
        )  # descriptors at which somebody may sleep in that way, whatever _quick says by now
        self._lent: set[int] = set()  # vectors whose descriptors are in use elsewhere, and stay non-blocking
        self._polling: list[None] = []
        self._retired: list[Link] = []  # links to close when nobody polls
        self._closed = False
        self._sleepers: set[Callable[[], object]] = set()  # wake those who wait on an event loop
        self._on_join: list[Callable[[int], object]] = []
        self._on_leave: list[Callable[[int], object]] = []
        self._on_server: list[Callable[[ServerGone | Reconnected], object]] = []
        self._calls: deque[Callable[[], object]] = deque()  # callbacks that are due
        self._news = select.epoll()
        self._closing = EventFd.create()
        self._news.register(self._closing, select.EPOLLIN)
        try:
            self._link = Link.connect(path, timeout_s, self._news, lease)
        except BaseException:
            self._closing.close()
            self._news.close()
            raise

    def close(self) -> None:
        """Leave. Arrays of the memory stay usable; whoever waits gets PeerClosedError. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._ways.clear()
            self._quick.clear()
            self._closing.ring()
            for wake in self._sleepers:
                with contextlib.suppress(RuntimeError):  # its loop is closed
                    wake()
            while self._polling:
                for fd in self._blocked:
                    os.eventfd_write(fd, 1)
                self._nobody_polls.wait()
            self._forget_fds()
            for poller in (*self._pollers.values(), self._news):
                poller.close()
            self._pollers.clear()
            self._calls.clear()
            if self._rejoining is not None:
                self._rejoining.close()
            self._words = None
            self._array = None
            for link in (self._link, *self._retired):
                link.close()
            self._retired.clear()
            self._closing.close()

    def _introduce(self, deadline: float, timeout_s: float) -> None:
        introduction = Introduction(self._link)
        while not self._complete(introduction):
            limit = deadline if introduction.due is None else min(deadline, introduction.due)
            if not self._sleep(self._news, limit) and limit == deadline:
                break
        if self._link.missing or self._link.memory is None:
            raise PeerError(
                f"the server on {self.path!r} did not introduce us within {timeout_s} s: "
                f"{self._link.missing} did not come; is it an ivshmem server?"
            )
        self._link.changes.clear()
        self.peer_id = self._link.peer_id
        self._show(self._link.memory.array())

    def _complete(self, introduction: Introduction) -> bool:
        try:
            return introduction.complete()
        except RemoteProtocolError as error:
            if self._lease is None or not self._link.silent:
                raise
            raise PeerError(
                f"the server on {self.path!r} does not let us in: most likely lease {self._lease!r} is held by somebody who "
                "is connected; choose another, or see with ivshmem-server -v whom it refuses and why"
            ) from error

    def _show(self, array: NDArray[np.uint8]) -> None:
        self._array = array
        self._words = Words(array)

    def _check_open(self) -> None:
        if self._closed:
            raise PeerClosedError(f"peer {self.peer_id} of {self.path!r} is closed; connect again with Peer.connect()")

    def _fresh(self) -> Link:
        """Read what the server has said, and rejoin when that is wanted. Under the lock."""
        self._check_open()
        if self._retired and not self._polling:
            self._retired.pop().close()
        if not self._link.gone:
            try:
                self._link.read()
            finally:
                self._note_changes()
                self._note_end()
        if self._reconnect and self._link.gone:
            if self._rejoining is None:
                self._rejoining = Rejoining(self.path, self._news, self._lease)
                self._ways.clear()  # the long way knows when to look for the server
            link = self._rejoining.advance()
            if link is not None:
                self._rejoining = None
                self._move_to(link)
        return self._link

    def _note_end(self) -> None:
        if self._link.gone:
            self._calls.extend(partial(function, ServerGone()) for function in self._on_server)

    def _note_changes(self) -> None:
        if self._link.departed:
            self._forget_fds()
            for line in self._link.departed:
                line.close()
            self._link.departed.clear()
        for peer_id, came in self._link.changes:
            self._calls.extend(partial(each, peer_id) for each in (self._on_join if came else self._on_leave))
        self._link.changes.clear()

    def _move_to(self, link: Link) -> None:
        """Go on with another connection: new ids, new eventfds, maybe new memory."""
        old, previous_id = self._link, self.peer_id
        for vector, line in enumerate(old.own):
            if vector in self._pollers:
                self._pollers[vector].unregister(line)
            if vector < len(link.own) and (count := line.take()):  # what nobody has taken yet
                link.own[vector].ring(count)
        for vector in list(self._pollers):
            if vector < len(link.own):
                self._pollers[vector].register(link.own[vector], select.EPOLLIN)
            else:
                del self._pollers[vector]
        assert old.memory is not None
        assert link.memory is not None
        same_memory = os.path.samestat(os.fstat(old.memory.fd), os.fstat(link.memory.fd))
        if same_memory:  # arrays stay what they are
            old.memory, link.memory = link.memory, old.memory
        else:
            self._show(link.memory.array())
        link.changes[:] = [(peer_id, False) for peer_id in old.others if peer_id not in link.others]
        link.changes += [(peer_id, True) for peer_id in link.others if peer_id not in old.others]
        self._link, self.peer_id = link, link.peer_id
        self._forget_fds()
        self._retired.append(old)
        event = Reconnected(link.peer_id, previous_id, same_memory)
        self._calls.extend(partial(function, event) for function in self._on_server)
        self._note_changes()

    def _line(self, peer_id: int, vector: int) -> EventFd:
        """Find a vector; look for news only when it is unknown, which keeps ringing cheap. Under the lock."""
        self._check_open()
        lines = self._link.lines.get(peer_id, ())
        if not 0 <= vector < len(lines):
            own = peer_id == self.peer_id
            lines = self._fresh().lines.get(self.peer_id if own else peer_id, ())
        if 0 <= vector < len(lines):
            return lines[vector]
        known = lines or peer_id == self.peer_id
        what = f"peer {peer_id} has no vector {vector}" if known else f"there is no peer {peer_id}"
        raise UnknownPeerError(f"{what}; {self._who_is_there()}")

    def _who_is_there(self) -> str:
        them = ", ".join(f"{peer_id} with {len(lines)}" for peer_id, lines in sorted(self._link.lines.items()))
        gone = "" if not self._link.gone else "; the server is gone"
        if gone and self._reconnect:
            gone += " and is looked for"
        return f"peers and their vectors, counted from 0, are: {them or 'none'} (we are peer {self.peer_id}){gone}"

    def _forget_fds(self) -> None:
        """Make sure that nobody rings by a remembered descriptor. Under the lock."""
        self._fds.clear()
        while self._touching:  # for the time of one system call that does not wait
            time.sleep(0)

    def _poller(self, vector: int) -> select.epoll:
        """Return what wakes who waits for this vector. Under the lock."""
        line = self._line(self.peer_id, vector)
        poller = self._pollers.get(vector)
        if poller is None:
            poller = self._pollers[vector] = select.epoll()
            poller.register(line, select.EPOLLIN)
            poller.register(self._news, select.EPOLLIN)
        if self._rejoining is None:
            self._ways[vector] = (poller.poll, line.fileno())
            if not (self._reconnect or self._on_join or self._on_leave or self._on_server or vector in self._lent):
                os.set_blocking(line.fileno(), True)
                self._quick[vector] = line.fileno()
                self._blocked.add(line.fileno())
        return poller

    def _hear(self) -> None:
        """Have waits that begin from now on hear what the server says. Under the lock."""
        self._quick.clear()

    def _left_s(self, deadline: float | None) -> float:
        """Return how long to poll: until a deadline or the next attempt to reconnect; -1 for ever."""
        rejoining = self._rejoining
        if rejoining is not None:
            deadline = rejoining.due if deadline is None else min(deadline, rejoining.due)
        return -1 if deadline is None else max(0.0, deadline - time.monotonic())

    def _sleep(self, poller: select.epoll, deadline: float | None) -> bool:
        """Wait for news, or for an interrupt; False when the deadline has passed."""
        # close() marks itself first and then looks for us; we do the reverse: one of both sees the other
        self._polling.append(None)
        try:
            self._check_open()
            if poller.poll(self._left_s(deadline), 1):
                return True
        finally:
            self._polling.pop()
            if self._closed:
                self._tell_closer()
        return deadline is None or time.monotonic() < deadline

    def _tell_closer(self) -> None:
        with self._lock:
            self._nobody_polls.notify_all()
