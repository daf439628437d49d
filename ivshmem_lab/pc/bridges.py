"""PCI-to-PCI bridges: buses behind buses.

Ref: PCI-to-PCI Bridge Architecture Specification 1.1, section 3.2 (header type 1) and chapter 4 (windows). Identities,
read-only bytes and write masks are those of QEMU 7.2's ``pcie-root-port``, ``pcie-pci-bridge`` and ``pci-bridge``, read
from it. Their own MSI, MSI-X, standard hot-plug and power registers are only remembered: nothing happens there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..device.pci import COMMAND, COMMAND_MEMORY, STATUS_CAPABILITIES, SUBSYSTEM, Bar, PciFunction
from .hostbridge import PciBus

if TYPE_CHECKING:
    from ..device.effects import Effects

RED_HAT = 0x1B36
CLASS_BRIDGE = 0x0604
HEADER_TYPE = 1
PRIMARY, SECONDARY, SUBORDINATE = 0x18, 0x19, 0x1A
IO_WINDOW, MEMORY_WINDOW, PREFETCHABLE_WINDOW, PREFETCHABLE_UPPER = 0x1C, 0x20, 0x24, 0x28
CONTROL = 0x3E
BUS_RESET = 0x40

_HEADER_MASK = {0x18: b"\xff\xff\xff\xff\xf0\xf0", 0x20: b"\xf0\xff" * 4 + b"\xff" * 8}
_NO_SUBSYSTEM = {SUBSYSTEM: bytes(4)}


class PciBridge(PciFunction):
    """A bridge and the bus behind it.

    Parameters
    ----------
    name
        ``"pcie-root-port"``, ``"pcie-pci-bridge"`` or ``"pci-bridge"``.
    bus_name
        Name of the bus behind it: the bridge's id, as in QEMU.
    """

    def __init__(self, name: str, bus_name: str) -> None:
        device, bar, status, initial, writable = _KINDS[name]
        super().__init__(
            name,
            vendor=RED_HAT,
            device=device,
            class_code=CLASS_BRIDGE,
            header_type=HEADER_TYPE,
            status=status,
            bars=(bar,),
            interrupt_pin=1,
            initial={**_NO_SUBSYSTEM, **initial},
            writable={**_HEADER_MASK, **writable},
        )
        self.bus = PciBus(bus_name, self)
        self._resets = False
        self.chassis_slot = (0, 0)
        """Where the slot behind a root port is, for people: (chassis, slot)."""

    def write_config(self, offset: int, size: int, value: int) -> Effects:
        """Write through the masks; a bus reset that begins is told by `takes_reset`."""
        before = self.read_config(CONTROL, 1)
        effects = super().write_config(offset, size, value)
        self._resets |= bool(self.read_config(CONTROL, 1) & ~before & BUS_RESET)
        return effects

    def takes_reset(self) -> bool:
        """Tell, once, that software asked to reset the bus behind (section 3.2.5.18)."""
        resets, self._resets = self._resets, False
        return resets

    @property
    def numbers(self) -> range:
        """The bus numbers behind the bridge."""
        return range(self.read_config(SECONDARY, 1), self.read_config(SUBORDINATE, 1) + 1)

    def forwards(self, address: int, size_bytes: int) -> bool:
        """Tell whether memory accesses to these addresses reach the bus behind."""
        end = address + size_bytes
        windows = (self._window(MEMORY_WINDOW), self._window(PREFETCHABLE_WINDOW))
        return bool(self.command & COMMAND_MEMORY) and any(
            first <= address and end <= behind for first, behind in windows
        )

    @property
    def windows(self) -> dict[str, tuple[int, int]]:
        """First address and first one behind, of each window, with QMP's names."""
        first, last = self.read_config(IO_WINDOW, 1) & 0xF0, self.read_config(IO_WINDOW + 1, 1) & 0xF0
        return {
            "io_range": (first << 8, (last << 8) + 0x1000),
            "memory_range": self._window(MEMORY_WINDOW),
            "prefetchable_range": self._window(PREFETCHABLE_WINDOW),
        }

    def _window(self, offset: int) -> tuple[int, int]:
        """Return a window's first address and the first behind it (section 3.2.5.8)."""
        first = (self.read_config(offset, 2) & 0xFFF0) << 16
        behind = ((self.read_config(offset + 2, 2) & 0xFFF0) << 16) + (1 << 20)
        if offset == PREFETCHABLE_WINDOW:
            first |= self.read_config(PREFETCHABLE_UPPER, 4) << 32
            behind += self.read_config(PREFETCHABLE_UPPER + 4, 4) << 32
        return first, behind

    def open_window(self, first: int, behind: int, numbers: range) -> Effects:
        """Let a range of memory below 4 GiB through, and name the buses behind: the firmware's work."""
        effects = self.write_config(SECONDARY, 2, numbers.start | (numbers.stop - 1) << 8)
        effects += self.write_config(MEMORY_WINDOW, 4, first >> 16 | (behind - 1) >> 16 << 16)
        effects += self.write_config(PREFETCHABLE_WINDOW, 4, 0x0000FFF0)
        return effects + self.write_config(COMMAND, 2, 0x0107)


