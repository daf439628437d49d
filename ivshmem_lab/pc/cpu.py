"""What the machine asks of a CPU, and nothing more: any emulator that can do this can be the CPU."""

from __future__ import annotations

from typing import Protocol


class Cpu(Protocol):
    """A CPU's view of physical memory, at 4 KiB granularity.

    All calls come from the thread that runs the CPU, at a point where the guest is between instructions
    or inside a port access.
    """

    def map_memory(self, address: int, memory: object, size_bytes: int) -> None:
        """Show a writable buffer (the buffer protocol) at a physical address."""

    def map_mmio_page(self, address: int) -> None:
        """Send accesses to this page to the board."""

    def unmap(self, address: int, size_bytes: int) -> None:
        """Hide what was shown."""
