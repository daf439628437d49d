"""What firmware does before a kernel runs: give every BAR an address and switch decoding on.

A PC's firmware (QEMU's SeaBIOS) leaves the devices so; our machine has no firmware image and does it here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..device.pci import COMMAND, COMMAND_IO, COMMAND_MEMORY, COMMAND_SERR, INTERRUPT_LINE, Bar
from .bridges import PciBridge

if TYPE_CHECKING:
    from ..device.pci import PciFunction
    from .board import Board
    from .hostbridge import PciBus

WINDOW_START = 0xC0000000
WINDOW_END = 0xFEC00000
"""Where a PC has PCI memory below 4 GiB: above RAM, below the I/O APIC."""
HIGH_START = 1 << 32
IO_START, IO_END = 0xC000, 0x10000
PM_INTERRUPT_LINE = 9
WINDOW_BYTES = 16 << 20
"""What every bridge forwards, at least."""


class Allocator:
    """Hands out addresses of PCI memory, from the top of the window down, and above 4 GiB what does not fit."""

    def __init__(self, window_start: int = WINDOW_START, window_end: int = WINDOW_END) -> None:
        self._start = window_start
        self._top = window_end
        self._high = HIGH_START
        self._io = IO_START

    def address(self, bar: Bar) -> int | None:
        """Return an aligned address for a BAR, or None when there is no room for it."""
        if bar.is_io:
            address = -(-self._io // bar.size_bytes) * bar.size_bytes
            if address + bar.size_bytes > IO_END:
                return None
            self._io = address + bar.size_bytes
            return address
        address = self._top - bar.size_bytes & -bar.size_bytes
        if address >= self._start:
            self._top = address
            return address
        if not bar.is_64bit:
            return None
        address = -(-self._high // bar.size_bytes) * bar.size_bytes
        self._high = address + bar.size_bytes
        return address


def assign_all(board: Board, allocator: Allocator) -> None:
    """Give the buses numbers, open the bridges' windows, and give every BAR of the machine its address."""
    _assign_bus(board, board.pci, allocator, 1)


def _assign_bus(board: Board, bus: PciBus, allocator: Allocator, number: int) -> int:
    """Do one bus and those behind it; returns the next bus number."""
    assign(board, [function for _, _, function in bus if not isinstance(function, PciBridge)], allocator)
    for _, _, bridge in bus:
        if not isinstance(bridge, PciBridge):
            continue
        window = Bar(0, _window_bytes(bridge.bus))
        first = allocator.address(window)
        if first is None:
            board.guest_error("no room for a bridge's window", f"{bridge.name}, {window.size_bytes} bytes")
            continue
        assign(board, [bridge], allocator)
        behind = first + window.size_bytes
        following = _assign_bus(board, bridge.bus, Allocator(first, behind), number + 1)
        board.act(bridge, bridge.open_window(first, behind, range(number, following)))
        number = following
    return number


def _window_bytes(bus: PciBus) -> int:
    """Return the size of a bridge's window: twice what is there, for alignment and for what is plugged later."""
    wanted = sum(2 * bar.size_bytes for function in bus.walk() for bar in function.bars.values())
    return max(WINDOW_BYTES, 1 << (wanted - 1).bit_length() if wanted else 0)


def assign(board: Board, functions: list[PciFunction], allocator: Allocator) -> None:
    """Program the BARs of some functions and enable them, largest first.

    Parameters
    ----------
    board
        Carries out the mapping.
    functions
        Which ones.
    allocator
        Hands out the addresses.
    """
    wanted = sorted(
        ((bar, function) for function in functions for bar in function.bars.values()),
        key=lambda item: -item[0].size_bytes,
    )
    for bar, function in wanted:
        address = allocator.address(bar)
        if address is None:
            board.guest_error("no room for a BAR", f"{function.name} BAR {bar.index}, {bar.size_bytes} bytes")
            continue
        board.act(function, function.write_config(bar.offset, 4, address & 0xFFFFFFFF))
        if bar.is_64bit:
            board.act(function, function.write_config(bar.offset + 4, 4, address >> 32))
    for function in functions:
        board.act(function, function.write_config(COMMAND, 2, COMMAND_IO | COMMAND_MEMORY | COMMAND_SERR))
        if function.read_config(INTERRUPT_LINE + 1, 1):
            board.act(function, function.write_config(INTERRUPT_LINE, 1, PM_INTERRUPT_LINE))
