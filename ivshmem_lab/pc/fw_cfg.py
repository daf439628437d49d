"""The firmware configuration device: a selector and a data port, from which firmware learns about the machine.

Ref: QEMU ``docs/specs/fw_cfg.rst``; ports 0x510 (selector, 16 bits) and 0x511 (data, one byte at a time). There is no
DMA interface, which the interface's revision (bit 1 of the id) says.
"""

from __future__ import annotations

PORT = 0x510
PORTS = 2
SIGNATURE, ID, RAM_SIZE, CPUS, MAX_CPUS, FILE_DIRECTORY = 0x00, 0x01, 0x03, 0x05, 0x0F, 0x19
ENTRY_MASK = 0x3FFF
"""Without the bits that ask for writing and for architecture specific items."""


class FwCfg:
    """The items of one machine.

    Parameters
    ----------
    ram_bytes
        How much memory there is.
    """

    def __init__(self, ram_bytes: int) -> None:
        self._items = {
            SIGNATURE: b"QEMU",
            ID: (1).to_bytes(4, "little"),
            RAM_SIZE: ram_bytes.to_bytes(8, "little"),
            CPUS: (1).to_bytes(2, "little"),
            MAX_CPUS: (1).to_bytes(2, "little"),
            FILE_DIRECTORY: bytes(4),
        }
        self._item = self._items[SIGNATURE]
        self._next = 0

    def reset(self) -> None:
        """Select the signature."""
        self._select(SIGNATURE)

    def _select(self, key: int) -> None:
        self._item = self._items.get(key & ENTRY_MASK, b"") if not key & ~ENTRY_MASK else b""
        self._next = 0

    def read(self, offset: int, size: int) -> int:
        """Carry out IN: the next byte of the selected item, from either port; 0 behind its end (QEMU 7.2)."""
        if size != 1 or self._next >= len(self._item):
            return 0
        self._next += 1
        return self._item[self._next - 1]

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry out OUT: 16 bits select an item; the items are read-only."""
        if size == 2:
            self._select(value)
