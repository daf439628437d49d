"""The Python process as a peer: memory to read and write, interrupts to send and to wait for."""

from __future__ import annotations

import os
import time
from os import eventfd_read, eventfd_write
from typing import TYPE_CHECKING, Any, Self, overload

from ..errors import PeerClosedError, UnknownPeerError, UsageError
from ..ipc.eventfd import take
from ..ipc.runtime_dir import check_socket_path
from ..units import format_size
from .aio import AsyncPeer
from .joining import QUIET_S

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike, NDArray

    from .words import Words


class Peer(AsyncPeer):
    """One peer of an ivshmem server. Made by :meth:`connect`.

    Threads may share it: every call is complete in itself, and several may wait at the same time.

    Attributes
    ----------
    path
        The server's socket.
    peer_id
        Our own id, 0 to 65535: others ring it.
    """

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        timeout_s: float = 5.0,
        *,
        reconnect: bool = False,
        lease: str | None = None,
    ) -> Self:
        """Join a server.

        Returns when id, memory and own vectors have arrived, as far as one can know it
        (:data:`~ivshmem_lab.peer.joining.QUIET_S`). Vectors that come later are found when they are asked for.

        Parameters
        ----------
        path
            The server's socket.
        timeout_s
            How long it may take.
        reconnect
            When the server is gone, look for it on the same path, ten times a second while we are asked
            something, and join it again. Our id and the memory can be others then: :meth:`on_server` tells.
            Until then the old memory and eventfds stay in use.
        lease
            A name under which a server of ours keeps our id for us while we are away (30 s unless it was told
            otherwise), also across its own restart with ``--state``; the other peers do not hear that we were gone.
            Only one at a time holds it, and only our user gets it back. 1 to 48 letters, digits, dots, underscores or
            hyphens. QEMU's server knows no leases, and gives any id.

        Raises
        ------
        UsageError
            When the path cannot be that of a socket, or the lease has no such name.
        PeerError
            When nobody listens there, the introduction is not complete in time, or somebody else holds the lease.
        RemoteProtocolError
            When the server breaks the protocol.
        SharedMemoryError
            When the server's memory cannot be mapped.
        """
        deadline = time.monotonic() + timeout_s
        peer = cls(check_socket_path(path), timeout_s, reconnect=reconnect, lease=lease)
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
            return not self._closed and not self._fresh().gone

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The shared memory, not a copy: shape ``(size_bytes,)``, bytes; read-only for an observer.

        An array that you hold outlives :meth:`close`.
        """
        with self._lock:
            self._check_open()
            assert self._array is not None
            return self._array

    @property
    def size_bytes(self) -> int:
        """Size of the shared memory."""
        return len(self.memory)

    @property
    def writable(self) -> bool:
        """Whether we may write the memory; an observer may not."""
        return bool(self.memory.flags.writeable)

    @overload
    def array(self, dtype: type[np.uint8] = ..., offset: int = 0, count: int | None = None) -> NDArray[np.uint8]: ...
    @overload
    def array(self, dtype: DTypeLike, offset: int = 0, count: int | None = None) -> NDArray[Any]: ...
    def array(self, dtype: DTypeLike = "u1", offset: int = 0, count: int | None = None) -> NDArray[Any]:
        """Return a part of the memory as an array of any type, not a copy; read-only for an observer.

        Parameters
        ----------
        dtype
            Type of one element.
        offset
            Bytes from the start of the memory.
        count
            Elements; None for as many as fit. The shape is ``(count,)``.

        Raises
        ------
        UsageError
            When the part does not lie inside the memory.
        """
        import numpy as np

        memory, element = self.memory, np.dtype(dtype)
        room = (len(memory) - offset) // element.itemsize if 0 <= offset <= len(memory) and element.itemsize else -1
        wanted = room if count is None else count
        if not 0 <= wanted <= room:
            raise UsageError(
                f"{'the array' if count is None else count} of {element.itemsize}-byte elements at offset {offset} is not "
                f"inside the memory of {len(memory)} bytes; lower offset or count"
            )
        return memory[offset : offset + wanted * element.itemsize].view(element)

    def load32(self, offset: int) -> int:
        """Read the u32 at an offset in one access (:mod:`~ivshmem_lab.peer.words` says what that is worth).

        Raises
        ------
        UsageError
            When the offset is not a multiple of 4, or not inside the memory.
        """
        return self._open_words().load(offset, 4)

    def store32(self, offset: int, value: int) -> None:
        """Write the u32 at an offset in one access.

        Raises
        ------
        UsageError
            When the offset is not a multiple of 4 or not inside the memory, or the value is no u32.
        SharedMemoryError
            When we are an observer.
        """
        self._open_words().store(offset, 4, value)

    def load64(self, offset: int) -> int:
        """Read the u64 at an offset, a multiple of 8, in one access; raises as :meth:`load32`."""
        return self._open_words().load(offset, 8)

    def store64(self, offset: int, value: int) -> None:
        """Write the u64 at an offset, a multiple of 8, in one access; raises as :meth:`store32`."""
        self._open_words().store(offset, 8, value)

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
        """Return the descriptor of one of our vectors, for select and friends. It stays ours, and is non-blocking.

        Raises
        ------
        UnknownPeerError
            When we have no such vector.
        """
        with self._lock:
            fd = self._line(self.peer_id, vector).fileno()
            self._lent.add(vector)
            self._quick.pop(vector, None)
            os.set_blocking(fd, False)
            return fd

    def check_vector(self, vector: int) -> None:
        """Raise UnknownPeerError when we have no such vector."""
        with self._lock:
            self._line(self.peer_id, vector)

    def ring(self, peer_id: int, vector: int = 0) -> None:
        """Interrupt a peer, or ourselves.

        Raises
        ------
        UnknownPeerError
            When there is no such peer, or it has no such vector; names those that exist.
        PeerClosedError
            After :meth:`close`.
        """
        touching = self._touching
        touching.append(None)
        try:
            eventfd_write(self._fds[peer_id, vector], 1)
            return  # noqa: TRY300 -- nearly all calls end here
        except KeyError:  # first time
            pass
        except BlockingIOError:  # its counter is full: the interrupt is pending anyway
            return
        finally:
            touching.pop()
        with self._lock:
            line = self._line(peer_id, vector)
            line.ring()
            self._fds[peer_id, vector] = line.fileno()

    def wait(self, vector: int = 0, timeout_s: float | None = None) -> int:
        """Wait for interrupts on one of our vectors. Those that came before count too.

        Meanwhile we hear of peers that come and go, where that matters: with a time limit, with callbacks, or when
        reconnecting. A server that ends does not end the waiting.

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
            When the server breaks the protocol, where it is heard; once, then waiting goes on without the server.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        polling = self._polling
        polling.append(None)
        try:
            # The short ways, without locks.
            if timeout_s is None and vector in self._quick:  # four system calls in a round trip
                count = eventfd_read(self._quick[vector])
                if not self._closed:  # else it was close() that rang
                    return count
            else:  # six
                poll, fd = self._ways[vector]
                for ready, _ in poll(timeout_s if timeout_s is None or timeout_s >= 0 else 0, 1):
                    if ready == fd and (count := take(fd)):
                        return count
        except (KeyError, BlockingIOError):  # first time, or reconnecting; or QEMU has made it a non-blocking one again
            pass
        finally:
            polling.pop()
            if self._closed:
                self._tell_closer()
        while True:
            with self._lock:
                poller = self._poller(vector)
                if count := self._line(self.peer_id, vector).take():
                    return count
                self._fresh()
            if not self._sleep(poller, deadline):
                with self._lock:
                    return self._line(self.peer_id, vector).take()

    def wait_for_peer(self, peer_id: int | None = None, timeout_s: float | None = None) -> int:
        """Wait until a peer is there with as many vectors as we have; None: any other peer.

        One that has fewer counts when nothing more was heard for :data:`~ivshmem_lab.peer.joining.QUIET_S`.

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
                gone = link.gone
            if complete:
                return complete[0]
            limit = time.monotonic() + QUIET_S if found else deadline
            if (gone and not self._reconnect) or not self._sleep(self._news, limit):
                break
        if found:
            return next(iter(found))
        who = "another peer" if peer_id is None else f"peer {peer_id}"
        why = "the server is gone" if gone else f"not within {timeout_s} s"
        raise UnknownPeerError(f"{who} did not come, {why}; {self._who_is_there()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        with self._lock:
            if self._closed or self._array is None:
                return f"<Peer {self.peer_id} of {self.path}: closed>"
            others = ", ".join(f"{peer_id} with {count}" for peer_id, count in self._link.others.items()) or "none"
            looked_for = " and is looked for" if self._reconnect else ""
            server = "" if not self._link.gone else f"; the server is gone{looked_for}"
            return (
                f"<Peer {self.peer_id} of {self.path}: memory {format_size(len(self._array))}"
                f"{'' if self.writable else ', read-only'}, vectors {len(self._link.own)}; "
                f"other peers and their vectors: {others}{server}>"
            )

    def _open_words(self) -> Words:
        words = self._words
        if words is None:
            self._check_open()
            raise PeerClosedError("no memory")
        return words
