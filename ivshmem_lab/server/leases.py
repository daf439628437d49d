"""Leases: an id together with its eventfds, kept for a holder that comes back.

A client asks for one as `ivshmem_lab.wire.lease` says. Only the same uid gets a lease back. While it is kept nobody hears that the holder is gone; when the holder returns, its
counters start at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..wire.lease import check_lease_name, lease_of_address
from .policy import NotAdmittedError

if TYPE_CHECKING:
    import asyncio
    import socket

    from .packet import SharedFd

MOST_HELD = 256
"""Leases that are kept without a holder; beyond that the oldest of the same uid, else the oldest, ends."""


@dataclass(slots=True)
class Lease:
    """One lease; `ends` is the timer of one whose holder is gone."""

    name: str
    uid: int
    peer_id: int
    vectors: list[SharedFd]
    ends: asyncio.TimerHandle | None = None
    held: bool = False


@dataclass(slots=True)
class ServerState:
    """What a server that goes down hands to the next one on the same memory (``Server(..., state=...)``).

    The descriptors close when this object and all servers that use it are gone.
    """

    next_id: int
    vectors: int
    leases: list[Lease] = field(default_factory=list)


class Leases:
    """All leases of one server, in the order in which holders left."""

    def __init__(self) -> None:
        self._all: dict[tuple[int, str], Lease] = {}

    def get(self, uid: int, name: str) -> Lease | None:
        """Find a lease."""
        return self._all.get((uid, name))

    def add(self, lease: Lease) -> None:
        """Take a lease in."""
        self._all[lease.uid, lease.name] = lease

    def hold(self, lease: Lease, timer: asyncio.TimerHandle) -> None:
        """Keep a lease whose holder is gone."""
        self.remove(lease)
        lease.held, lease.ends = True, timer
        self.add(lease)

    def give_back(self, lease: Lease) -> None:
        """Note that the holder is there again."""
        lease.held = False
        self._stop(lease)

    def remove(self, lease: Lease) -> None:
        """Forget a lease."""
        self._stop(lease)
        self._all.pop((lease.uid, lease.name), None)

    def clear(self) -> None:
        """Forget all."""
        for lease in self.all():
            self.remove(lease)

    def all(self) -> list[Lease]:
        """Return every lease."""
        return list(self._all.values())

    def held(self) -> list[Lease]:
        """Return those without a holder, the one that waits longest first."""
        return [lease for lease in self._all.values() if lease.held]

    def to_give_up(self, uid: int) -> Lease | None:
        """Return the lease that must end because `uid` left one more than may be kept."""
        held = self.held()
        if len(held) <= MOST_HELD:
            return None
        return next((lease for lease in held if lease.uid == uid), held[0])

    @staticmethod
    def _stop(lease: Lease) -> None:
        if lease.ends is not None:
            lease.ends.cancel()
            lease.ends = None


def lease_name(name: str) -> str:
    """Return the name of a lease when it may be one.

    Raises
    ------
    NotAdmittedError
        When it may not.
    """
    try:
        return check_lease_name(name)
    except UsageError as error:
        raise NotAdmittedError(str(error)) from error


def lease_asked_for(sock: socket.socket) -> str | None:
    """Return the lease that a client names by its socket's address, or None; raises as `lease_name`."""
    try:
        return lease_of_address(sock.getpeername())
    except UsageError as error:
        raise NotAdmittedError(str(error)) from error
