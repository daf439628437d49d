"""A PCI function's configuration space: header, write masks, BARs.

Ref: PCI Local Bus Specification 3.0, chapter 6 (configuration space) and 6.2.5 (base addresses).
Values and write masks that QEMU chooses were read from QEMU 7.2 (``-machine pc``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, SnapshotMismatchError
from ..units import is_power_of_two
from .effects import Effects, MapBar

if TYPE_CHECKING:
    from collections.abc import Mapping

SNAPSHOT_VERSION = 1
"""Of what `PciFunction.snapshot` returns, subclasses included."""
CONFIG_BYTES = 256
ADDRESS_LIMIT = 1 << 46
"""The physical addresses of common x86 CPUs end here; the Unicorn engine's at 2^52 (measured, 2.1.4)."""
COMMAND = 0x04
STATUS = 0x06
BAR0 = 0x10
SUBSYSTEM = 0x2C
CAPABILITIES = 0x34
INTERRUPT_LINE = 0x3C

COMMAND_IO = 0x0001
COMMAND_MEMORY = 0x0002
COMMAND_MASTER = 0x0004
COMMAND_SERR = 0x0100
COMMAND_INTX_DISABLE = 0x0400
COMMAND_WRITABLE = 0x0507
"""IO, MEMORY, MASTER, SERR and INTx disable: what QEMU 7.2 lets software set."""

STATUS_INTERRUPT = 0x0008
STATUS_CAPABILITIES = 0x0010

