"""Our PC: a board with memory, the i440FX chipset's functions, a serial port, debug exit and hot-plug ports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..device.ivshmem import Ivshmem
from ..device.pci import COMMAND, COMMAND_IO, COMMAND_MEMORY
from ..errors import DeviceError
from . import acpi_hotplug, firmware, fw_cfg, multiboot, q35, uart
from .board import Board, Link, Mapping
from .bus import Range
from .hostbridge import PciBus, chipset
from .irq_inputs import IrqInputs
from .pic import Pic
from .piix import Piix3

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..device.pci import PciFunction
    from .bridges import PciBridge
    from .cpu import Cpu

LATCH_PORTS = (0x80,)
IDLE = b"\xfa\xf4\xeb\xfd"
IDLE_ADDRESS = 0x7C00
"""Without a kernel the CPU rests here: ``cli; hlt; jmp`` back to the hlt."""


@dataclass(slots=True)
class Hooks:
    """Whom the machine tells."""

    transmit: Callable[[int], None] = lambda byte: None
    """A byte left the serial port."""
    transmitter_ready: Callable[[], bool] = lambda: True
    """Tells whether the serial port's other end takes more."""
    receiver_ready: Callable[[], None] = lambda: None
    """The guest has read what was typed, and more was refused before."""
    debug_exit: Callable[[int], None] = lambda status: None
    """The guest ended the machine, with this exit status (1, 3, 5, …)."""
    device_deleted: Callable[[str, Ivshmem], None] = lambda device_id, device: None
    """The guest let a device go."""


@dataclass(slots=True)
class _Latch:
    """Ports that only remember what was written: the POST port."""

    value: int = 0xFF

    def read(self, offset: int, size: int) -> int:
        del offset, size
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        del offset, size
        self.value = value & 0xFF


@dataclass(slots=True)
class Peripheral:
    """A device that a user plugged."""

    device: Ivshmem
    slot: int
    bus: PciBus
    hotplugged: bool = False


