"""Buses, interrupt controller and PCI slots wired together: what an ivshmem device needs around it.

The board carries out the effects of devices. It is what ``ivshmem_lab.plug`` puts around a user's own
CPU, and the inner half of our PC (`ivshmem_lab.pc.machine`).
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..device.effects import Effects, MapBar, RingDoorbell, SendMsi, SetIntx
from ..device.ivshmem import MEMORY_BAR, MSIX_BAR, Ivshmem
from ..device.pci import INTERRUPT_LINE
from ..errors import DeviceError
from . import lapic
from .bridges import PciBridge
from .bus import PAGE_BYTES, MmioBus, PortBus, Range, Read
from .hostbridge import PciBus, RootBus

if TYPE_CHECKING:
    from ..device.pci import PciFunction
    from .cpu import Cpu

log = logging.getLogger("ivshmem_lab.guest")


class Link(Protocol):
    """The world behind one ivshmem device: its memory, and the peers' eventfds."""

    @property
    def memory(self) -> object:
        """The shared memory, a writable buffer."""

    def ring(self, peer_id: int, vector: int) -> None:
        """Interrupt a vector of a peer."""


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """Memory that the CPU sees at an address."""

    address: int
    size: int
    memory: object

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        return memoryview(self.memory).cast("B")  # type: ignore[arg-type]


