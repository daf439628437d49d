"""What a Linux guest is made of, as the user says it, and the machine that comes of it."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ...errors import UsageError
from ...units import MIB
from ..agent import PORT_NAME
from ..command import MACHINE_TYPES, Machine

if TYPE_CHECKING:
    import os

    from ..command import Connection

DEFAULT_MEMORY_BYTES = 128 * MIB
LEAST_MEMORY_BYTES = 96 * MIB
"""With 64 MiB the kernel panics while it unpacks itself (measured: Debian 6.1 cloud)."""

PORT_ROOM_BYTES = 1 << 30
"""Largest memory that can be plugged into a running guest.

Without it a device of 4 MiB gets no address for its BAR 2 (Linux 6.1: "can't assign; no space"): the firmware
(SeaBIOS of QEMU 7.2) opens a window of 2 MiB for an empty root port."""

_COMMAND_LINE = "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check"
_ACCELERATOR = "tcg,thread=multi,tb-size=32"
"""A translation buffer of 32 MiB boots as fast as the default of 1 GiB and takes less memory (measured)."""


class Cable:
    """A network cable between two Linux guests: a virtio-net card at each end, no host network involved.

    The first guest that takes it gets the address 10.77.0.1, the second one 10.77.0.2. Close it when both have started.
    """

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self._ends: list[socket.socket] = list(socket.socketpair())
        self._taken = 0

    def take(self) -> CableEnd:
        """Return an end for a guest.

        Raises
        ------
        UsageError
            Both are taken, or it is closed.
        """
        if not self._ends or self._taken == 2:
            raise UsageError("a cable has two ends, and both are taken, or it is closed; make a new Cable()")
        number, self._taken = self._taken, self._taken + 1
        return CableEnd(self._ends[number], self.addresses[number], number)

    def close(self) -> None:
        """Give our descriptors of it back; guests that have started keep theirs. May be repeated."""
        for end in self._ends:
            end.close()
        self._ends = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class CableEnd:
    """One end of a `Cable`."""

    sock: socket.socket
    address: str
    number: int


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """A Linux guest: ``lab.vm("alice", guest=LinuxGuest(…), emulator="qemu")``.

    ``guest="linux"`` is the same as ``LinuxGuest()``.

    Parameters
    ----------
    kernel, initrd
        Files of your own, both or neither; None for the cached image of this distribution. With your own, commands
        can be run when the initrd starts ``ivshmem-tool agent`` at the port named ``org.ivshmem_lab.agent``.
    append
        More words for the kernel's command line.
    cable
        A network cable to another guest.
    machine
        ``"q35"``, with an IOMMU for the interrupts of applications (VFIO); or ``"pc"``, without: memory and doorbells only, but
        devices of the start can be let go, too.
    """

    kernel: str | os.PathLike[str] | None = None
    initrd: str | os.PathLike[str] | None = None
    append: str = ""
    cable: Cable | None = None
    machine: str = "q35"

    def files(self) -> tuple[Path, Path] | None:
        """Return kernel and initrd of the user's own; None when there are none.

        Raises
        ------
        UsageError
            Only one is given, or a file is not there.
        """
        if self.kernel is None and self.initrd is None:
            return None
        if self.kernel is None or self.initrd is None:
            raise UsageError(
                "kernel and initrd of your own go together: the modules in the initrd belong to the kernel"
            )
        paths = Path(self.kernel), Path(self.initrd)
        for path in paths:
            if not path.is_file():
                raise UsageError(f"{str(path)!r} is no file; give a kernel (vmlinuz or vmlinux) and its initrd")
        return paths[0].absolute(), paths[1].absolute()


@dataclass(frozen=True, slots=True)
class LinuxMachine(Machine):
    """A machine for Linux; a q35 has an IOMMU that remaps interrupts, so that VFIO can give the device's vectors to an application."""

    cable: CableEnd | None = field(default=None, kw_only=True)

    def inherited_fds(self) -> tuple[int, ...]:
        """Return the network's descriptor."""
        return (self.cable.sock.fileno(),) if self.cable else ()


def linux_machine(
    name: str,
    guest: LinuxGuest,
    kernel: Path,
    initrd: Path,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    connections: tuple[Connection, ...] = (),
    append: str = "",
    root_ports: int = 0,
) -> LinuxMachine:
    """Return the machine for a guest; `append` adds words to the kernel's command line.

    Raises
    ------
    UsageError
        It has too little memory, or there is no such machine.
    """
    if guest.machine not in MACHINE_TYPES:
        raise UsageError(f"machine {guest.machine!r} is unknown; there are {', '.join(MACHINE_TYPES)}")
    if memory_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(
            f"{memory_bytes // MIB} MiB of memory is not enough for a Linux guest; give it {LEAST_MEMORY_BYTES // MIB}M or more"
        )
    end = guest.cable.take() if guest.cable else None
    is_q35 = guest.machine == "q35"
    words = [
        _COMMAND_LINE,
        "intel_iommu=on" if is_q35 else "",
        *([f"ivshmem_lab.address={end.address}/24"] if end else []),
        guest.append,
        append,
    ]
    # The IOMMU comes before the devices that it serves.
    platform = ["-device", "intel-iommu,intremap=on"] if is_q35 else []
    platform += ["-device", "virtio-serial-pci,id=agents", "-device", "pvpanic"]
    if end:
        platform += ["-netdev", f"socket,id=net,fd={end.sock.fileno()}"]
        platform += ["-device", f"virtio-net-pci,netdev=net,mac=52:54:00:77:00:0{end.number + 1},romfile="]
    return LinuxMachine(
        name,
        kernel=str(kernel),
        append=" ".join(word for word in words if word),
        memory_bytes=memory_bytes,
        connections=connections,
        machine=guest.machine,
        root_ports=root_ports,
        initrd=str(initrd),
        accelerator=_ACCELERATOR,
        platform=tuple(platform),
        ports=(PORT_NAME,),
        port_room=f"pref64-reserve={PORT_ROOM_BYTES}",
        cable=end,
    )