_PLUGS = Bar(0, 256, is_64bit=True)
_KINDS: dict[str, tuple[int, Bar, int, dict[int, bytes], dict[int, bytes]]] = {
    # device id, BAR 0, status, further bytes, further write masks
    "pcie-root-port": (
        0x000C,
        Bar(0, 4096),
        STATUS_CAPABILITIES,
        {
            0x1C: b"\xf0\x00",
            0x20: b"\xf0\xff\x00\x00\xf1\xff\x01\x00",
            0x34: b"\x54",
            0x40: bytes.fromhex("0d00 0000 361b 0000 1140 0000 0000 0000 0008 0000 1048 4201 0080 0000"),
            0x60: bytes.fromhex("0406 3000 0000 1100 7b00 0200 c001"),
            0x78: b"\x20\x00\x30",
            0x80: b"\x1e\x00\x00\x00\x04",
        },
        {
            CONTROL: b"\x5f\x00",
            0x4B: b"\xc0",
            0x5C: b"\x0f",
            0x6C: b"\xf9\x07",
            0x70: b"\x07",
            0x7C: b"\x20\x80",
            0x90: b"\xff" * 0x70,
        },
    ),
    "pcie-pci-bridge": (
        0x000E,
        _PLUGS,
        STATUS_CAPABILITIES | 0x00A0,
        {
            0x1E: b"\xa0\x00",
            0x24: b"\x01\x00\x01\x00",
            0x34: b"\x8c",
            0x40: bytes.fromhex("0c00 0000 0000 0000 1040 7200 0080 0000 0000 0000 1104 0000 0000 1100"),
            0x6C: b"\x20\x00\x30",
            0x84: b"\x01\x48\x03",
            0x8C: b"\x05\x84\x80\x01",
        },
        {
            CONTROL: b"\xff\x0b",
            0x42: b"\xff",
            0x50: b"\x0f",
            0x70: b"\x20\x80",
            0x8E: b"\x01",
            0x90: b"\xfc" + b"\xff" * 9 + b"\x00\x00\x01",
            0xA4: b"\xff" * 0x5C,
        },
    ),
    "pci-bridge": (
        0x0001,
        _PLUGS,
        STATUS_CAPABILITIES | 0x00A0,
        {
            0x1E: b"\xa0\x00",
            0x24: b"\x01\x00\x01\x00",
            0x34: b"\x4c",
            0x40: bytes.fromhex("0c00 0000 0000 0000 0440 2001 0548 8001"),
        },
        {
            CONTROL: b"\xff\x0b",
            0x42: b"\xff",
            0x4B: b"\xff",
            0x4E: b"\x01",
            0x50: b"\xfc" + b"\xff" * 9 + b"\x00\x00\x01",
            0x64: b"\xff" * 0x9C,
        },
    ),
}
BRIDGES = tuple(_KINDS)
"""The bridges there are."""
