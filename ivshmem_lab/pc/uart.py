"""A 16550-like serial port that is polled: data, line status, and the registers that drivers set up first.

Ref: National Semiconductor PC16550D data sheet, section 8 (registers).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

COM1 = 0x3F8
PORTS = 8
DATA, IER, FIFO, LINE_CONTROL, MODEM_CONTROL, LINE_STATUS, MODEM_STATUS, SCRATCH = range(8)
DATA_READY = 0x01
TRANSMITTER_EMPTY = 0x60
DIVISOR_LATCH = 0x80
INPUT_LIMIT = 4096


class Uart:
    """One serial port.

    Parameters
    ----------
    transmit
        Called with each byte that the guest sends.
    ready
        Tells whether the other end takes more; while it does not, the transmitter reads as busy,
        so that a slow reader slows the guest instead of losing its words.
    room
        Called when there is room again for what `receive` did not take.
    """

    def __init__(
        self,
        transmit: Callable[[int], None],
        ready: Callable[[], bool] = lambda: True,
        room: Callable[[], None] = lambda: None,
    ) -> None:
        self._transmit = transmit
        self._ready = ready
        self._room = room
        self._refused = False
        self._input: deque[int] = deque()
        self._registers = bytearray(PORTS)
        self._divisor = bytearray(b"\x0c\x00")

    def receive(self, data: bytes) -> int:
        """Take bytes for the guest; returns how many fitted."""
        room = INPUT_LIMIT - len(self._input)
        self._input.extend(data[:room])
        self._refused = len(data) > room
        return min(room, len(data))

    def _make_room(self) -> None:
        if self._refused and not self._input:
            self._refused = False
            self._room()

    def reset(self) -> None:
        """Return to power-on; what was typed and not read is gone."""
        self._input.clear()
        self._make_room()
        self._registers = bytearray(PORTS)
        self._divisor = bytearray(b"\x0c\x00")

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {
            "registers": self._registers.hex(),
            "divisor": self._divisor.hex(),
            "input": bytes(self._input).hex(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned."""
        self._registers[:] = bytes.fromhex(state["registers"]).ljust(PORTS, bytes(1))[:PORTS]
        self._divisor[:] = bytes.fromhex(state["divisor"]).ljust(2, bytes(1))[:2]
        self._input = deque(bytes.fromhex(state["input"])[:INPUT_LIMIT])

    def read(self, offset: int, size: int) -> int:
        """Carry out IN; a wider access reads the first register."""
        del size
        latch = self._registers[LINE_CONTROL] & DIVISOR_LATCH
        if latch and offset in (DATA, IER):
            return self._divisor[offset]
        if offset == DATA:
            byte = self._input.popleft() if self._input else 0
            self._make_room()
            return byte
        if offset == FIFO:
            return 0x01
        if offset == LINE_STATUS:
            return (TRANSMITTER_EMPTY if self._ready() else 0) | (DATA_READY if self._input else 0)
        if offset == MODEM_STATUS:
            return 0xB0
        return self._registers[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        """Carry out OUT; a wider access writes the first register."""
        del size
        value &= 0xFF
        latch = self._registers[LINE_CONTROL] & DIVISOR_LATCH
        if latch and offset in (DATA, IER):
            self._divisor[offset] = value
        elif offset == DATA:
            self._transmit(value)
        elif offset not in (FIFO, LINE_STATUS, MODEM_STATUS):
            self._registers[offset] = value
