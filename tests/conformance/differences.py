"""Where our machine answers otherwise than QEMU 7.2, and why: everything that the comparison leaves out.

Each entry is tested: it fails when the answers are others, or the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import accesses as do
from accesses import PLACES, Step


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes
    ----------
    name, reason
        For people.
    steps
        What shows it, with a device of two vectors placed by `accesses.PLACED`.
    ours, theirs
        The last line of the answer to the last step; empty where it depends on the firmware's version.
    quirk
        Our device answers as QEMU does with this ``x-quirks``.
    """

    name: str
    reason: str
    steps: tuple[Step, ...]
    ours: str
    theirs: str
    quirk: str | None = None


DIFFERENCES = [
    Difference(
        "doorbell vectors",
        "The specification gives the doorbell a vector of 16 bits; QEMU's slow path looks at 8 of them.",
        (
            do.config(0x42, 2, 0x8000),
            Step("ring vector 0x100", (f"writel {PLACES[0][0] + 12:#x} 0x100",), settles=True),
            do.pending(2),
        ),
        ours="OK 0x0000000000000000",
        theirs="OK 0x0100000000000000",
        quirk="qemu-7.2",
    ),
    Difference(
        "a BAR over another one",
        "Which of two overlapping BARs is seen is undefined; here the one that was there first, in QEMU the newer one.",
        (do.bar(0, 0, 4, 7), do.bar(2, 0, 4, 9), do.config(0x10, 4, PLACES[2][0]), do.memory(PLACES[2][0], 4)),
        ours="OK 0x09000000",
        theirs="OK 0x07000000",
    ),
    Difference(
        "a BAR above 2^46",
        "Physical addresses of common x86 CPUs end there; QEMU's memory does not, and the engine's ends at 2^52.",
        (do.bar(2, 0, 4, 7), do.config(0x1C, 4, 1 << 15), do.memory(1 << 47 | PLACES[2][0], 4)),
        ours="OK 0x00000000",
        theirs="OK 0x07000000",
    ),
    Difference(
        "registers of the local APIC",
        "QEMU shows them to the CPU only; here qtest sees them, too.",
        (do.memory(0xFEE00030, 4),),
        ours="OK 0x14000500",
        theirs="OK 0x00000000",
    ),
    Difference(
        "both edge/level registers at once",
        "The PIIX3's are two ports; in QEMU a word access goes to one of them twice.",
        (do.ports(0x4D0, 1, 8), do.ports(0x4D1, 1, 2), do.ports(0x4D0, 2)),
        ours="OK 0x0208",
        theirs="OK 0x0808",
    ),
    Difference(
        "firmware",
        "There is no firmware image here.",
        (do.memory(0xFFFFFFF0, 4),),
        ours="OK 0x00000000",
        theirs="OK 0xea5be000",
    ),
    Difference(
        "memory below 1 MiB",
        "QEMU has the firmware's image there until it opens the memory behind; here it is memory.",
        (do.memory(0xF0000, 4, 0x12345678), do.memory(0xF0000, 4)),
        ours="OK 0x78563412",
        theirs="",
    ),
    Difference(
        "DMA of the firmware configuration",
        "Bytes through the data port are enough for what little is in it.",
        (do.ports(0x514, 4),),
        ours="OK 0xffffffff",
        theirs="OK 0x554d4551",
    ),
]
