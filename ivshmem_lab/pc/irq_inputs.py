"""The input pins of the I/O APIC, as wires: who drives them, and who listens.

Ref: QEMU 7.2 has one I/O APIC of 24 pins, the object ``ioapic``, whose pins a qtest client can watch and drive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PINS = 24


class IrqInputs:
    """The levels of 24 interrupt lines.

    Attributes
    ----------
    listener
        Called with the pin and its new level whenever one changes.
    """

    def __init__(self) -> None:
        self._levels = 0
        self.listener: Callable[[int, bool], None] | None = None

    def set(self, pin: int, level: bool) -> None:
        """Drive a line."""
        if bool(self._levels >> pin & 1) == level:
            return
        self._levels ^= 1 << pin
        if self.listener is not None:
            self.listener(pin, level)
