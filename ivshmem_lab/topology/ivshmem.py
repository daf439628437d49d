"""One ivshmem device as a value: what the legacy and today's options of QEMU say between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Master(Enum):
    """Whether the device's memory moves with its machine (QEMU's property ``master``, type OnOffAuto)."""

    ON = "on"
    OFF = "off"
    AUTO = "auto"
    """On for the peer with id 0, and for memory without a server; off for the others."""


@dataclass(frozen=True, slots=True)
class IvshmemDevice:
    """A device with memory of one of three kinds.

    Attributes
    ----------
    shm
        Name of a POSIX shared memory object, without the leading slash: memory without a server.
    memdev
        Id of a memory backend that is described elsewhere.
    chardev
        Id of the character device that is connected to an ivshmem server.
    size_bytes
        Size of the memory; None where the format leaves it to the server or the backend.
    vectors
        Interrupt vectors; without a server it is 1 and says nothing.
    msix
        False for INTx: legacy ``msi=off``.
    ioeventfd
        Whether a doorbell rings without the emulator's help.
    master
        Whether the memory moves with the machine.
    bar_64bit
        Whether the memory's BAR has 64 bits.
    device_id
        ``id`` of the device.
    others
        Properties that every PCI device has, such as ``addr`` and ``bus``, in their order.
    """

    shm: str | None = None
    memdev: str | None = None
    chardev: str | None = None
    size_bytes: int | None = None
    vectors: int = 1
    msix: bool = True
    ioeventfd: bool = True
    master: Master = Master.AUTO
    bar_64bit: bool = True
    device_id: str | None = None
    others: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """How messages call the device."""
        source = next(
            f"{name}={value}"
            for name, value in (("shm", self.shm), ("memdev", self.memdev), ("chardev", self.chardev))
            if value is not None
        )
        return f"ivshmem device {self.device_id!r}" if self.device_id else f"ivshmem device with {source}"


@dataclass(frozen=True, slots=True)
class Note:
    """What a format could not say as the other one did.

    Attributes
    ----------
    code
        A short name for programs: ``"intx"``, ``"size"``, ``"use64"``, ``"memdev"``, ``"vectors"``, ``"revision"``.
    subject
        The device.
    text
        What is different now.
    remedy
        What to do about it.
    lost
        True when the guest or the user gets less than before; False for a remark.
    """

    code: str
    subject: str
    text: str
    remedy: str
    lost: bool = True

    def __str__(self) -> str:
        """Write it as one line."""
        return f"{self.subject}: {self.text}; {self.remedy}"
