"""The words of ``device_add`` and ``-device``: which properties there are, and how their values are read.

Ref: QEMU 7.2, ``-device DRIVER,help`` and the texts of its refusals.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from ..errors import IvshmemLabError, UsageError, VmError
from ..keyval import join_pairs
from .qmp import QmpError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*")

_PCI = ("addr", "bus", "master")
PROPERTIES = {
    "ivshmem-plain": (*_PCI, "memdev"),
    "ivshmem-doorbell": (*_PCI, "chardev", "vectors", "ioeventfd", "x-quirks"),
    "ivshmem": ("addr", "bus", "size", "shm", "chardev", "msi", "ioeventfd", "vectors", "role", "use64", "x-quirks"),
    "isa-debug-exit": ("iobase", "iosize"),
    "pcie-root-port": ("addr", "bus", "chassis", "slot"),
    "pcie-pci-bridge": ("addr", "bus"),
    "pci-bridge": ("addr", "bus", "chassis_nr"),
}
"""What each driver takes besides ``driver`` and ``id``."""


def check_identifier(text: str) -> None:
    """Refuse what cannot be the id of a device or an object."""
    if not IDENTIFIER.fullmatch(text):
        raise QmpError(
            f"Parameter 'id' expects an identifier: a letter, then letters, digits, '-', '.', '_'; not '{text}'"
        )


def check_names(driver: str, names: Mapping[str, str], *, has_buses: bool = True) -> None:
    """Refuse a driver or a property that does not exist; the texts begin as QEMU's."""
    if driver not in PROPERTIES:
        raise QmpError(f"'{driver}' is not a valid device model name; this machine has {', '.join(PROPERTIES)}")
    for name in names:
        if name not in PROPERTIES[driver]:
            raise QmpError(f"Property '{driver}.{name}' not found; there are {', '.join(PROPERTIES[driver])}")
    if not has_buses:
        raise QmpError(f"No '{'ISA' if driver == 'isa-debug-exit' else 'PCI'}' bus found for device '{driver}'")


def slot_number(driver: str, text: str | None) -> int | None:
    """Read ``addr``: a slot in hexadecimal, with function 0 or none."""
    if text is None:
        return None
    slot, _, function = text.partition(".")
    try:
        number = int(slot, 16)
    except ValueError:
        number = -1
    if not 0 <= number < 32 or function not in ("", "0"):
        raise QmpError(f"Property '{driver}.addr' doesn't take value '{text}'; slots are 0 to 1f")
    return number


def number(text: str, name: str) -> int:
    """Read a number that is not negative."""
    try:
        value = int(text, 0)
    except ValueError:
        raise QmpError(f"Parameter '{name}' expects integer, not '{text}'") from None
    if value < 0:
        raise QmpError(f"Parameter '{name}' expects uint32_t, not {text}")
    return value


@contextlib.contextmanager
def named(option: str, properties: Mapping[str, str]) -> Iterator[None]:
    """Put the option of the command line before what is wrong with it."""
    with given(option, join_pairs(properties.items())):
        yield


@contextlib.contextmanager
def given(option: str, text: str) -> Iterator[None]:
    """Put an option and its text before what is wrong with it."""
    try:
        yield
    except IvshmemLabError as error:
        kind = VmError if isinstance(error, VmError) else UsageError
        raise kind(f"{option} {text}: {error}") from error
