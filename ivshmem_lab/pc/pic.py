"""Two 8259A interrupt controllers, the second on line 2 of the first, as in every PC.

Ref: Intel 8259A data sheet (initialization and operation command words); edge/level registers at 0x4D0 and 0x4D1 from
Intel 82371SB (PIIX3), section 2.5. Rotation of priorities, polling and special mask mode are left out: QEMU has
them, but nobody who drives ivshmem uses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bus import Range

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST, SECOND = 0x20, 0xA0
EDGE_LEVEL = 0x4D0
CASCADE = 2
ICW1, ICW1_NEEDS_ICW4, ICW1_SINGLE = 0x10, 0x01, 0x02
ICW4_AUTO_EOI = 0x02
OCW3, OCW3_READ, OCW3_READ_IN_SERVICE = 0x08, 0x02, 0x01
EOI, EOI_SPECIFIC = 0x20, 0x40
LEVEL_CAPABLE = (0xF8, 0xDE)
"""Lines whose mode software can choose; timer, keyboard, cascade, clock and coprocessor are edges."""
_STATE = ("lines", "requested", "in_service", "mask", "base", "level", "_init", "_needs_icw4", "_auto_eoi", "_read_isr")


class _Chip:
    """One 8259A with its eight lines."""

    def __init__(self) -> None:
        self.level = 0
        self.reset()

    def reset(self) -> None:
        """Return to power-on."""
        self.lines = self.requested = self.in_service = self.mask = self.base = self.level = 0
        self._restart()

    def _restart(self) -> None:
        self._init = 0
        self._needs_icw4 = self._auto_eoi = self._read_isr = 0

    def set_line(self, line: int, level: bool) -> None:
        """Drive a line: an edge is remembered, a level lasts as long as it is there."""
        bit = 1 << line
        if level:
            if self.level & bit or not self.lines & bit:
                self.requested |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            if self.level & bit:
                self.requested &= ~bit

    def pending(self) -> int | None:
        """Return the line that may interrupt now: lower numbers come first, and never below one in service."""
        waiting = self.requested & ~self.mask
        if not waiting:
            return None
        first = waiting & -waiting
        return first.bit_length() - 1 if not self.in_service or first < self.in_service & -self.in_service else None

    def acknowledge(self, line: int) -> None:
        """Take a line into service."""
        bit = 1 << line
        if not self._auto_eoi:
            self.in_service |= bit
        if not self.level & bit:
            self.requested &= ~bit

    def read(self, offset: int) -> int:
        """Carry out IN."""
        return self.mask if offset else self.in_service if self._read_isr else self.requested

    def write(self, offset: int, value: int) -> None:
        """Carry out OUT."""
        if not offset and value & ICW1:
            self._restart()
            self.requested = self.lines & self.level
            self.in_service = self.mask = 0
            self._needs_icw4 = value & ICW1_NEEDS_ICW4
            self._init = 2
        elif not offset and value & OCW3:
            if value & OCW3_READ:
                self._read_isr = value & OCW3_READ_IN_SERVICE
        elif not offset:
            if value & EOI:
                self.in_service &= ~(1 << (value & 7) if value & EOI_SPECIFIC else self.in_service & -self.in_service)
        elif self._init == 2:
            self.base, self._init = value & 0xF8, 3
        elif self._init == 3:
            self._init = 4 if self._needs_icw4 else 0
        elif self._init == 4:
            self._auto_eoi, self._init = value & ICW4_AUTO_EOI, 0
        else:
            self.mask = value

    def snapshot(self) -> dict[str, int]:
        """Return the state as plain values."""
        return {name.removeprefix("_"): getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, int]) -> None:
        """Take over what `snapshot` returned."""
        for name in _STATE:
            setattr(self, name, state[name.removeprefix("_")] & 0xFF)


class Pic:
    """The pair.

    Parameters
    ----------
    output
        Called with the level of the INTR pin after whatever may have changed it.
    """

    def __init__(self, output: Callable[[bool], None]) -> None:
        self._output = output
        self._first, self._second = _Chip(), _Chip()

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive one of the lines 0 to 15."""
        chip = self._second if irq & 8 else self._first
        chip.set_line(irq & 7, level)
        self._update()

    def _update(self) -> None:
        waits = self._second.pending() is not None
        self._first.set_line(CASCADE, waits)
        if not waits:
            # An input must stay high until it is acknowledged (data sheet, "Interrupt Request"): nothing spurious here.
            self._first.requested &= ~(1 << CASCADE)
        self._output(self._first.pending() is not None)

    def pending(self) -> int | None:
        """Return the vector that the CPU would get now; nothing changes."""
        line = self._first.pending()
        if line is None:
            return None
        if line != CASCADE:
            return self._first.base + line
        second = self._second.pending()
        return self._second.base + (7 if second is None else second)

    def acknowledge(self) -> None:
        """Let the CPU take the interrupt (two INTA cycles)."""
        line = self._first.pending()
        if line is None:
            return
        second = self._second.pending() if line == CASCADE else None
        self._first.acknowledge(line)
        if second is not None:
            self._second.acknowledge(second)
        self._update()

    def reset(self) -> None:
        """Return to power-on."""
        self._first.reset()
        self._second.reset()
        self._update()

    def set_up(self) -> None:
        """Do what a PC's firmware does: vectors 0x08 and 0x70, everything masked, PCI lines 10 and 11 by level."""
        for chip, base, cascade in ((self._first, 0x08, 4), (self._second, 0x70, 2)):
            for offset, value in ((0, 0x11), (1, base), (1, cascade), (1, 1), (1, 0xFF)):
                chip.write(offset, value)
        self._second.level = 0x0C
        self._update()

    def ranges(self) -> list[Range]:
        """Return the ports."""
        return [
            *(Range(port, 2, *self._ports(chip)) for port, chip in ((FIRST, self._first), (SECOND, self._second))),
            Range(EDGE_LEVEL, 2, self._read_level, self._write_level),
        ]

    def _ports(self, chip: _Chip) -> tuple[Callable[[int, int], int], Callable[[int, int, int], None]]:
        def write(offset: int, size: int, value: int) -> None:
            del size
            chip.write(offset, value & 0xFF)
            self._update()

        return lambda offset, size: chip.read(offset), write

    def _read_level(self, offset: int, size: int) -> int:
        del size
        return (self._first, self._second)[offset].level

    def _write_level(self, offset: int, size: int, value: int) -> None:
        del size
        (self._first, self._second)[offset].level = value & LEVEL_CAPABLE[offset]
        self._update()

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"first": self._first.snapshot(), "second": self._second.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned."""
        self._first.restore(state["first"])
        self._second.restore(state["second"])
        self._update()
