"""The local APIC: enough to take interrupt messages, one after the other, by priority.

Ref: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3, chapter "Advanced Programmable
Interrupt Controller (APIC)": 10.4 (registers), 10.8 (handling interrupts), 10.11 (message signalled interrupts).
One CPU; no timer, no I/O APIC, no start-up messages. LINT0 takes the 8259 pair (virtual wire mode).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pic import Pic

BASE = 0xFEE00000
SIZE = 0x1000
MESSAGE_END = 0xFEF00000
VERSION = 0x00050014
ENABLED = 0x100
BROADCAST = 0xFF

ID, VERSION_AT, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_FIRST, LVT_LAST = 0x320, 0x370
LINT0 = 0x350
MASKED, MODE_MASK, EXTERNAL_MODE = 0x10000, 0x700, 0x700


class Lapic:
    """One CPU's interrupt controller, with vectors as bits of two integers.

    Parameters
    ----------
    apic_id
        The id to which messages are sent.
    """

    def __init__(self, apic_id: int = 0) -> None:
        self.apic_id = apic_id
        self.requested = 0
        """Requested vectors as bits; bit 0, which is no vector, while the 8259 pair wants the CPU (LINT0, ExtINT)."""
        self.external: Pic | None = None
        self._external = False
        self._in_service = 0
        self._priority = 0
        self._spurious = 0xFF
        self._logical = 0
        self._format = 0xFFFFFFFF
        self._scratch: dict[int, int] = {}
        self.reset()

    def reset(self) -> None:
        """Return to power-on: disabled, nothing requested."""
        self.requested = self._in_service = self._priority = 0
        self._spurious = 0xFF
        self._logical, self._format = 0, 0xFFFFFFFF
        self._scratch = dict.fromkeys(range(LVT_FIRST, LVT_LAST + 1, 0x10), MASKED)
        # The boot processor's LINT0 lets the 8259 through, as firmware leaves it (QEMU 7.2 at reset).
        self._scratch[LINT0] = EXTERNAL_MODE
        self._take_external()

    def set_external(self, level: bool) -> None:
        """Take the level of the 8259 pair's output (virtual wire mode, SDM 10.1)."""
        self._external = level
        self._take_external()

    def _take_external(self) -> None:
        lets_through = self._scratch[LINT0] & (MASKED | MODE_MASK) == EXTERNAL_MODE
        self.requested = self.requested & ~1 | (self._external and lets_through)

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "requested": self.requested & ~1,
            "in_service": self._in_service,
            "priority": self._priority,
            "spurious": self._spurious,
            "logical": self._logical,
            "format": self._format,
            "scratch": [[offset, value] for offset, value in self._scratch.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned."""
        self.requested = state["requested"] & (1 << 256) - 2
        self._in_service = state["in_service"] & (1 << 256) - 1
        self._priority = state["priority"] & 0xFF
        self._spurious = state["spurious"] & 0x1FF
        self._logical = state["logical"] & 0xFF000000
        self._format = state["format"] & 0xFFFFFFFF | 0x0FFFFFFF
        for offset, value in state["scratch"]:
            if offset in (ICR_LOW, ICR_HIGH) or LVT_FIRST <= offset <= LVT_LAST:
                self._scratch[offset] = value & 0xFFFFFFFF
        self._take_external()

    # -- messages and the CPU ------------------------------------------------------------------------

    def message(self, address: int, data: int) -> bool:
        """Take an interrupt message; tells whether it was for us and of a kind we know (fixed, lowest priority)."""
        destination = address >> 12 & 0xFF
        if address & 0x4:
            wanted = destination == BROADCAST or bool(destination & self._logical >> 24)
        else:
            wanted = destination in (BROADCAST, self.apic_id)
        vector = data & 0xFF
        if not wanted or data >> 8 & 7 > 1 or vector < 16:
            return False
        self.requested |= 1 << vector
        return True

    def pending(self) -> int | None:
        """Return the vector that may interrupt the CPU now, or None."""
        vector = self._own_pending()
        if vector is None and self.requested & 1 and self.external is not None:
            return self.external.pending()
        return vector

    def _own_pending(self) -> int | None:
        if self.requested < 2 or not self._spurious & ENABLED:
            return None
        vector = self.requested.bit_length() - 1
        return vector if vector >> 4 > self._processor_priority() >> 4 else None

    def acknowledge(self, vector: int) -> None:
        """Let the CPU take a vector: ours moves from requested to in service, the 8259 pair is told of its own."""
        if self.external is not None and self._own_pending() is None:
            self.external.acknowledge()
            return
        bit = 1 << vector
        self.requested &= ~bit
        self._in_service |= bit

    def _processor_priority(self) -> int:
        in_service = self._in_service.bit_length() - 1 if self._in_service else 0
        return max(self._priority, in_service & 0xF0)

    # -- registers -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read a register; they are 32 bits wide at multiples of 16."""
        if size != 4 or offset & 0xF:
            return 0
        if ISR <= offset < ESR:
            word = offset >> 4 & 7
            block = offset & ~0x7F
            bits = self._in_service if block == ISR else self.requested & ~1 if block == IRR else 0
            return bits >> 32 * word & 0xFFFFFFFF
        values = {
            ID: self.apic_id << 24,
            VERSION_AT: VERSION,
            TPR: self._priority,
            PPR: self._processor_priority(),
            LDR: self._logical,
            DFR: self._format,
            SVR: self._spurious,
        }
        return values.get(offset, self._scratch.get(offset, 0))

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        if offset == EOI:
            if self._in_service:
                self._in_service &= ~(1 << self._in_service.bit_length() - 1)
        elif size != 4:
            return
        elif offset == TPR:
            self._priority = value & 0xFF
        elif offset == SVR:
            self._spurious = value & 0x1FF
        elif offset == LDR:
            self._logical = value & 0xFF000000
        elif offset == DFR:
            self._format = value | 0x0FFFFFFF
        elif offset == ICR_LOW:
            self._scratch[ICR_LOW] = value & ~0x1000
            self._send(value)
        elif offset == ICR_HIGH or LVT_FIRST <= offset <= LVT_LAST:
            self._scratch[offset] = value
            if offset == LINT0:
                self._take_external()

    def _send(self, command: int) -> None:
        """Carry out an inter-processor interrupt; there is one processor."""
        shorthand = command >> 18 & 3
        destination = self._scratch.get(ICR_HIGH, 0) >> 24
        if shorthand == 3:
            return
        if shorthand in (1, 2):
            destination, command = self.apic_id, command & ~0x800
        self.message(BASE | destination << 12 | (command >> 9 & 4), command & 0x7FF)
