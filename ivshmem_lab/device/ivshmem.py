"""The ivshmem device, revision 1: ``ivshmem-plain`` and ``ivshmem-doorbell``.

Ref: QEMU ``docs/specs/ivshmem-spec.txt``, sections "Device interface" and "PCI device registers".
What an access of another width does was measured on QEMU 7.2, whose registers are 4 bytes wide:

1. A narrow read at a register's first byte gives its low bytes, elsewhere 0 without a side effect.
2. A narrow write anywhere in a register replaces the whole register by the small value.
3. Eight bytes are two accesses, low one first; unaligned reads are put together from aligned ones.

The doorbell's vector has 16 bits here, as the specification says (QEMU's slow path looks at 8).
"""

from __future__ import annotations

from typing import Any

from ..errors import DeviceError
from ..units import check_memory_size
from .effects import Effects, RingDoorbell
from .msix import CAPABILITY_BYTES, Msix
from .pci import CAPABILITIES, COMMAND_MASTER, QUMRANET_VENDOR, STATUS_CAPABILITIES, Bar, PciFunction
from .registers import BAR0_BYTES, BAR0_REGISTERS, DOORBELL, INT_MASK, INT_STATUS, IV_POSITION, Access

IVSHMEM_DEVICE = 0x1110
CLASS_MEMORY_RAM = 0x0500
MSIX_CAPABILITY = 0x40
MSIX_CONTROL = MSIX_CAPABILITY + 2

REGISTERS_BAR = 0
MSIX_BAR = 1
MEMORY_BAR = 2


def _pieces(offset: int, size: int) -> list[tuple[int, int]]:
    """Cut an access into naturally aligned ones of at most 4 bytes, in order: (offset, width)."""
    pieces = []
    while size:
        width = min(4, 1 << size.bit_length() - 1, offset & -offset or 4)
        pieces.append((offset, width))
        offset, size = offset + width, size - width
    return pieces


