"""The input pins of the I/O APIC, as wires: who drives them, and who listens.

Ref: QEMU 7.2 has one I/O APIC of 24 pins, the object ``ioapic``, whose pins a qtest client can watch and drive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PINS = 24


class IrqInputs:
    """The 24 interrupt lines, to those who listen: a line's level counts from when somebody began to."""

    def __init__(self) -> None:
        self._levels = 0
        self._listener: Callable[[int, bool], None] | None = None

    def listen(self, listener: Callable[[int, bool], None] | None) -> None:
        """Have the pin and its new level told whenever one changes; None ends that."""
        if self._listener is None or listener is None:
            self._levels = 0
        self._listener = listener

    def set(self, pin: int, level: bool) -> None:
        """Drive a line."""
        if self._listener is None or bool(self._levels >> pin & 1) == level:
            return
        self._levels ^= 1 << pin
        self._listener(pin, level)
