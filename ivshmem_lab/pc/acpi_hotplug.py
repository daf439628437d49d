"""The ports by which a guest learns of PCI hot-plug and lets a device go.

Ref: QEMU ``docs/specs/acpi_pci_hotplug.txt`` (ports 0xae00, 32-bit accesses).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

BASE = 0xAE00
SIZE = 0x18
UP, DOWN, EJECT, REMOVABLE, BUS_SELECT, INDEX = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14


class AcpiHotplug:
    """Slots that came, slots that are asked to go.

    Parameters
    ----------
    eject
        Called with a slot when the guest lets its device go.
    removable
        Tells which slots can be emptied, as a bit mask.
    """

    def __init__(self, eject: Callable[[int], None], removable: Callable[[], int]) -> None:
        self._eject = eject
        self._removable = removable
        self._up = 0
        self._down = 0
        self._bus = 0

    def came(self, slot: int) -> None:
        """Tell the guest of a new device."""
        self._up |= 1 << slot
        self._down &= ~(1 << slot)

    def asked_to_go(self, slot: int) -> None:
        """Ask the guest to eject a device."""
        self._down |= 1 << slot

    def waiting(self) -> list[int]:
        """Return the slots that the guest was asked to eject and has not."""
        return [slot for slot in range(32) if self._down >> slot & 1]

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
        if self._bus and offset in (UP, DOWN, REMOVABLE):
            return 0
        if offset == UP:
            up, self._up = self._up, 0
            return up
        return {DOWN: self._down, REMOVABLE: self._removable(), BUS_SELECT: self._bus}.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry out OUT. Of several eject bits only the lowest counts."""
        if size != 4:
            return
        if offset == BUS_SELECT:
            self._bus = value
        elif offset == EJECT and value and not self._bus:
            slot = (value & -value).bit_length() - 1
            self._up &= ~(1 << slot)
            self._down &= ~(1 << slot)
            if self._removable() >> slot & 1:
                self._eject(slot)
