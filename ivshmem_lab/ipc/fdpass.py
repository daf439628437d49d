"""File descriptors that travel with bytes over a Unix socket (unix(7), SCM_RIGHTS)."""

from __future__ import annotations

import array
import os
import socket
from typing import TYPE_CHECKING

from ..errors import IvshmemLabError, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_INT_BYTES = array.array("i").itemsize


class PassedFdLostError(IvshmemLabError):
    """The kernel could not hand over a passed file descriptor: this process has too many open."""


def send_message(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> int:
    """Send bytes, with descriptors on the first of them, in one sendmsg(2).

    Returns
    -------
    int
        Bytes sent, which can be fewer than given.

    Raises
    ------
    OSError
        As the kernel says; ``BlockingIOError`` when a non-blocking socket is full.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], ancillary)


def receive_message(sock: socket.socket, size: int, max_fds: int = 1) -> tuple[bytes, list[int]]:
    """Receive up to `size` bytes and the descriptors that came with them, close-on-exec.

    The kernel never reads past bytes that carry descriptors, so these belong to the last message touched.

    Returns
    -------
    tuple
        The bytes (empty at end of file), and the descriptors, which now belong to the caller.

    Raises
    ------
    RemoteProtocolError
        Field ``"message"``: more descriptors than allowed came; all are closed.
    PassedFdLostError
        A descriptor was lost because this process may open no more; the others are closed.
    OSError
        As the kernel says; ``BlockingIOError`` when nothing is there.
    """
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(max_fds * _INT_BYTES), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(payload) - len(payload) % _INT_BYTES
            fds.extend(array.array("i", payload[:whole]))
    if len(fds) > max_fds or (flags & socket.MSG_CTRUNC and len(fds) == max_fds):
        close_all(fds)
        raise RemoteProtocolError("message", f"more than {max_fds} file descriptors came with one message")
    if flags & socket.MSG_CTRUNC:
        close_all(fds)
        raise PassedFdLostError("a passed file descriptor was lost: too many files are open; raise `ulimit -n`")
    return data, fds


def close_all(fds: Iterable[int]) -> None:
    """Close raw descriptors."""
    for fd in fds:
        os.close(fd)
