"""qtest, the server's end: one line of text asks for an access to ports or memory, one line answers.

Ref: QEMU 7.2, ``docs/devel/qtest.rst``. Requests are words separated by spaces; numbers are decimal, 0x hexadecimal or 0
octal (``strtoul`` with base 0); an answer is ``OK``, ``OK VALUE`` or ``FAIL REASON``. ``IRQ raise N`` and ``IRQ lower N``
come at any time after ``irq_intercept_in``. Where QEMU ends itself over a malformed request, it is refused here.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from ..errors import IvshmemLabError
from ..pc import access
from ..pc.irq_inputs import PINS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..pc.irq_inputs import IrqInputs
    from ..pc.machine import Machine

ACCESS_LIMIT_BYTES = 16 << 20
LINE_LIMIT_BYTES = 2 * ACCESS_LIMIT_BYTES + 128
"""``write`` carries two digits for each byte."""

WIDTHS = {"b": 1, "w": 2, "l": 4, "q": 8}
NUMBER = re.compile(r"(-?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))")
INTERCEPTED = "ioapic"


class QtestError(IvshmemLabError):
    """A request cannot be carried out; the text goes behind ``FAIL``."""


def number(text: str, limit: int = 1 << 64) -> int:
    """Read a number as ``strtoull`` with base 0 does.

    >>> number("0x10"), number("010"), number("10")
    (16, 8, 10)

    Raises
    ------
    QtestError
        When it is none, or not below `limit`.
    """
    match = NUMBER.fullmatch(text)
    if match is None:
        raise QtestError(f"'{text}' is not a number; write 10, 0x0a or 012")
    sign, hexadecimal, octal, decimal = match.groups()
    value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    if sign:
        value = (1 << 64) - value
    if not 0 <= value < limit:
        raise QtestError(f"{text} is out of range: 0 to {limit - 1:#x}")
    return value


class Qtest:
    """Carries requests out on a machine; all calls come from the vCPU's thread.

    Parameters
    ----------
    machine
        The machine, or None for one without memory and devices (``-machine none``).
    has_clock
        With ``-accel qtest`` the client moves the virtual clock.
    send
        Called with each line that goes to the client, in order.
    """

    def __init__(self, machine: Machine | None, *, has_clock: bool, send: Callable[[str], None]) -> None:
        self._machine = machine
        self._send = send
        self._clock_ns = 0
        self._commands: dict[str, tuple[int, Callable[[Sequence[str]], str]]] = {
            "endianness": (0, lambda words: "little"),
            "irq_intercept_in": (1, self._intercept),
            "irq_intercept_out": (1, self._intercept),
            "set_irq_in": (4, self._set_irq_in),
            "read": (2, lambda words: f"0x{self._read(words).hex()}"),
            "b64read": (2, lambda words: base64.b64encode(self._read(words)).decode()),
            "write": (3, self._write),
            "b64write": (3, self._write_base64),
            "memset": (3, self._memset),
        }
        for letter, width in WIDTHS.items():
            self._commands[f"read{letter}"] = (1, self._reader(width))
            self._commands[f"write{letter}"] = (2, self._writer(width))
            if width <= 4:
                self._commands[f"in{letter}"] = (1, self._port_reader(width))
                self._commands[f"out{letter}"] = (2, self._port_writer(width))
        if has_clock:
            self._commands["clock_step"] = (0, self._clock_step)
            self._commands["clock_set"] = (1, self._clock_set)

    def execute(self, line: str) -> None:
        """Carry out one request, and send the answer behind the news of interrupt lines that it made."""
        words = line.rstrip("\r").split(" ")
        needed, command = self._commands.get(words[0], (0, None))
        if command is None:
            self._send("FAIL" if words[0] == "module_load" else f"FAIL Unknown command '{words[0]}'")
        elif len(words) <= needed:
            self._send(f"FAIL {words[0]} takes {needed} words behind it, not {len(words) - 1}")
        else:
            try:
                answer = command(words[1:])
            except QtestError as error:
                self._send(f"FAIL {error}")
            else:
                self._send(f"OK {answer}" if answer else "OK")

    # -- interrupt lines -----------------------------------------------------------------------------

    def _intercept(self, words: Sequence[str]) -> str:
        self._ioapic(words[0]).listen(lambda pin, level: self._send(f"IRQ {'raise' if level else 'lower'} {pin}"))
        return ""

    def _ioapic(self, path: str) -> IrqInputs:
        if self._machine is None or path != INTERCEPTED:
            raise QtestError("Unknown device")
        return self._machine.irq_inputs

    def _set_irq_in(self, words: Sequence[str]) -> str:
        inputs = self._ioapic(words[0])
        if words[1] != "unnamed-gpio-in":
            raise QtestError(f"{words[0]} has no pins '{words[1]}', only unnamed-gpio-in")
        inputs.set(number(words[2], PINS), bool(number(words[3])))
        return ""

    def detach(self) -> None:
        """Stop listening: the client has gone."""
        if self._machine is not None:
            self._machine.irq_inputs.listen(None)

    # -- ports and memory ----------------------------------------------------------------------------

    def _board(self) -> Machine:
        if self._machine is None:
            raise QtestError("this machine (none) has no memory and no ports")
        return self._machine

    def _port_reader(self, width: int) -> Callable[[Sequence[str]], str]:
        return lambda words: f"0x{access.read_ports(self._board(), number(words[0], 1 << 16), width):04x}"

    def _port_writer(self, width: int) -> Callable[[Sequence[str]], str]:
        def write(words: Sequence[str]) -> str:
            access.write_ports(self._board(), number(words[0], 1 << 16), width, number(words[1]))
            return ""

        return write

    def _reader(self, width: int) -> Callable[[Sequence[str]], str]:
        def read(words: Sequence[str]) -> str:
            data = access.read_memory(self._board(), number(words[0]), width)
            return f"0x{int.from_bytes(data, 'little'):016x}"

        return read

    def _writer(self, width: int) -> Callable[[Sequence[str]], str]:
        def write(words: Sequence[str]) -> str:
            data = (number(words[1]) & (1 << 8 * width) - 1).to_bytes(width, "little")
            access.write_memory(self._board(), number(words[0]), data)
            return ""

        return write

    def _read(self, words: Sequence[str]) -> bytes:
        address, size = number(words[0]), number(words[1], ACCESS_LIMIT_BYTES + 1)
        return access.read_memory(self._board(), address, size)

    def _write(self, words: Sequence[str]) -> str:
        address, size, digits = number(words[0]), number(words[1], ACCESS_LIMIT_BYTES + 1), words[2]
        if len(digits) < 3 or not digits.startswith("0x"):
            raise QtestError("data is 0x and two hexadecimal digits for each byte")
        digits = digits[2 : 2 + 2 * size]
        try:
            data = bytes.fromhex(digits[: len(digits) & -2])
        except ValueError:
            raise QtestError("data has a digit that is not hexadecimal") from None
        access.write_memory(self._board(), address, data.ljust(size, b"\0"))
        return ""

    def _write_base64(self, words: Sequence[str]) -> str:
        address, size = number(words[0]), number(words[1], ACCESS_LIMIT_BYTES + 1)
        try:
            data = base64.b64decode(words[2], validate=True)
        except (ValueError, binascii.Error):
            raise QtestError("data is not base64") from None
        access.write_memory(self._board(), address, data[:size])
        return ""

    def _memset(self, words: Sequence[str]) -> str:
        address, size, pattern = number(words[0]), number(words[1], ACCESS_LIMIT_BYTES + 1), number(words[2])
        access.write_memory(self._board(), address, bytes([pattern & 0xFF]) * size)
        return ""

    # -- the clock -----------------------------------------------------------------------------------

    def _clock_step(self, words: Sequence[str]) -> str:
        # Nothing on this machine waits for a time: a step to the next deadline is none.
        return self._advance(self._clock_ns + number(words[0], 1 << 62) if words else 0)

    def _clock_set(self, words: Sequence[str]) -> str:
        return self._advance(number(words[0], 1 << 63))

    def _advance(self, time_ns: int) -> str:
        self._clock_ns = max(self._clock_ns, time_ns)
        return str(self._clock_ns)
