"""What a device asks of the world around it, as values.

A device never touches memory, eventfds or interrupt controllers itself. A register write
returns a tuple of these, and the machine carries them out in order.
"""

from __future__ import annotations

from typing import NamedTuple


class RingDoorbell(NamedTuple):
    """Interrupt a vector of a peer: add 1 to its eventfd."""

    peer_id: int
    vector: int


class SendMsi(NamedTuple):
    """Write a message: 32 bits of data to a bus address (PCI 3.0, section 6.8)."""

    address: int
    data: int


class SetIntx(NamedTuple):
    """Raise or lower the function's interrupt pin (PCI 3.0, section 2.2.6)."""

    level: bool


class MapBar(NamedTuple):
    """Show a BAR at an address, or hide it when the address is None."""

    bar: int
    address: int | None


Effect = RingDoorbell | SendMsi | SetIntx | MapBar
Effects = tuple[Effect, ...]
