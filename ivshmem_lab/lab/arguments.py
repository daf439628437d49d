"""Reading what a user hands to a lab; everything wrong ends in a UsageError that names it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from .. import guests
from ..errors import UsageError
from ..topology.validate import DEFAULT_ROOT_PORTS, MOST_ROOT_PORTS, NAME
from ..units import MIB, format_size, parse_size
from ..vm.command import MACHINE_TYPES


def read_name(name: str) -> str:
    """Return a name that can stand in a table, a file name and a QEMU option."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise UsageError(
            f"name {name!r} is not allowed: 1 to 32 letters, digits, '_', '-' or '.', a letter or digit first"
        )
    return name


def read_guest(guest: object) -> str | None:
    """Return the ELF of a guest that ships with the package, or of a path; None stays None."""
    if guest is None:
        return None
    if not isinstance(guest, (str, os.PathLike)):
        raise UsageError(f"guest {guest!r} is no name, no path and no LinuxGuest()")
    text = os.fspath(guest)
    if not isinstance(guest, str) or os.sep in text:
        path = Path(text)
        if not path.is_file():
            raise UsageError(f"guest {text!r} is no file; give the path of a 32-bit multiboot ELF")
        return str(path.resolve())
    known = sorted(guests.available())
    if text not in known:
        raise UsageError(f"guest {text!r} is unknown; there are {', '.join(known)}, or give a path with a '/' in it")
    return str(guests.guest_path(text))


def read_guest_arguments(args: Mapping[str, object] | str | None) -> str:
    """Return a guest's command line: ``{"role": "ping", "rounds": 100}`` becomes ``role=ping rounds=100``."""
    if args is None:
        return ""
    if isinstance(args, str):
        return args
    if not isinstance(args, Mapping):
        raise UsageError(f"args {args!r} is neither a dict nor a text; write {{'rounds': 100}} or 'rounds=100'")
    tokens = [f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in args.items()]
    for token in tokens:
        if re.search(r"\s", token):
            raise UsageError(f"guest argument {token!r} has a blank in it; the guest would read two")
    return " ".join(tokens)


def read_vm_memory(memory: str | int) -> int:
    """Return a guest's RAM in bytes, whole MiB; a bare number in a text means MiB, as for ``-m`` of QEMU."""
    size_bytes = parse_size(memory, "memory", default_suffix="m" if isinstance(memory, str) else "")
    if size_bytes < MIB or size_bytes % MIB:
        raise UsageError(f"memory {memory!r} ({format_size(size_bytes)}) is not a whole number of MiB, at least 1M")
    return size_bytes


def read_cpu(cpu: int | None) -> int | None:
    """Return a host CPU that this process may use."""
    if cpu is not None and cpu not in (allowed := os.sched_getaffinity(0)):
        raise UsageError(f"cpu {cpu!r} is not one this process may use: {', '.join(map(str, sorted(allowed)))}")
    return cpu


def read_machine(machine: str) -> str:
    """Return a machine type that a VM can have."""
    if machine not in MACHINE_TYPES:
        raise UsageError(f"machine {machine!r} is unknown; there are {' and '.join(map(repr, MACHINE_TYPES))}")
    return machine


def read_root_ports(machine: str, root_ports: int | None) -> int:
    """Return the number of root ports: 4 for a q35 machine of which nothing was said, none for a pc."""
    if machine == "pc":
        if root_ports:
            raise UsageError(
                f"root_ports={root_ports!r}: a pc has slots for 30 devices and no root ports; leave it out"
            )
        return 0
    if root_ports is None:
        return DEFAULT_ROOT_PORTS
    if isinstance(root_ports, bool) or not isinstance(root_ports, int) or not 0 <= root_ports <= MOST_ROOT_PORTS:
        raise UsageError(f"root_ports {root_ports!r} is not allowed: 0 to {MOST_ROOT_PORTS}")
    return root_ports
