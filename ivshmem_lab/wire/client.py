"""The client's end of the ivshmem server's protocol, version 0, as a state machine without sockets.

Source: QEMU docs/specs/ivshmem-spec, "Client-Server protocol"; what QEMU does was measured with 7.2.

1. First comes the protocol version, 0, without a descriptor ("The server sends protocol version").
2. Then the client's own peer id, 0 to 65535, without a descriptor.
3. Then -1 with the descriptor of the shared memory, once. (QEMU tolerates other peers' vectors
   before it; so do we, our own too, on which QEMU crashes.)
4. A peer id with a descriptor: one more vector of that peer, from vector 0 up. The client's own id
   too: these are the interrupts that it receives.
5. A peer id without a descriptor: that peer left. Of an unknown peer: ignored, as QEMU does. The
   client's own: wrong.
6. There is no end of the introduction: how many vectors the client has is never transmitted.
7. The client sends nothing. End of file inside a message, or before 1 to 3 are done, is an error;
   later the client keeps what it has.

Numbers outside -1 to 65535 are wrong everywhere. QEMU stays connected after a wrong message that
comes later than rule 3; we do not: a server that breaks one rule cannot be trusted with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeAlias

from ..errors import RemoteProtocolError
from .messages import MAX_PEER_ID, MAX_VECTORS, MEMORY, PROTOCOL_VERSION, Decoder, F, Message

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server gave us this peer id."""

    peer_id: int


@dataclass(frozen=True, slots=True)
class MemoryArrived(Generic[F]):
    """The shared memory; the descriptor now belongs to the caller."""

    fd: F


@dataclass(frozen=True, slots=True)
class VectorAdded(Generic[F]):
    """One more vector of a peer, or of ourselves; the descriptor now belongs to the caller."""

    peer_id: int
    vector: int
    fd: F


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """A peer that we knew is gone, with all its vectors."""

    peer_id: int


Event: TypeAlias = Welcome | MemoryArrived[F] | VectorAdded[F] | PeerLeft


class ClientProtocol(Generic[F]):
    """What one client knows, from the bytes and descriptors that its server sent.

    Attributes
    ----------
    peer_id
        Our own id, None before it arrived.
    vectors
        Number of vectors of every peer that has any, ourselves included.
    version_seen
        Whether the server has said its first message.
    """

    def __init__(self) -> None:
        self.peer_id: int | None = None
        self.vectors: dict[int, int] = {}
        self.version_seen = False
        self._memory_seen = False
        self._decoder: Decoder[F] = Decoder()
        self._error: RemoteProtocolError | None = None
        self._orphans: list[F] = []

    @property
    def ready(self) -> bool:
        """Version, own id and memory have arrived."""
        return self._memory_seen

    @property
    def pending_bytes(self) -> int:
        """Bytes of a message that is not complete yet, 0 to 7."""
        return self._decoder.pending_bytes

    def receive(self, data: bytes, fds: Sequence[F] = ()) -> list[Event[F]]:
        """Take what one read returned; say what it means.

        Raises
        ------
        RemoteProtocolError
            The server broke a rule; ``.field`` says which. It is raised again by every later call.
            Descriptors that came with this piece are then in :meth:`abandon`.
        """
        if self._error is not None:
            self._orphans.extend(fds)
            raise self._error
        try:
            messages = self._decoder.feed(data, fds)
        except RemoteProtocolError as error:
            self._error = error
            self._orphans += fds
            raise
        try:
            events = [self._read(message) for message in messages]
        except RemoteProtocolError as error:
            self._error = error
            self._orphans += [message.fd for message in messages if message.fd is not None]
            raise
        return [event for event in events if event is not None]

    def eof(self) -> None:
        """Take the end of the stream.

        Raises
        ------
        RemoteProtocolError
            Field ``"message"``: it came inside a message, or before version, id and memory.
        """
        if self._error is not None:
            raise self._error
        if self.pending_bytes:
            self._error = RemoteProtocolError(
                "message", f"the server closed after {self.pending_bytes} of a message's 8 bytes"
            )
        elif not self.ready:
            self._error = RemoteProtocolError("message", f"the server closed before it sent {self.missing}")
        if self._error is not None:
            raise self._error

    @property
    def missing(self) -> str:
        """What of the introduction has not arrived, in words; empty when :attr:`ready`."""
        parts = {
            "the protocol version": self.version_seen,
            "the peer id": self.peer_id is not None,
            "the shared memory": self._memory_seen,
        }
        return ", ".join(name for name, seen in parts.items() if not seen)

    def abandon(self) -> list[F]:
        """Give the descriptors that came and went into no event, for the caller to close."""
        orphans, self._orphans = self._orphans, []
        return orphans + self._decoder.abandon()

    def _read(self, message: Message[F]) -> Event[F] | None:
        value, fd = message.value, message.fd
        if not self.version_seen:
            self._read_version(value, fd)
            return None
        if self.peer_id is None:
            return self._read_own_id(value, fd)
        if value == MEMORY:
            return self._read_memory(fd)
        if not 0 <= value <= MAX_PEER_ID:
            raise RemoteProtocolError(
                "message", f"number {value}; allowed are -1 (memory) and peer ids 0 to {MAX_PEER_ID}"
            )
        return self._read_departure(value) if fd is None else self._read_vector(value, fd)

    def _read_version(self, value: int, fd: F | None) -> None:
        if value != PROTOCOL_VERSION:
            raise RemoteProtocolError(
                "version", f"the server speaks version {value}; this client speaks {PROTOCOL_VERSION}"
            )
        if fd is not None:
            raise RemoteProtocolError("version", "a file descriptor came with the version; none belongs there")
        self.version_seen = True

    def _read_own_id(self, value: int, fd: F | None) -> Welcome:
        if not 0 <= value <= MAX_PEER_ID:
            raise RemoteProtocolError("peer id", f"the server gave us id {value}; allowed are 0 to {MAX_PEER_ID}")
        if fd is not None:
            raise RemoteProtocolError("peer id", f"a file descriptor came with our id {value}; none belongs there")
        self.peer_id = value
        return Welcome(value)

    def _read_memory(self, fd: F | None) -> MemoryArrived[F]:
        if fd is None:
            raise RemoteProtocolError("shared memory", "no file descriptor came with -1; the memory's belongs there")
        if self._memory_seen:
            raise RemoteProtocolError("shared memory", "the server sent a second memory; there is one")
        self._memory_seen = True
        return MemoryArrived(fd)

    def _read_vector(self, peer_id: int, fd: F) -> VectorAdded[F]:
        vector = self.vectors.get(peer_id, 0)
        if vector >= MAX_VECTORS:
            raise RemoteProtocolError(
                "vector", f"peer {peer_id} has more than {MAX_VECTORS} vectors; the doorbell knows no more"
            )
        self.vectors[peer_id] = vector + 1
        return VectorAdded(peer_id, vector, fd)

    def _read_departure(self, peer_id: int) -> PeerLeft | None:
        if peer_id == self.peer_id:
            raise RemoteProtocolError("departure", f"the server says that we, peer {peer_id}, left; only others can")
        return None if self.vectors.pop(peer_id, None) is None else PeerLeft(peer_id)
