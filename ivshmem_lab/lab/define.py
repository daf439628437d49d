"""A machine of a lab, from what the user says about it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..topology.model import Vm as Definition
from ..vm.accel import ACCELERATORS, choose
from ..vm.command import Connection, Machine
from ..vm.linux.guest import LinuxGuest, LinuxMachine
from ..vm.qemu import find_emulator
from ..vm.vm import Vm
from .arguments import (
    read_cpu,
    read_guest,
    read_guest_arguments,
    read_machine,
    read_name,
    read_root_ports,
    read_vm_memory,
)
from .linux import LinuxVm, make_machine, read_linux_guest
from .members import LabVm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .home import Home
    from .servers import LabServer


def define_vm(
    home: Home,
    servers: Sequence[LabServer],
    name: str,
    guest: str | os.PathLike[str] | LinuxGuest | None,
    args: Mapping[str, object] | str | None,
    emulator: str,
    memory: str | int | None,
    machine: str,
    root_ports: int | None,
    cpu: int | None,
    accel: str,
) -> LabVm:
    """Make a machine; arguments and errors are those of `Lab.vm`."""
    read_name(name)
    linux = read_linux_guest(guest, emulator)
    memory_bytes = read_vm_memory(memory if memory is not None else "128M" if linux else "32M")
    words = read_guest_arguments(args)
    connections = tuple(Connection(server.path, max(1, server.vectors)) for server in servers)
    machine = read_machine(machine)
    chipset = linux.machine if linux else machine
    ports = read_root_ports(chipset, root_ports)
    parts = (
        make_machine(name, linux, memory_bytes, connections, words, ports)
        if linux
        else Machine(name, read_guest(guest), words, memory_bytes, connections, chipset, ports)
    )
    parts = _accelerated(parts, emulator, accel)
    vm = Vm(
        parts,
        find_emulator(emulator),
        cpu=read_cpu(cpu),
        environment=home.guard.environment,
        on_spawn=home.guard.add_process,
        on_reaped=home.guard.remove_process,
    )
    definition = Definition(
        name,
        emulator,
        _guest_name(guest),
        None if args is None else words,
        None if memory is None else memory_bytes,
        machine,
        cpu,
        root_ports,
        accel,
    )
    return (LinuxVm if linux else LabVm)(home, vm, servers, definition, guest)


def _accelerated(parts: Machine, emulator: str, accel: str) -> Machine:
    """Return a machine with the accelerator that was asked for; what it has anyway is TCG."""
    if accel not in ACCELERATORS:
        raise UsageError(f"accel {accel!r} is unknown; there are {', '.join(map(repr, ACCELERATORS))}")
    if emulator != "qemu":
        if accel == "kvm":
            raise UsageError(f'accel="kvm" goes with emulator="qemu"; {emulator} runs its guests on the Unicorn engine')
        return parts
    if isinstance(parts, LinuxMachine):
        if choose(accel, "linux", Path(parts.kernel or ""), Path(parts.initrd or "")) == "kvm":
            # The IOMMU's interrupt remapping needs it (QEMU manual, intel-iommu).
            return replace(parts, accelerator="kvm,kernel-irqchip=split")
    elif choose(accel, "bare-metal") == "kvm":
        return replace(parts, accelerator="kvm")
    return parts


def _guest_name(guest: str | os.PathLike[str] | LinuxGuest | None) -> str | None:
    """Write a guest as `Lab.vm` reads it; the details of a `LinuxGuest` have no place in a topology."""
    if guest is None or isinstance(guest, str):
        return guest
    if isinstance(guest, LinuxGuest):
        return "linux"
    path = os.fspath(guest)
    return path if os.sep in path else os.curdir + os.sep + path
