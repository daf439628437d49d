r"""How a client asks for a lease: by the address that it binds its own socket to before it connects.

``\0ivshmem-lease/NAME/ANYTHING`` is abstract (unix(7)): no file. ANYTHING makes it unique. The protocol itself has
no message from client to server; one that knows no leases, such as QEMU's, does not look at the address.
"""

from __future__ import annotations

import re

from ..errors import UsageError

_PREFIX = b"\0ivshmem-lease/"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,48}")


def check_lease_name(name: str) -> str:
    """Return the name of a lease when it may be one.

    Raises
    ------
    UsageError
        When it is not 1 to 48 letters, digits, dots, underscores or hyphens.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"lease name {name!r} is not allowed; 1 to 48 letters, digits, dots, underscores or hyphens")
    return name


def lease_address(name: str, unique: str) -> bytes:
    """Return the address to bind to; `unique` at most 40 bytes. Raises as `check_lease_name`."""
    return _PREFIX + f"{check_lease_name(name)}/{unique}".encode()


def lease_of_address(address: object) -> str | None:
    """Return the name in a client's address, or None when it asks for no lease. Raises as `check_lease_name`."""
    if not isinstance(address, bytes) or not address.startswith(_PREFIX):
        return None
    return check_lease_name(address[len(_PREFIX) :].split(b"/")[0].decode(errors="replace"))
