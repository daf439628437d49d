"""The functions of the Q35 chipset: host bridge (MCH) and the ICH9's LPC, SATA and SMBus functions.

Identities, read-only bytes and write masks are those that QEMU 7.2 ``-machine q35`` shows at reset. Only the
configuration space is there: no ECAM window (PCIEXBAR is remembered), no disks, no SMBus.
"""

from __future__ import annotations

from ..device.pci import STATUS_CAPABILITIES, Bar, PciFunction
from .hostbridge import INTEL

_REST = {0x3F: b"\x00" + b"\xff" * 0xC0}
"""Everything behind the header; what does not apply is taken out of it."""


def chipset() -> list[tuple[int, int, PciFunction]]:
    """Return the functions that every ``-machine q35`` has: (slot, function number, function)."""
    return [
        (
            0,
            0,
            PciFunction(
                "mch",
                vendor=INTEL,
                device=0x29C0,
                class_code=0x0600,
                initial={0x50: b"\x10", 0x63: b"\xb0", 0x9D: b"\x02\x38"},
                writable={**_REST, 0x50: b"\x10\x00", 0x9C: b"\x00\x20\x00"},
            ),
        ),
        (
            31,
            0,
            PciFunction(
                "ICH9-LPC",
                vendor=INTEL,
                device=0x2918,
                revision=2,
                class_code=0x0601,
                header_type=0x80,
                initial={0x40: b"\x01", 0x60: b"\x80" * 4, 0x68: b"\x80" * 4},
                writable={**_REST, 0x40: b"\x87\xff\x00\x00", 0xA0: b"\xef"},
            ),
        ),
        (
            31,
            2,
            PciFunction(
                "ich9-ahci",
                vendor=INTEL,
                device=0x2922,
                revision=2,
                class_code=0x0106,
                prog_if=1,
                header_type=0x80,
                status=STATUS_CAPABILITIES,
                interrupt_pin=1,
                bars=(Bar(4, 32, is_io=True), Bar(5, 4096)),
                initial={0x34: b"\x80", 0x80: b"\x05\xa8\x80", 0x90: b"\x40", 0xA8: b"\x12\x00\x10\x00\x48"},
                writable={**_REST, 0x80: b"\x00\x00\x01\x00\xfc", 0xA8: bytes(8)},
            ),
        ),
        (
            31,
            3,
            PciFunction(
                "ICH9-SMB",
                vendor=INTEL,
                device=0x2930,
                revision=2,
                class_code=0x0C05,
                header_type=0x80,
                interrupt_pin=1,
                bars=(Bar(4, 64, is_io=True),),
                writable={**_REST, 0x40: b"\xf7"},
            ),
        ),
    ]
