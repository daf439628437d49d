"""What lives in a lab: a server and a virtual machine as the user sees them, from any thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import LabError, VmError, VmStartError
from ..server.server import Server
from ..units import format_size
from ..vm.vm import COMMAND_TIME_LIMIT_S, VmState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ..ipc.memory import SharedMemory
    from ..server.events import PeerInfo
    from ..vm.vm import Vm
    from .guard import Guard
    from .loop import LabLoop


class Home(Protocol):
    """What a member asks of its lab."""

    loop: LabLoop
    guard: Guard

    @property
    def closed(self) -> bool:
        """Whether the lab is closed."""

    def forget(self, name: str, member: object) -> None:
        """Free the name of a member that is gone."""

    def require_open(self, call: str) -> None:
        """Raise LabError when the lab is closed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the lab's table: who is who."""

    name: str
    kind: str
    state: str
    peer_id: str = ""
    vectors: str = ""
    memory: str = ""
    server: str = ""


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
    """

    def __init__(self, home: Home, name: str, path: str, memory: SharedMemory, vectors: int) -> None:
        self._home = home
        self._shared = memory
        # A lab may hold real QEMU at any time, which dies of what other peers do (Server, "shield").
        self._server = Server(path, memory, vectors, shield_qemu=True)
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

    def close(self) -> None:
        """Disconnect everybody and remove the socket; the name is free again. May be repeated."""
        if not self._home.closed:
            self._home.loop.call(self.end(), finish=True)

    def __repr__(self) -> str:
        size = format_size(self.size_bytes)
        return f"<LabServer {self.name}: {size} shared, {self.vectors} vectors per peer, socket {self.path}>"

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


class Console:
    """What a guest has written to its serial port."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def text(self) -> str:
        """Return everything so far; the last 256 KiB are kept."""
        return self._vm.console_text

    def __repr__(self) -> str:
        return self._vm.console_text or f"<console of {self._vm.name}: nothing yet>"