class Machine(Board):
    """The whole PC.

    Parameters
    ----------
    cpu
        The CPU.
    ram
        Guest memory, a writable buffer of whole MiB.
    kernel
        What to start, or None to rest.
    hooks
        Whom to tell.
    is_q35
        Has the Q35 chipset instead of the i440FX; bus 0 takes no hot-plug then, buses behind bridges do.
    """

    def __init__(
        self,
        cpu: Cpu,
        ram: memoryview,
        kernel: multiboot.Kernel | None = None,
        hooks: Hooks | None = None,
        *,
        is_q35: bool = False,
    ) -> None:
        super().__init__(cpu, bus_name="pcie.0" if is_q35 else "pci.0")
        self._root_takes_hotplug = not is_q35
        self.ram = ram
        self.kernel = kernel
        self.hooks = hooks or Hooks()
        self.peripherals: dict[str, Peripheral] = {}
        """Plugged devices by id."""
        self.debug_exit_ports: tuple[int, ...] = ()
        """First port and number of ports of ``isa-debug-exit``."""
        self.uart = uart.Uart(self.hooks.transmit, self.hooks.transmitter_ready, self.hooks.receiver_ready)
        self.hotplug = acpi_hotplug.AcpiHotplug(self._ejected, self._removable)
        self.buses: dict[str, PciBus] = {self.pci.name: self.pci}
        """Buses by name."""
        self.bridges: dict[str, PciBridge] = {}
        """Bridges by id."""
        self.irq_inputs = IrqInputs()
        self.pic = Pic(self.lapic.set_external)
        self.lapic.external = self.pic
        self.piix = None if is_q35 else Piix3(self._set_irq)
        for slot, number, function in chipset(self.piix) if self.piix else q35.chipset():
            self.pci.plug(function, slot, number)
        for ports in self.pic.ranges():
            self.ports.add(ports)
        self.ports.add(Range(uart.COM1, uart.PORTS, self.uart.read, self.uart.write))
        base = acpi_hotplug.BASE_Q35 if is_q35 else acpi_hotplug.BASE
        self.ports.add(Range(base, acpi_hotplug.SIZE, self.hotplug.read, self.hotplug.write))
        self.fw_cfg = fw_cfg.FwCfg(len(ram))
        self.ports.add(Range(fw_cfg.PORT, fw_cfg.PORTS, self.fw_cfg.read, self.fw_cfg.write))
        self._latches = [_Latch() for _ in LATCH_PORTS]
        for port, latch in zip(LATCH_PORTS, self._latches, strict=True):
            self.ports.add(Range(port, 1, latch.read, latch.write))
        self.add_memory(Mapping(0, len(ram), ram))

    def add_debug_exit(self, port: int, ports: int) -> None:
        """Add QEMU's ``isa-debug-exit``: writing v ends the machine with status ``v << 1 | 1``."""
        if any(self.ports.answers(port + index) for index in range(ports)):
            raise DeviceError(f"isa-debug-exit: port {port:#x} is in use; choose another iobase, such as 0xf4")
        self.debug_exit_ports = (port, ports)
        self.ports.add(
            Range(
                port,
                ports,
                lambda offset, size: 0,
                lambda offset, size, value: self.hooks.debug_exit((value << 1 | 1) & 0xFF),
            )
        )

    # -- INTx ----------------------------------------------------------------------------------------

    def _set_irq(self, irq: int, level: bool) -> None:
        # A line of the 8259 pair is a pin of the I/O APIC, too.
        self.pic.set_irq(irq, level)
        self.irq_inputs.set(irq, level)

    def set_intx(self, function: PciFunction, level: bool) -> None:
        """Drive a function's INTA: through the PIIX3's routing to the interrupt controller (bus 0 of a ``pc``)."""
        slot = next((slot for slot, _, other in self.pci if other is function), None)
        if slot is not None and self.piix is not None:
            self.piix.set_intx(slot, level)

    def unplug(self, slot: int, bus: PciBus | None = None) -> PciFunction:
        """Take the device out of a slot; BARs and interrupt pin go with it."""
        if self.piix is not None and bus in {None, self.pci}:
            self.piix.set_intx(slot, False)
        return super().unplug(slot, bus)

    # -- devices -------------------------------------------------------------------------------------

    def add_device(
        self,
        device_id: str,
        device: Ivshmem,
        link: Link,
        slot: int | None = None,
        *,
        hotplugged: bool,
        bus: PciBus | None = None,
    ) -> int:
        """Plug a device; a hot-plugged one is announced to the guest.

        Returns
        -------
        int
            Its slot.

        Raises
        ------
        DeviceError
            When the id or the slot is in use, or no slot is left. The texts are QEMU's.
        """
        if device_id in self.peripherals:
            raise DeviceError(f"Duplicate device ID '{device_id}'")
        bus = bus or self.pci
        number = self._hotplug_number(bus)
        if hotplugged and number is None:
            raise DeviceError(f"Bus '{bus.name}' does not support hotplugging")
        slot = self._slot_for(device, slot, bus)
        self.plug_ivshmem(device, link, slot, bus)
        self.peripherals[device_id] = Peripheral(device, slot, bus, hotplugged)
        if hotplugged:
            assert number is not None
            self.hotplug.came(slot, number)
            # A new device decodes; only a reset switches that off (QEMU 7.2).
            self.act(device, device.write_config(COMMAND, 2, COMMAND_IO | COMMAND_MEMORY))
        return slot

    def add_bridge(self, bridge_id: str, bridge: PciBridge, slot: int | None, bus: PciBus) -> None:
        """Plug a bridge, before the machine starts; its bus has the bridge's id as name.

        Raises
        ------
        DeviceError
            When the slot is in use, or no slot is left.
        """
        bus.plug_bridge(bridge, bridge.bus, self._slot_for(bridge, slot, bus))
        self.bridges[bridge_id] = bridge
        self.buses[bridge_id] = bridge.bus

    def _slot_for(self, function: PciFunction, slot: int | None, bus: PciBus) -> int:
        if slot is None:
            slot = bus.free_slot()
            if slot is None:
                raise DeviceError(f"PCI: no slot/function available for {function.name}, all in use or reserved")
        elif (holder := bus.at(slot)) is not None:
            raise DeviceError(
                f"PCI: slot {slot} function 0 not available for {function.name}, in use by {holder.name},id={self._id_of(holder)}"
            )
        return slot

    def _id_of(self, function: PciFunction) -> str:
        functions: dict[PciFunction, str] = {plugged.device: name for name, plugged in self.peripherals.items()}
        functions |= {bridge: name for name, bridge in self.bridges.items()}
        return functions.get(function, "(null)")

    def _hotplug_buses(self) -> list[PciBus]:
        """Return the buses that can be plugged into, by their number on the hot-plug ports."""

        def behind(bus: PciBus) -> list[PciBus]:
            return [found for child in reversed(bus.children) for found in (child, *behind(child))]

        return [*([self.pci] if self._root_takes_hotplug else []), *behind(self.pci)]

    def takes_hotplug(self, bus: PciBus) -> bool:
        """Tell whether devices come and go on a bus while the machine runs."""
        return self._hotplug_number(bus) is not None

    def _hotplug_number(self, bus: PciBus) -> int | None:
        buses = self._hotplug_buses()
        return buses.index(bus) if bus in buses else None

    def _hotplug_bus(self, number: int) -> PciBus | None:
        buses = self._hotplug_buses()
        return buses[number] if number < len(buses) else None

    def ask_to_go(self, device_id: str) -> None:
        """Ask the guest to let a device go; it is gone when the guest ejects it.

        Raises
        ------
        DeviceError
            When there is no such device.
        """
        if device_id in self.bridges:
            raise DeviceError(f"'{device_id}' is a bridge; bridges stay as long as the machine")
        if device_id not in self.peripherals:
            raise DeviceError(f"Device '{device_id}' not found")
        plugged = self.peripherals[device_id]
        number = self._hotplug_number(plugged.bus)
        if number is None:
            raise DeviceError(f"Bus '{plugged.bus.name}' does not support hotplugging")
        self.hotplug.asked_to_go(plugged.slot, number)

    def _removable(self, number: int) -> int:
        # QEMU 7.2 lets every slot go, occupied or not, but those of the chipset and of bridges.
        bus = self._hotplug_bus(number)
        fixed = 0
        for slot, _, function in bus or ():
            if not isinstance(function, Ivshmem):
                fixed |= 1 << slot
        return 0xFFFFFFFF & ~fixed

    def _ejected(self, number: int, slot: int) -> None:
        bus = self._hotplug_bus(number)
        for device_id, plugged in list(self.peripherals.items()):
            if plugged.slot == slot and plugged.bus is bus:
                self.unplug(slot, bus)
                del self.peripherals[device_id]
                self.hooks.device_deleted(device_id, plugged.device)

    def snapshot(self) -> dict[str, Any]:
        """Return everything but memory as plain values."""
        parts = {name: part.snapshot() for name, part in self._parts().items()}
        return {**parts, "latches": [latch.value for latch in self._latches]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned, on a machine with the same devices and its memory filled."""
        for name, part in self._parts().items():
            part.restore(state[name])
        for latch, value in zip(self._latches, state["latches"], strict=True):
            latch.value = value & 0xFF

    def _parts(self) -> dict[str, Any]:
        return {
            "lapic": self.lapic,
            "uart": self.uart,
            "hotplug": self.hotplug,
            "pci": self.pci,
            "pic": self.pic,
        }

    # -- power ---------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset everything but memory; devices that were asked to go are gone (QEMU 7.2)."""
        for number, slot in self.hotplug.waiting():
            self._ejected(number, slot)
        super().reset()
        self.pic.reset()
        self.uart.reset()
        self.fw_cfg.reset()
        self.hotplug.reset()

    def start(self) -> multiboot.Start:
        """Do the firmware's work and load the kernel.

        Returns
        -------
        Start
            Where and how the CPU begins.
        """
        firmware.assign_all(self, firmware.Allocator(max(firmware.WINDOW_START, len(self.ram))))
        if self.piix is not None:
            behind = [plugged for plugged in self.peripherals.values() if plugged.bus is self.pci]
            self.piix.set_up({plugged.slot: plugged.device for plugged in behind})
        self.pic.set_up()
        if self.kernel is None:
            self.ram[IDLE_ADDRESS : IDLE_ADDRESS + len(IDLE)] = IDLE
            return multiboot.Start(IDLE_ADDRESS, 0, 0)
        return multiboot.load(self.kernel, self.ram)
