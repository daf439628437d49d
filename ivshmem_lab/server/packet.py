"""Descriptors with several holders, and messages that are encoded once for all their receivers."""

from __future__ import annotations

import os
import re

from ..ipc.eventfd import take
from ..ipc.parcels import Parcel
from ..wire.messages import MESSAGE_BYTES, encode

_COUNT = re.compile(rb"^eventfd-count: *([0-9a-f]+)$", re.MULTILINE)


class SharedFd:
    """A descriptor that is closed when its last holder lets go.

    The holders are counted by Python itself: one join among a thousand peers is a thousand holders,
    and counting them here would cost more than sending the messages.
    """

    __slots__ = ("_owned", "fd")

    def __init__(self, fd: int, *, owned: bool = True) -> None:
        self.fd = fd
        self._owned = owned

    def __del__(self) -> None:
        if self._owned:
            os.close(self.fd)


class Packet(Parcel):
    """A message to a peer: its number, its descriptor, and both as the kernel wants them."""

    __slots__ = ("fd", "value")

    def __init__(self, value: int, fd: SharedFd | None = None, size_bytes: int = MESSAGE_BYTES) -> None:
        super().__init__(encode(value)[:size_bytes], None if fd is None else fd.fd)
        self.value = value
        self.fd = fd


def new_eventfd() -> SharedFd:
    """Make an interrupt line: counter 0, non-blocking.

    Raises
    ------
    OSError
        When the kernel is short of descriptors.
    """
    return SharedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def drain_eventfd(fd: SharedFd) -> int:
    """Set an interrupt line's counter to 0; return what it was."""
    return take(fd.fd)


def rings_waiting(fd: SharedFd) -> int:
    """Return an interrupt line's counter without taking it (proc(5), fdinfo: hexadecimal)."""
    with open(f"/proc/self/fdinfo/{fd.fd}", "rb", buffering=0) as info:  # noqa: PTH123 -- half the time of Path
        found = _COUNT.search(info.read(4096))
    return 0 if found is None else int(found[1], 16)