QUMRANET_VENDOR = 0x1AF4
QEMU_SUBSYSTEM = 0x1100


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register.

    Parameters
    ----------
    index
        0 to 5; a 64-bit BAR also takes the next one.
    size_bytes
        Power of two, 16 or more (4 for I/O).
    is_64bit, prefetchable, is_io
        The type bits that software reads.
    """

    index: int
    size_bytes: int
    is_64bit: bool = False
    prefetchable: bool = False
    is_io: bool = False

    @property
    def type_bits(self) -> int:
        """The read-only low bits."""
        if self.is_io:
            return 0x1
        return (0x4 if self.is_64bit else 0) | (0x8 if self.prefetchable else 0)

    @property
    def offset(self) -> int:
        """Byte offset in configuration space."""
        return BAR0 + 4 * self.index


class PciFunction:
    """One PCI function: 256 bytes of configuration space and up to six BARs.

    Parameters
    ----------
    name
        The device model, for people and for QMP.
    vendor, device, revision, class_code
        The identity; ``class_code`` has 16 bits (class and subclass).
    subsystem
        Subsystem id under vendor 0x1af4.
    prog_if, header_type
        More of the header.
    bars
        The BARs, any order.
    interrupt_pin
        0 for none, 1 for INTA.
    initial
        Further bytes at power-on, ``{offset: bytes}``; read-only unless in `writable`.
    writable
        Write masks of further bytes, ``{offset: bytes}``.

    Raises
    ------
    DeviceError
        When a BAR's size is not a power of two.
    """

    def __init__(
        self,
        name: str,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        prog_if: int = 0,
        header_type: int = 0,
        status: int = 0,
        subsystem: int = QEMU_SUBSYSTEM,
        bars: tuple[Bar, ...] = (),
        interrupt_pin: int = 0,
        initial: Mapping[int, bytes] | None = None,
        writable: Mapping[int, bytes] | None = None,
    ) -> None:
        self.name = name
        self.bars = {bar.index: bar for bar in bars}
        self.mapped: dict[int, int] = {}
        """Address of every BAR that is visible now, by index."""
        self._initial = bytearray(CONFIG_BYTES)
        self._mask = bytearray(CONFIG_BYTES)
        self._put(0x00, vendor, 2)
        self._put(0x02, device, 2)
        self._put(STATUS, status, 2)
        self._put(0x08, revision, 1)
        self._put(0x09, prog_if, 1)
        self._put(0x0A, class_code, 2)
        self._put(0x0E, header_type, 1)
        self._put(SUBSYSTEM, QUMRANET_VENDOR, 2)
        self._put(SUBSYSTEM + 2, subsystem, 2)
        self._put(INTERRUPT_LINE + 1, interrupt_pin, 1)
        self._allow(COMMAND, COMMAND_WRITABLE, 2)
        self._allow(0x0C, 0xFF, 1)
        self._allow(INTERRUPT_LINE, 0xFF, 1)
        for bar in bars:
            if not is_power_of_two(bar.size_bytes):
                raise DeviceError(f"{name}: BAR {bar.index} of {bar.size_bytes} bytes is not a power of two")
            width = 8 if bar.is_64bit else 4
            self._put(bar.offset, bar.type_bits, width)
            self._allow(bar.offset, -bar.size_bytes & ((1 << 8 * width) - 1), width)
        for offset, data in (initial or {}).items():
            self._initial[offset : offset + len(data)] = data
        for offset, data in (writable or {}).items():
            self._mask[offset : offset + len(data)] = data
        self._config = bytearray(self._initial)
        self.command = 0
        """The command register; kept apart since every interrupt looks at it."""

    def _put(self, offset: int, value: int, width: int) -> None:
        self._initial[offset : offset + width] = value.to_bytes(width, "little")

    def _allow(self, offset: int, mask: int, width: int) -> None:
        self._mask[offset : offset + width] = mask.to_bytes(width, "little")

    def config_bytes(self) -> bytes:
        """Return the whole configuration space, 256 bytes."""
        return bytes(self._config)

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values that JSON can hold; ``version`` says how to read them."""
        return {"version": SNAPSHOT_VERSION, "model": self.name, "config": self._config.hex()}

    def restore(self, state: dict[str, Any]) -> Effects:
        """Take over what `snapshot` returned: only bits that a guest can write.

        Raises
        ------
        SnapshotMismatchError
            When it is a snapshot of another device or another version; nothing has changed then.
        DeviceError
            When other bits differ.
        """
        self._check_same(state)
        config = bytes.fromhex(state["config"])
        for offset, (new, own, mask) in enumerate(zip(config, self._initial, self._mask, strict=True)):
            if (new ^ own) & ~mask and offset not in (COMMAND, COMMAND + 1):
                raise DeviceError(f"{self.name}: configuration byte {offset:#x} is {new:#x} there and {own:#x} here")
        self._config[:] = config
        self.command = int.from_bytes(self._config[COMMAND : COMMAND + 2], "little")
        return self._remap()

    def _check_same(self, state: dict[str, Any]) -> None:
        """Refuse a snapshot of another device, by name."""
        expected = self.snapshot_identity()
        there = {what: state.get(what) for what in expected}
        mismatches = {what: (there[what], here) for what, here in expected.items() if there[what] != here}
        if mismatches:
            raise SnapshotMismatchError(self.name, mismatches)

    def snapshot_identity(self) -> dict[str, Any]:
        """Return what must be the same on a device that takes over a snapshot of this one."""
        return {"version": SNAPSHOT_VERSION, "model": self.name}

    def read_config(self, offset: int, size: int) -> int:
        """Read `size` bytes (1, 2 or 4) at `offset`; beyond the end reads ones."""
        data = self._config[offset : offset + size]
        return int.from_bytes(data.ljust(size, b"\xff"), "little")

    def write_config(self, offset: int, size: int, value: int) -> Effects:
        """Write `size` bytes at `offset` through the write masks.

        Returns
        -------
        Effects
            `MapBar` for each BAR that came, went or moved, and what a capability adds.
        """
        for index in range(offset, min(offset + size, CONFIG_BYTES)):
            mask = self._mask[index]
            byte = value >> 8 * (index - offset) & 0xFF
            self._config[index] = (self._config[index] & ~mask) | (byte & mask)
        self.command = int.from_bytes(self._config[COMMAND : COMMAND + 2], "little")
        return self._remap() + self._config_written(offset, size)

    def _config_written(self, offset: int, size: int) -> Effects:
        """Let a subclass act on its capabilities."""
        return ()

    def bar_address(self, index: int) -> int | None:
        """Return where a BAR is visible by its registers, or None when it decodes nothing.

        None while decoding is off, at address 0, beyond what a CPU reaches, and at all ones below 4 GiB:
        that is a driver that asks for the size, and no memory ever lies there. (QEMU shows a 64-bit BAR for
        a moment; mapping gigabytes twice for nothing is a price that only an emulator pays.)
        """
        bar = self.bars[index]
        if not self.command & (COMMAND_IO if bar.is_io else COMMAND_MEMORY):
            return None
        width = 8 if bar.is_64bit else 4
        raw = int.from_bytes(self._config[bar.offset : bar.offset + width], "little")
        address = raw & -bar.size_bytes
        low_ones = -bar.size_bytes & 0xFFFFFFFF
        sizing = low_ones and raw >> 4 == low_ones >> 4
        return None if sizing or address == 0 or address + bar.size_bytes > ADDRESS_LIMIT else address

    def _remap(self) -> Effects:
        """Compare what the registers say with what is mapped; hide before showing."""
        hide: list[MapBar] = []
        show: list[MapBar] = []
        for index in self.bars:
            address = self.bar_address(index)
            old = self.mapped.get(index)
            if address == old:
                continue
            if old is not None:
                hide.append(MapBar(index, None))
                del self.mapped[index]
            if address is not None:
                show.append(MapBar(index, address))
                self.mapped[index] = address
        return (*hide, *show)

    def reset(self) -> Effects:
        """Return to power-on values (PCI 3.0, section 4.3.1)."""
        self._config[:] = self._initial
        self.command = int.from_bytes(self._config[COMMAND : COMMAND + 2], "little")
        return self._remap()

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """Read from a BAR that is registers; a function without registers reads ones."""
        del bar, offset
        return (1 << 8 * size) - 1

    def after_read(self) -> Effects:
        """Return what the last read of a BAR has changed, for functions with an interrupt pin."""
        return ()

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> Effects:
        """Write to a BAR that is registers."""
        del bar, offset, size, value
        return ()
