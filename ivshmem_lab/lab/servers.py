"""What a lab's machines and peers share: servers, and memory without a server, as the user sees them."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from typing import TYPE_CHECKING

from ..errors import LabError, VmError
from ..server.policy import Policy, Rule
from ..server.server import Server
from ..units import format_size
from .home import Row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..ipc.memory import SharedMemory
    from ..server.events import PeerInfo, ServerEvent
    from .home import Home

_SETTLE_TIME_LIMIT_S = 2.0
_LOOK_EVERY_S = 0.002
KEPT_EVENTS = 1000


class LabServer:
    """An ivshmem server of a lab; made by `Lab.server`.

    Attributes
    ----------
    name : str
    path : str
        Its Unix socket; any program that speaks ivshmem protocol version 0 may join.
    size_bytes : int
    vectors : int
        Interrupt vectors of every peer.
    peers_per_uid, observer_uid : int or None
        Its policy; see `Lab.server`.
    """

    def __init__(
        self,
        home: Home,
        name: str,
        path: str,
        memory: SharedMemory,
        vectors: int,
        peers_per_uid: int | None = None,
        observer_uid: int | None = None,
    ) -> None:
        self._home = home
        self._shared = memory
        observers = () if observer_uid is None else (Rule("observer", uid=observer_uid),)
        policy = Policy(peers_per_uid=peers_per_uid, rules=observers)
        # A lab may hold real QEMU at any time, which dies of what other peers do (Server, "shield").
        self._server = Server(path, memory, vectors, self._note, shield_qemu=True, policy=policy)
        self.peers_per_uid = peers_per_uid
        self.observer_uid = observer_uid
        self._events: deque[tuple[float, ServerEvent]] = deque(maxlen=KEPT_EVENTS)
        self.name = name
        self.path = path
        self.size_bytes = memory.size_bytes
        self.vectors = vectors

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The shared memory, zero copy: uint8, shape ``(size_bytes,)``."""
        return self._shared.array()

    @property
    def peers(self) -> dict[int, PeerInfo]:
        """The connected peers by id, in the order they joined."""
        self._home.require_open(f"{self.name}.peers")

        async def ask() -> dict[int, PeerInfo]:
            return self._server.peers

        return self._home.loop.call(ask())

    @property
    def events(self) -> list[tuple[float, ServerEvent]]:
        """What it told, oldest first, each with its time (`time.monotonic`); the last 1000 are kept."""
        return list(self._events.copy())  # in one go, whatever the loop is doing

    def close(self) -> None:
        """Disconnect everybody and remove the socket; the name is free again. May be repeated."""
        if not self._home.closed:
            self._home.loop.call(self.end(), finish=True)

    def __repr__(self) -> str:
        size = format_size(self.size_bytes)
        return f"<LabServer {self.name}: {size} shared, {self.vectors} vectors per peer, socket {self.path}>"

    def belongs_to(self, home: Home) -> bool:
        """Tell whether it is a member of this lab."""
        return self._home is home

    async def check(self) -> None:
        """Raise LabError when nobody can join; on the lab's loop."""
        if not self._server.listening:
            raise LabError(f"server {self.name} does not listen; make a new one")

    async def settle(self, pid: int) -> None:
        """Wait until a process has read all that was sent to it, 2 s at most; on the lab's loop."""
        deadline = time.monotonic() + _SETTLE_TIME_LIMIT_S
        while self._server.unread(pid):  # the kernel tells nobody when the other end has read
            if time.monotonic() >= deadline:
                raise VmError(
                    f"process {pid} has not read what server {self.name} sent it in {_SETTLE_TIME_LIMIT_S:g} s; is it hanging?"
                )
            await asyncio.sleep(_LOOK_EVERY_S)

    async def begin(self) -> None:
        """Listen; on the lab's loop."""
        self._home.guard.add_path(self.path)
        await self._server.start()

    async def end(self) -> None:
        """Close; on the lab's loop."""
        await self._server.close()
        self._home.guard.remove_path(self.path)
        self._shared.close()
        self._home.forget(self.name, self)

    def ids_of(self, pid: int | None) -> list[int]:
        """Return the peer ids of a process, in the order they joined; on the lab's loop."""
        return [peer.peer_id for peer in self._server.peers.values() if peer.pid == pid]

    def _note(self, event: ServerEvent) -> None:
        self._events.append((time.monotonic(), event))

    def rows(self, known: set[tuple[str, int]]) -> list[Row]:
        """Return its own line, and one for each peer that is no member of the lab; on the lab's loop."""
        peers = self._server.peers.values()
        size = format_size(self.size_bytes)
        own = Row(
            self.name, "server", f"{len(peers)} peer{'' if len(peers) == 1 else 's'}", "", str(self.vectors), size
        )
        foreign = [
            Row(f"(pid {peer.pid})", "foreign peer", "connected", str(peer.peer_id), str(peer.vectors), size, self.name)
            for peer in peers
            if (self.name, peer.peer_id) not in known
        ]
        return [own, *foreign]


class LabMemory:
    """Shared memory of a lab without a server, for ``ivshmem-plain`` devices; made by `Lab.memory`.

    Attributes
    ----------
    name : str
    size_bytes : int
    path : str
        Where this user's processes can open it, as long as the lab lives.
    """

    def __init__(self, home: Home, name: str, memory: SharedMemory) -> None:
        self._home = home
        self._shared = memory
        self._closed = False
        self.name = name
        self.size_bytes = memory.size_bytes
        self.path = f"/proc/{os.getpid()}/fd/{memory.fd}"

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The memory, zero copy: uint8, shape ``(size_bytes,)``."""
        return self._shared.array()

    def belongs_to(self, home: Home) -> bool:
        """Tell whether it is a member of this lab."""
        return self._home is home

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Let go of it; machines that have it keep it. The name is free again. May be repeated."""
        self._closed = True
        self._shared.close()
        self._home.forget(self.name, self)

    def row(self) -> Row:
        """Return its line of the table."""
        return Row(self.name, "memory", "ready", memory=format_size(self.size_bytes))

    def __repr__(self) -> str:
        return f"<LabMemory {self.name}: {format_size(self.size_bytes)} for ivshmem-plain>"
