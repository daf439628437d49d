"""The Unix socket a server listens on: made private, found stale or alive, removed by its maker only."""

from __future__ import annotations

import contextlib
import errno
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..errors import ServerError, UsageError
from ..ipc.runtime_dir import check_socket_path

if TYPE_CHECKING:
    import os

_BACKLOG = 1024  # the kernel cuts it to net.core.somaxconn
_LISTENS = 0x10000  # __SO_ACCEPTCON in the flags of /proc/net/unix


class Listener:
    """A listening, non-blocking Unix stream socket with mode 0600 or as asked.

    Attributes
    ----------
    sock
        The socket.
    path
        Where it is bound, as it was given.
    """

    def __init__(self, sock: socket.socket, path: str) -> None:
        self.sock = sock
        self.path = path
        self._absolute = Path(path).absolute()  # the working directory may change (daemons)
        self._identity = _identity(self._absolute)

    @classmethod
    def open(cls, path: str | os.PathLike[str], mode: int = 0o600) -> Self:
        """Bind and listen, the socket file having this mode. One that nobody listens on is replaced.

        Raises
        ------
        UsageError
            When the path cannot hold a socket.
        ServerError
            When somebody listens there.
        """
        text = check_socket_path(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            _bind(sock, text)
            Path(text).chmod(mode)  # before listen(): until then nobody can connect
            sock.listen(_BACKLOG)
            return cls(sock, text)
        except BaseException:
            sock.close()
            raise

    def close(self) -> None:
        """Stop listening and remove the socket file, unless somebody else put theirs there."""
        self.sock.close()
        with contextlib.suppress(OSError):
            if _identity(self._absolute) == self._identity:
                self._absolute.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _bind(sock: socket.socket, path: str) -> None:
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise UsageError(f"no socket can be made at {path!r}: {error.strerror}; choose another path") from error
        try:
            _remove_stale(path)
            sock.bind(path)
        except OSError as again:
            raise ServerError(
                f"no socket can be made at {path!r}: {again.strerror}; another program was faster, or it is not ours to replace"
            ) from again


def _remove_stale(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            raise UsageError(f"{path!r} exists and is not a socket; choose another path, it will not be overwritten")
        if _is_alive(path):
            raise ServerError(f"a program listens on {path!r} already; stop it or choose another path")
        Path(path).unlink()


def _is_alive(path: str) -> bool:
    """Tell whether somebody listens there, and connect only when the kernel's list does not say it.

    A connection would make a peer come and go, of which all peers of a live server hear.
    """
    names = {path, str(Path(path).absolute())}
    with contextlib.suppress(OSError), Path("/proc/net/unix").open(errors="surrogateescape") as table:
        for line in table:
            fields = line.rstrip("\n").split(maxsplit=7)  # Num RefCount Protocol Flags Type St Inode Path
            if len(fields) == 8 and fields[7] in names and int(fields[3], 16) & _LISTENS:
                return True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:  # its queue is full, it is of another type, or not ours to connect to
            return True
        return True
