"""Eventfds: the interrupt lines between peers (eventfd(2)).

A peer's vector is one eventfd: others add to its counter, the owner reads and clears it, so
interrupts that nobody has taken yet are counted, not lost. Always non-blocking: the open file is
shared between processes, and real QEMU sets O_NONBLOCK on it anyway (measured, 7.2).
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import sys
import time
from pathlib import Path
from typing import Self

from ..errors import UsageError

MAX_COUNT = 2**64 - 2
"""Largest value that an eventfd's counter holds."""

_NO_NOWAIT = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
"""What preadv2(2) says where the kernel, or a sandbox in its place, cannot read an eventfd with RWF_NOWAIT."""


def is_eventfd(fd: int) -> bool:
    """Tell whether a descriptor that somebody passed is an eventfd."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) == "anon_inode:[eventfd]"
    except OSError:
        return False


def poll_timeout_ms(deadline: float | None) -> int | None:
    """Return what poll(2) is to wait until a :func:`time.monotonic` deadline: whole ms, rounded up, never negative."""
    if deadline is None:
        return None
    return max(0, min(math.ceil((deadline - time.monotonic()) * 1000), 2**31 - 1))


def take(fd: int) -> int:
    """Read and clear an eventfd's counter; 0 when it is empty. Never waits, whatever the file's flags say.

    The shared open file may be a blocking one: real QEMU makes it so for a moment while it joins (7.2, when it takes
    passed descriptors), and so does a peer that waits for nothing else.
    """
    counter = bytearray(8)
    try:
        os.preadv(fd, [counter], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except OSError as error:
        if error.errno not in _NO_NOWAIT:
            raise
        return _take_if_ready(fd)
    return int.from_bytes(counter, sys.byteorder)


def _take_if_ready(fd: int) -> int:
    """Look first, for kernels without that flag: waits only if another reader empties a blocking file in between."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(0):
        return 0
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class EventFd:
    """An eventfd; owns its descriptor and makes it non-blocking."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    @classmethod
    def create(cls) -> Self:
        """Make a new one, counter 0, close-on-exec."""
        return cls(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def fileno(self) -> int:
        """Return the descriptor, for select and friends; -1 after :meth:`close`."""
        return self._fd

    def ring(self, count: int = 1) -> None:
        """Add to the counter. A counter that is full stays so: the interrupt is pending anyway.

        Raises
        ------
        UsageError
            When the count is not 1 to :data:`MAX_COUNT`.
        """
        if not 1 <= count <= MAX_COUNT:
            raise UsageError(f"count {count} is not allowed; ring 1 to {MAX_COUNT} times")
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._fd, count)

    def take(self) -> int:
        """Return how often it was rung since the last time, and start again at 0."""
        return take(self._fd)

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until it is rung and take the count; 0 when the time is over (None: no limit)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        while True:
            if poller.poll(poll_timeout_ms(deadline)):
                count = self.take()
                if count:  # else another reader was faster
                    return count
            if deadline is not None and time.monotonic() >= deadline:
                return 0

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<EventFd {'closed' if self._fd < 0 else self._fd}>"
