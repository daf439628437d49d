"""The Python process as a peer: memory to read and write, interrupts to send and to wait for.

There is no thread here: what the server has to say is read whenever the peer is asked something.
"""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING, Self

from ..errors import PeerClosedError, PeerError, UnknownPeerError
from ..ipc.eventfd import EventFd, poll_timeout_ms
from ..ipc.runtime_dir import check_socket_path
from ..units import format_size
from .link import Link

if TYPE_CHECKING:
    import os

    import numpy as np
    from numpy.typing import NDArray

QUIET_S = 0.1
"""A server that says nothing for so long has finished the introduction.

The protocol does not say where it ends, nor how many vectors a peer has. Own vectors come last, and
all peers have equally many with QEMU's server (measured, 7.2) and with ours: when another peer is
there, its vectors tell the number and nothing is waited for.
"""

_ALONE_QUIET_S = 0.02  # the same, once a first own vector is there: a server sends them in one go


class Peer:
    """One peer of an ivshmem server. Made by :meth:`connect`.

    Threads may share it: every call is complete in itself, and several may wait at the same time.

    Attributes
    ----------
    path
        The server's socket.
    peer_id
        Our own id, 0 to 65535: others ring it.
    """

    def __init__(self, path: str, link: Link) -> None:
        self.path = path
        self.peer_id = -1
        self._link = link
        self._array: NDArray[np.uint8] | None = None
        self._lock = threading.RLock()  # held by every call, but not while it polls
        self._nobody_polls = threading.Condition(self._lock)
        self._polling = 0
        self._closed = False
        self._closing = EventFd.create()  # wakes those who poll when another thread closes

    @classmethod
    def connect(cls, path: str | os.PathLike[str], timeout_s: float = 5.0) -> Self:
        """Join a server.

        Returns when id, memory and own vectors have arrived, as far as one can know it
        (:data:`QUIET_S`). Vectors that come later are found when they are asked for.

        Raises
        ------
        UsageError
            When the path cannot be that of a socket.
        PeerError
            When nobody listens there, or the introduction is not complete in time.
        RemoteProtocolError
            When the server breaks the protocol.
        SharedMemoryError
            When the server's memory cannot be mapped.
        """
        deadline = time.monotonic() + timeout_s
        text = check_socket_path(path)
        peer = cls(text, Link.connect(text, timeout_s))
        try:
            peer._introduce(deadline, timeout_s)
        except BaseException:
            peer.close()
            raise
        return peer

    @property
    def connected(self) -> bool:
        """Whether the server is still there. Without it memory and interrupts go on, but nobody new is heard of."""
        with self._lock:
            return not self._closed and self._fresh().sock is not None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The shared memory, not a copy: shape ``(size_bytes,)``, bytes. An array that you hold outlives :meth:`close`."""
        with self._lock:
            self._check_open()
            assert self._array is not None
            return self._array

    @property
    def size_bytes(self) -> int:
        """Size of the shared memory."""
        return len(self.memory)

    @property
    def vectors(self) -> int:
        """How many vectors we have."""
        with self._lock:
            return len(self._fresh().own)

    @property
    def peers(self) -> dict[int, int]:
        """The others that are there now: id and number of vectors."""
        with self._lock:
            return self._fresh().others

    def vector_fd(self, vector: int = 0) -> int:
        """Return the descriptor of one of our vectors, for select and friends. It stays ours.

        Raises
        ------
        UnknownPeerError
            When we have no such vector.
        """
        with self._lock:
            return self._line(self.peer_id, vector).fileno()

    def ring(self, peer_id: int, vector: int = 0) -> None:
        """Interrupt a peer, or ourselves.

        Raises
        ------
        UnknownPeerError
            When there is no such peer, or it has no such vector; names those that exist.
        PeerClosedError
            After :meth:`close`.
        """
        with self._lock:
            self._line(peer_id, vector).ring()

    def wait(self, vector: int = 0, timeout_s: float | None = None) -> int:
        """Wait for interrupts on one of our vectors.

        Meanwhile we hear of peers that come and go; a server that ends does not end the waiting.

        Returns
        -------
        int
            How many came since the last wait; 0 when the time is over (None: no limit).

        Raises
        ------
        UnknownPeerError
            When we have no such vector.
        PeerClosedError
            After :meth:`close`, also by another thread.
        RemoteProtocolError
            When the server breaks the protocol; once, then waiting goes on without the server.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                line = self._line(self.peer_id, vector)
                count = line.take()
                if count:
                    return count
                self._fresh()
            if not self._poll(deadline, line):
                return 0

    def wait_for_peer(self, peer_id: int | None = None, timeout_s: float | None = None) -> int:
        """Wait until a peer is there with as many vectors as we have; None: any other peer.

        One that has fewer counts when nothing more was heard for :data:`QUIET_S`.

        Returns
        -------
        int
            Its id.

        Raises
        ------
        UnknownPeerError
            When it has not come in time, or cannot come because the server is gone; names those that are there.
        PeerClosedError
            After :meth:`close`, also by another thread.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                link = self._fresh()
                found = {each: count for each, count in link.others.items() if peer_id is None or each == peer_id}
                complete = [each for each, count in found.items() if count >= len(link.own)]
                gone = link.sock is None
            if complete:
                return complete[0]
            limit = time.monotonic() + QUIET_S if found else deadline
            if gone or not self._poll(limit):
                break
        if found:
            return next(iter(found))
        who = "another peer" if peer_id is None else f"peer {peer_id}"
        why = "the server is gone" if gone else f"not within {timeout_s} s"
        raise UnknownPeerError(f"{who} did not come, {why}; {self._who_is_there()}")

    def close(self) -> None:
        """Leave. Arrays of the memory stay usable; whoever waits gets PeerClosedError. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._closing.ring()
            while self._polling:
                self._nobody_polls.wait()
            self._link.close()
            self._array = None
            self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        with self._lock:
            if self._closed or self._array is None:
                return f"<Peer {self.peer_id} of {self.path}: closed>"
            others = ", ".join(f"{peer_id} with {count}" for peer_id, count in self._link.others.items()) or "none"
            server = "" if self._link.sock is not None else "; the server is gone"
            return (
                f"<Peer {self.peer_id} of {self.path}: memory {format_size(len(self._array))}, vectors {len(self._link.own)}; "
                f"other peers and their vectors: {others}{server}>"
            )

    def _introduce(self, deadline: float, timeout_s: float) -> None:
        while True:
            self._link.read()
            own, others = len(self._link.own), max(self._link.others.values(), default=0)
            ready = not self._link.missing
            if ready and (self._link.sock is None or 0 < own == others):
                break
            quiet_s = _ALONE_QUIET_S if own and not others else QUIET_S
            if not self._poll(min(deadline, time.monotonic() + quiet_s) if ready else deadline):
                break
        if self._link.missing or self._link.memory is None:
            raise PeerError(
                f"the server on {self.path!r} did not introduce us within {timeout_s} s: "
                f"{self._link.missing} did not come; is it an ivshmem server?"
            )
        self.peer_id = self._link.peer_id
        self._array = self._link.memory.array()

    def _check_open(self) -> None:
        if self._closed:
            raise PeerClosedError(f"peer {self.peer_id} of {self.path!r} is closed; connect again with Peer.connect()")

    def _fresh(self) -> Link:
        """Read what the server has said. Under the lock."""
        self._check_open()
        self._link.read()
        return self._link

    def _line(self, peer_id: int, vector: int) -> EventFd:
        """Find a vector; look for news only when it is unknown, which keeps ringing cheap. Under the lock."""
        self._check_open()
        lines = self._link.lines.get(peer_id, [])
        if not 0 <= vector < len(lines):
            lines = self._fresh().lines.get(peer_id, [])
        if 0 <= vector < len(lines):
            return lines[vector]
        known = lines or peer_id == self.peer_id
        what = f"peer {peer_id} has no vector {vector}" if known else f"there is no peer {peer_id}"
        raise UnknownPeerError(f"{what}; {self._who_is_there()}")

    def _who_is_there(self) -> str:
        them = ", ".join(f"{peer_id} with {len(lines)}" for peer_id, lines in sorted(self._link.lines.items()))
        return f"peers and their vectors, counted from 0, are: {them or 'none'} (we are peer {self.peer_id})"

    def _poll(self, deadline: float | None, line: EventFd | None = None) -> bool:
        """Wait for the server to say something, or for an interrupt; False when the time is over."""
        poller = select.poll()
        with self._lock:
            self._check_open()
            poller.register(self._closing, select.POLLIN)
            if self._link.sock is not None:
                poller.register(self._link.sock, select.POLLIN)
            if line is not None:
                poller.register(line, select.POLLIN)
            self._polling += 1
        try:
            return bool(poller.poll(poll_timeout_ms(deadline)))
        finally:
            with self._lock:
                self._polling -= 1
                self._nobody_polls.notify_all()
