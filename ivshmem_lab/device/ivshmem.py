"""The ivshmem device, revision 1: ``ivshmem-plain`` and ``ivshmem-doorbell``.

Ref: QEMU ``docs/specs/ivshmem-spec.txt``, sections "Device interface" and "PCI device registers".
What an access of another width does was measured on QEMU 7.2, whose registers are 4 bytes wide:

1. A narrow read at a register's first byte gives its low bytes, elsewhere 0 without a side effect.
2. A narrow write anywhere in a register replaces the whole register by the small value.
3. Eight bytes are two accesses, low one first; unaligned reads are put together from aligned ones.

The doorbell's vector has 16 bits here, as the specification says. QEMU's slow path looks at 8 of them: with
``quirks="qemu-7.2"`` ours does so, too, and then ``ioeventfd`` tells which path a write takes.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ..errors import DeviceError, UsageError
from ..units import check_memory_size
from .effects import Effects, RingDoorbell
from .msix import CAPABILITY_BYTES, Msix
from .pci import CAPABILITIES, COMMAND_MASTER, QUMRANET_VENDOR, STATUS_CAPABILITIES, Bar, PciFunction
from .registers import BAR0_BYTES, BAR0_REGISTERS, DOORBELL, INT_MASK, INT_STATUS, IV_POSITION, RegisterFile

IVSHMEM_DEVICE = 0x1110
CLASS_MEMORY_RAM = 0x0500
MSIX_CAPABILITY = 0x40
MSIX_CONTROL = MSIX_CAPABILITY + 2

REGISTERS_BAR = 0
MSIX_BAR = 1
MEMORY_BAR = 2


QUIRKS = ("none", "qemu-7.2")
"""Whose deviations from the specification a device shows."""


def _width(offset: int, size: int) -> int:
    """Return how wide the first naturally aligned piece of an access is, 4 bytes at most."""
    width = 4 if size >= 4 else 2 if size >= 2 else 1
    while offset & width - 1:
        width >>= 1
    return width


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
    ioeventfd
        An exact write of 4 bytes to the doorbell rings directly; False: through the register. They differ with
        quirks only.
    quirks
        ``"none"``: as the specification says. ``"qemu-7.2"``: the register path looks at 8 bits of the vector.

    Raises
    ------
    UsageError
        When a BAR cannot show that size, or there are no such quirks.
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

    attached = True
    """The shared memory is there."""
    REVISION = 1
    PIN = 0
    MEANINGS: ClassVar[dict[str, str]] = {}
    """What registers mean on this personality, where it differs."""

    def __init__(
        self,
        memory_bytes: int,
        *,
        vectors: int = 0,
        peer_id: int = 0,
        ioeventfd: bool = True,
        quirks: str = "none",
        use64: bool = True,
    ) -> None:
        check_memory_size(memory_bytes, "ivshmem memory")
        if quirks not in QUIRKS:
            raise UsageError(f"quirks {quirks!r} do not exist; there are {', '.join(QUIRKS)}")
        if not 0 <= peer_id <= 0xFFFF:
            raise DeviceError(f"peer id {peer_id} is out of range: 0 to 65535")
        self.msix = Msix(vectors, MSIX_BAR) if vectors else None
        bars = [
            Bar(REGISTERS_BAR, BAR0_BYTES),
            Bar(MEMORY_BAR, memory_bytes, is_64bit=use64, prefetchable=True),
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
            self._model(),
            vendor=QUMRANET_VENDOR,
            device=IVSHMEM_DEVICE,
            class_code=CLASS_MEMORY_RAM,
            revision=self.REVISION,
            interrupt_pin=self.PIN,
            status=STATUS_CAPABILITIES if self.msix else 0,
            bars=tuple(bars),
            initial=initial,
            writable=writable,
        )
        self.memory_bytes = memory_bytes
        self.ioeventfd = ioeventfd
        self.quirks = quirks
        self._slow_vectors = 0xFF if quirks == "qemu-7.2" else 0xFFFF
        self._exact_vectors = 0xFFFF if ioeventfd else self._slow_vectors
        self.registers = RegisterFile(BAR0_REGISTERS)
        self.registers.set(IV_POSITION, peer_id)
        self.peers: dict[int, int] = {}
        """Vectors of every peer that can be rung, own ones included, by peer id."""

    def _model(self) -> str:
        return "ivshmem-doorbell" if self.msix else "ivshmem-plain"

    @property
    def peer_id(self) -> int:
        """What IVPosition reads."""
        return self.registers.get(IV_POSITION)

    @property
    def int_mask(self) -> int:
        """What IntrMask holds."""
        return self.registers.get(INT_MASK)

    @property
    def int_status(self) -> int:
        """What IntrStatus holds; looking does not clear it."""
        return self.registers.get(INT_STATUS)

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
        if size == 4 and not offset & 3:
            return self._read_register(offset)
        value = shift = 0
        while size:
            width = _width(offset, size)
            if not offset & 3:
                value |= (self._read_register(offset) & ((1 << 8 * width) - 1)) << shift
            offset, size, shift = offset + width, size - width, shift + 8 * width
        return value

    def _read_register(self, offset: int) -> int:
        return self.registers.read(offset)

    def peek(self, offset: int) -> int:
        """Return what a 4-byte read of BAR 0 would give, and change nothing: IntrStatus is not cleared."""
        return self.registers.peek(offset)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> Effects:
        """Write 1, 2, 4 or 8 bytes of BAR 0 or BAR 1.

        Returns
        -------
        Effects
            `RingDoorbell` for a doorbell of a known peer and vector, `SendMsi` for an unmasked pending vector.
        """
        if bar == MSIX_BAR and self.msix:
            return self._gate(self.msix.write(offset, size, value))
        if size == 4 and not offset & 3:
            return self._write_register(offset, value, self._exact_vectors)
        effects: Effects = ()
        while size:
            width = _width(offset, size)
            piece = value & ((1 << 8 * width) - 1)
            # Only a write of exactly 4 bytes is an exact match; the pieces of another go through the register.
            effects += self._write_register(offset & ~3, piece, self._slow_vectors)
            value >>= 8 * width
            offset, size = offset + width, size - width
        return effects

    def _write_register(self, offset: int, value: int, vector_mask: int) -> Effects:
        if offset == DOORBELL.offset:
            peer_id, vector = value >> 16, value & 0xFFFF
            known = self.peers.get(peer_id, 0)
            # The exact match is tried first, and knows all vectors; what it does not know takes the register path.
            if vector >= known:
                vector &= self._slow_vectors
            else:
                vector &= vector_mask
            return (RingDoorbell(peer_id, vector),) if self._rings and vector < known else ()
        self.registers.write(offset, value)
        return ()

    @property
    def _rings(self) -> bool:
        """Tell whether the doorbell rings anybody."""
        return self.msix is not None

    def _config_written(self, offset: int, size: int) -> Effects:
        if self.msix and offset < MSIX_CONTROL + 2 and offset + size > MSIX_CONTROL:
            control = int.from_bytes(self._config[MSIX_CONTROL : MSIX_CONTROL + 2], "little")
            return self._gate(self.msix.control_written(control))
        return ()

    def snapshot_identity(self) -> dict[str, Any]:
        """Return what must be the same on a device that takes over a snapshot of this one."""
        vectors = self.msix.vectors if self.msix else 0
        return {**super().snapshot_identity(), "memory_bytes": self.memory_bytes, "vectors": vectors}

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values that JSON can hold; id and peers are the server's to give.

        Returns
        -------
        dict
            ``version``, ``model``, ``memory_bytes``, ``vectors``, ``config`` (hexadecimal), ``int_mask``, ``int_status``,
            and ``msix`` (``vectors``, ``table`` and ``pending``, hexadecimal) or None.
        """
        return {
            **self.snapshot_identity(),
            **super().snapshot(),
            "int_mask": self.int_mask,
            "int_status": self.int_status,
            "msix": self.msix.snapshot() if self.msix else None,
        }

    def restore(self, state: dict[str, Any]) -> Effects:
        """Take over what `snapshot` returned; vectors that pend and are not masked are sent.

        Raises
        ------
        SnapshotMismatchError
            When model, memory size or vectors are others; nothing has changed then.
        DeviceError
            When it is damaged.
        """
        effects = super().restore(state)
        self.registers.set(INT_MASK, state["int_mask"] & 0xFFFFFFFF)
        self.registers.set(INT_STATUS, state["int_status"] & 0xFFFFFFFF)
        if self.msix:
            self.msix.restore(state["msix"])
            effects += self._config_written(MSIX_CONTROL, 2)
        return effects

    def reset(self) -> Effects:
        """Reset registers, MSI-X and header; id, peers, memory and the bytes behind the capabilities stay (QEMU 7.2)."""
        self.registers.set(INT_MASK, 0)
        self.registers.set(INT_STATUS, 0)
        if self.msix:
            self.msix.reset()
        free = MSIX_CAPABILITY + (CAPABILITY_BYTES if self.msix else 0)
        kept = self._config[free:]
        effects = super().reset()
        self._config[free:] = kept
        return effects

    def __repr__(self) -> str:
        """Show the registers with their fields, values and meanings: the device as a lesson."""
        identity = f"{self.name}, revision {self.REVISION}, {self.memory_bytes} bytes"
        lines = [identity, *(f"  {line}" for line in self.registers.describe(self.MEANINGS))]
        if self.msix:
            lines.append(f"  {self.msix.describe()}")
        else:
            lines.append(f"  {self._interrupts()}")
        lines += [self._describe_bar(index) for index in sorted(self.bars)]
        who = ", ".join(f"{peer} ({vectors})" for peer, vectors in sorted(self.peers.items()))
        lines.append(f"  peers that can be rung (vectors): {who or 'none'}")
        return "\n".join(lines)

    def _interrupts(self) -> str:
        return "no interrupts: this personality has no MSI-X"

    def _describe_bar(self, index: int) -> str:
        bar, address = self.bars[index], self.mapped.get(index)
        kind = {REGISTERS_BAR: "registers", MSIX_BAR: "MSI-X table and pending bits", MEMORY_BAR: "shared memory"}[
            index
        ]
        place = "not visible" if address is None else f"at {address:#x}"
        return f"  BAR {index}: {kind}, {bar.size_bytes} bytes, {place}"
