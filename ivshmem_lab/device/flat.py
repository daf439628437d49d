"""``ivshmem-flat``: the device without PCI, for microcontroller-like guests.

Ref: QEMU 10.0 and later, ``hw/misc/ivshmem-flat.c`` and ``docs/system/devices/ivshmem-flat.rst``: four registers in
16 bytes and the shared memory lie at fixed addresses; one interrupt line is pulsed for any vector, so that a
guest does not learn which one was rung. Register accesses are 4 bytes wide inside, as on the PCI device.

Where QEMU's code goes wrong, ours does not:

1. A doorbell is heeded only for vectors that the peer has (QEMU indexes 64 entries with up to 65535).
2. Each vector's event is cleared with its own eventfd (QEMU clears vector 0's for all, and then spins).
3. A peer that leaves without ever having come changes nothing (QEMU adds it first), nor does our own id leaving
   (QEMU frees memory that is part of the device).
4. The protocol version is checked, and a server that goes away ends nothing (QEMU exits).
5. `snapshot` and `restore`: QEMU has no migration state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import DeviceError, SnapshotMismatchError, UsageError
from ..units import parse_size
from .effects import RingDoorbell
from .registers import DOORBELL, INT_MASK, INT_STATUS, IV_POSITION, Access, Register

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL = "ivshmem-flat"
REGISTERS_BYTES = 16
PAGE_BYTES = 4096
MOST_VECTORS = 64
"""Vectors that QEMU's device takes from its server; further ones are closed."""
SNAPSHOT_VERSION = 1

REGISTERS = (
    Register(INT_MASK.name, INT_MASK.offset, Access.READ_ONLY, "reads 0; writes are ignored"),
    Register(INT_STATUS.name, INT_STATUS.offset, Access.READ_ONLY, "reads 0; writes are ignored"),
    Register(IV_POSITION.name, IV_POSITION.offset, Access.READ_ONLY, "own peer id; 0 without a server"),
    DOORBELL,
)


class PulseInterrupt(NamedTuple):
    """Raise the interrupt line and lower it again."""


FlatEffects = tuple[RingDoorbell | PulseInterrupt, ...]

NO_SERVER = "ivshmem server socket not specified or incorret. Can't create device."
SIZE_DIFFERS = "Can't map shmem fd: shmem size different from device size!"
"""QEMU's own words, with its spelling: people search for them."""


@dataclass(frozen=True, slots=True)
class FlatProperties:
    """QEMU's properties of ``ivshmem-flat`` that say where it lies.

    Parameters
    ----------
    shmem_size
        Bytes of shared memory; the server's must be the same.
    x_bus_address_iomem, x_bus_address_shmem
        Addresses of the registers and of the memory. The defaults are QEMU's.

    Raises
    ------
    UsageError
        When an address or size does not fit.

    Examples
    --------
    >>> FlatProperties.parse({"x-bus-address-shmem": "0x60000000", "shmem-size": "64K"}).shmem_size
    65536
    """

    shmem_size: int = 4 << 20
    x_bus_address_iomem: int = 0x400FF000
    x_bus_address_shmem: int = 0x40100000

    def __post_init__(self) -> None:
        if self.shmem_size <= 0 or self.shmem_size % PAGE_BYTES:
            raise UsageError(f"shmem-size={self.shmem_size} is no multiple of {PAGE_BYTES} bytes above 0")
        if not 0 <= self.x_bus_address_iomem < 1 << 52 or self.x_bus_address_iomem % REGISTERS_BYTES:
            raise UsageError(
                f"x-bus-address-iomem={self.x_bus_address_iomem:#x} is no multiple of {REGISTERS_BYTES} below 2^52"
            )
        if not 0 <= self.x_bus_address_shmem < 1 << 52 or self.x_bus_address_shmem % PAGE_BYTES:
            raise UsageError(
                f"x-bus-address-shmem={self.x_bus_address_shmem:#x} is no multiple of {PAGE_BYTES} below 2^52"
            )

    @classmethod
    def parse(cls, properties: Mapping[str, int | str]) -> FlatProperties:
        """Read properties by QEMU's names: ``shmem-size``, ``x-bus-address-iomem``, ``x-bus-address-shmem``."""
        values: dict[str, int] = {}
        for name, value in properties.items():
            field = name.replace("-", "_")
            if field not in cls.__slots__:
                known = ", ".join(slot.replace("_", "-") for slot in cls.__slots__)
                raise UsageError(f"Property '{MODEL}.{name}' not found; there are {known}")
            try:
                if name == "shmem-size":
                    values[field] = parse_size(value, name)
                else:
                    values[field] = int(value, 0) if isinstance(value, str) else int(value)
            except UsageError:
                raise
            except (TypeError, ValueError):
                raise UsageError(f"{name}={value!r} is no number; give an address such as 0x400FF000") from None
        return cls(**values)

    def check_memory(self, size_bytes: int) -> None:
        """Refuse memory of another size.

        Raises
        ------
        DeviceError
            In QEMU's words, with the two sizes and the remedy.
        """
        if size_bytes != self.shmem_size:
            raise DeviceError(
                f"{SIZE_DIFFERS} The memory has {size_bytes} bytes and the device {self.shmem_size}; "
                f"say shmem-size={size_bytes}"
            )


