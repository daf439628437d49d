"""A virtual machine of a lab as the user sees it, from any thread."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from ..errors import LabError, VmError, VmStartError
from ..units import format_size
from ..vm.device import DeviceState
from ..vm.hotplug import Hotplug
from ..vm.state import VmState
from ..vm.vm import COMMAND_TIME_LIMIT_S
from .home import Row
from .plugged import LabDevice, make_backing
from .servers import LabServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..vm.backing import Backing
    from ..vm.device import Step
    from ..vm.events import QmpEvent
    from ..vm.vm import Vm
    from .home import Home
    from .plugged import Source


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
        self._hotplug: Hotplug | None = None
        self._devices: list[LabDevice] = []
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

    @property
    def devices(self) -> list[LabDevice]:
        """The devices that were plugged in while it ran and are there still."""
        return [device for device in self._devices if device.state is not DeviceState.ABSENT]

    @property
    def guards(self) -> int:
        """Descriptors kept occupied in real QEMU since doorbell devices were unplugged (docs/hotplug.md)."""
        return 0 if self._hotplug is None else self._hotplug.guards.count

    @property
    def events(self) -> list[QmpEvent]:
        """What the machine told over QMP, oldest first; the last 1000 are kept."""
        return list(self._vm.events)

    def plug(
        self,
        source: Source,
        *,
        vectors: int | None = None,
        device_id: str | None = None,
        bus: str | int | None = None,
        timeout_s: float = COMMAND_TIME_LIMIT_S,
        on_step: Callable[[Step], None] | None = None,
        **properties: Any,
    ) -> LabDevice:
        """Plug a device into the running machine; the guest notices it afterwards (`LabDevice.wait_seen`).

        Parameters
        ----------
        source
            A server of the lab, or the path of any ivshmem server's socket: an ``ivshmem-doorbell``.
            A memory of the lab: an ``ivshmem-plain``.
        vectors
            MSI-X vectors of a doorbell device; None for as many as the server gives.
        device_id
            Its id in the machine; None for ``"hot0"``, ``"hot1"``, …
        bus
            A root port's name (q35) or a slot number (pc); None for the first that is free.
        timeout_s
            For each QMP command, in seconds.
        on_step
            Called with every `Step` as it is done, on the lab's thread.
        **properties
            More properties of ``device_add``, such as ``master="on"``.

        Raises
        ------
        UsageError
            A value is not allowed, or taken.
        QmpCommandError
            The machine refused, in its own words; nothing is left of the device.
        VmError
            There is no machine that runs, it has no free place, or gives no answer.
        LabError, PeerError
            The server cannot be joined.
        """
        self._home.require_open(f"{self.name}.plug()")
        backing = make_backing(self._home, source, vectors)
        # Half a device could not be taken back: Ctrl-C waits.
        return self._home.loop.call(
            self._plug(source, backing, device_id, bus, properties, timeout_s, on_step), finish=True
        )

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

    async def _plug(
        self,
        source: Source,
        backing: Backing,
        device_id: str | None,
        bus: str | int | None,
        properties: dict[str, Any],
        timeout_s: float,
        on_step: Callable[[Step], None] | None,
    ) -> LabDevice:
        if self._hotplug is None:
            self._hotplug = Hotplug(self._vm)
        if device_id is None:
            taken = {device.device_id for device in self.devices}
            device_id = next(name for number in itertools.count() if (name := f"hot{number}") not in taken)
        before = set(source.ids_of(self._vm.pid)) if isinstance(source, LabServer) else set()
        device = await self._hotplug.plug(
            device_id, backing, bus=bus, properties=properties, timeout_s=timeout_s, on_step=on_step
        )
        ids = (
            [each for each in source.ids_of(self._vm.pid) if each not in before]
            if isinstance(source, LabServer)
            else []
        )
        plugged = LabDevice(self._home, self.name, device, source, ids[-1] if ids else None)
        self._devices = [*self.devices, plugged]
        return plugged

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