class Ivshmem(PciFunction):
    """One ivshmem device as its guest sees it.

    Parameters
    ----------
    memory_bytes
        Size of the shared memory: a power of two, at least 4096.
    vectors
        0 makes an ``ivshmem-plain``; 1 to 2048 an ``ivshmem-doorbell`` with so many MSI-X vectors.
    peer_id
        What IVPosition reads.

    Raises
    ------
    UsageError
        When a BAR cannot show that size.
    DeviceError
        When the number of vectors is out of range.

    Examples
    --------
    >>> device = Ivshmem(1 << 20, vectors=2, peer_id=5)
    >>> device.read_bar(0, 8, 4)
    5
    >>> device.peer_vector(7, 0)
    >>> device.write_bar(0, 12, 4, 7 << 16 | 0)
    (RingDoorbell(peer_id=7, vector=0),)
    """

    def __init__(self, memory_bytes: int, *, vectors: int = 0, peer_id: int = 0) -> None:
        check_memory_size(memory_bytes, "ivshmem memory")
        if not 0 <= peer_id <= 0xFFFF:
            raise DeviceError(f"peer id {peer_id} is out of range: 0 to 65535")
        self.msix = Msix(vectors, MSIX_BAR) if vectors else None
        bars = [
            Bar(REGISTERS_BAR, BAR0_BYTES),
            Bar(MEMORY_BAR, memory_bytes, is_64bit=True, prefetchable=True),
        ]
        # QEMU leaves the bytes behind the header as plain read/write storage where no capability lies.
        initial: dict[int, bytes] = {}
        writable = {0x40: b"\xff" * 0xC0}
        if self.msix:
            bars.append(Bar(MSIX_BAR, self.msix.bar_bytes))
            initial = {CAPABILITIES: bytes([MSIX_CAPABILITY]), MSIX_CAPABILITY: self.msix.capability()}
            free = MSIX_CAPABILITY + CAPABILITY_BYTES
            writable = {MSIX_CONTROL: b"\x00\xc0", free: b"\xff" * (0x100 - free)}
        super().__init__(
            "ivshmem-doorbell" if self.msix else "ivshmem-plain",
            vendor=QUMRANET_VENDOR,
            device=IVSHMEM_DEVICE,
            class_code=CLASS_MEMORY_RAM,
            revision=1,
            status=STATUS_CAPABILITIES if self.msix else 0,
            bars=tuple(bars),
            initial=initial,
            writable=writable,
        )
        self.memory_bytes = memory_bytes
        self.peer_id = peer_id
        self.int_mask = 0
        self.int_status = 0
        self.peers: dict[int, int] = {}
        """Vectors of every peer that can be rung, own ones included, by peer id."""

    # -- the server's side ---------------------------------------------------------------------------

    def peer_vector(self, peer_id: int, vector: int) -> None:
        """Learn that a vector of a peer (or of our own) can be rung."""
        self.peers[peer_id] = max(self.peers.get(peer_id, 0), vector + 1)

    def peer_left(self, peer_id: int) -> None:
        """Forget a peer; its doorbells are ignored from now on."""
        self.peers.pop(peer_id, None)

    def interrupt(self, vector: int) -> Effects:
        """Take an event on one of our vectors.

        A message is lost, not pending, while the function may not master the bus (QEMU 7.2).
        """
        return self._gate(self.msix.notify(vector)) if self.msix else ()

    def _gate(self, effects: Effects) -> Effects:
        return effects if self.command & COMMAND_MASTER else ()

    # -- the guest's side ----------------------------------------------------------------------------

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of BAR 0 or BAR 1 (BAR 2 is memory and never comes here)."""
        if bar == MSIX_BAR and self.msix:
            return self.msix.read(offset, size)
        value = shift = 0
        for at, width in _pieces(offset, size):
            if at & 3 == 0:
                value |= (self._read_register(at) & ((1 << 8 * width) - 1)) << shift
            shift += 8 * width
        return value

    def _read_register(self, offset: int) -> int:
        if offset == INT_MASK.offset:
            return self.int_mask
        if offset == INT_STATUS.offset:
            status, self.int_status = self.int_status, 0
            return status
        if offset == IV_POSITION.offset:
            return self.peer_id
        return 0

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> Effects:
        """Write 1, 2, 4 or 8 bytes of BAR 0 or BAR 1.

        Returns
        -------
        Effects
            `RingDoorbell` for a doorbell of a known peer and vector, `SendMsi` for an unmasked pending vector.
        """
        if bar == MSIX_BAR and self.msix:
            return self._gate(self.msix.write(offset, size, value))
        if size == 4 and offset & 3 == 0:
            return self._write_register(offset, value)
        effects: Effects = ()
        for at, width in _pieces(offset, size):
            effects += self._write_register(at & ~3, value & ((1 << 8 * width) - 1))
            value >>= 8 * width
        return effects

    def _write_register(self, offset: int, value: int) -> Effects:
        if offset == DOORBELL.offset:
            peer_id, vector = value >> 16, value & 0xFFFF
            if self.msix and vector < self.peers.get(peer_id, 0):
                return (RingDoorbell(peer_id, vector),)
        elif offset == INT_MASK.offset:
            self.int_mask = value
        elif offset == INT_STATUS.offset:
            self.int_status = value
        return ()

    def _config_written(self, offset: int, size: int) -> Effects:
        if self.msix and offset < MSIX_CONTROL + 2 and offset + size > MSIX_CONTROL:
            control = int.from_bytes(self._config[MSIX_CONTROL : MSIX_CONTROL + 2], "little")
            return self._gate(self.msix.control_written(control))
        return ()

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values; id and peers are the server's to give."""
        state = {**super().snapshot(), "int_mask": self.int_mask, "int_status": self.int_status}
        return {**state, "msix": self.msix.snapshot()} if self.msix else state

    def restore(self, state: dict[str, Any]) -> Effects:
        """Take over what `snapshot` returned; vectors that pend and are not masked are sent."""
        effects = super().restore(state)
        self.int_mask, self.int_status = state["int_mask"] & 0xFFFFFFFF, state["int_status"] & 0xFFFFFFFF
        if self.msix:
            self.msix.restore(state["msix"])
            effects += self._config_written(MSIX_CONTROL, 2)
        return effects

    def reset(self) -> Effects:
        """Reset registers, MSI-X and configuration; id, peers and memory stay (QEMU 7.2)."""
        self.int_mask = self.int_status = 0
        if self.msix:
            self.msix.reset()
        return super().reset()

    def __repr__(self) -> str:
        """Show the registers with their values and meanings: the device as a lesson."""
        values = {
            INT_MASK: self.int_mask,
            INT_STATUS: self.int_status,
            IV_POSITION: self.peer_id,
            DOORBELL: 0,
        }
        lines = [f"{self.name}, {self.memory_bytes} bytes, peer id {self.peer_id}"]
        for register in BAR0_REGISTERS:
            shown = "        --" if register.access is Access.WRITE_ONLY else f"0x{values[register]:08x}"
            lines.append(
                f"  {register.offset:#04x} {register.name:<10} {register.access.value} {shown}  {register.meaning}"
            )
        if self.msix:
            state = "enabled" if self.msix.enabled else "disabled"
            lines.append(f"  MSI-X {self.msix.vectors} vectors, {state}, pending {self.msix.pending:#x}")
        for index, address in sorted(self.mapped.items()):
            lines.append(f"  BAR {index} at {address:#x}, {self.bars[index].size_bytes} bytes")
        return "\n".join(lines)
