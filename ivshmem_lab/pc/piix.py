"""The PIIX3's interrupt routing: pins of PCI slots to four wires (PIRQ), wires to lines of the interrupt controller.

Ref: Intel 82371SB (PIIX3), section 2.2.9 (PIRQRC, configuration 0x60 to 0x63: bit 7 off, bits 3..0 the line). Slot
s, pin p (0 for INTA) is on wire ``(s - 1 + p) & 3``, as on QEMU 7.2 ``-machine pc``. Lines that the data sheet
reserves are routed, and a value with a reserved bit routes nothing, as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..device.pci import INTERRUPT_LINE, PciFunction

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..device.effects import Effects

WIRES = 4
ROUTES = 0x60
LINES = 16
FIRMWARE_ROUTES = (10, 10, 11, 11)
"""What SeaBIOS puts into the four registers."""


def wire(slot: int, pin: int = 1) -> int:
    """Return the wire of a slot's pin (1 for INTA)."""
    return slot - 1 + pin - 1 & WIRES - 1


class Piix3(PciFunction):
    """The ISA bridge of a PC, with its interrupt router.

    Parameters
    ----------
    set_irq
        Called with a line of the interrupt controller and its level.
    """

    def __init__(self, set_irq: Callable[[int, bool], None]) -> None:
        self._set_irq = set_irq
        self._raised: set[int] = set()
        """Slots whose INTA is raised."""
        self._levels = 0
        """For each line a bit for each wire that raises it."""
        super().__init__(
            "PIIX3",
            vendor=0x8086,
            device=0x7000,
            class_code=0x0601,
            status=0x0200,
            header_type=0x80,
            initial={0x4C: b"\x4d\x00\x03", ROUTES: b"\x80\x80\x80\x80", 0x69: b"\x02", 0x70: b"\x80"},
            writable={ROUTES: b"\xff\xff\xff\xff"},
        )

    def set_intx(self, slot: int, level: bool) -> None:
        """Drive INTA of a slot; several slots share a wire, several wires a line."""
        if level == (slot in self._raised):
            return
        if level:
            self._raised.add(slot)
        else:
            self._raised.discard(slot)
        self._drive_wire(wire(slot))

    def irq(self, slot: int) -> int | None:
        """Return the line to which INTA of a slot goes, or None."""
        return self._line(wire(slot))

    def _line(self, wire_index: int) -> int | None:
        route = self._config[ROUTES + wire_index]
        return route if route < LINES else None

    def _drive_wire(self, wire_index: int) -> None:
        irq = self._line(wire_index)
        if irq is None:
            return
        bit = 1 << WIRES * irq + wire_index
        raised = any(wire(slot) == wire_index for slot in self._raised)
        self._levels = self._levels | bit if raised else self._levels & ~bit
        self._drive_line(irq)

    def _drive_line(self, irq: int) -> None:
        self._set_irq(irq, bool(self._levels >> WIRES * irq & (1 << WIRES) - 1))

    def _route(self) -> None:
        """Start again: one wire after the other, then all lines (so does QEMU 7.2, and a raised line blinks)."""
        self._levels = 0
        for index in range(WIRES):
            self._drive_wire(index)
        for irq in range(LINES):
            self._drive_line(irq)

    def _config_written(self, offset: int, size: int) -> Effects:
        if offset < ROUTES + WIRES and offset + size > ROUTES:
            self._route()
        return ()

    def restore(self, state: dict[str, object]) -> Effects:
        """Take over what `snapshot` returned; the lines follow."""
        effects = super().restore(state)
        self._route()
        return effects

    def reset(self) -> Effects:
        """Return to power-on: nothing is routed."""
        effects = super().reset()
        self._route()
        return effects

    def set_up(self, functions: dict[int, PciFunction]) -> None:
        """Do what a PC's firmware does: route the wires, and tell each function with a pin its line.

        Parameters
        ----------
        functions
            By slot.
        """
        for index, irq in enumerate(FIRMWARE_ROUTES):
            self.write_config(ROUTES + index, 1, irq)
        for slot, function in functions.items():
            if function.read_config(INTERRUPT_LINE + 1, 1):
                function.write_config(INTERRUPT_LINE, 1, self.irq(slot) or 0)
