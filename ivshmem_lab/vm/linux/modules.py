"""Which kernel modules a guest needs, in the order in which they can be loaded.

A package carries no ``modules.dep`` (depmod makes it at installation), so the dependencies come from each module's own
``.modinfo``. Modules are taken as they are: Debian's have no debug information, and ``strip`` would only take their signature.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from .errors import LinuxImageError
from .kernel import decompress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

WANTED = ("virtio_pci", "virtio_console", "virtio_net", "vfio_iommu_type1", "vfio_pci")
"""The agent's port, the network to compare with, and the device's interrupts for an application."""

WELCOME = ("pvpanic_mmio",)
"""Taken where the kernel has them: a panic is told to QEMU (docs/specs/pvpanic)."""

_SUFFIX = re.compile(r"\.ko(\.xz|\.gz|\.zst)?$")


def module_name(file_name: str) -> str:
    """Return a module's name as the kernel knows it.

    >>> module_name("vfio-pci.ko.xz")
    'vfio_pci'
    """
    return _SUFFIX.sub("", file_name).replace("-", "_")


def find_modules(root: Path) -> dict[str, Path]:
    """Return the file of each module under a ``/lib/modules/VERSION``."""
    return {module_name(path.name): path for path in sorted(root.rglob("*.ko*")) if _SUFFIX.search(path.name)}


def read_module(path: Path) -> bytes:
    """Return a module's ELF, unpacked.

    Raises
    ------
    LinuxImageError
        It cannot be unpacked.
    """
    data = path.read_bytes()
    return data if data.startswith(b"\x7fELF") else decompress(data, f"module {path.name}")


def modinfo(elf: bytes) -> dict[str, str]:
    """Return what a module says of itself, from its section ``.modinfo`` (ELF-64, little endian).

    Raises
    ------
    LinuxImageError
        It is no such ELF, or has no such section.
    """
    try:
        if elf[:6] != b"\x7fELF\x02\x01":
            raise LinuxImageError("a kernel module is no ELF of 64 bits")
        (table,) = struct.unpack_from("<Q", elf, 0x28)
        size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
        sections = [struct.unpack_from("<I20xQQ", elf, table + index * size) for index in range(count)]
        names_at = sections[names_index][1]
        for name, offset, length in sections:
            start = names_at + name
            if elf[start : elf.index(b"\0", start)] == b".modinfo":
                words = elf[offset : offset + length].split(b"\0")
                pairs = [word.decode("utf-8", "replace").partition("=") for word in words if b"=" in word]
                return {key: value for key, _, value in reversed(pairs)}
    except (struct.error, ValueError, IndexError) as error:
        raise LinuxImageError(f"a kernel module is no whole ELF: {error}") from error
    raise LinuxImageError("a kernel module has no section .modinfo")


def load_order(
    wanted: Iterable[str], present: Mapping[str, object], builtin: Sequence[str], depends: Callable[[str], str]
) -> list[str]:
    """Return the modules to load, each after those that it depends on.

    Parameters
    ----------
    wanted
        Names of modules.
    present
        Those that can be loaded, by name.
    builtin
        Those that the kernel has in itself.
    depends
        Gives a present module's ``depends``: names with commas between them.

    Raises
    ------
    LinuxImageError
        One is neither present nor built in.
    """
    order: list[str] = []
    known = set(builtin)

    def visit(name: str, needed_by: str) -> None:
        if name in known:
            return
        if name not in present:
            raise LinuxImageError(
                f"this kernel has no module {name}{needed_by}; take the distribution's cloud or generic kernel"
            )
        known.add(name)
        for other in depends(name).split(","):
            if other:
                visit(other.replace("-", "_"), f", which {name} needs")
        order.append(name)

    for name in wanted:
        visit(name, "")
    return order


def read_builtin(root: Path) -> list[str]:
    """Return the names of the modules that a kernel has in itself, from its ``modules.builtin``."""
    path = root / "modules.builtin"
    return [module_name(line.rsplit("/", 1)[-1]) for line in path.read_text().split()] if path.is_file() else []
