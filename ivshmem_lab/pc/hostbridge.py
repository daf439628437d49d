"""PCI buses, bus 0 behind configuration mechanism 1, and the functions of the i440FX/PIIX3 chipset.

Ref: PCI 3.0, section 3.2.2.3.2 (ports 0xCF8 and 0xCFC). The chipset's identities and
read-only bytes are those that QEMU 7.2 ``-machine pc`` shows at reset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..device.effects import Effects
from ..device.pci import Bar, PciFunction
from ..errors import DeviceError
from .bus import Range, ones
from .piix import Piix3

CONFIG_ADDRESS = 0xCF8
RESET_CONTROL = 1
SLOTS = 32
ENABLE = 0x80000000
INTEL = 0x8086

Act = Callable[[PciFunction, Effects], None]


class Bridge(Protocol):
    """What a bus asks of the bridge before it."""

    @property
    def numbers(self) -> range:
        """The bus numbers behind the bridge, by its registers."""

    def forwards(self, address: int, size_bytes: int) -> bool:
        """Tell whether memory accesses to these addresses reach the bus behind."""


class PciBus:
    """The 32 slots of a bus.

    Parameters
    ----------
    name
        What ``bus=`` calls it.
    bridge
        The bridge before it; None for bus 0.
    """

    def __init__(self, name: str, bridge: Bridge | None = None) -> None:
        self.name = name
        self.bridge = bridge
        self.parent: PciBus | None = None
        self.children: list[PciBus] = []
        """Buses behind bridges on this one, in the order in which they came."""
        self._functions: dict[tuple[int, int], PciFunction] = {}

    def plug(self, function: PciFunction, slot: int, number: int = 0) -> None:
        """Put a function into a slot.

        Raises
        ------
        DeviceError
            When the slot does not exist or is in use.
        """
        if not 0 <= slot < SLOTS:
            raise DeviceError(f"slot {slot} does not exist: a PCI bus has slots 0 to {SLOTS - 1}")
        if (slot, number) in self._functions:
            raise DeviceError(f"slot {slot} function {number} is in use by {self._functions[slot, number].name}")
        self._functions[slot, number] = function

    def plug_bridge(self, bridge: PciFunction, behind: PciBus, slot: int) -> None:
        """Put a bridge into a slot, with the bus behind it."""
        self.plug(bridge, slot)
        self.children.append(behind)
        behind.parent = self

    def walk(self) -> Iterator[PciFunction]:
        """Yield every function here and on the buses behind, near ones first."""
        for _, _, function in self:
            yield function
        for child in self.children:
            yield from child.walk()

    def numbered(self, number: int) -> PciBus | None:
        """Find a bus behind this one by the number that software gave it."""
        for child in self.children:
            assert child.bridge is not None
            numbers = child.bridge.numbers
            if number and number in numbers:
                return child if number == numbers.start else child.numbered(number)
        return None

    def reaches(self, address: int, size_bytes: int) -> bool:
        """Tell whether memory accesses get here through all bridges."""
        bus: PciBus | None = self
        while bus is not None and bus.bridge is not None:
            if not bus.bridge.forwards(address, size_bytes):
                return False
            bus = bus.parent
        return True

    def unplug(self, slot: int, number: int = 0) -> PciFunction:
        """Take a function out of its slot."""
        return self._functions.pop((slot, number))

    def free_slot(self) -> int | None:
        """Return the lowest slot without a function 0, or None when the bus is full."""
        return next((slot for slot in range(SLOTS) if (slot, 0) not in self._functions), None)

    def __iter__(self) -> Iterator[tuple[int, int, PciFunction]]:
        """Yield (slot, function number, function), in bus order."""
        for (slot, number), function in sorted(self._functions.items(), key=lambda item: item[0]):
            yield slot, number, function

    def at(self, slot: int, number: int = 0) -> PciFunction | None:
        """Return the function in a slot, if there is one."""
        return self._functions.get((slot, number))


class RootBus(PciBus):
    """Bus 0 and the two ports that reach it and all buses behind.

    Parameters
    ----------
    act
        Called with a function and the effects of a configuration write.
    name
        Its name.
    """

    def __init__(self, act: Act, name: str = "pci.0") -> None:
        super().__init__(name)
        self._act = act
        self._address = 0

    def snapshot(self) -> dict[str, Any]:
        """Return the state of the bus and all functions as plain values."""
        functions = {f"{slot:x}.{number}": function.snapshot() for slot, number, function in self}
        return {"address": self._address, "functions": functions}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned, on a bus with the same functions."""
        self._address = state["address"] & 0xFFFFFFFF
        for slot, number, function in self:
            self._act(function, function.restore(state["functions"][f"{slot:x}.{number}"]))

    # -- the ports -----------------------------------------------------------------------------------

    def ports(self) -> Range:
        """Return 0xCF8 to 0xCFF as a port range."""
        return Range(CONFIG_ADDRESS, 8, self._read, self._write)

    def _selected(self) -> PciFunction | None:
        if not self._address & ENABLE:
            return None
        number = self._address >> 16 & 0xFF
        bus = self.numbered(number) if number else self
        return None if bus is None else bus.at(self._address >> 11 & 31, self._address >> 8 & 7)

    # The data port's offset is put over the low bits of the address, which hardware would ignore (QEMU 7.2).
    def _read(self, offset: int, size: int) -> int:
        if offset < 4:
            # QEMU 7.2 gives the low bytes wherever a narrow read begins; at 0xCF9 is the reset control register.
            return 0 if offset == RESET_CONTROL and size == 1 else self._address & ones(size)
        function = self._selected()
        if function is None:
            return ones(size)
        return function.read_config(self._address & 0xFF | offset - 4, size)

    def _write(self, offset: int, size: int, value: int) -> None:
        if offset < 4:
            if offset == 0 and size == 4:
                self._address = value
            return
        function = self._selected()
        if function is not None:
            self._act(function, function.write_config(self._address & 0xFF | offset - 4, size, value))

    def reset(self) -> None:
        """Return every function to power-on values."""
        self._address = 0
        for function in self.walk():
            self._act(function, function.reset())


def chipset(isa: Piix3 | None = None) -> list[tuple[int, int, PciFunction]]:
    """Return the functions that every ``-machine pc`` has: (slot, function number, function).

    Parameters
    ----------
    isa
        The ISA bridge whose routing reaches an interrupt controller; None for one that reaches none.
    """
    return [
        (1, 0, isa or Piix3(lambda irq, level: None)),
        (
            0,
            0,
            PciFunction(
                "i440FX",
                vendor=INTEL,
                device=0x1237,
                revision=2,
                class_code=0x0600,
                initial={0x57: b"\x04", 0x72: b"\x02"},
                writable={0x58: b"\xff" * 8, 0x72: b"\x08"},
            ),
        ),
        (
            1,
            1,
            PciFunction(
                "piix3-ide",
                vendor=INTEL,
                device=0x7010,
                class_code=0x0101,
                prog_if=0x80,
                status=0x0280,
                bars=(Bar(4, 16, is_io=True),),
                writable={0x40: b"\xff" * 4},
            ),
        ),
        (
            1,
            3,
            PciFunction(
                "PIIX4_PM",
                vendor=INTEL,
                device=0x7113,
                revision=3,
                class_code=0x0680,
                status=0x0280,
                interrupt_pin=1,
                initial={0x40: b"\x01", 0x5F: b"\x10", 0x63: b"\x60", 0x90: b"\x01"},
                writable={0x40: b"\xc0\xff", 0x80: b"\x01", 0x90: b"\xc0\xff"},
            ),
        ),
    ]