class FlatIvshmem:
    """One ``ivshmem-flat`` as its guest sees it.

    Parameters
    ----------
    memory_bytes
        Size of the shared memory.
    peer_id
        What IVPosition reads.

    Raises
    ------
    DeviceError
        When the id is out of range.

    Examples
    --------
    >>> device = FlatIvshmem(4 << 20, peer_id=3)
    >>> device.read(8, 4)
    3
    >>> device.peer_vector(7, 0)
    >>> device.write(12, 4, 7 << 16 | 0)
    (RingDoorbell(peer_id=7, vector=0),)
    >>> device.interrupt(1)
    (PulseInterrupt(),)
    """

    name = MODEL

    def __init__(self, memory_bytes: int, *, peer_id: int = 0) -> None:
        if not 0 <= peer_id <= 0xFFFF:
            raise DeviceError(f"peer id {peer_id} is out of range: 0 to 65535")
        self.memory_bytes = memory_bytes
        self.peer_id = peer_id
        self.peers: dict[int, int] = {}
        """Vectors of every peer that can be rung, own ones included, by peer id."""

    # -- the server's side ---------------------------------------------------------------------------

    def peer_vector(self, peer_id: int, vector: int) -> None:
        """Learn that a vector of a peer (or of our own) can be rung."""
        self.peers[peer_id] = max(self.peers.get(peer_id, 0), vector + 1)

    def peer_left(self, peer_id: int) -> None:
        """Forget a peer; its doorbells are ignored from now on."""
        self.peers.pop(peer_id, None)

    def interrupt(self, vector: int) -> FlatEffects:
        """Take an event on one of our vectors: the line is pulsed, whichever it was."""
        del vector
        return (PulseInterrupt(),)

    # -- the guest's side ----------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes of the registers: away from a register's first byte they are 0."""
        if size == 8:
            return self.read(offset, 4) | self.read(offset + 4, 4) << 32
        return self.peer_id & (1 << 8 * size) - 1 if offset == IV_POSITION.offset else 0

    def write(self, offset: int, size: int, value: int) -> FlatEffects:
        """Write 1, 2, 4 or 8 bytes: a narrow write anywhere in the doorbell is a write of the small value.

        Returns
        -------
        FlatEffects
            `RingDoorbell` for a known peer and vector.
        """
        if size == 8:
            return self.write(offset, 4, value & 0xFFFFFFFF) + self.write(offset + 4, 4, value >> 32)
        peer_id, vector = value >> 16 & 0xFFFF, value & 0xFFFF
        if offset & ~3 == DOORBELL.offset and vector < self.peers.get(peer_id, 0):
            return (RingDoorbell(peer_id, vector),)
        return ()

    # -- state ---------------------------------------------------------------------------------------

    def reset(self) -> FlatEffects:
        """Reset: there is nothing to reset; id, peers and memory stay."""
        return ()

    def snapshot(self) -> dict[str, Any]:
        """Return the state as plain values: there is none but what must match; id and peers come from the server."""
        return {"version": SNAPSHOT_VERSION, "model": MODEL, "memory_bytes": self.memory_bytes}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `snapshot` returned.

        Raises
        ------
        SnapshotMismatchError
            When it is of another version, model or size; nothing has changed then.
        """
        mismatches = {
            name: (state.get(name), here) for name, here in self.snapshot().items() if state.get(name) != here
        }
        if mismatches:
            raise SnapshotMismatchError(self.name, mismatches)

    def __repr__(self) -> str:
        """Show the registers with their values and meanings: the device as a lesson."""
        lines = [f"{self.name}, {self.memory_bytes} bytes, peer id {self.peer_id}"]
        for register in REGISTERS:
            lines.extend(f"  {line}" for line in register.describe(self.read(register.offset, 4)))
        lines.append("  one interrupt line, pulsed for any vector")
        return "\n".join(lines)
