"""The message page: a tiny interrupt controller for guests whose architecture has none in the engine.

One page of registers, four bytes each. A device's MSI-X table entry holds the page's address and, as data, the
interrupt's id (0 to 1022); a driver that takes the interrupt line's exception reads CLAIM to learn which one it was.
It stands for what GICv2m and GICC_IAR do on an Arm, and what the PLIC's claim register does on a RISC-V.

======  ========  ========================================================================================
offset  register  meaning
======  ========  ========================================================================================
0x00    SEND      W: the id becomes pending, and the line is high. What MSI-X writes; a guest may, too
0x04    CLAIM     R: the lowest pending id, which is pending no more; 1023 when there is none
0x08    COUNT     R: how many ids are pending
======  ========  ========================================================================================

The line is high while anything is pending: a handler that claims nothing is entered again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...pc.bus import PAGE_BYTES, Range

if TYPE_CHECKING:
    from collections.abc import Callable

SEND, CLAIM, COUNT = 0x00, 0x04, 0x08
NONE = 1023


class MessagePage:
    """The page, without an engine.

    Parameters
    ----------
    address
        Where it lies; a multiple of 4096.
    on_send
        Called when an id has become pending.
    """

    def __init__(self, address: int, on_send: Callable[[], None]) -> None:
        self.address = address
        self._on_send = on_send
        self.requested = 0
        """Pending ids as bits."""

    def range(self) -> Range:
        """Return it as a range of registers."""
        return Range(self.address, PAGE_BYTES, self.read, self.write)

    def message(self, data: int) -> bool:
        """Take an interrupt message; tells whether its data is an id."""
        if not 0 <= data < NONE:
            return False
        self.requested |= 1 << data
        self._on_send()
        return True

    def pending(self) -> int | None:
        """Return the lowest pending id."""
        return (self.requested & -self.requested).bit_length() - 1 if self.requested else None

    def acknowledge(self, number: int) -> None:
        """Do nothing when the CPU enters its handler: the id stays pending until CLAIM is read."""

    def read(self, offset: int, size: int) -> int:
        """Read a register; other widths than 4 read 0."""
        if size != 4 or offset not in (CLAIM, COUNT):
            return 0
        if offset == COUNT:
            return self.requested.bit_count()
        number = self.pending()
        if number is None:
            return NONE
        self.requested &= ~(1 << number)
        return number

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        if offset == SEND and size == 4:
            self.message(value)
