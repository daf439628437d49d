"""What can be plugged into a machine of a lab while it runs, and out again."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..vm.command import boot_device_id
from ..vm.device import GUEST_TIME_LIMIT_S, DeviceState
from ..vm.hotplug import Hotplug
from ..vm.vm import COMMAND_TIME_LIMIT_S
from .attached import Attached, BootDevice, choose, link_of
from .plugged import LabDevice, make_backing
from .servers import LabServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..topology.model import Link
    from ..vm.backing import Backing
    from ..vm.device import Step
    from ..vm.vm import Vm
    from .home import Home
    from .plugged import Source


class PluggableVm:
    """The devices of a machine; `LabVm` is one."""

    def __init__(self, home: Home, vm: Vm, servers: Sequence[LabServer]) -> None:
        self._home = home
        self._vm = vm
        self._boot = [BootDevice(boot_device_id(number), server) for number, server in enumerate(servers)]
        self._hotplug: Hotplug | None = None
        self._devices: list[LabDevice] = []
        self.name = vm.name

    @property
    def home(self) -> Home:
        """The lab that it is in."""
        return self._home

    @property
    def servers(self) -> tuple[LabServer, ...]:
        """The servers it was connected to at its start, one ivshmem-doorbell device for each that is there still."""
        return tuple(boot.server for boot in self._boot if not boot.gone)

    @property
    def _peer_ids(self) -> list[int]:
        return [boot.peer_id for boot in self._boot if boot.peer_id is not None and not boot.gone]

    @property
    def devices(self) -> list[LabDevice]:
        """The devices that were plugged in while it ran and are there still."""
        return [device for device in self._devices if device.state is not DeviceState.ABSENT]

    @property
    def attached(self) -> list[Attached]:
        """All its devices, those of its start first; of a machine that has ended, those it had."""
        fixed = self._vm.machine.machine != "pc"
        boots = [boot for boot in self._boot if not boot.gone]
        found = [
            Attached(link_of(boot.server, None, {}), boot.server, boot.device_id, boot.peer_id, boot.device, fixed)
            for boot in boots
        ]
        known = {id(boot.device) for boot in boots}
        return found + [
            Attached(device.link, device.source, device.device_id, device.peer_id, device, fixed=False)
            for device in self._devices
            if not device.gone and id(device) not in known
        ]

    @property
    def guards(self) -> int:
        """Descriptors kept occupied in real QEMU since doorbell devices were unplugged (docs/hotplug.md)."""
        return 0 if self._hotplug is None else self._hotplug.guards.count

    def plug(
        self,
        source: Source,
        *,
        vectors: int | None = None,
        device_id: str | None = None,
        bus: str | int | None = None,
        timeout_s: float = COMMAND_TIME_LIMIT_S,
        on_step: Callable[[Step], None] | None = None,
        backing_id: str | None = None,
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
        backing_id
            From which the ids of its chardev or memory are made; None for a new one. The destination of a migration needs the source's.
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
        link = link_of(source, vectors, properties)
        # Half a device could not be taken back: Ctrl-C waits.
        return self._home.loop.call(
            self._plug(source, backing, link, device_id, bus, properties, timeout_s, on_step, backing_id), finish=True
        )

    def unplug(
        self,
        source: Source,
        *,
        vectors: int | None = None,
        timeout_s: float = GUEST_TIME_LIMIT_S,
        **properties: Any,
    ) -> LabDevice:
        """Unplug the device that shows a server or a memory, also one of the machine's start (on a pc).

        Parameters
        ----------
        source
            What the device shows.
        vectors, **properties
            As it was plugged, where there are several that show it; of equal ones the last goes.
        timeout_s
            How long the guest may take, in seconds.

        Returns
        -------
        LabDevice
            It is absent.

        Raises
        ------
        UsageError
            There is no such device.
        GuestSilentError, VmError
            As `LabDevice.unplug`.
        """
        self._home.require_open(f"{self.name}.unplug()")
        device = self.device(source, vectors=vectors, **properties)
        device.unplug(timeout_s)
        return device

    @property
    def slots(self) -> list[tuple[str, str]]:
        """Its places for devices, such as ``"pci.0 slot 0x04"``, each with the device's id, or empty when it is free.

        Raises
        ------
        VmError
            There is no machine, or no answer in time.
        """
        self._home.require_open(f"{self.name}.slots")
        return self._home.loop.call(self._slots())

    def device(
        self,
        source: Source | None = None,
        *,
        device_id: str | None = None,
        vectors: int | None = None,
        **properties: Any,
    ) -> LabDevice:
        """Return the device that shows a server or a memory, also one of the machine's start; see `unplug`.

        Parameters
        ----------
        source, vectors, **properties
            As `unplug`'s.
        device_id
            Its id in the machine, instead: for one of several that show the same.

        Raises
        ------
        UsageError
            There is no such device.
        VmError
            The machine does not run, or cannot let it go.
        """
        self._home.require_open(f"{self.name}.device()")
        there = self.attached
        if device_id is not None:
            found = next((each for each in there if each.device_id == device_id), None)
        else:
            found = None if source is None else choose(there, source, vectors, properties)
        if found is None:
            shown = ", ".join(f"{each.device_id} ({each.link or each.source})" for each in there) or "none"
            wanted = f"of {source!r}" if device_id is None else f"{device_id!r}"
            raise UsageError(f"{self.name} has no such device {wanted}; its devices: {shown}")
        if found.device is not None:
            return found.device
        boot = next(boot for boot in self._boot if boot.device_id == found.device_id)
        return self._home.loop.call(self._adopt(boot), finish=True)

    async def _plug(
        self,
        source: Source,
        backing: Backing,
        link: Link | None,
        device_id: str | None,
        bus: str | int | None,
        properties: dict[str, Any],
        timeout_s: float,
        on_step: Callable[[Step], None] | None,
        backing_id: str | None,
    ) -> LabDevice:
        hotplug = self._take_hotplug()
        if device_id is None:
            taken = {device.device_id for device in self.devices}
            device_id = next(name for number in itertools.count() if (name := f"hot{number}") not in taken)
        before = set(source.ids_of(self._vm.pid)) if isinstance(source, LabServer) else set()
        device = await hotplug.plug(
            device_id,
            backing,
            bus=bus,
            properties=properties,
            timeout_s=timeout_s,
            on_step=on_step,
            backing_id=backing_id,
        )
        ids = (
            [each for each in source.ids_of(self._vm.pid) if each not in before]
            if isinstance(source, LabServer)
            else []
        )
        plugged = LabDevice(self._home, self.name, device, source, ids[-1] if ids else None, link)
        self._devices = [*self.devices, plugged]
        return plugged

    async def _slots(self) -> list[tuple[str, str]]:
        table = self._take_hotplug().slots.table(await self._vm.execute("query-pci"))
        return [(str(place), device_id) for place, device_id in table]

    async def _adopt(self, boot: BootDevice) -> LabDevice:
        if boot.device is None:
            device = await self._take_hotplug().adopt(boot.device_id, make_backing(self._home, boot.server, None))
            link = link_of(boot.server, None, {})
            boot.device = LabDevice(self._home, self.name, device, boot.server, boot.peer_id, link)
            self._devices = [*self.devices, boot.device]
        return boot.device

    def _take_hotplug(self) -> Hotplug:
        if self._hotplug is None:
            self._hotplug = Hotplug(self._vm)
        return self._hotplug
