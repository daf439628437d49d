"""Sizes and times as people write them.

Sizes are binary, as QEMU's are: ``"4M"`` is 4 MiB (QEMU manual, option ``-m``).
"""

from __future__ import annotations

import re

from .errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

PAGE_BYTES = 4096
"""Smallest memory that a PCI guest can map (x86 page)."""

_SUFFIXES = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB}
_SIZE = re.compile(r"(?P<number>0[xX][0-9a-fA-F]+|\d+(?:\.\d+)?)\s*(?P<suffix>[bkmgt]?)(?:i?b)?", re.IGNORECASE)


def parse_size(text: str | int, what: str = "size", default_suffix: str = "") -> int:
    """Read a size in bytes.

    Parameters
    ----------
    text
        ``4194304``, ``"4194304"``, ``"4M"``, ``"4MiB"``, ``"1.5G"``, ``"0x1000"``.
    what
        Name of the value, for the error message.
    default_suffix
        Unit of a bare number: ``""`` for bytes, ``"m"`` for MiB (as ``-m`` of QEMU).

    Returns
    -------
    int
        Bytes, 0 or more.

    Raises
    ------
    UsageError
        When the text is no size, or not a whole number of bytes.

    Examples
    --------
    >>> parse_size("4M")
    4194304
    >>> parse_size("64", default_suffix="m")
    67108864
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise UsageError(f"{what} {text!r} is not a size; write bytes or a number with K, M, G or T, such as 4M")
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"{what} {text} is negative; sizes start at 0")
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{what} {text!r} is not a size; write bytes or a number with K, M, G or T, such as 4M")
    number, suffix = match["number"], match["suffix"].lower() or default_suffix
    unit = _SUFFIXES[suffix]
    if number[:2].lower() == "0x":
        return int(number, 16) * unit
    if "." not in number:
        return int(number) * unit
    whole, fraction = number.split(".")
    denominator: int = 10 ** len(fraction)
    size_bytes, rest = divmod(int(whole + fraction) * unit, denominator)
    if rest:
        raise UsageError(f"{what} {text!r} is not a whole number of bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Write a size the way :func:`parse_size` reads it, with the largest unit that divides it.

    >>> format_size(4194304)
    '4M'
    >>> format_size(1000)
    '1000'
    """
    for unit, suffix in ((TIB, "T"), (GIB, "G"), (MIB, "M"), (KIB, "K")):
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{suffix}"
    return str(size_bytes)


def is_power_of_two(number: int) -> bool:
    """Tell whether a number is a power of two.

    >>> is_power_of_two(4096), is_power_of_two(3)
    (True, False)
    """
    return number > 0 and number & (number - 1) == 0


def check_memory_size(size_bytes: int, what: str = "size") -> int:
    """Return the size when a PCI BAR can show it; refuse it otherwise.

    A BAR decodes a power of two; real QEMU aborts on any other size
    (QEMU 7.2, ``pci_register_bar``: ``is_power_of_two(size)``), and below one page
    ``ivshmem`` refuses it.

    Raises
    ------
    UsageError
        Names the two nearest sizes that are allowed.
    """
    if size_bytes < PAGE_BYTES:
        raise UsageError(f"{what} {format_size(size_bytes)} is too small: at least one page, {format_size(PAGE_BYTES)}")
    if not is_power_of_two(size_bytes):
        below = 1 << (size_bytes.bit_length() - 1)
        raise UsageError(
            f"{what} {format_size(size_bytes)} is not a power of two; "
            f"the nearest that are: {format_size(below)} and {format_size(below * 2)}"
        )
    return size_bytes
