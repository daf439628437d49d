"""Two 8259A interrupt controllers, the second on line 2 of the first, as in every PC.

Ref: Intel 8259A data sheet (initialization and operation command words); edge/level registers at 0x4D0 and 0x4D1 from
Intel 82371SB (PIIX3), section 2.5. Where the data sheet leaves a choice, it is that of QEMU 7.2: a request of the
second chip that is taken back stays requested at the first one, and its acknowledgement gives the second's line 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bus import Range

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST, SECOND = 0x20, 0xA0
EDGE_LEVEL = 0x4D0
CASCADE, SPURIOUS = 2, 7
ICW1, ICW1_NEEDS_ICW4, ICW1_SINGLE = 0x10, 0x01, 0x02
ICW4_AUTO_EOI, ICW4_FULLY_NESTED = 0x02, 0x10
OCW3, OCW3_READ, OCW3_READ_IN_SERVICE, OCW3_POLL = 0x08, 0x02, 0x01, 0x04
OCW3_SPECIAL_MASK, OCW3_SPECIAL_MASK_ON = 0x40, 0x20
EOI, SPECIFIC, ROTATE = 0x20, 0x40, 0x80
POLL_PENDING = 0x80
LEVEL_CAPABLE = (0xF8, 0xDE)
"""Lines whose mode software can choose; timer, keyboard, cascade, clock and coprocessor are edges."""
LINES = 8
_STATE = (
    *("lines", "requested", "in_service", "mask", "base", "level", "_first_line", "_init", "_needs_icw4", "_single"),
    *("_auto_eoi", "_rotates", "_special_mask", "_fully_nested", "_read_isr", "_poll"),
)


class _Chip:
    """One 8259A with its eight lines.

    Parameters
    ----------
    output
        Called with the level of the INT pin whenever the chip drives it, changed or not.
    is_first
        The other chip is on its line 2.
    """

    def __init__(self, output: Callable[[bool], None], *, is_first: bool) -> None:
        self._output = output
        self._is_first = is_first
        self.requested = self.level = 0
        self._restart()

    def reset(self) -> None:
        """Return to power-on."""
        self.requested = self.level = 0
        self._restart()
        self.drive()

    def drive(self) -> None:
        """Drive the INT pin."""
        self._output(self.pending() is not None)

    def _restart(self) -> None:
        self.lines = self.in_service = self.mask = self.base = self._first_line = 0
        self.requested &= self.level
        self._init = self._needs_icw4 = self._single = 0
        self._auto_eoi = self._rotates = self._special_mask = self._fully_nested = self._read_isr = self._poll = 0

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
        self.drive()

    def _rank(self, lines: int) -> int:
        """Return the place in the order of priorities of the first of some lines; LINES for none."""
        turned = (lines >> self._first_line | lines << LINES - self._first_line) & 0xFF
        return (turned & -turned).bit_length() - 1 if turned else LINES

    def _line(self, rank: int) -> int:
        return rank + self._first_line & LINES - 1

    def pending(self) -> int | None:
        """Return the line that may interrupt now: by priority, and never below one in service."""
        rank = self._rank(self.requested & ~self.mask)
        if rank == LINES:
            return None
        holding = self.in_service
        if self._special_mask:
            holding &= ~self.mask
        if self._fully_nested and self._is_first:
            holding &= ~(1 << CASCADE)
        return self._line(rank) if rank < self._rank(holding) else None

    def acknowledge(self, line: int) -> None:
        """Take a line into service."""
        bit = 1 << line
        if not self._auto_eoi:
            self.in_service |= bit
        elif self._rotates:
            self._first_line = line + 1 & LINES - 1
        if not self.level & bit:
            self.requested &= ~bit
        self.drive()

    def read(self, offset: int) -> int:
        """Carry out IN; the first one after a poll command acknowledges as the CPU would."""
        if self._poll:
            self._poll = 0
            line = self.pending()
            if line is None:
                return 0
            self.acknowledge(line)
            return POLL_PENDING | line
        return self.mask if offset else self.in_service if self._read_isr else self.requested

    def write(self, offset: int, value: int) -> None:
        """Carry out OUT."""
        if not offset and value & ICW1:
            self._restart()
            self._needs_icw4, self._single = value & ICW1_NEEDS_ICW4, value & ICW1_SINGLE
            self._init = 2
            self.drive()
        elif not offset and value & OCW3:
            if value & OCW3_POLL:
                self._poll = 1
            if value & OCW3_READ:
                self._read_isr = value & OCW3_READ_IN_SERVICE
            if value & OCW3_SPECIAL_MASK:
                self._special_mask = value & OCW3_SPECIAL_MASK_ON
        elif not offset:
            self._end(value)
        elif self._init == 2:
            self.base = value & 0xF8
            self._init = 3 if not self._single else 4 if self._needs_icw4 else 0
        elif self._init == 3:
            self._init = 4 if self._needs_icw4 else 0
        elif self._init == 4:
            self._auto_eoi, self._fully_nested, self._init = value & ICW4_AUTO_EOI, value & ICW4_FULLY_NESTED, 0
        else:
            self.mask = value
            self.drive()

    def _end(self, value: int) -> None:
        """Carry out OCW2: end of interrupt, and who comes first from now on."""
        line: int | None = value & LINES - 1
        if value & EOI:
            if not value & SPECIFIC:
                rank = self._rank(self.in_service)
                line = self._line(rank) if rank < LINES else None
            if line is not None:
                self.in_service &= ~(1 << line)
        elif not value & SPECIFIC:
            self._rotates, line = value & ROTATE, None
        if line is not None:
            if value & ROTATE:
                self._first_line = line + 1 & LINES - 1
            self.drive()

    def snapshot(self) -> dict[str, int]:
        """Return the state as plain values."""
        return {name.removeprefix("_"): getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, int]) -> None:
        """Take over what `snapshot` returned."""
        for name in _STATE:
            setattr(self, name, state[name.removeprefix("_")] & 0xFF)
        self._first_line &= LINES - 1


class Pic:
    """The pair.

    Parameters
    ----------
    output
        Called with the level of the INTR pin whenever it is driven.
    """

    def __init__(self, output: Callable[[bool], None]) -> None:
        self._first = _Chip(output, is_first=True)
        self._second = _Chip(lambda level: self._first.set_line(CASCADE, level), is_first=False)

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive one of the lines 0 to 15."""
        chip = self._second if irq & 8 else self._first
        chip.set_line(irq & 7, level)

    def pending(self) -> int | None:
        """Return the vector that the CPU would get now; nothing changes."""
        line = self._first.pending()
        if line is None:
            return None
        if line != CASCADE:
            return self._first.base + line
        second = self._second.pending()
        return self._second.base + (SPURIOUS if second is None else second)

    def acknowledge(self) -> None:
        """Let the CPU take the interrupt (two INTA cycles)."""
        line = self._first.pending()
        if line is None:
            return
        second = self._second.pending() if line == CASCADE else None
        if second is not None:
            self._second.acknowledge(second)
        self._first.acknowledge(line)

    def reset(self) -> None:
        """Return to power-on."""
        self._first.reset()
        self._second.reset()

    def set_up(self) -> None:
        """Do what a PC's firmware does: vectors 0x08 and 0x70, everything masked, PCI lines 10 and 11 by level."""
        for chip, base, cascade in ((self._first, 0x08, 4), (self._second, 0x70, 2)):
            for offset, value in ((0, 0x11), (1, base), (1, cascade), (1, 1), (1, 0xFF)):
                chip.write(offset, value)
        self._second.level = 0x0C

    def ranges(self) -> list[Range]:
        """Return the ports."""
        return [
            self._ports(FIRST, self._first),
            self._ports(SECOND, self._second),
            Range(EDGE_LEVEL, 2, self._read_level, self._write_level, widest=1),
        ]

    def _ports(self, start: int, chip: _Chip) -> Range:
        return Range(
            start,
            2,
            lambda offset, size: chip.read(offset),
            lambda offset, size, value: chip.write(offset, value & 0xFF),
            widest=1,
        )

    def _read_level(self, offset: int, size: int) -> int:
        del size
        return (self._first, self._second)[offset].level

    def _write_level(self, offset: int, size: int, value: int) -> None:
        del size
        (self._first, self._second)[offset].level = value & LEVEL_CAPABLE[offset]

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {"first": self._first.snapshot(), "second": self._second.snapshot()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned."""
        self._first.restore(state["first"])
        self._second.restore(state["second"])
        self._first.drive()
