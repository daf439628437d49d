"""The registers of ivshmem's BAR 0, as data.

Ref: QEMU ``docs/specs/ivshmem-spec.txt`` ("Device Specification for Inter-VM shared memory device",
PCI device registers). Behaviour measured on QEMU 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Access(Enum):
    """How software may use a register."""

    READ_WRITE = "RW"
    READ_ONLY = "RO"
    WRITE_ONLY = "WO"
    READ_CLEARS = "RC"


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
    """

    name: str
    offset: int
    access: Access
    meaning: str


INT_MASK = Register("IntrMask", 0x00, Access.READ_WRITE, "INTx mask; stored and without effect in revision 1")
INT_STATUS = Register("IntrStatus", 0x04, Access.READ_CLEARS, "INTx status; reading clears it")
IV_POSITION = Register("IVPosition", 0x08, Access.READ_ONLY, "own peer id; 0 on ivshmem-plain")
DOORBELL = Register("Doorbell", 0x0C, Access.WRITE_ONLY, "peer id in bits 31..16, vector in bits 15..0")

BAR0_REGISTERS = (INT_MASK, INT_STATUS, IV_POSITION, DOORBELL)
BAR0_BYTES = 256
