"""What a server tells its owner: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


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
class ClientRefused:
    """A client connected but never became a peer, and why. No other peer heard of it."""

    pid: int
    uid: int
    reason: str


@dataclass(frozen=True, slots=True)
class ServerStrained:
    """The kernel is short of something (mostly file descriptors): newcomers wait, nobody is lost."""

    reason: str


ServerEvent: TypeAlias = PeerJoined | PeerSettled | PeerDeparted | ClientRefused | ServerStrained


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A connected peer; `queued` is the number of messages that wait for it to read."""

    peer_id: int
    pid: int
    uid: int
    vectors: int
    queued: int
