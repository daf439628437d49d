"""The ivshmem server: joins any number of peers over one shared memory, and never drops a message.

What differs from QEMU's contrib server, each measured with 7.2: a queue per peer instead of sends
whose failure nobody looks at; no limit at 1024 descriptors; a rude client costs only itself; a
shortage of descriptors is waited out; nobody hears "left" twice, and real QEMU, if shielded, never.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from ..errors import ServerError, UsageError
from ..ipc.runtime_dir import check_socket_path
from ..ipc.sockets import unread_bytes
from ..units import check_memory_size, format_size
from .control import ControlSocket
from .door import Door, allow_many_files, peers_that_fit
from .events import PeerInfo, ServerEvent, ServerStarted
from .listener import Listener
from .outbox import Outbox
from .packet import rings_waiting
from .policy import Policy, check_memory_mode
from .roster import Roster, Settings

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from ..ipc.memory import SharedMemory
    from .connection import Connection
    from .events import FaultPlan, ServerTap
    from .leases import ServerState
    from .policy import Admission

MAX_VECTORS = 2048
"""Vectors of an MSI-X table (PCI specification), the most that a device can use."""

_MOST_LOOKED_AT = 2048
"""Vectors whose counters a status tells; with more of them, looking would keep the peers waiting (10 µs each)."""

_DRAIN_LOOK_S = 0.005  # how often a drain looks whether the queues are empty


class Server:
    """An ivshmem server on an asyncio loop; all methods belong to the loop's thread.

    Parameters
    ----------
    path
        Where the Unix socket is to be: at most 107 bytes, mode 0600 unless the policy says otherwise.
    memory
        What the peers will share; a power of two, at least 4096 bytes. It stays the caller's.
    vectors
        Interrupt vectors of every peer, 0 to 2048.
    on_event
        Called with every :data:`~ivshmem_lab.server.events.ServerEvent`, on the loop's thread.
    queue_limit
        A peer that lets more messages than this wait, its own introduction not counted, is disconnected.
    policy
        Who may join, as what; None: everybody whom the socket's mode lets in, as a peer.
    shield_qemu
        Keep from every client whose process calls itself ``qemu…`` what crashes real QEMU: no peer's
        leaving is told to it, and no id that it was told of goes to anybody else while it is connected.
        What was withheld is counted, and told as events.
    lease_hold_s
        How long the id and the eventfds of a peer with a lease are kept after it is gone; 0: not.
    control_path
        Where a socket (mode 0600) is to be that answers ``{"execute": "status"}``; None: nowhere.
    state
        What an earlier server on the same memory handed over (:meth:`export_state`).
    tap
        Listens in to every message and event.
    faults
        Interferes with every message, for teaching and tests.

    Raises
    ------
    UsageError
        When the path, the memory's size or the number of vectors is not allowed, the memory cannot
        be kept from observers, or `state` has another number of vectors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        memory: SharedMemory,
        vectors: int = 1,
        on_event: Callable[[ServerEvent], None] | None = None,
        *,
        queue_limit: int = 1_000_000,
        policy: Policy | None = None,
        shield_qemu: bool = False,
        lease_hold_s: float = 30.0,
        control_path: str | os.PathLike[str] | None = None,
        state: ServerState | None = None,
        tap: ServerTap | None = None,
        faults: FaultPlan | None = None,
    ) -> None:
        if not 0 <= vectors <= MAX_VECTORS:
            raise UsageError(f"{vectors} vectors are not allowed; 0 to {MAX_VECTORS}")
        if state is not None and state.vectors != vectors:
            raise UsageError(f"the state handed over has {state.vectors} vectors per peer, not {vectors}; keep them")
        check_memory_size(memory.size_bytes, "memory")
        self._policy = Policy() if policy is None else policy
        if self._policy.has_observers:
            check_memory_mode(memory.fd)
        self.path = check_socket_path(path)
        self.memory = memory
        self.vectors = vectors
        self._on_event = on_event
        self._tap = tap
        self._faults = faults
        settings = Settings(vectors, self._policy, shield_qemu, queue_limit, lease_hold_s)
        self._roster = Roster(memory.fd, settings, self._tell)
        if state is not None:
            self._roster.take_over(state)
        self._control = None if control_path is None else ControlSocket(control_path, self.status)
        self._door: Door | None = None
        self._outbox: Outbox | None = None
        self._started_at = 0.0
        self._limits = (0, 0)

    @property
    def peers(self) -> dict[int, PeerInfo]:
        """The connected peers by id, in the order they joined."""
        outbox = self._outbox
        if outbox is None:
            return {}
        return {peer_id: _info(each, outbox.waiting(each)) for peer_id, each in self._roster.connections.items()}

    async def start(self) -> None:
        """Begin to listen; raises this process's limit of open files to its hard limit.

        Raises
        ------
        UsageError
            When no socket can be made at the path.
        ServerError
            When it is started already, or another program listens there.
        """
        if self._outbox is not None:
            raise ServerError(f"the server on {self.path!r} is started already")
        loop = asyncio.get_running_loop()
        listener = Listener.open(self.path, self._policy.socket_mode)
        try:
            if self._control is not None:
                self._control.start(loop)
        except BaseException:
            listener.close()
            raise
        roster = self._roster
        self._outbox = Outbox(loop, self._tap, self._faults, roster.settle, roster.depart, roster.look)
        roster.open(loop, self._outbox)
        self._started_at = time.monotonic()
        open_files = allow_many_files()
        self._limits = (open_files, peers_that_fit(open_files, self.vectors))
        self._tell(ServerStarted(self.path, *self._limits))
        self._door = Door(loop, listener, roster, self._tell)

    async def drain(self, timeout_s: float = 5.0) -> bool:
        """Let in those who have connected already and nobody after them, and send what waits; :meth:`close` follows.

        Returns
        -------
        bool
            Whether everything was handed to the kernel within `timeout_s`. A peer can still read it after
            the server is gone.
        """
        deadline = time.monotonic() + timeout_s
        if self._door is not None:
            self._door.close(admit_waiting=True)
        outbox = self._outbox
        if outbox is None:
            return True
        outbox.send_now()
        while any(outbox.waiting(each) for each in self._roster.connections.values()):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(_DRAIN_LOOK_S)
        return True

    async def close(self) -> None:
        """Disconnect everybody and remove the sockets. The memory stays. May be called twice."""
        if self._outbox is None:
            return
        if self._door is not None:
            self._door.close()
            self._door = None
        if self._control is not None:
            self._control.close()
        self._roster.close()
        self._outbox.close()
        self._outbox = None

    def export_state(self) -> ServerState:
        """Return what the next server on this memory needs to go on with the same ids and leases.

        Call it before :meth:`close`, and give it to the next server as `state`. Holders of leases come back
        to the ids and eventfds that they had; ids go on where they were, so that no QEMU that is
        still running with the eventfds it knows meets an id again.
        """
        return self._roster.state()

    def expect(self, pid: int, admission: Admission) -> None:
        """Say how the next client from a process of this user is to join: role, lease, id, shield.

        Several calls for one pid stand for as many connections, in this order. It is forgotten
        when the client joined, or with :meth:`expect_no_more`.

        Raises
        ------
        UsageError
            When it is to observe, and the memory cannot be kept from observers.
        """
        if admission.role == "observer":
            check_memory_mode(self.memory.fd)
        self._roster.expected.setdefault(pid, []).append(admission)

    def expect_no_more(self, pid: int) -> None:
        """Forget what was said about clients from a process that is gone."""
        self._roster.expected.pop(pid, None)

    def unread(self, pid: int) -> int:
        """Return how much was sent to the peers of a process and not read yet: messages here, bytes in the kernel."""
        outbox = self._outbox
        if outbox is None:
            return 0
        theirs = [each for each in self._roster.connections.values() if each.pid == pid]
        return sum(outbox.waiting(each) + unread_bytes(each.sock) for each in theirs)

    @property
    def listening(self) -> bool:
        """Whether newcomers are let in."""
        return self._door is not None

    def status(self) -> dict[str, Any]:
        """Return what there is to know, as plain values that JSON can carry.

        A ring goes from peer to peer and past the server, which can see only those that the one who was rung has not
        taken: `rings_waiting` of each peer (None when there are more than 2048 vectors). A guest that never takes
        them has no handler, or masks them. Those that a lease's holder had not taken when it came back were
        discarded, and are counted in `rings_discarded`.
        """
        roster, counters = self._roster, self._roster.counters
        high_water = 0 if self._outbox is None else self._outbox.queue_high_water
        return {
            "path": self.path,
            "listening": self.listening,
            "uptime_s": round(time.monotonic() - self._started_at, 3) if self._outbox is not None else 0.0,
            "memory": {"kind": self.memory.kind, "name": self.memory.name, "size_bytes": self.memory.size_bytes},
            "vectors": self.vectors,
            "open_files": self._limits[0],
            "peers_allowed": self._limits[1],
            "peers": self._rows(),
            "leases_held": [
                {"name": lease.name, "uid": lease.uid, "id": lease.peer_id} for lease in roster.leases.held()
            ],
            "counters": {
                "joins": counters.joins,
                "leaves": counters.leaves,
                "lease_returns": counters.lease_returns,
                "rings_discarded": counters.rings_discarded,
                "messages": roster.messages,
                "queue_high_water": high_water,
                "refusals": counters.refusals,
                "drops": dict(counters.drops),
                "withheld": counters.withheld,
            },
        }

    def _rows(self) -> list[dict[str, Any]]:
        connections = self._roster.connections
        look = sum(len(each.vectors) for each in connections.values()) <= _MOST_LOOKED_AT
        rows = []
        for peer in self.peers.values():
            row = dataclasses.asdict(peer)
            waiting = sum(map(rings_waiting, connections[peer.peer_id].vectors)) if look else None
            rows.append({"id": row.pop("peer_id"), **row, "rings_waiting": waiting})
        return rows

    def __repr__(self) -> str:
        state = f"peers {', '.join(map(str, self.peers)) or 'none'}" if self._door is not None else "not listening"
        return f"<Server {self.path}: memory {format_size(self.memory.size_bytes)}, vectors {self.vectors}; {state}>"

    def _tell(self, event: ServerEvent) -> None:
        if self._tap is not None:
            self._tap.event(time.monotonic_ns(), event)
        if self._on_event is not None:
            self._on_event(event)


def _info(connection: Connection, waiting: int) -> PeerInfo:
    return PeerInfo(
        connection.peer_id,
        connection.pid,
        connection.uid,
        len(connection.vectors),
        waiting,
        connection.role,
        None if connection.lease is None else connection.lease.name,
        connection.shielded,
    )
