"""One emulated machine as a process has it: machine, vCPU thread, memory backends, character devices, plugged devices.

The event loop owns the tables here; the machine itself is touched on the vCPU's thread only.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from ..device.ivshmem import Ivshmem
from ..device.msix import MAX_VECTORS
from ..errors import DeviceError, VmError
from ..keyval import parse_switch
from ..pc.bridges import BRIDGES
from ..pc.machine import Hooks, Machine
from ..units import check_memory_size
from .backends import MemoryBackend, anonymous_memory, find_memdev, open_backend
from .bridges import add_bridge, find_bus
from .chardev import Chardev, SerialLine, open_chardev
from .cpu import UnicornCpu
from .kernel import read_kernel
from .legacy import LegacyDevices, quirks, server_chardev
from .link import MemoryLink, ServerLink, shake_hands
from .migration.manager import Migration
from .properties import check_identifier, check_names, given, named, number, slot_number
from .qmp import DEVICE_NOT_FOUND, QmpError
from .runner import Runner, RunState

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from ..pc.hostbridge import PciBus
    from .options import Options

log = logging.getLogger("ivshmem_lab.emulator")

T = TypeVar("T")
UNPLUG_PATIENCE_S = 5.0
"""For so long a second ``device_del`` is refused (QEMU 7.2, i440FX)."""


class Emulator:
    """The machine and everything that is plugged into it.

    Parameters
    ----------
    options
        The command line.
    emit
        Called on the event loop with the name and data of a QMP event.

    Attributes
    ----------
    ended : asyncio.Future
        Gets the process's exit status.
    """

    def __init__(self, options: Options, emit: Callable[[str, dict[str, Any] | None], None]) -> None:
        self.options = options
        self.emit = emit
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self.loop.create_future()
        self.backends: dict[str, MemoryBackend] = {}
        self.chardevs: dict[str, Chardev] = {}
        self.properties: dict[str, dict[str, str]] = {}
        """``device_add``'s arguments of every plugged device, by id."""
        self.links: dict[str, MemoryLink | ServerLink] = {}
        """What lies behind every plugged device, by id."""
        self._patience: dict[str, float] = {}
        """Until when a device that was asked to go is waited for, by id."""
        self._started = False
        self._anonymous = 0
        self._serial: SerialLine | None = None
        kernel = read_kernel(options)
        self.cpu = UnicornCpu(native_hook=options.native_hook)
        self.runner = Runner(
            self.cpu,
            self._guest_reset,
            self._broken,
            boots_late=options.qtest is not None,
            has_guest=not options.driven and options.machine != "none",
        )
        hooks = Hooks(
            transmit=lambda byte: self._serial.write(byte) if self._serial else None,
            transmitter_ready=lambda: self._serial.ready() if self._serial else True,
            receiver_ready=lambda: self._serial.input_wanted() if self._serial else None,
            debug_exit=self._debug_exit,
            device_deleted=self._device_deleted,
        )
        self._ram = anonymous_memory(options.memory_bytes)
        self.machine = Machine(self.cpu, memoryview(self._ram), kernel, hooks, is_q35=options.machine == "q35")
        self.cpu.attach(self.machine, whole_machine=True)
        self.migration = Migration(self)
        self.legacy = LegacyDevices(self)

    async def start(self) -> None:
        """Open everything that the command line names, and start the vCPU's thread."""
        options = self.options
        for properties in options.chardevs:
            with named("-chardev", properties):
                await self.chardev_add(properties)
        if options.serial not in (None, "none"):
            assert options.serial is not None
            self._serial = SerialLine(self.claim_chardev(options.serial, "-serial"), self._typed)
        for properties in options.objects:
            with named("-object", properties):
                self.object_add(properties)
        for properties in options.devices:
            with named("-device", properties):
                await self.device_add(properties)
        self._started = True
        self.runner.start(self.machine, incoming=options.incoming is not None)
        if options.incoming is not None:
            with given("-incoming", options.incoming):
                await self.migration.listen(options.incoming)
        elif not options.paused:
            await self.on_vcpu(self.runner.resume)

    async def close(self) -> None:
        """End the vCPU's thread and give everything back."""
        await self.migration.close()
        await self.legacy.close()
        self.runner.end()
        if self._serial is not None:
            await self._serial.drain()
            self._serial.close()
        for link in self.links.values():
            if isinstance(link, ServerLink):
                link.close()
        self.runner.close()
        self.legacy.release()
        for backend in self.backends.values():
            backend.close()
        for chardev in self.chardevs.values():
            chardev.close()

    async def on_vcpu(self, function: Callable[[], T]) -> T:
        """Do something on the vCPU's thread (directly, before that has begun)."""
        if not self._started:
            return function()
        return await asyncio.wrap_future(self.runner.call(function))

    # -- character devices and memory backends -------------------------------------------------------

    async def chardev_add(self, properties: dict[str, str]) -> None:
        """Open a character device; one that shall wait for its client is waited for."""
        device_id = properties.get("id", "")
        if device_id in self.chardevs:
            raise QmpError(f"Chardev with id '{device_id}' already exists")
        if properties.get("backend") == "stdio" and any(other.backend == "stdio" for other in self.chardevs.values()):
            raise QmpError(f"Failed to add chardev '{device_id}': cannot use stdio by multiple character devices")
        chardev = open_chardev(properties)
        self.chardevs[device_id] = chardev
        if chardev.wait:
            assert chardev.sock is not None
            log.warning("waiting for a connection on %s", chardev.path)
            accepted, _ = await self.loop.sock_accept(chardev.sock)
            chardev.accepted(accepted)

    def chardev_remove(self, device_id: str) -> None:
        """Close a character device that nothing uses."""
        chardev = self.chardevs.get(device_id)
        if chardev is None:
            raise QmpError(f"Chardev '{device_id}' not found")
        if chardev.used_by is not None:
            raise QmpError(f"Chardev '{device_id}' is busy")
        del self.chardevs[device_id]
        chardev.close()

    def claim_chardev(self, device_id: str, user: str) -> Chardev:
        """Find a free character device and mark who uses it."""
        chardev = self.chardevs.get(device_id)
        if chardev is None:
            raise VmError(f"{user}: chardev {device_id!r} not found; there are: {', '.join(self.chardevs) or 'none'}")
        if chardev.used_by is not None:
            raise VmError(f"{user}: chardev {device_id!r} is in use by {chardev.used_by}")
        chardev.used_by = user
        return chardev

    def object_add(self, properties: dict[str, str]) -> None:
        """Make a memory backend."""
        object_id = properties.get("id", "")
        if object_id:
            check_identifier(object_id)
        if object_id in self.backends:
            raise QmpError(f"attempt to add duplicate property '{object_id}' to object (type 'container')")
        backend = open_backend(properties)
        self.backends[backend.object_id] = backend

    def object_del(self, object_id: str) -> None:
        """Remove a memory backend that no device uses."""
        backend = self.backends.get(object_id)
        if backend is None:
            raise QmpError(f"object '{object_id}' not found")
        if backend.used_by is not None:
            raise QmpError(f"object '{object_id}' is in use, can not be deleted")
        del self.backends[object_id]
        backend.close()

    # -- devices -------------------------------------------------------------------------------------

    async def device_add(self, properties: dict[str, str]) -> None:
        """Plug a device, into a running machine too.

        Raises
        ------
        QmpError
            When a property is missing, unknown or wrong; the texts are QEMU's where it has some.
        IvshmemLabError
            When the server or the memory behind it cannot be used.
        """
        pairs = dict(properties)
        driver = pairs.pop("driver", None)
        if driver is None:
            raise QmpError("Parameter 'driver' is missing")
        device_id = self._new_id(pairs.pop("id", None))
        check_names(driver, pairs, has_buses=self.options.machine != "none")
        if driver == "isa-debug-exit":
            await self._add_debug_exit(pairs)
            return
        slot = slot_number(driver, pairs.pop("addr", None))
        bus = find_bus(self.machine, pairs.pop("bus", None))
        if driver in BRIDGES:
            add_bridge(self.machine, device_id, driver, pairs, slot, bus, started=self._started)
            self.properties[device_id] = dict(properties)
            return
        master = pairs.pop("master", "off")
        if master not in ("on", "off", "auto"):
            raise QmpError(f"Parameter 'master' does not accept value '{master}'")
        if driver == "ivshmem":
            await self.legacy.add(device_id, pairs, (slot, bus))
        elif driver == "ivshmem-plain":
            backend = find_memdev(self.backends, pairs.pop("memdev", None))
            self.migration.check_migratable(master, 0)
            device = Ivshmem(check_memory_size(backend.size_bytes, f"memdev {backend.object_id}"))
            backend.used_by = device_id
            try:
                await self.plug(device_id, device, MemoryLink(backend.map), slot, bus)
            except BaseException:
                backend.used_by = None
                raise
        else:
            await self._add_doorbell(device_id, pairs, slot, bus, master)
        self.properties[device_id] = dict(properties)

    def _new_id(self, device_id: str | None) -> str:
        if device_id is None:
            self._anonymous += 1
            return f"device[{self._anonymous - 1}]"
        check_identifier(device_id)
        if device_id in self.properties:
            raise QmpError(f"Duplicate device ID '{device_id}'")
        return device_id

    async def _add_doorbell(
        self, device_id: str, pairs: dict[str, str], slot: int | None, bus: PciBus, master: str
    ) -> None:
        driver = "ivshmem-doorbell"
        name = pairs.pop("chardev", None)
        if name is None:
            raise QmpError("You must specify a 'chardev'")
        vectors = number(pairs.pop("vectors", "1"), "vectors")
        ioeventfd = parse_switch(pairs.pop("ioeventfd", "on"), "ioeventfd")
        if not 1 <= vectors <= MAX_VECTORS:
            raise QmpError(
                f"Failed to initialize interrupts: The number of MSI-X vectors is invalid (1 to {MAX_VECTORS})"
            )
        chardev, sock = server_chardev(self.chardevs, driver, name)
        shown = quirks(pairs, driver)
        chardev.used_by = device_id
        link = ServerLink(sock, vectors)
        try:
            await shake_hands(link, sock)
            if master == "on" and link.peer_id:
                raise QmpError("master must connect to the server before any peers")
            self.migration.check_migratable(master, link.peer_id)
            device = Ivshmem(
                link.memory_bytes, vectors=vectors, peer_id=link.peer_id, ioeventfd=ioeventfd, quirks=shown
            )
            await self.plug(device_id, device, link, slot, bus)
        except BaseException:
            link.close()
            chardev.used_by = None
            raise

    async def plug(
        self, device_id: str, device: Ivshmem, link: MemoryLink | ServerLink, slot: int | None, bus: PciBus
    ) -> None:
        """Put a device with the world behind it into the machine."""

        def plug() -> None:
            self.machine.add_device(device_id, device, link, slot, hotplugged=self._started, bus=bus)
            if isinstance(link, ServerLink) and device.attached:
                link.attach(device, self.runner.events, lambda vector: self.machine.event(device, vector))

        try:
            await self.on_vcpu(plug)
        except DeviceError as error:
            raise QmpError(str(error)) from error
        self.links[device_id] = link

    async def _add_debug_exit(self, pairs: dict[str, str]) -> None:
        port = number(pairs.pop("iobase", "0x501"), "iobase")
        ports = number(pairs.pop("iosize", "0x02"), "iosize")
        if self._started:
            raise QmpError("Bus 'isa.0' does not support hotplugging")
        if not 0 < port <= 0x10000 - ports or not 0 < ports <= 4:
            raise QmpError(
                f"isa-debug-exit: iobase {port:#x} with {ports} ports does not exist; try iobase=0xf4,iosize=0x04"
            )
        self.machine.add_debug_exit(port, ports)

    async def device_del(self, device_id: str) -> None:
        """Ask the guest to let a device go."""
        name = device_id.removeprefix("/machine/peripheral/")
        if name not in self.properties:
            raise QmpError(f"Device '{device_id}' not found", DEVICE_NOT_FOUND)
        if self.loop.time() < self._patience.get(name, 0):
            raise QmpError(f"Device {device_id} is already in the process of unplug")
        self._patience[name] = self.loop.time() + UNPLUG_PATIENCE_S
        await self.on_vcpu(lambda: self.machine.ask_to_go(name))

    def _device_deleted(self, device_id: str, device: Ivshmem) -> None:
        """Take the news on the vCPU's thread: the guest has ejected a device."""
        link = self.links.pop(device_id)
        # The board may still have the memory mapped until the guest reaches its next block.
        self.runner.events.post(lambda: self._gone(device_id, link))

    def _gone(self, device_id: str, link: MemoryLink | ServerLink) -> None:
        if isinstance(link, ServerLink) and link.ready:
            link.close()
        self.loop.call_soon_threadsafe(self._release, device_id)

    def _release(self, device_id: str) -> None:
        self.legacy.release(device_id)
        self.properties.pop(device_id, None)
        self._patience.pop(device_id, None)
        holders: list[MemoryBackend | Chardev] = [*self.backends.values(), *self.chardevs.values()]
        for holder in holders:
            if holder.used_by == device_id:
                holder.used_by = None
        path = f"/machine/peripheral/{device_id}"
        named = {} if "[" in device_id else {"device": device_id}
        self.emit("DEVICE_DELETED", {**named, "path": path})

    # -- what happens on the vCPU's thread ------------------------------------------------------------

    def _typed(self, data: bytes, taken: Callable[[int], None]) -> None:
        """Give typed bytes to the serial port; tells on the event loop how many it took."""

        def tell(future: Future[int]) -> None:
            if not future.cancelled() and future.exception() is None:
                self.loop.call_soon_threadsafe(taken, future.result())

        self.runner.call(lambda: self.machine.uart.receive(data)).add_done_callback(tell)

    def _debug_exit(self, status: int) -> None:
        self.runner.pause()
        self.cpu.stop_soon()
        self._end(status)

    def _end(self, status: int) -> None:
        self.loop.call_soon_threadsafe(self.end, status)

    def end(self, status: int) -> None:
        """Let the process end with this status (on the event loop)."""
        if not self.ended.done():
            self.ended.set_result(status)

    def _guest_reset(self) -> None:
        if self.options.reboot:
            self.runner.reset()
            self.emit_later("RESET", {"guest": True, "reason": "guest-reset"})
        else:
            self.runner.pause()
            self.emit_later("SHUTDOWN", {"guest": True, "reason": "guest-reset"})
            self._end(0)

    def _broken(self, reason: str) -> None:
        self.emit_later("STOP", None)
        if not self.options.monitors:
            # Nobody could look at it: end instead of hanging.
            self._end(1)

    def emit_later(self, name: str, data: dict[str, Any] | None) -> None:
        """Tell an event from the vCPU's thread."""
        self.loop.call_soon_threadsafe(self.emit, name, data)

    @property
    def state(self) -> RunState:
        """The run state."""
        return self.runner.state
