"""Guest programs: one 32-bit multiboot ELF each, that runs unchanged on QEMU and on our emulator.

``probe`` prints the PCI bus and every register of every ivshmem device, ``pingpong`` answers and
times interrupts, ``stream`` moves bytes through a ring, ``echo`` answers the messages of a channel
(:mod:`ivshmem_lab.peer.channel`, ``src/channel.h``), ``knock`` interrupts itself and times the doorbell. Their sources and options are in ``src/``;
the host's side of what they keep in shared memory is in :mod:`ivshmem_lab.guests.exchange`.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import GuestError

__all__ = ["available", "guest_path"]

_PREBUILT = Path(__file__).parent / "elf"


def available() -> list[str]:
    """Name the prebuilt guest programs, sorted.

    >>> available()
    ['echo', 'intx', 'knock', 'migrant', 'pingpong', 'probe', 'stream']
    """
    return sorted(elf.stem for elf in _PREBUILT.glob("*.elf"))


def guest_path(name: str) -> Path:
    """Return the path of a prebuilt guest program, for ``-kernel``.

    Raises
    ------
    GuestError
        No such program; the message names those that exist.

    Examples
    --------
    >>> guest_path("pingpong").name
    'pingpong.elf'
    """
    names = available()
    if name not in names:
        raise GuestError(
            f"guest program {name!r} does not exist; there are {', '.join(names) or 'none, run `make guests`'}"
        )
    return _PREBUILT / f"{name}.elf"