class Board:
    """Ports, memory-mapped registers, one local APIC, PCI bus 0.

    Parameters
    ----------
    cpu
        The CPU whose physical memory is arranged.
    has_lapic
        False leaves interrupt messages to whoever overrides `message`.
    bus_name
        Name of bus 0.
    """

    def __init__(self, cpu: Cpu, *, has_lapic: bool = True, bus_name: str = "pci.0") -> None:
        self.cpu = cpu
        self.lapic = lapic.Lapic()
        self.ports = PortBus()
        self.mmio = MmioBus()
        self.pci = RootBus(self.act, bus_name)
        self.ports.add(self.pci.ports())
        self.guest_errors: Counter[str] = Counter()
        """What the guest did that a PC answers with silence, by kind."""
        self._memory: list[Mapping] = []
        self._in_message = False
        self._links: dict[PciFunction, Link] = {}
        self._buses: dict[PciFunction, PciBus] = {}
        """Where a function behind a bridge is."""
        self._bars: dict[tuple[PciFunction, int], Mapping | Range] = {}
        self._covered: dict[tuple[PciFunction, int], MapBar] = {}
        """BARs that lie over other memory, and appear when that goes."""
        if has_lapic and not self._add_mmio(Range(lapic.BASE, lapic.SIZE, self.lapic.read, self.lapic.write)):
            raise DeviceError(f"there is memory at {lapic.BASE:#x}, where the local APIC belongs")

    # -- the CPU's accesses --------------------------------------------------------------------------

    def read_mmio(self, address: int, size: int) -> int:
        """Read registers, or zero where nobody answers (QEMU 7.2; a real bus gives ones)."""
        mmio = self.mmio.find(address)
        if mmio is None:
            self.guest_error("unanswered memory access", f"read of {size} bytes at {address:#x}")
            return 0
        return mmio.read(address - mmio.start, size)

    def write_mmio(self, address: int, size: int, value: int) -> None:
        """Write registers; lost where nobody answers."""
        mmio = self.mmio.find(address)
        if mmio is None:
            self.guest_error("unanswered memory access", f"write of {size} bytes at {address:#x}")
        else:
            mmio.write(address - mmio.start, size, value)

    def read_port(self, port: int, size: int) -> int:
        """Carry out IN."""
        if not self.ports.answers(port):
            self.guest_error("unanswered port", f"read of {size} bytes at port {port:#x}")
        return self.ports.read(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        """Carry out OUT."""
        if not self.ports.answers(port):
            self.guest_error("unanswered port", f"write of {size} bytes at port {port:#x}")
        self.ports.write(port, size, value)

    def guest_error(self, kind: str, detail: str) -> None:
        """Count what a guest should not do; the first of each kind is logged."""
        self.guest_errors[kind] += 1
        if self.guest_errors[kind] == 1:
            log.warning("guest: %s (%s); further ones are counted, not logged", kind, detail)

    # -- devices -------------------------------------------------------------------------------------

    def plug_ivshmem(self, device: Ivshmem, link: Link, slot: int, bus: PciBus | None = None) -> None:
        """Put an ivshmem device into a slot (of bus 0, or another), with the world behind it.

        Raises
        ------
        DeviceError
            When the slot is in use or does not exist.
        """
        bus = bus or self.pci
        bus.plug(device, slot)
        self._links[device] = link
        self._buses[device] = bus

    def unplug(self, slot: int, bus: PciBus | None = None) -> PciFunction:
        """Take the device out of a slot; its BARs disappear."""
        function = (bus or self.pci).unplug(slot)
        for bar in list(function.mapped):
            self._hide(function, bar)
        self._links.pop(function, None)
        self._buses.pop(function, None)
        return function

    def event(self, device: Ivshmem, vector: int) -> None:
        """Take an event on one of a device's vectors."""
        self.act(device, device.interrupt(vector))

    def act(self, function: PciFunction, effects: Effects) -> None:
        """Carry out what a device asks for, in order."""
        for effect in effects:
            if isinstance(effect, RingDoorbell):
                self._links[function].ring(effect.peer_id, effect.vector)
            elif isinstance(effect, SendMsi):
                self.message(effect.address, effect.data)
            elif isinstance(effect, SetIntx):
                self.set_intx(function, effect.level)
            elif effect.address is None:
                self._hide(function, effect.bar)
            else:
                self._show(function, effect)
        if isinstance(function, PciBridge):
            self._pass_through(function)

    def set_intx(self, function: PciFunction, level: bool) -> None:
        """Drive a function's interrupt pin; a board without an interrupt controller for it leaves it alone."""
        del function, level

    def message(self, address: int, data: int) -> None:
        """Deliver an interrupt message: to the local APIC, or as the plain store that it is elsewhere."""
        if lapic.BASE <= address < lapic.MESSAGE_END:
            if not self.lapic.message(address, data):
                self.guest_error("interrupt message for nobody", f"address {address:#x}, data {data:#x}")
            return
        mapping = self.memory_at(address)
        if mapping is not None and address <= mapping.end - 4:
            offset = address - mapping.address
            mapping.view[offset : offset + 4] = data.to_bytes(4, "little")
            return
        mmio = self.mmio.find(address)
        # A message that a register sends on writing to it by message is one too many: no endless chains.
        if mmio is not None and not self._in_message:
            self._in_message = True
            try:
                mmio.write(address - mmio.start, 4, data)
            finally:
                self._in_message = False
            return
        self.guest_error("interrupt message for nobody", f"address {address:#x}, data {data:#x}")

    # -- address map ---------------------------------------------------------------------------------

    def add_memory(self, mapping: Mapping) -> bool:
        """Show memory to the CPU; False when something else is there already."""
        if self._overlaps(mapping.address, mapping.end):
            return False
        self._memory.append(mapping)
        self.cpu.map_memory(mapping.address, mapping.memory, mapping.size)
        return True

    def memory_at(self, address: int) -> Mapping | None:
        """Return the memory at an address."""
        return next((mapping for mapping in self._memory if mapping.address <= address < mapping.end), None)

    def _overlaps(self, start: int, end: int) -> bool:
        return self._has_memory(start, end) or self.mmio.any_between(start, end)

    def _has_memory(self, start: int, end: int) -> bool:
        """Tell whether there is memory somewhere in ``start <= address < end``."""
        return any(start < other.end and other.address < end for other in self._memory)

    def _add_mmio(self, mmio: Range) -> bool:
        first, last = mmio.start & -PAGE_BYTES, -(-mmio.end // PAGE_BYTES) * PAGE_BYTES
        if self._has_memory(first, last):
            return False
        for address in self.mmio.add(mmio):
            self.cpu.map_mmio_page(address)
        return True

    def _show(self, function: PciFunction, effect: MapBar) -> None:
        if self._place(function, effect):
            return
        self._covered[function, effect.bar] = effect
        if effect.address is None or self._reaches(function, effect.address, effect.bar):
            self.guest_error(
                "BAR over other memory", f"{function.name} BAR {effect.bar} at {effect.address:#x} stays hidden"
            )

    def _place(self, function: PciFunction, effect: MapBar) -> bool:
        """Put a BAR where it belongs; False when something else is there."""
        bar, address = function.bars[effect.bar], effect.address
        if bar.is_io or address is None:
            return True
        if not self._reaches(function, address, effect.bar):
            return False
        shown: Mapping | Range
        if effect.bar == MEMORY_BAR and function in self._links:
            shown = Mapping(address, bar.size_bytes, self._links[function].memory)
            placed = self.add_memory(shown)
        else:
            shown = Range(
                address,
                bar.size_bytes,
                self._reader(function, effect.bar),
                lambda offset, size, value: self.act(function, function.write_bar(effect.bar, offset, size, value)),
                8 if effect.bar == MSIX_BAR else 4,
            )
            placed = self._add_mmio(shown)
        if placed:
            self._bars[function, effect.bar] = shown
        return placed

    def _reaches(self, function: PciFunction, address: int, bar: int) -> bool:
        bus = self._buses.get(function)
        return bus is None or bus.reaches(address, function.bars[bar].size_bytes)

    def _pass_through(self, bridge: PciBridge) -> None:
        """Show and hide the BARs behind a bridge whose windows may have changed."""
        if bridge.takes_reset():
            for function in bridge.bus.walk():
                self.act(function, function.reset())
        for function in bridge.bus.walk():
            for index, address in list(function.mapped.items()):
                shown = (function, index) in self._bars
                if shown != self._reaches(function, address, index):
                    self._hide(function, index)
                    if not self._place(function, effect := MapBar(index, address)):
                        self._covered[function, index] = effect

    def _reader(self, function: PciFunction, bar: int) -> Read:
        """Return what reads a BAR; only functions with an interrupt pin can have news after a read."""

        def read(offset: int, size: int) -> int:
            value = function.read_bar(bar, offset, size)
            self.act(function, function.after_read())
            return value

        if function.read_config(INTERRUPT_LINE + 1, 1):
            return read
        return lambda offset, size: function.read_bar(bar, offset, size)

    def _hide(self, function: PciFunction, bar: int) -> None:
        self._covered.pop((function, bar), None)
        shown = self._bars.pop((function, bar), None)
        if shown is None:
            return
        if isinstance(shown, Mapping):
            self._memory.remove(shown)
            self.cpu.unmap(shown.address, shown.size)
        else:
            for address in self.mmio.remove(shown):
                self.cpu.unmap(address, PAGE_BYTES)
        for key, effect in list(self._covered.items()):
            if self._place(key[0], effect):
                del self._covered[key]

    def bar_is_visible(self, function: PciFunction, bar: int) -> bool:
        """Tell whether the CPU sees a BAR now."""
        return (function, bar) in self._bars

    def reset(self) -> None:
        """Reset every PCI function and the local APIC."""
        self.pci.reset()
        self.lapic.reset()
