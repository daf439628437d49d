"""The ports by which a guest learns of PCI hot-plug and lets a device go.

Ref: QEMU ``docs/specs/acpi_pci_hotplug.txt`` (ports 0xae00 on ``-machine pc``, 0xcc0 on ``q35``; 32-bit accesses).
Several buses share the ports; the guest selects one by number. Numbers go to the buses that can be plugged into, and on
each to the bridge that came last first (measured on QEMU 7.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = 0xAE00
BASE_Q35 = 0x0CC0
BUSES = 256
SIZE = 0x18
UP, DOWN, EJECT, REMOVABLE, BUS_SELECT, INDEX = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14


class AcpiHotplug:
    """Slots that came, slots that are asked to go.

    Parameters
    ----------
    eject
        Called with a bus number and a slot when the guest lets its device go.
    removable
        Tells which slots of a bus can be emptied, as a bit mask.
    """

    def __init__(self, eject: Callable[[int, int], None], removable: Callable[[int], int]) -> None:
        self._eject = eject
        self._removable = removable
        self._up = 0
        self._down = 0
        self._bus = 0

    # Bit 32 * bus + slot of `_up` and `_down` belongs to a slot of a bus.

    def came(self, slot: int, bus: int = 0) -> None:
        """Tell the guest of a new device."""
        self._up |= 1 << 32 * bus + slot
        self._down &= ~(1 << 32 * bus + slot)

    def asked_to_go(self, slot: int, bus: int = 0) -> None:
        """Ask the guest to eject a device."""
        self._down |= 1 << 32 * bus + slot

    def waiting(self) -> list[tuple[int, int]]:
        """Return the slots that the guest was asked to eject and has not: (bus number, slot)."""
        return [divmod(bit, 32) for bit in range(self._down.bit_length()) if self._down >> bit & 1]

    def reset(self) -> None:
        """Forget all news; the machine carries out what was pending (QEMU 7.2)."""
        self._up = self._down = self._bus = 0

    def snapshot(self) -> dict[str, int]:
        """Return the state as plain values."""
        return {"up": self._up, "down": self._down, "bus": self._bus}

    def restore(self, state: dict[str, int]) -> None:
        """Take over what `snapshot` returned."""
        self._up, self._down, self._bus = (state[name] & 0xFFFFFFFF for name in ("up", "down", "bus"))

    def read(self, offset: int, size: int) -> int:
        """Carry out IN. The up bits are cleared by being read."""
        if size != 4:
            return 0
        if self._bus >= BUSES:
            return 0
        if offset == BUS_SELECT:
            return self._bus
        first = 32 * self._bus
        if offset == UP:
            up = self._up >> first & 0xFFFFFFFF
            self._up &= ~(up << first)
            return up
        if offset == DOWN:
            return self._down >> first & 0xFFFFFFFF
        return self._removable(self._bus) if offset == REMOVABLE else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry out OUT. Of several eject bits only the lowest counts."""
        if size != 4:
            return
        if offset == BUS_SELECT:
            self._bus = value
        elif offset == EJECT and value and self._bus < BUSES:
            slot = (value & -value).bit_length() - 1
            self._up &= ~(1 << 32 * self._bus + slot)
            self._down &= ~(1 << 32 * self._bus + slot)
            if self._removable(self._bus) >> slot & 1:
                self._eject(self._bus, slot)