class LabVm:
    """A virtual machine of a lab; made by `Lab.vm`.

    Attributes
    ----------
    name : str
    servers : tuple of LabServer
        The servers it is connected to, one ivshmem-doorbell device for each.
    console : Console
        What the guest writes to its serial port.
    """

    def __init__(self, home: Home, vm: Vm, servers: Sequence[LabServer]) -> None:
        self._home = home
        self._vm = vm
        self._peer_ids: list[int] = []
        self._begun = False
        self.name = vm.name
        self.servers = tuple(servers)
        self.console = Console(vm)

    @property
    def emulator(self) -> str:
        """``"unicorn"`` or ``"qemu"``."""
        return self._vm.emulator.kind

    @property
    def state(self) -> VmState:
        """Where it is in its life; compares equal to its text, such as ``"running"``."""
        return self._vm.state

    @property
    def reason(self) -> str:
        """Why it is stopped or failed, in a few words."""
        return self._vm.reason

    @property
    def pid(self) -> int | None:
        """Process id, while there is a process."""
        return self._vm.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line it was started with."""
        return self._vm.argv

    @property
    def exit_status(self) -> int | None:
        """Exit status of the process; a guest's debug exit with value V gives ``(V << 1) | 1``."""
        return self._vm.exit_status

    @property
    def peer_id(self) -> int | list[int]:
        """Its peer id (IVPosition), or a list in the order of `servers` when there are several.

        Raises
        ------
        LabError
            It has none: not started yet, or not connected.
        """
        if not self.servers:
            raise LabError(f"{self.name} is not connected to a server, so it has no peer id")
        if not self._peer_ids:
            raise LabError(f"{self.name} has no peer id before it is started; call lab.start() or {self.name}.start()")
        return self._peer_ids[0] if len(self._peer_ids) == 1 else list(self._peer_ids)

    def start(self) -> None:
        """Start the process and let the guest run. Nothing happens when it runs already.

        Raises
        ------
        VmStartError
            It could not be started; nothing is left of it, and its name is free again.
        """
        self._home.require_open(f"{self.name}.start()")
        self._home.loop.call(self.begin(run=True))

    def close(self) -> None:
        """End the machine; the name is free again. May be repeated."""
        if not self._home.closed:
            self._home.loop.call(self.end(), finish=True)

    def wait_text(self, text: str, timeout_s: float = COMMAND_TIME_LIMIT_S) -> str:
        """Wait until the guest has written a text to its serial port; return all it has written so far.

        Raises
        ------
        VmTimeoutError
            It did not in time.
        VmError
            It ended without.
        """
        self._home.require_open(f"{self.name}.wait_text()")
        return self._home.loop.call(self._vm.wait_text(text, timeout_s))

    def wait_end(self, timeout_s: float = COMMAND_TIME_LIMIT_S) -> bool:
        """Wait until the process has ended; tell whether it has."""
        self._home.require_open(f"{self.name}.wait_end()")
        return self._home.loop.call(self._vm.wait_end(timeout_s))

    def execute(self, command: str, /, *, timeout_s: float = COMMAND_TIME_LIMIT_S, **arguments: Any) -> Any:
        """Execute a QMP command and return its answer; see `Vm.execute`.

        Raises
        ------
        QmpCommandError
            The machine refused it.
        VmError
            There is no machine, or no answer in time.
        """
        self._home.require_open(f"{self.name}.execute({command!r})")
        return self._home.loop.call(self._vm.execute(command, timeout_s=timeout_s, **arguments))

    def __repr__(self) -> str:
        parts = [f"{self._vm.emulator}, {self.state}"]
        if self.reason:
            parts.append(self.reason)
        for server, peer_id in zip(self.servers, self._peer_ids, strict=False):
            parts.append(f"peer {peer_id} of {server.name}")
        return f"<LabVm {self.name}: {', '.join(parts)}>"

    async def begin(self, *, run: bool) -> None:
        """Launch what is defined, let run what has not run yet; on the lab's loop."""
        try:
            if self._vm.state is VmState.DEFINED:
                await self._vm.launch()
                self._peer_ids = self._find_peer_ids()
            if run and not self._begun and self._vm.state is VmState.PAUSED:
                await self._vm.cont()
                self._begun = True
        except BaseException as error:  # also when we are cancelled: nothing is to be left
            await self.end()
            if isinstance(error, VmError) and not isinstance(error, VmStartError):
                raise VmStartError(f"{self.name} ended while it was being started: {error}") from error
            raise

    async def end(self) -> None:
        """Close; on the lab's loop."""
        try:
            await self._vm.close()
        finally:
            self._home.forget(self.name, self)

    def rows(self) -> list[Row]:
        """Return its lines of the table: one for each connection, one when there is none."""
        state = f"{self.state}: {self.reason}" if self.reason else str(self.state)
        if not self.servers:
            return [Row(self.name, f"{self.emulator} VM", state)]
        ids = [str(peer_id) for peer_id in self._peer_ids] or ["-"] * len(self.servers)
        return [
            Row(
                self.name,
                f"{self.emulator} VM",
                state,
                peer_id,
                str(server.vectors),
                format_size(server.size_bytes),
                server.name,
            )
            for server, peer_id in zip(self.servers, ids, strict=True)
        ]

    def identities(self) -> set[tuple[str, int]]:
        """Return (server name, peer id) of each connection."""
        return {(server.name, peer_id) for server, peer_id in zip(self.servers, self._peer_ids, strict=False)}

    def _find_peer_ids(self) -> list[int]:
        """Match the servers' peers with the process: each device joined its server before QMP answered."""
        left = {server.name: server.ids_of(self._vm.pid) for server in self.servers}
        try:
            return [left[server.name].pop(0) for server in self.servers]
        except IndexError:
            raise VmStartError(
                f"{self.name} ({self._vm.emulator}) runs, but did not join every server it was connected to; "
                f"its peer ids: { ({server.name: server.ids_of(self._vm.pid) for server in self.servers}) }"
            ) from None
