"""Plugging devices into a running machine and out again."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, VmError
from .device import LIVE, DeviceState, HotplugDevice, Step
from .guards import WARN_AT, Guards
from .slots import Slots
from .vm import COMMAND_TIME_LIMIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from .backing import Backing
    from .events import QmpEvent
    from .vm import Vm

_log = logging.getLogger(__name__)


class Hotplug:
    """What can be plugged into one machine, and what is.

    Parameters
    ----------
    vm
        The machine.
    """

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.guards = Guards(vm)
        self.slots = Slots(vm.machine)
        self.devices: dict[str, HotplugDevice] = {}
        self._plugs: dict[str, int] = {}
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        vm.events.listen(self._hear)

    async def plug(
        self,
        device_id: str,
        backing: Backing,
        *,
        bus: str | int | None = None,
        properties: dict[str, Any] | None = None,
        timeout_s: float = COMMAND_TIME_LIMIT_S,
        on_step: Callable[[Step], None] | None = None,
        backing_id: str | None = None,
    ) -> HotplugDevice:
        """Plug a device in; it returns when the machine has it, which the guest need not have noticed.

        Parameters
        ----------
        device_id
            A new id.
        backing
            What it shows.
        bus
            A root port's name (q35) or a slot number (pc); None for the first that is free.
        properties
            More properties of ``device_add``.
        timeout_s
            For each QMP command, in seconds.
        on_step
            Called with every step, on the loop's thread.
        backing_id
            From which the ids of its chardev or memory are made; None for one that was not there before: QEMU 7.2 gives a memory up a
            moment after ``object-del``, and aborts when one of the same id comes into the same slot before that ("RAMBlock … already
            registered"). It is part of what a migration compares.

        Raises
        ------
        UsageError
            The id or the place is taken, or the size is not allowed.
        QmpCommandError
            The machine refused; nothing is left of it.
        VmTimeoutError
            The machine does not answer any more.
        VmError
            It is not running, or has no free place.
        """
        async with self._turn:
            if self.vm.state not in LIVE:
                raise VmError(f"{self.vm.name} is {self.vm.state}; start it before plugging devices in")
            if device_id in self.devices:
                raise UsageError(f"{self.vm.name} has a device {device_id!r} already; give another id")
            if backing.has_peers:
                self._look_at_room()
            place = self.slots.take(await self.vm.execute("query-pci"), bus)
            backing_id = backing_id or self._fresh(device_id)
            device = HotplugDevice(self.vm, device_id, backing, place, self.guards, self.left, backing_id)
            device.on_step = on_step
            self.devices[device_id] = device
            try:
                await device.plug(properties or {}, timeout_s)
            except BaseException:
                if device.state is not DeviceState.FAILED:
                    self.left(device)
                raise
            return device

    async def adopt(self, device_id: str, backing: Backing) -> HotplugDevice:
        """Take a device that the machine was started with into care, so that it can be unplugged like the others.

        Raises
        ------
        VmError
            The machine is not running, has no such device, or has it where nothing can be unplugged: on the first
            bus of a q35 (QEMU 7.2: "Bus 'pcie.0' does not support hotplugging").
        """
        async with self._turn:
            if device_id not in self.devices:
                place = self.slots.find(await self.vm.execute("query-pci"), device_id)
                device = HotplugDevice(self.vm, device_id, backing, place, self.guards, self.left)
                device.adopt()
                self.devices[device_id] = device
            return self.devices[device_id]

    def _fresh(self, device_id: str) -> str:
        self._plugs[device_id] = number = self._plugs.get(device_id, 0) + 1
        return device_id if number == 1 else f"{device_id}-{number}"

    def left(self, device: HotplugDevice) -> None:
        """Forget a device that is gone; its place is free."""
        if self.devices.get(device.device_id) is device:
            del self.devices[device.device_id]
            self.slots.free(device.place)

    def _hear(self, event: QmpEvent) -> None:
        if event.name == "DEVICE_DELETED" and (device := self.devices.get(str(event.data.get("device", "")))):
            task = asyncio.get_running_loop().create_task(device.deleted(event))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _look_at_room(self) -> None:
        used, limit = self.guards.room()
        if self.guards.count and limit and used >= WARN_AT * limit:
            _log.warning(
                "%s has %d of at most %d files open, %d of them guards of unplugged devices; restart it before it runs out",
                self.vm.name,
                used,
                limit,
                self.guards.count,
            )
