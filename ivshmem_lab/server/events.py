"""What a server tells its owner, and what may listen in or interfere: plain values and two interfaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias


@dataclass(frozen=True, slots=True)
class ServerStarted:
    """The server listens.

    `open_files` is this process's limit of open files (``RLIMIT_NOFILE``, raised to its hard limit),
    `peers_allowed` how many peers fit into what is left of it: each takes one, and one per vector.
    """

    path: str
    open_files: int
    peers_allowed: int


@dataclass(frozen=True, slots=True)
class PeerJoined:
    """A peer has its id; everything that it and the others must hear is queued.

    `pid` and `uid` are those of the process that connected (unix(7), SO_PEERCRED).
    """

    peer_id: int
    pid: int
    uid: int


@dataclass(frozen=True, slots=True)
class PeerSettled:
    """The introduction of a peer has been sent whole. Comes once per peer."""

    peer_id: int


@dataclass(frozen=True, slots=True)
class PeerDeparted:
    """A peer is gone, and why."""

    peer_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseReturned:
    """A peer came back under its lease: same id, same eventfds. The others heard nothing of it."""

    peer_id: int
    lease: str


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """A lease whose holder is gone ended, and why; from now on its id counts as left."""

    peer_id: int
    lease: str
    reason: str


@dataclass(frozen=True, slots=True)
class MessageWithheld:
    """A shielded peer was not told something that could have crashed it (``shield_qemu``)."""

    peer_id: int
    about: int
    reason: str


@dataclass(frozen=True, slots=True)
class ClientRefused:
    """A client connected but never became a peer, and why. No other peer heard of it."""

    pid: int
    uid: int
    reason: str


@dataclass(frozen=True, slots=True)
class ServerStrained:
    """The kernel is short of something (mostly file descriptors): newcomers wait, nobody is lost."""

    reason: str


ServerEvent: TypeAlias = (
    ServerStarted
    | PeerJoined
    | PeerSettled
    | PeerDeparted
    | LeaseReturned
    | LeaseEnded
    | MessageWithheld
    | ClientRefused
    | ServerStrained
)


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A connected peer.

    `queued` is the number of messages that wait for it to read; `role` is ``"peer"`` or
    ``"observer"``; `lease` the name under which it may come back, or None; `shielded` whether
    messages that crash real QEMU are kept from it.
    """

    peer_id: int
    pid: int
    uid: int
    vectors: int
    queued: int
    role: str = "peer"
    lease: str | None = None
    shielded: bool = False


class ServerTap(Protocol):
    """Listens in. Called on the server's thread; what it raises ends the server, so it should not."""

    def message(self, now_ns: int, peer_id: int, value: int, has_fd: bool) -> None:
        """Take a message to a peer that was just handed to the kernel (:func:`time.monotonic_ns`)."""

    def event(self, now_ns: int, event: ServerEvent) -> None:
        """Take an event."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How one message is to be delivered. The default is: as it is, at once, once.

    Attributes
    ----------
    delay_s
        Wait so long before it, and so before everything that follows it.
    copies
        How often; 0 drops it.
    cut_after_bytes
        Send only so many of its 8 bytes (0 to 7; the descriptor rides on the first), then close the connection.
    leave_out_fd
        Send the number without its descriptor.
    value
        Send this number instead.
    """

    delay_s: float = 0.0
    copies: int = 1
    cut_after_bytes: int | None = None
    leave_out_fd: bool = False
    value: int | None = None


class FaultPlan(Protocol):
    """Interferes, for teaching and tests. Called on the server's thread."""

    def deliver(self, peer_id: int, index: int, value: int, has_fd: bool) -> Delivery:
        """Say how to deliver the `index`-th message (from 0) to a peer, before it is queued."""
