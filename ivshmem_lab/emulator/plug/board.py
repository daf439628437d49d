"""The board around devices on a user's engine: PCI behind ports or an ECAM window, flat devices, interrupt messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...device.effects import RingDoorbell
from ...errors import DeviceError
from ...pc import lapic
from ...pc.board import Board, Mapping
from ...pc.bus import PAGE_BYTES, Range, ones
from .messages import MessagePage

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...device.flat import FlatEffects, FlatIvshmem, FlatProperties
    from ...pc.board import Link
    from ...pc.bus import Read, Write
    from ..enginecpu import EngineCpu

ECAM_BYTES = 1 << 20
"""Bus 0: 32 slots of 8 functions of 4096 bytes (PCI Express 5.0, 7.2.2)."""


class PlugBoard(Board):
    """A board on an engine that has memory and ports of its user.

    Parameters
    ----------
    cpu
        The engine.
    on_message
        Gets (address, data) of every interrupt message, and (0, number) of a flat device's pulses; None has them
        delivered.
    has_lapic
        Interrupts of an x86 are delivered.
    """

    def __init__(self, cpu: EngineCpu, on_message: Callable[[int, int], None] | None, *, has_lapic: bool) -> None:
        self.engine_cpu = cpu
        self.on_message = on_message
        self.port_in: Read | None = None
        self.port_out: Write | None = None
        self.page: MessagePage | None = None
        self.told = 0
        """Messages that were handed to the user."""
        self.in_users_handler = False
        self._has_lapic = has_lapic
        self._flat: dict[FlatIvshmem, tuple[Mapping, Range, Link, int]] = {}
        super().__init__(cpu, has_lapic=has_lapic)

    def _has_memory(self, start: int, end: int) -> bool:
        foreign = (
            (first, last + 1)
            for first, last, _ in self.engine_cpu.user_uc.mem_regions()
            if not self.engine_cpu.is_ours(first)
        )
        return super()._has_memory(start, end) or any(start < last and first < end for first, last in foreign)

    # -- interrupts ----------------------------------------------------------------------------------

    def pending(self) -> int | None:
        """Return the number of an interrupt that waits for the CPU."""
        if self._has_lapic:
            return self.lapic.pending()
        return self.page.pending() if self.page is not None else None

    def acknowledge(self, number: int) -> None:
        """Note that the CPU has taken it."""
        if self._has_lapic:
            self.lapic.acknowledge(number)

    def add_page(self, address: int) -> None:
        """Show the message page, if it is not there yet."""
        if self.page is not None:
            return
        page = MessagePage(address, self.engine_cpu.stop_soon)
        if address % PAGE_BYTES or self._overlaps(address, address + PAGE_BYTES):
            raise DeviceError(f"the message page cannot lie at {address:#x}; give message_page= a free page's address")
        self._add_mmio(page.range())
        self.page = page

    def message(self, address: int, data: int) -> None:
        """Hand a message to the user, or to the interrupt controller that we show."""
        if self.on_message is not None:
            self.told += 1
            self.on_message(address, data)
        elif self.page is not None and address == self.page.address:
            if not self.page.message(data):
                self.guest_error("interrupt message for nobody", f"id {data:#x} is above 1022")
        elif self._has_lapic or not lapic.BASE <= address < lapic.MESSAGE_END:
            super().message(address, data)
        else:
            self.guest_error("interrupt message for nobody", f"address {address:#x}, data {data:#x}")

    # -- ports ---------------------------------------------------------------------------------------

    def read_port(self, port: int, size: int) -> int:
        """Carry out IN: ours, else the user's."""
        if self.port_in is None or self.ports.answers(port):
            return super().read_port(port, size)
        self.in_users_handler = True
        try:
            return self.port_in(port, size)
        finally:
            self.in_users_handler = False

    def write_port(self, port: int, size: int, value: int) -> None:
        """Carry out OUT: ours, else the user's."""
        if self.port_out is None or self.ports.answers(port):
            super().write_port(port, size, value)
            return
        self.in_users_handler = True
        try:
            self.port_out(port, size, value)
        finally:
            self.in_users_handler = False

    # -- the ECAM window -----------------------------------------------------------------------------

    def add_ecam(self, address: int) -> None:
        """Show the configuration spaces of bus 0 at an address.

        Raises
        ------
        DeviceError
            When it is not aligned, or something else is there.
        """
        if address % ECAM_BYTES:
            raise DeviceError(f"ecam={address:#x} is no multiple of 1 MiB (PCI Express 5.0, 7.2.2)")
        if self._overlaps(address, address + ECAM_BYTES):
            raise DeviceError(f"the engine has memory at ecam={address:#x}, where the 1 MiB window belongs")
        self.mmio.add(Range(address, ECAM_BYTES, self._read_ecam, self._write_ecam))
        self.engine_cpu.map_mmio(address, ECAM_BYTES)

    def _read_ecam(self, offset: int, size: int) -> int:
        function = self.pci.at(offset >> 15, offset >> 12 & 7)
        return ones(size) if function is None else function.read_config(offset & 0xFFF, size)

    def _write_ecam(self, offset: int, size: int, value: int) -> None:
        function = self.pci.at(offset >> 15, offset >> 12 & 7)
        if function is not None:
            self.act(function, function.write_config(offset & 0xFFF, size, value))

    # -- flat devices --------------------------------------------------------------------------------

    def plug_flat(self, device: FlatIvshmem, link: Link, where: FlatProperties, irq: int) -> None:
        """Show a flat device at its addresses.

        Parameters
        ----------
        device, link
            The device, and the world behind it.
        where
            Its addresses.
        irq
            The number of its interrupt: an x86's vector, an id of the message page.

        Raises
        ------
        DeviceError
            When something else is there.
        """
        memory = Mapping(where.x_bus_address_shmem, device.memory_bytes, link.memory)
        registers = Range(
            where.x_bus_address_iomem,
            16,
            device.read,
            lambda offset, size, value: self._act_flat(device, device.write(offset, size, value)),
        )
        taken = any(registers.start < other.end and other.start < registers.end for _, other, *_ in self._flat.values())
        if taken or not self._add_mmio(registers):
            raise DeviceError(f"something lies at x-bus-address-iomem={registers.start:#x} already")
        if not self.add_memory(memory):
            self._remove_registers(registers)
            raise DeviceError(f"something lies at x-bus-address-shmem={memory.address:#x} to {memory.end:#x} already")
        self._flat[device] = (memory, registers, link, irq)

    def unplug_flat(self, device: FlatIvshmem) -> None:
        """Hide a flat device."""
        memory, registers, *_ = self._flat.pop(device)
        self._memory.remove(memory)
        self.engine_cpu.unmap(memory.address, memory.size)
        self._remove_registers(registers)

    def _remove_registers(self, registers: Range) -> None:
        for address in self.mmio.remove(registers):
            self.engine_cpu.unmap(address, PAGE_BYTES)

    def flat_event(self, device: FlatIvshmem, vector: int) -> None:
        """Take an event on one of a flat device's vectors."""
        self._act_flat(device, device.interrupt(vector))

    def _act_flat(self, device: FlatIvshmem, effects: FlatEffects) -> None:
        _, _, link, irq = self._flat[device]
        for effect in effects:
            if isinstance(effect, RingDoorbell):
                link.ring(effect.peer_id, effect.vector)
            elif self.on_message is not None or not self._has_lapic:
                self.message(self.page.address if self.page else 0, irq)
            else:
                self.message(lapic.BASE, irq)
