"""MSI-X: the vector table, the pending bits, the masks.

Ref: PCI 3.0, section 6.8.2. Placement and access rules as measured on QEMU 7.2: table at offset 0 of
the BAR, pending bits at 0x800 for up to 128 vectors and at ``vectors * 16`` beyond; the table takes accesses of
4 and 8 bytes, narrower reads give 0 and narrower writes are dropped.
"""

from __future__ import annotations

from typing import Any

from ..errors import DeviceError
from .effects import Effects, SendMsi

MAX_VECTORS = 2048
ENTRY_BYTES = 16
CAPABILITY_ID = 0x11
CAPABILITY_BYTES = 12
ENABLE = 0x8000
FUNCTION_MASK = 0x4000


class Msix:
    """The MSI-X state of one function.

    Parameters
    ----------
    vectors
        1 to 2048.
    bar
        The BAR in which table and pending bits lie.

    Raises
    ------
    DeviceError
        When the number of vectors is out of range.
    """

    def __init__(self, vectors: int, bar: int) -> None:
        if not 1 <= vectors <= MAX_VECTORS:
            raise DeviceError(f"vectors={vectors} is out of range: MSI-X has 1 to {MAX_VECTORS}")
        self.vectors = vectors
        self.bar = bar
        self.table_bytes = vectors * ENTRY_BYTES
        self.pba_offset = max(0x800, self.table_bytes)
        self.pba_bytes = (vectors + 63) // 64 * 8
        end = self.pba_offset + self.pba_bytes
        self.bar_bytes = max(4096, 1 << (end - 1).bit_length())
        self.enabled = False
        self.function_masked = False
        self._table = bytearray()
        self._pending = 0
        self.reset()

    def reset(self) -> None:
        """Mask every entry, forget what is pending, disable."""
        self._table = bytearray(b"\0\0\0\0\0\0\0\0\0\0\0\0\1\0\0\0" * self.vectors)
        self._pending = 0
        self.enabled = False
        self.function_masked = False

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"vectors": self.vectors, "table": self._table.hex(), "pending": f"{self._pending:x}"}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned."""
        table = bytes.fromhex(state["table"])
        if len(table) != self.table_bytes:
            raise DeviceError(f"MSI-X table of {len(table)} bytes, and it has {self.table_bytes} here")
        self._table[:] = table
        self._pending = int(state["pending"], 16) & (1 << self.vectors) - 1

    def capability(self) -> bytes:
        """Return the capability as it stands in configuration space at reset (12 bytes)."""
        return (
            bytes([CAPABILITY_ID, 0])
            + (self.vectors - 1).to_bytes(2, "little")
            + self.bar.to_bytes(4, "little")
            + (self.pba_offset | self.bar).to_bytes(4, "little")
        )

    @property
    def pending(self) -> int:
        """Pending bits; bit v belongs to vector v."""
        return self._pending

    def read(self, offset: int, size: int) -> int:
        """Read from table or pending bits; 0 in the gaps and for narrow accesses."""
        if size < 4:
            return 0
        if offset + size <= self.table_bytes:
            return int.from_bytes(self._table[offset : offset + size], "little")
        start = offset - self.pba_offset
        if start >= 0 and start + size <= self.pba_bytes:
            return self._pending >> 8 * start & ((1 << 8 * size) - 1)
        return 0

    def write(self, offset: int, size: int, value: int) -> Effects:
        """Write to the table; the pending bits are read-only. Unmasking sends what is pending."""
        if size < 4 or offset + size > self.table_bytes:
            return ()
        self._table[offset : offset + size] = value.to_bytes(size, "little")
        return self._send_pending(offset // ENTRY_BYTES)

    def control_written(self, control: int) -> Effects:
        """Take a new message control word; enabling or unmasking sends what is pending."""
        self.enabled = bool(control & ENABLE)
        self.function_masked = bool(control & FUNCTION_MASK)
        if not self._pending:
            return ()
        return tuple(effect for vector in range(self.vectors) for effect in self._send_pending(vector))

    def notify(self, vector: int) -> Effects:
        """Signal an event: a message, a pending bit when masked, nothing when MSI-X is off."""
        if not self.enabled or vector >= self.vectors:
            return ()
        if self.function_masked or self._masked(vector):
            self._pending |= 1 << vector
            return ()
        return (self._message(vector),)

    def describe(self) -> str:
        """Say in one line what the state is."""
        switch = "on" if self.enabled else "off (events are lost)"
        mask = ", all vectors masked" if self.function_masked else ""
        masked = sum(self._masked(vector) for vector in range(self.vectors))
        waiting = self._pending.bit_count()
        return f"MSI-X {switch}{mask}: {self.vectors} vectors, {masked} masked, {waiting} pending ({self._pending:#x})"

    def _masked(self, vector: int) -> bool:
        return bool(self._table[vector * ENTRY_BYTES + 12] & 1)

    def _message(self, vector: int) -> SendMsi:
        entry = self._table[vector * ENTRY_BYTES : vector * ENTRY_BYTES + 12]
        return SendMsi(int.from_bytes(entry[:8], "little"), int.from_bytes(entry[8:], "little"))

    def _send_pending(self, vector: int) -> Effects:
        bit = 1 << vector
        if not self._pending & bit or not self.enabled or self.function_masked or self._masked(vector):
            return ()
        self._pending &= ~bit
        return (self._message(vector),)
