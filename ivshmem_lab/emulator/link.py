"""The worlds behind ivshmem devices: a memory backend alone, or an ivshmem server with memory and peers."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Protocol

from ..errors import IvshmemLabError, RemoteProtocolError, VmError
from ..ipc.eventfd import is_eventfd
from ..ipc.fdpass import receive_message
from ..ipc.memory import SharedMemory
from ..units import check_memory_size
from ..wire.client import ClientProtocol, Event, MemoryArrived, PeerLeft, VectorAdded, Welcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from .events import Events

log = logging.getLogger("ivshmem_lab.emulator")

HANDSHAKE_S = 5.0
READ_BYTES = 4096
TURN_READS = 64
"""Reads before the guest gets its turn: a server that never stops talking does not hold it up."""


class Rings(Protocol):
    """A device that can ring peers."""

    def peer_vector(self, peer_id: int, vector: int) -> None:
        """Learn that a vector of a peer can be rung."""

    def peer_left(self, peer_id: int) -> None:
        """Forget a peer."""


class MemoryLink:
    """Memory without peers, for ``ivshmem-plain``."""

    def __init__(self, memory: object) -> None:
        self.memory = memory

    @property
    def memory_bytes(self) -> int:
        """Size of the memory."""
        return memoryview(self.memory).nbytes  # type: ignore[arg-type]

    @property
    def peer_id(self) -> int:
        """What IVPosition reads without a server."""
        return 0

    def ring(self, peer_id: int, vector: int) -> None:
        """There is nobody to ring."""


class ServerLink:
    """An ivshmem server's memory and peers, for ``ivshmem-doorbell``.

    Parameters
    ----------
    sock
        Connected to the server; stays the caller's.
    vectors
        How many vectors the device has; more that arrive are closed, as QEMU does.

    Notes
    -----
    `handshake` blocks, on any thread. From `attach` on, everything happens on the vCPU's thread.
    """

    def __init__(self, sock: socket.socket, vectors: int) -> None:
        self.rings_sent = self.rings_heard = 0
        """Doorbells of the guest that reached a peer's vector, and those of peers that came; for those who watch."""
        self._sock = sock
        self._vectors = vectors
        self._protocol: ClientProtocol[int] = ClientProtocol()
        self._eventfds: dict[int, list[int]] = {}
        self._shared: SharedMemory | None = None
        self._early: list[Event[int]] = []
        self._events: Events | None = None
        self._device: Rings | None = None
        self._interrupt: Callable[[int], None] = lambda vector: None
        self._surplus = False
        self._following = False
        """The socket is among the events: the server is heard."""

    @property
    def memory(self) -> object:
        """The shared memory."""
        assert self._shared is not None
        return self._shared.map

    @property
    def ready(self) -> bool:
        """The handshake is done: id and memory are there."""
        return self._protocol.ready and self._shared is not None

    @property
    def memory_bytes(self) -> int:
        """Size of the shared memory."""
        assert self._shared is not None
        return self._shared.size_bytes

    @property
    def peer_id(self) -> int:
        """Our id."""
        assert self._protocol.peer_id is not None
        return self._protocol.peer_id

    def handshake(self, timeout_s: float = HANDSHAKE_S) -> None:
        """Read version, id and memory.

        Raises
        ------
        ProtocolError
            When the server breaks the protocol or closes too early.
        SharedMemoryError, UsageError
            When the memory cannot be mapped, or has a size that no BAR can show.
        VmError
            When the server says nothing in time.
        """
        deadline = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        try:
            while not self._protocol.ready:
                left_ms = int((deadline - time.monotonic()) * 1000)
                if left_ms <= 0 or not poller.poll(left_ms):
                    raise VmError(
                        f"the ivshmem server did not send {self._protocol.missing} in {timeout_s:g} s; is it an ivshmem server?"
                    )
                data, fds = receive_message(self._sock, READ_BYTES)
                for event in self._protocol.receive(data, fds):
                    if isinstance(event, MemoryArrived):
                        self._shared = SharedMemory.from_fd(event.fd)
                        check_memory_size(self._shared.size_bytes, "memory of the ivshmem server")
                        _ = self._shared.map
                    elif not isinstance(event, Welcome):
                        self._early.append(event)
                if not data:
                    self._protocol.eof()
        except BaseException:
            self.close()
            raise

    def attach(self, device: Rings, events: Events, interrupt: Callable[[int], None]) -> None:
        """Begin to serve a device: its peers, its interrupts.

        Parameters
        ----------
        device
            Learns who can be rung.
        events
            Wakes the vCPU.
        interrupt
            Called with a vector when somebody rang it.
        """
        self._device, self._events, self._interrupt = device, events, interrupt
        self._sock.setblocking(False)
        self._take_all(self._early)
        events.add(self._sock.fileno(), self._readable)
        self._following = True

    def _readable(self) -> None:
        """Read what the server has to say; when it is gone, everything that is known goes on working."""
        try:
            for _ in range(TURN_READS):
                data, fds = receive_message(self._sock, READ_BYTES)
                self._take_all(self._protocol.receive(data, fds))
                if not data:
                    self._protocol.eof()
                    self._unfollow("closed the connection")
                    return
        except BlockingIOError:
            return
        except (IvshmemLabError, OSError) as error:
            self._unfollow(f"is not followed any more: {error}")

    def _take_all(self, events: list[Event[int]]) -> None:
        while events:
            try:
                self._take(events.pop(0))
            except BaseException:
                self._early = events  # their descriptors are closed with the link
                raise

    def _unfollow(self, reason: str | None = None) -> None:
        if self._following and self._events is not None:
            self._events.remove(self._sock.fileno())
        self._following = False
        if reason is not None:
            log.warning(
                "the ivshmem server of peer %s %s; known peers can still be rung", self._protocol.peer_id, reason
            )

    def _take(self, event: Event[int]) -> None:
        if isinstance(event, VectorAdded):
            self._add_vector(event)
        elif isinstance(event, PeerLeft):
            if self._device is not None:
                self._device.peer_left(event.peer_id)
            for fd in self._eventfds.pop(event.peer_id, []):
                os.close(fd)
        elif isinstance(event, MemoryArrived):
            os.close(event.fd)

    def _add_vector(self, event: VectorAdded[int]) -> None:
        assert self._device is not None
        assert self._events is not None
        if not is_eventfd(event.fd):
            os.close(event.fd)
            raise RemoteProtocolError(
                "vector", f"what came for vector {event.vector} of peer {event.peer_id} is no eventfd"
            )
        if event.vector >= self._vectors and event.peer_id == self.peer_id:
            os.close(event.fd)
            if not self._surplus:
                self._surplus = True
                log.warning("Too many eventfd received, device has %d vectors", self._vectors)
            return
        os.set_blocking(event.fd, False)
        self._eventfds.setdefault(event.peer_id, []).append(event.fd)
        self._device.peer_vector(event.peer_id, event.vector)
        if event.peer_id == self.peer_id:
            fd, vector = event.fd, event.vector
            self._events.add(fd, lambda: self._rung(fd, vector))

    def _rung(self, fd: int, vector: int) -> None:
        try:
            self.rings_heard += os.eventfd_read(fd)
        except BlockingIOError:
            return
        self._interrupt(vector)

    def ring(self, peer_id: int, vector: int) -> None:
        """Add 1 to a peer's eventfd; a full counter is pending anyway."""
        self.rings_sent += 1
        try:
            os.eventfd_write(self._eventfds[peer_id][vector], 1)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give back eventfds and memory; the socket stays the caller's."""
        if self._events is not None:
            self._unfollow()
            for fd in self._eventfds.get(self.peer_id, []):
                self._events.remove(fd)
            self._events = None
        for fds in self._eventfds.values():
            for fd in fds:
                os.close(fd)
        self._eventfds.clear()
        for fd in self._protocol.abandon():
            os.close(fd)
        for event in self._early:
            if isinstance(event, VectorAdded | MemoryArrived):
                os.close(event.fd)
        self._early.clear()
        if self._shared is not None:
            self._shared.close()
            self._shared = None


async def shake_hands(link: ServerLink, sock: socket.socket, timeout_s: float = HANDSHAKE_S) -> None:
    """Let a link's handshake block a thread of its own; it ends at once when nobody waits for it any more."""
    handshake = asyncio.ensure_future(asyncio.to_thread(link.handshake, timeout_s))
    try:
        await asyncio.shield(handshake)
    except asyncio.CancelledError:
        # The thread sees the end of the stream and is done at once.
        sock.shutdown(socket.SHUT_RDWR)
        await asyncio.gather(handshake, return_exceptions=True)
        raise
