"""Accesses of any length to memory and ports, as from a debugger: cut into what the devices take.

Ref: QEMU 7.2, ``address_space_read`` and ``address_space_write``: an access to a device's registers is cut into
naturally aligned pieces, at most as wide as the device takes (4 bytes, 8 for MSI-X tables); memory where nobody
answers reads as zeros, ports as ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .board import Mapping
from .bus import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .board import Board
    from .bus import Range

ADDRESS_SPACE = 1 << 64


def _piece(region: Range, address: int, size: int) -> int:
    """Return how many bytes from `address` on a device takes at once."""
    offset = address - region.start
    widest = min(size, region.widest, region.end - address, offset & -offset or size)
    return 1 << widest.bit_length() - 1


def _pieces(board: Board, address: int, size: int) -> Iterator[tuple[int, int, Mapping | Range | None]]:
    """Cut an access: (address, bytes, who answers)."""
    end = address + size
    while address < end:
        left = end - address
        owner: Mapping | Range | None = board.memory_at(address)
        if owner is not None:
            count = min(left, owner.end - address)
        elif (owner := board.mmio.find(address)) is not None:
            count = _piece(owner, address, left)
        elif board.mmio.any_between(address, address + 1):
            count = 1
        else:
            count = min(left, PAGE_BYTES - address % PAGE_BYTES)
        yield address, count, owner
        address += count


def read_memory(board: Board, address: int, size: int) -> bytes:
    """Read physical memory and memory-mapped registers."""
    found = bytearray()
    for at, count, owner in _pieces(board, address, size):
        if owner is None:
            found += bytes(count)
        elif isinstance(owner, Mapping):
            found += owner.view[at - owner.address : at - owner.address + count]
        else:
            found += owner.read(at - owner.start, count).to_bytes(count, "little")
    return bytes(found)


def write_memory(board: Board, address: int, data: bytes) -> None:
    """Write physical memory and memory-mapped registers; lost where nobody answers."""
    done = 0
    for at, count, owner in _pieces(board, address, len(data)):
        piece = data[done : done + count]
        done += count
        if owner is None:
            continue
        if isinstance(owner, Mapping):
            owner.view[at - owner.address : at - owner.address + count] = piece
        else:
            owner.write(at - owner.start, count, int.from_bytes(piece, "little"))


def read_ports(board: Board, port: int, size: int) -> int:
    """Read 1, 2 or 4 bytes from ports."""
    value = done = 0
    while done < size:
        ports = board.ports.find(port + done)
        count = _piece(ports, port + done, size - done) if ports is not None else 1
        piece = ports.read(port + done - ports.start, count) if ports is not None else 0xFF
        value |= (piece & (1 << 8 * count) - 1) << 8 * done
        done += count
    return value


def write_ports(board: Board, port: int, size: int, value: int) -> None:
    """Write 1, 2 or 4 bytes to ports."""
    done = 0
    while done < size:
        ports = board.ports.find(port + done)
        count = _piece(ports, port + done, size - done) if ports is not None else 1
        if ports is not None:
            ports.write(port + done - ports.start, count, value >> 8 * done & (1 << 8 * count) - 1)
        done += count
