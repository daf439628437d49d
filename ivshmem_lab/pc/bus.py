"""Two address spaces: memory-mapped registers and I/O ports.

A port that nobody answers reads as all ones, as on a PC whose bus ends a cycle with a master abort
(PCI 3.0, section 3.3.3.1). Memory that nobody answers reads as zeros, as in QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PAGE_SHIFT = 12
PAGE_BYTES = 1 << PAGE_SHIFT

Read = Callable[[int, int], int]
"""(offset in the range, size in bytes) to value."""
Write = Callable[[int, int, int], None]
"""(offset in the range, size in bytes, value)."""


@dataclass(frozen=True, slots=True)
class Range:
    """A range of addresses and who answers there."""

    start: int
    size: int
    read: Read
    write: Write
    widest: int = 4
    """The widest single access, in bytes: longer ones come in pieces."""

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.start + self.size


def ones(size: int) -> int:
    """Return what an unanswered read of `size` bytes gives."""
    return (1 << 8 * size) - 1


class PortBus:
    """I/O ports."""

    def __init__(self) -> None:
        self._by_port: dict[int, Range] = {}

    def add(self, ports: Range) -> None:
        """Answer a range of ports."""
        self._by_port.update(dict.fromkeys(range(ports.start, ports.end), ports))

    def find(self, port: int) -> Range | None:
        """Return who answers at a port."""
        return self._by_port.get(port)

    def answers(self, port: int) -> bool:
        """Tell whether somebody answers at a port."""
        return port in self._by_port

    def read(self, port: int, size: int) -> int:
        """Carry out IN."""
        ports = self._by_port.get(port)
        if ports is None:
            return ones(size)
        return ports.read(port - ports.start, size) & ones(size)

    def write(self, port: int, size: int, value: int) -> None:
        """Carry out OUT."""
        ports = self._by_port.get(port)
        if ports is not None:
            ports.write(port - ports.start, size, value & ones(size))


class MmioBus:
    """Memory-mapped registers, found by page, with byte-granular ranges inside a page."""

    def __init__(self) -> None:
        self._pages: dict[int, tuple[Range, ...]] = {}

    def add(self, mmio: Range) -> list[int]:
        """Answer a range; returns the addresses of pages that were empty until now."""
        fresh = []
        for page in range(mmio.start >> PAGE_SHIFT, (mmio.end - 1 >> PAGE_SHIFT) + 1):
            others = self._pages.get(page, ())
            if not others:
                fresh.append(page << PAGE_SHIFT)
            self._pages[page] = (*others, mmio)
        return fresh

    def remove(self, mmio: Range) -> list[int]:
        """Stop answering a range; returns the addresses of pages that are empty now."""
        empty = []
        for page in range(mmio.start >> PAGE_SHIFT, (mmio.end - 1 >> PAGE_SHIFT) + 1):
            left = tuple(other for other in self._pages[page] if other is not mmio)
            if left:
                self._pages[page] = left
            else:
                del self._pages[page]
                empty.append(page << PAGE_SHIFT)
        return empty

    def find(self, address: int) -> Range | None:
        """Return who answers at an address."""
        for mmio in self._pages.get(address >> PAGE_SHIFT, ()):
            if mmio.start <= address < mmio.start + mmio.size:
                return mmio
        return None

    def any_between(self, start: int, end: int) -> bool:
        """Tell whether a page that touches ``start <= address < end`` has anyone in it."""
        return any(start < (page + 1) << PAGE_SHIFT and page << PAGE_SHIFT < end for page in self._pages)
