"""Unix sockets: connecting without waiting for ever, and binding over what a dead program left."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import struct
import termios
from pathlib import Path

_TIMEVAL = struct.Struct("ll")


def connect_unix(path: str, timeout_s: float, own_address: bytes | None = None) -> socket.socket:
    """Connect to a listening socket, from an address of our own if one is given.

    A full backlog blocks connect(2) for as long as a send may block (unix(7), SO_SNDTIMEO), and the
    socket stays a blocking one.

    Raises
    ------
    OSError
        Nobody listens there, or nobody accepts in time.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        micros = max(1, int(timeout_s * 1e6))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(*divmod(micros, 1_000_000)))
        if own_address is not None:
            sock.bind(own_address)
        sock.connect(path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def bind_unix(path: str) -> socket.socket:
    """Bind a stream socket (mode 0600), replacing a socket file on which nobody listens any more.

    Raises
    ------
    OSError
        The path cannot be used, or somebody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # becomes the mode of the file
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            Path(path).unlink()
            sock.bind(path)
    except BaseException:
        sock.close()
        raise
    return sock


def unread_bytes(sock: socket.socket) -> int:
    """Return the kernel's memory for what was sent and the other end has not read (unix(7), SIOCOUTQ); 0: all is read."""
    value = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, value)
    return value[0]


def _is_stale(path: str) -> bool:
    if not stat.S_ISSOCK(Path(path).lstat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED
