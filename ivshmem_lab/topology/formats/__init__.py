"""The formats in which machines with ivshmem devices are written down; each has ``parse`` and ``write``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UsageError
from . import legacy_argv, qemu_argv

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .argv import CommandLine, Written


@dataclass(frozen=True, slots=True)
class ArgvFormat:
    """A dialect of QEMU's command line."""

    name: str
    what: str
    parse: Callable[[Sequence[str]], CommandLine]
    write: Callable[[CommandLine], Written]


FORMATS = {
    "legacy": ArgvFormat("legacy", "-device ivshmem,… of QEMU up to 3.1", legacy_argv.parse, legacy_argv.write),
    "qemu": ArgvFormat("qemu", "-device ivshmem-plain,… and ivshmem-doorbell,…", qemu_argv.parse, qemu_argv.write),
}
"""All formats, by the name that ``ivshmem-lab translate`` takes."""


def format_named(name: str) -> ArgvFormat:
    """Find a format.

    Raises
    ------
    UsageError
        When there is none of that name.
    """
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def translate(argv: Sequence[str], origin: str = "legacy", target: str = "qemu") -> Written:
    """Read a command line in one format and write it in another.

    Parameters
    ----------
    argv
        The words of a whole command line; the program's name may lead it.
    origin, target
        Names of formats.

    Raises
    ------
    UsageError
        When a device is described wrongly, or a format does not exist.

    Examples
    --------
    >>> translate(["-device", "ivshmem,shm=board,size=1,role=peer"]).argv  # doctest: +NORMALIZE_WHITESPACE
    ['-object', 'memory-backend-file,id=ivshmem-mem,mem-path=/dev/shm/board,size=1M,share=on',
     '-device', 'ivshmem-plain,memdev=ivshmem-mem,master=off']
    """
    return format_named(target).write(format_named(origin).parse(argv))
