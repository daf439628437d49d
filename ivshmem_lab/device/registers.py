"""The registers of ivshmem's BAR 0, as data: reading, writing, documentation and ``repr`` come from here.

Ref: QEMU ``docs/specs/ivshmem-spec.txt`` ("Device Specification for Inter-VM shared memory device",
PCI device registers). Behaviour measured on QEMU 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class Access(Enum):
    """How software may use a register."""

    READ_WRITE = "RW"
    READ_ONLY = "RO"
    WRITE_ONLY = "WO"
    READ_CLEARS = "RC"
    """Software may write it, too."""

    @property
    def meaning(self) -> str:
        """One line for people."""
        return _ACCESS_MEANINGS[self]


_ACCESS_MEANINGS = {
    Access.READ_WRITE: "read and write",
    Access.READ_ONLY: "read; writes are ignored",
    Access.WRITE_ONLY: "write; reads 0",
    Access.READ_CLEARS: "read clears it; write stores",
}


@dataclass(frozen=True, slots=True)
class Field:
    """Some bits of a register.

    Parameters
    ----------
    name
        The specification's name.
    high, low
        First and last bit, 31 to 0.
    meaning
        One line for people.
    values
        Words for particular values.
    """

    name: str
    high: int
    low: int
    meaning: str
    values: tuple[tuple[int, str], ...] = ()

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return (1 << self.high + 1) - (1 << self.low)

    def extract(self, word: int) -> int:
        """Return the field's value in a register's 32 bits."""
        return (word & self.mask) >> self.low

    def describe(self, word: int | None) -> str:
        """Say what the field holds in a register's 32 bits, None for one that cannot be read."""
        bits = f"[{self.high}]" if self.high == self.low else f"[{self.high}:{self.low}]"
        if word is None:
            return f"{bits} {self.name}: {self.meaning}"
        value = self.extract(word)
        words = dict(self.values).get(value)
        return f"{bits} {self.name} = {value}{f' ({words})' if words else ''}: {self.meaning}"


@dataclass(frozen=True, slots=True)
class Register:
    """One 32-bit register.

    Parameters
    ----------
    name
        The specification's name.
    offset
        Bytes from the start of BAR 0.
    access
        What reading and writing do.
    meaning
        One line for people.
    fields
        Its parts, highest bits first.
    """

    name: str
    offset: int
    access: Access
    meaning: str
    fields: tuple[Field, ...] = ()

    def describe(self, word: int) -> list[str]:
        """Say in lines what the register is and what it holds."""
        hidden = self.access is Access.WRITE_ONLY
        shown = "        --" if hidden else f"0x{word:08x}"
        first = f"{self.offset:#04x} {self.name:<10} {self.access.value} {shown}  {self.meaning}"
        return [first, *(f"     {field.describe(None if hidden else word)}" for field in self.fields)]


NO_ID = 0xFFFFFFFF
"""What IVPosition reads while a device of revision 0 has no memory yet."""

_INTX = ((0, "off"), (1, "on"))
INT_MASK = Register(
    "IntrMask",
    0x00,
    Access.READ_WRITE,
    "INTx mask; stored and without effect in revision 1",
    (Field("mask", 31, 0, "revision 0: the line is raised while IntrStatus & IntrMask is not 0", _INTX),),
)
INT_STATUS = Register(
    "IntrStatus",
    0x04,
    Access.READ_CLEARS,
    "INTx status; reading clears it",
    (Field("status", 31, 0, "revision 0: 1 after a peer rang, whichever vector", ((0, "nothing"), (1, "rung"))),),
)
IV_POSITION = Register(
    "IVPosition",
    0x08,
    Access.READ_ONLY,
    "own peer id; 0 on ivshmem-plain",
    (Field("id", 31, 0, "who we are on the server: 0 to 65535", ((NO_ID, "no memory attached yet"),)),),
)
DOORBELL = Register(
    "Doorbell",
    0x0C,
    Access.WRITE_ONLY,
    "peer id in bits 31..16, vector in bits 15..0",
    (Field("peer", 31, 16, "id of the peer to interrupt"), Field("vector", 15, 0, "which of its vectors")),
)

BAR0_REGISTERS = (INT_MASK, INT_STATUS, IV_POSITION, DOORBELL)
BAR0_BYTES = 256


class RegisterFile:
    """The values of some registers, read and written as each one's access says.

    Parameters
    ----------
    registers
        Which ones; their offsets are multiples of 4.

    Examples
    --------
    >>> file = RegisterFile(BAR0_REGISTERS)
    >>> file.write(INT_STATUS.offset, 5)
    >>> file.peek(INT_STATUS.offset), file.read(INT_STATUS.offset), file.read(INT_STATUS.offset)
    (5, 5, 0)
    """

    __slots__ = ("_clears", "_readable", "_stores", "_words", "registers")

    def __init__(self, registers: tuple[Register, ...]) -> None:
        self.registers = registers
        self._words: dict[int, int] = {register.offset: 0 for register in registers}
        self._readable = _offsets(registers, Access.READ_WRITE, Access.READ_ONLY, Access.READ_CLEARS)
        self._stores = _offsets(registers, Access.READ_WRITE, Access.READ_CLEARS)
        self._clears = _offsets(registers, Access.READ_CLEARS)

    def peek(self, offset: int) -> int:
        """Return what a 32-bit read would give, and change nothing."""
        return self._words[offset] if offset in self._readable else 0

    def read(self, offset: int) -> int:
        """Carry out a 32-bit read; 0 where no register is."""
        if offset not in self._readable:
            return 0
        word = self._words[offset]
        if offset in self._clears:
            self._words[offset] = 0
        return word

    def write(self, offset: int, word: int) -> None:
        """Carry out a 32-bit write; lost where nothing can be written."""
        if offset in self._stores:
            self._words[offset] = word

    def set(self, register: Register, word: int) -> None:
        """Put a value into a register from the device's side."""
        self._words[register.offset] = word

    def get(self, register: Register) -> int:
        """Return a register's value from the device's side."""
        return self._words[register.offset]

    def describe(self, meanings: Mapping[str, str] | None = None) -> list[str]:
        """Say in lines what the registers are and hold.

        Parameters
        ----------
        meanings
            What differs on this device, by a register's name.
        """
        lines = []
        for register in self.registers:
            meaning = (meanings or {}).get(register.name, register.meaning)
            named = Register(register.name, register.offset, register.access, meaning, register.fields)
            lines += named.describe(self._words[register.offset])
        return lines


def _offsets(registers: Iterable[Register], *kinds: Access) -> frozenset[int]:
    return frozenset(register.offset for register in registers if register.access in kinds)


def document(registers: Iterable[Register] = BAR0_REGISTERS) -> str:
    """Return the registers as a table in Markdown, for the documentation.

    >>> print(document().splitlines()[0])
    | offset | register | access | bits | meaning |
    """
    lines = ["| offset | register | access | bits | meaning |", "|---|---|---|---|---|"]
    for register in registers:
        lines.append(
            f"| {register.offset:#04x} | {register.name} | {register.access.value}: {register.access.meaning} "
            f"| | {register.meaning} |"
        )
        lines += [f"| | | | {field.high}..{field.low} {field.name} | {field.meaning} |" for field in register.fields]
    return "\n".join(lines)
