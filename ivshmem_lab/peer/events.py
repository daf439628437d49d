"""What a peer hears of, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Interrupts on one of our vectors."""

    vector: int
    count: int
    """How many came since somebody last took them."""


@dataclass(frozen=True, slots=True)
class ServerGone:
    """The server ended. Memory and the eventfds that we hold go on."""


@dataclass(frozen=True, slots=True)
class Reconnected:
    """A server answers on the path again, and has introduced us."""

    peer_id: int
    previous_id: int
    same_memory: bool
    """False: `Peer.memory` is another array now; one that you hold shows the old memory."""
