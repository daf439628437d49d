"""Where sockets live: short paths that only this user can reach."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from ..errors import UsageError

MAX_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket: ``sun_path`` of unix(7) is 108 bytes with its final zero."""


def runtime_dir() -> Path:
    """Return a directory of this user alone (mode 0700), made when it is missing.

    ``$XDG_RUNTIME_DIR/ivshmem-lab`` where that works, else ``ivshmem-lab-<uid>`` in the
    directory for temporary files.

    Raises
    ------
    UsageError
        When the directory belongs to somebody else, is open to others, or cannot be made.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and Path(base).is_absolute() and os.access(base, os.W_OK | os.X_OK):
        return _private(Path(base) / "ivshmem-lab")
    return _private(Path(tempfile.gettempdir()) / f"ivshmem-lab-{os.getuid()}")


def _private(path: Path) -> Path:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise UsageError(
            f"cannot make the directory {str(path)!r} for sockets: {error}; set XDG_RUNTIME_DIR"
        ) from error
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or mode & 0o077:
        raise UsageError(
            f"{str(path)!r} (owner {status.st_uid}, mode {mode:04o}) is not a private directory of this user; "
            "remove it, or set XDG_RUNTIME_DIR to a directory with mode 0700"
        )
    return path


def check_socket_path(path: str | os.PathLike[str]) -> str:
    """Return the path when a Unix socket can have it.

    Raises
    ------
    UsageError
        When it is empty, has a zero byte, or is longer than 107 bytes.
    """
    text = os.fspath(path)
    length = len(os.fsencode(text))
    if not text or "\0" in text or length > MAX_SOCKET_PATH_BYTES:
        raise UsageError(
            f"socket path {text!r} has {length} bytes; a Unix socket's path has 1 to {MAX_SOCKET_PATH_BYTES} and no zero byte: "
            "use a shorter directory, such as one under /tmp"
        )
    return text
