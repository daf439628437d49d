"""QEMU's ``name=value,name=value``: reading and writing it.

Ref: QEMU 7.2 manual, "Invocation": a comma inside a value is written twice; a leading word without ``=`` is the
value of the option's first name; a later one is a switch that is on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable


def split_pairs(text: str, first_key: str, what: str) -> dict[str, str]:
    """Split ``a=1,b=2``; a leading word without ``=`` is the value of `first_key`.

    >>> split_pairs("ivshmem-plain,memdev=m", "driver", "-device")
    {'driver': 'ivshmem-plain', 'memdev': 'm'}
    >>> split_pairs("file,id=c,path=/tmp/a,,b", "backend", "-chardev")
    {'backend': 'file', 'id': 'c', 'path': '/tmp/a,b'}

    Raises
    ------
    UsageError
        When a key is empty or given twice.
    """
    pairs: dict[str, str] = {}
    for index, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.replace("\0", ",").partition("=")
        if not equals:
            # As in QEMU, a bare word that is not the first is a switch.
            key, value = (first_key, key) if index == 0 and first_key else (key, "on")
        if not key:
            raise UsageError(f"{what} {text}: empty name before {part!r}; write name=value,name=value")
        if key in pairs:
            raise UsageError(f"{what} {text}: {key!r} is given twice")
        pairs[key] = value
    return pairs


def escape(value: str) -> str:
    """Write a value inside an option: a comma is doubled.

    >>> escape("/tmp/a,b")
    '/tmp/a,,b'
    """
    return value.replace(",", ",,")


def join_pairs(pairs: Iterable[tuple[str, str]], first_key: str = "") -> str:
    """Write pairs the way `split_pairs` reads them; the name of a leading `first_key` is left out.

    >>> join_pairs([("driver", "ivshmem-plain"), ("memdev", "a,b")], "driver")
    'ivshmem-plain,memdev=a,,b'
    """
    return ",".join(
        escape(value) if index == 0 and key == first_key else f"{key}={escape(value)}"
        for index, (key, value) in enumerate(pairs)
    )


def parse_switch(value: str, what: str) -> bool:
    """Read ``on`` or ``off``.

    Raises
    ------
    UsageError
        When it is neither.
    """
    if value in ("on", "yes", "true", "y"):
        return True
    if value in ("off", "no", "false", "n"):
        return False
    raise UsageError(f"{what}: {value!r} is neither on nor off")
