"""Who is there: admits clients as peers or observers, keeps leases, and tells everybody what they must hear."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import LocalProtocolError
from ..wire.server import ServerProtocol
from .connection import Connection, why_gone
from .events import LeaseEnded, LeaseReturned, MessageWithheld, PeerDeparted, PeerJoined, PeerSettled
from .leases import Lease, Leases, ServerState, lease_asked_for, lease_name
from .packet import Packet, SharedFd, drain_eventfd, new_eventfd
from .policy import Admission, NotAdmittedError, is_qemu

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

    from ..wire.server import Step
    from .events import ServerEvent
    from .outbox import Outbox
    from .policy import Credentials, Policy

_NO_LIMIT = 1 << 62


@dataclass(slots=True)
class Counters:
    """What has happened since the server was made."""

    joins: int = 0
    leaves: int = 0
    lease_returns: int = 0
    rings_discarded: int = 0  # not taken by the holder of a lease before it came back
    withheld: int = 0
    messages: int = 0  # of those who left; see Roster.messages
    drops: Counter[str] = field(default_factory=Counter)
    refusals: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a server was told when it was made."""

    vectors: int
    policy: Policy
    shield_qemu: bool
    queue_limit: int
    lease_hold_s: float


class Roster:
    """The peers of one server."""

    def __init__(self, memory_fd: int, settings: Settings, tell: Callable[[ServerEvent], None]) -> None:
        self.settings = settings
        self.connections: dict[int, Connection] = {}
        self.counters = Counters()
        self.leases = Leases()
        self.expected: dict[int, list[Admission]] = {}
        self.protocol: ServerProtocol[SharedFd, Packet] = ServerProtocol(Packet, SharedFd(memory_fd, owned=False))
        self._memory_fd = memory_fd
        self._read_only: SharedFd | None = None
        self._tell = tell
        self._newcomers = False
        self._present: Counter[int] = Counter()  # connected, by uid

    def open(self, loop: asyncio.AbstractEventLoop, outbox: Outbox) -> None:
        """Begin, on the server's loop."""
        self._loop = loop
        self._outbox = outbox
        for lease in self.leases.held():
            self._hold(lease)

    @property
    def messages(self) -> int:
        """Messages handed to the kernel so far."""
        return self.counters.messages + sum(each.sent for each in self.connections.values())

    def take_over(self, state: ServerState) -> None:
        """Expect back the leases of an earlier server, and go on with its ids."""
        self.protocol = ServerProtocol(Packet, SharedFd(self._memory_fd, owned=False), state.next_id)
        for lease in state.leases:
            self.protocol.restore(lease.peer_id, lease.vectors)
            self.leases.add(Lease(lease.name, lease.uid, lease.peer_id, lease.vectors, held=True))

    def state(self) -> ServerState:
        """Return what :meth:`take_over` needs."""
        leases = [Lease(each.name, each.uid, each.peer_id, list(each.vectors)) for each in self.leases.all()]
        return ServerState(self.protocol.next_id, self.settings.vectors, leases)

    def admit(self, sock: socket.socket, who: Credentials) -> None:
        """Make a peer or an observer of a connected socket. :meth:`introduce` sends what follows from it.

        Raises
        ------
        NotAdmittedError, LocalProtocolError
            When it may not join, or no id is free.
        OSError
            When the kernel is short of descriptors; the client may be tried again.
        """
        present = self._present[who.uid] + sum(lease.uid == who.uid for lease in self.leases.held())
        admission = self._admission(sock, who)
        lease = None if admission.lease is None else self._claim(who.uid, admission.lease)
        role = self.settings.policy.admit(who, present - (lease is not None))
        if "observer" in {role, admission.role}:
            self._admit_observer(sock, who)
            return
        shielded = admission.shield_qemu
        if shielded is None:
            shielded = self.settings.shield_qemu and is_qemu(who.pid)
        connection = Connection(sock, who, role, shielded=shielded)
        if lease is not None:
            self._come_back(connection, lease)
            return
        vectors = [new_eventfd() for _ in range(self.settings.vectors)]
        peer_id, step = self._with_a_free_id(
            lambda: self.protocol.join(vectors, peer_id=admission.peer_id, shielded=shielded)
        )
        connection.vectors = vectors
        if admission.lease is not None:
            connection.lease = Lease(admission.lease, who.uid, peer_id, vectors)
            self.leases.add(connection.lease)
        self._enter(connection, peer_id, step)

    def introduce(self) -> None:
        """Tell everybody of the newcomers, and then the newcomers of everybody: who knows all is known by all."""
        newcomers, self._newcomers = self._newcomers, False
        if newcomers:
            self._outbox.send_now()

    def depart(self, connection: Connection, kind: str, reason: str) -> None:
        """Let a peer go, and tell those who must hear of it; a lease is kept."""
        peer_id = connection.peer_id
        if self.connections.get(peer_id) is not connection:
            return
        lease = connection.lease
        self._forget(connection)
        self.counters.drops[kind] += 1
        self._tell(PeerDeparted(peer_id, reason))
        if lease is not None and self.settings.lease_hold_s > 0:
            self.protocol.expect_back(peer_id)
            self._hold(lease)
            surplus = self.leases.to_give_up(lease.uid)
            if surplus is not None:
                self.end_lease(surplus, "too many leases are kept")
            return
        if lease is not None:
            self.leases.remove(lease)
        self._post(self.protocol.leave(peer_id), peer_id, "left")
        self._outbox.send_soon()

    def end_lease(self, lease: Lease, reason: str) -> None:
        """Stop expecting somebody back."""
        self.leases.remove(lease)
        self._tell(LeaseEnded(lease.peer_id, lease.name, reason))
        self._post(self.protocol.leave(lease.peer_id), lease.peer_id, "left")
        self._outbox.send_soon()

    def settle(self, connection: Connection) -> None:
        """Say that an introduction has been sent whole."""
        self._tell(PeerSettled(connection.peer_id))

    def look(self, connection: Connection) -> None:
        """See whether a peer has left, or says what it should not."""
        gone = why_gone(connection.sock)
        if gone is not None:
            self.depart(connection, *gone)

    def close(self) -> None:
        """Disconnect everybody."""
        for connection in list(self.connections.values()):
            self._forget(connection)
            self.counters.drops["server closed"] += 1
            self._tell(PeerDeparted(connection.peer_id, "the server closed"))
        self.leases.clear()
        self._newcomers = False
        self.expected.clear()
        # the eventfds go with the last message about them
        self.protocol = ServerProtocol(Packet, SharedFd(self._memory_fd, owned=False), self.protocol.next_id)
        self._read_only = None

    def _admission(self, sock: socket.socket, who: Credentials) -> Admission:
        """Say how a client is to join: as it was announced, else as it asks by its socket's name."""
        announced = self.expected.get(who.pid) if who.uid == os.getuid() else None
        if announced:
            return announced[0]
        return Admission(lease=lease_asked_for(sock))

    def _claim(self, uid: int, name: str) -> Lease | None:
        """Find the lease of a client that comes back; one that has no lease yet gets None."""
        lease = self.leases.get(uid, lease_name(name))
        if lease is None or lease.held:
            return lease
        holder = self.connections[lease.peer_id]
        gone = why_gone(holder.sock)
        if gone is None:
            raise NotAdmittedError(f"lease {name!r} of uid {uid} is held by peer {lease.peer_id}, which is connected")
        self.depart(holder, *gone)
        return self.leases.get(uid, name)

    def _admit_observer(self, sock: socket.socket, who: Credentials) -> None:
        if self._read_only is None:
            self._read_only = SharedFd(os.open(f"/proc/self/fd/{self._memory_fd}", os.O_RDONLY | os.O_CLOEXEC))
        read_only = self._read_only
        peer_id, step = self._with_a_free_id(lambda: self.protocol.observe(read_only))
        self._enter(Connection(sock, who, "observer", shielded=False), peer_id, step)

    def _come_back(self, connection: Connection, lease: Lease) -> None:
        for vector in lease.vectors:
            self.counters.rings_discarded += drain_eventfd(vector)
        connection.vectors = lease.vectors
        connection.lease = lease
        self.leases.give_back(lease)
        self.counters.lease_returns += 1
        self._enter(connection, lease.peer_id, self.protocol.come_back(lease.peer_id, shielded=connection.shielded))
        self._tell(LeaseReturned(lease.peer_id, lease.name))

    def _enter(self, connection: Connection, peer_id: int, step: Step[Packet]) -> None:
        announced = self.expected.get(connection.pid)
        if announced and connection.uid == os.getuid():
            announced.pop(0)
            if not announced:
                del self.expected[connection.pid]
        connection.peer_id = peer_id
        connection.queue_limit = _NO_LIMIT
        self.connections[peer_id] = connection
        self._present[connection.uid] += 1
        self.counters.joins += 1
        self._outbox.watch.add(connection)
        introduction: list[Packet] = []
        for posting in step.postings:
            if posting.recipients == (peer_id,):
                introduction += posting.messages
        self._post(step, peer_id, "joined")
        self._outbox.admit(connection, introduction)
        connection.queue_limit = self.settings.queue_limit + self._outbox.waiting(connection)
        self._newcomers = True
        self._tell(PeerJoined(peer_id, connection.pid, connection.uid))

    def _with_a_free_id(self, join: Callable[[], tuple[int, Step[Packet]]]) -> tuple[int, Step[Packet]]:
        """Join; when ids are short, leases that are only kept give way, the oldest first."""
        while True:
            try:
                return join()
            except LocalProtocolError:
                held = self.leases.held()
                if not held:
                    raise
                self.end_lease(held[0], "its id was needed")

    def _hold(self, lease: Lease) -> None:
        hold_s = self.settings.lease_hold_s
        reason = f"its holder did not come back within {hold_s:g} s"
        self.leases.hold(lease, self._loop.call_later(hold_s, self.end_lease, lease, reason))

    def _post(self, step: Step[Packet], about: int, what: str) -> None:
        connections = self.connections
        for posting in step.postings:
            if posting.recipients != (about,):
                recipients = list(map(connections.__getitem__, posting.recipients))
                self._outbox.post(recipients, posting.messages, step.void)
        for recipient in step.withheld:
            self.counters.withheld += 1
            self._tell(MessageWithheld(recipient, about, f"peer {about} {what}"))

    def _forget(self, connection: Connection) -> None:
        self._outbox.forget(connection)
        self._outbox.watch.remove(connection)
        del self.connections[connection.peer_id]
        self._present[connection.uid] -= 1
        self.counters.leaves += 1
        self.counters.messages += connection.sent
        connection.close()
