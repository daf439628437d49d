"""Who is in a lab, under which name."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from ..errors import LabError, UsageError
from ..peer.peer import Peer
from .check import problems_here
from .describe import describe
from .members import LabVm
from .servers import LabMemory, LabServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..topology.model import Topology
    from ..topology.validate import Problem
    from .describe import Member


class Membership:
    """The names of a lab; `Lab` is one."""

    def __init__(self) -> None:
        self._members: dict[str, Member | None] = {}  # None: the name is being taken
        self._peer_servers: dict[str, LabServer] = {}
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the lab has been closed."""
        return self._closed

    @property
    def members(self) -> dict[str, Member]:
        """What is there by name, in the order it was made; without peers that are closed."""
        with self._lock:
            found = self._members.items()
            return {
                name: each for name, each in found if each is not None and not (isinstance(each, Peer) and each.closed)
            }

    def server_of(self, peer_name: str) -> LabServer | None:
        """Return the server that a host peer of the lab has joined."""
        return self._peer_servers.get(peer_name)

    def __getitem__(self, name: str) -> Member:
        try:
            return self.members[name]
        except KeyError:
            there = ", ".join(self.members) or "nothing"
            raise UsageError(f"there is no {name!r} in this lab; there is {there}") from None

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def topology(self) -> Topology:
        """Return what is there as a value: members by whichever call, with the devices that are plugged in.

        A machine that has ended is there until it is closed. Servers of other programs are not, nor what a topology
        cannot say of a `LinuxGuest`. A device or peer whose server was closed still names it.
        """
        return describe(self.members, self._peer_servers)[0]

    def problems(self, wanted: Topology) -> list[Problem]:
        """Return what is wrong with a topology, also here and now: a guest, a CPU or an emulator that is not there."""
        return problems_here(wanted, self.topology())

    def forget(self, name: str, member: object) -> None:
        """Free the name of a member that is gone."""
        with self._lock:
            if self._members.get(name) is member:
                del self._members[name]

    def require_open(self, call: str) -> None:
        """Raise LabError when the lab is closed, naming the call that came too late."""
        if self._closed:
            raise LabError(f"{call}: this lab is closed; make a new one with Lab()")

    def _servers(self, connect: LabServer | list[LabServer] | tuple[LabServer, ...] | None) -> list[LabServer]:
        if connect is None:
            return []
        servers = list(connect) if isinstance(connect, (list, tuple)) else [connect]
        for server in servers:
            if not isinstance(server, LabServer):
                raise UsageError(f"connect={server!r} is not a server; make one with lab.server('board') and pass it")
            if self._members.get(server.name) is not server:
                raise UsageError(f"connect={server!r} is closed, or belongs to another lab")
        return servers

    @contextlib.contextmanager
    def _taking(self, name: str) -> Iterator[None]:
        """Hold a name while its member is made; free it again when that fails. `close` waits for the making."""
        with self._making:
            self.require_open(f"{name!r}")
            with self._lock:
                holder = self._members.get(name)
                if name in self._members and not (isinstance(holder, Peer) and holder.closed):
                    what = {LabServer: "a server", LabMemory: "a memory", LabVm: "a VM", Peer: "a peer"}.get(
                        type(holder), "being made"
                    )
                    raise UsageError(f"the name {name!r} is taken ({what}); close it first, or choose another")
                self._members[name] = None
            try:
                yield
            except BaseException:
                with self._lock:
                    del self._members[name]
                raise
