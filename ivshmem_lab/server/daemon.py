"""Into the background, and out of it: the double fork, the pid file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from ..errors import IvshmemLabError, ServerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_DONE, _FAILED, _WRONG_CALL = 0, 1, 2


def status_of(error: IvshmemLabError) -> int:
    """Say the error on stderr; return the exit status that belongs to it."""
    print(f"ivshmem-server: {error}", file=sys.stderr, flush=True)
    return _WRONG_CALL if isinstance(error, UsageError) else _FAILED


def run_in_background(serve: Callable[[Callable[[], None]], int]) -> int:
    """Call `serve` in a daemon; it calls what it is given once clients can connect.

    The caller waits for that, so that errors are seen and the exit status is right.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run(serve, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        status = pipe.read(1)
    os.waitpid(child, 0)
    return status[0] if status else _FAILED


def _run(serve: Callable[[Callable[[], None]], int], ready_fd: int) -> NoReturn:
    """Second half of the double fork: a session of its own, whose leader ends, so that no terminal comes back."""
    status = _FAILED
    try:
        os.setsid()
        if os.fork():
            os._exit(_DONE)
        try:
            status = serve(lambda: _leave_terminal(ready_fd))
        except IvshmemLabError as error:
            status = status_of(error)
            os.write(ready_fd, bytes([status]))
        except BaseException:
            traceback.print_exc()
            raise
    finally:
        os._exit(status)


def _leave_terminal(ready_fd: int) -> None:
    """Say "done" to the process that started the daemon, and let go of its terminal and directory."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.write(ready_fd, bytes([_DONE]))
    os.close(ready_fd)


class PidFile:
    """A file with our pid, locked as long as we live, and removed when we end."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def write(cls, path: str) -> Self:
        """Write it; one that a dead process left is overwritten.

        Raises
        ------
        UsageError
            When it cannot be written.
        ServerError
            When it is that of a process that lives.
        """
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except (OSError, ValueError) as error:
                raise UsageError(f"the pid file {path!r} cannot be written: {error}; choose another with -p") from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):  # its owner removed it while we opened it
                    if os.path.samestat(os.fstat(fd), Path(path).stat()):
                        os.ftruncate(fd, 0)
                        os.write(fd, f"{os.getpid()}\n".encode())
                        return cls(path, fd)
                os.close(fd)
            except BlockingIOError as error:
                holder = os.read(fd, 32).decode(errors="replace").strip()
                os.close(fd)
                raise ServerError(
                    f"the pid file {path!r} is that of process {holder}, which runs; choose another with -p"
                ) from error
            except BaseException:
                os.close(fd)
                raise

    def remove(self) -> None:
        """Remove it."""
        with contextlib.suppress(OSError):
            Path(self.path).unlink()
        os.close(self._fd)
