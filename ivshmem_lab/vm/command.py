"""The command line of a virtual machine, in QEMU's words (QEMU manual, "Invocation")."""

from __future__ import annotations

from dataclasses import dataclass

from ..keyval import escape
from ..units import MIB

MACHINE_TYPES = ("pc", "q35")
"""i440FX with one conventional PCI bus, and Q35 with PCI Express (QEMU manual, ``-machine``)."""

INCOMING = ("-incoming", "defer")

DEBUG_EXIT_PORT = 0xF4
"""The guest writes V here and the process ends with status ``(V << 1) | 1`` (QEMU, ``isa-debug-exit``)."""


def boot_device_id(number: int) -> str:
    """Return the id of the device of a machine's connection, counted from 0."""
    return f"ivshmem{number}"


@dataclass(frozen=True, slots=True)
class Connection:
    """A device of the machine that joins an ivshmem server.

    Parameters
    ----------
    path
        The server's Unix socket.
    vectors
        MSI-X vectors of the device, 1 to 2048 (QEMU 7.2).
    """

    path: str
    vectors: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine is made of.

    Parameters
    ----------
    name
        Its name, for people.
    kernel
        A multiboot ELF; None starts the firmware alone (real QEMU).
    append
        The guest's command line.
    memory_bytes
        The guest's RAM, whole MiB.
    connections
        One ivshmem-doorbell device for each.
    machine
        ``"pc"`` or ``"q35"``.
    root_ports
        Root ports of a q35 machine, each of which takes one device later: nothing can be hot-plugged into
        ``pcie.0`` itself (QEMU 7.2).
    initrd
        The initial RAM disk of a Linux kernel.
    accelerator
        What runs the guest's instructions (QEMU manual, ``-accel``).
    platform
        Options that come before all devices.
    ports
        Names of virtio-serial ports, each with an inherited socket; they need a ``virtio-serial-pci`` in `platform`.
    port_room
        Property of the root ports that keeps room for the memory of what is plugged in later.
    """

    name: str
    kernel: str | None = None
    append: str = ""
    memory_bytes: int = 32 * MIB
    connections: tuple[Connection, ...] = ()
    machine: str = "pc"
    root_ports: int = 0
    initrd: str | None = None
    accelerator: str = "tcg"
    platform: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    port_room: str = ""

    def port_names(self) -> tuple[str, ...]:
        """Return the ids of the root ports, which are also the names of the buses behind them."""
        return tuple(f"rp{number}" for number in range(self.root_ports))

    def inherited_fds(self) -> tuple[int, ...]:
        """Return further descriptors that the process inherits under their numbers."""
        return ()

    def options(self, console_fd: int, qmp_fd: int, *port_fds: int, incoming: bool = False) -> list[str]:
        """Return the options of either emulator; the machine starts paused, or waits for a migration.

        Parameters
        ----------
        console_fd, qmp_fd
            Inherited sockets for the serial port and for the QMP monitor.
        *port_fds
            One for each of `ports`.
        incoming
            Wait for ``migrate-incoming``; what arrives runs if it ran before.

        Examples
        --------
        >>> " ".join(Machine("alice").options(3, 4)[:8])
        '-name alice -nodefaults -no-user-config -display none -machine pc'
        """
        options = ["-name", escape(self.name), "-nodefaults", "-no-user-config", "-display", "none"]
        options += ["-machine", self.machine, "-accel", self.accelerator, "-m", f"{self.memory_bytes // MIB}M"]
        if self.kernel is not None:
            options += ["-kernel", self.kernel]
            if self.initrd is not None:
                options += ["-initrd", self.initrd]
            if self.append:
                options += ["-append", self.append]
        options += ["-chardev", f"socket,id=con,fd={console_fd}", "-serial", "chardev:con"]
        options += ["-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"]
        options += self.platform
        for number, (port, fd) in enumerate(zip(self.ports, port_fds, strict=True)):
            options += ["-chardev", f"socket,id=port{number},fd={fd}"]
            options += ["-device", f"virtserialport,chardev=port{number},name={port}"]
        options += ["-device", f"isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=0x04"]
        for number, port in enumerate(self.port_names(), 1):
            root_port = f"pcie-root-port,id={port},bus=pcie.0,chassis={number},slot={number}"
            options += ["-device", f"{root_port},{self.port_room}" if self.port_room else root_port]
        for number, connection in enumerate(self.connections):
            chardev = f"{boot_device_id(number)}-chardev"  # named as those of plugged devices: unplugged alike
            options += ["-chardev", f"socket,id={chardev},path={escape(connection.path)}"]
            device = f"ivshmem-doorbell,id={boot_device_id(number)},chardev={chardev},vectors={connection.vectors}"
            options += ["-device", device]
        return [*options, *(INCOMING if incoming else ("-S",))]
