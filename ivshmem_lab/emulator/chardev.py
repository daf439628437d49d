"""Character devices: what the serial port, QMP and ivshmem devices are connected to.

Ref: QEMU 7.2 manual, ``-chardev`` (backends socket, stdio, file, null).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, VmError
from ..ipc.runtime_dir import check_socket_path
from .options import parse_switch

if TYPE_CHECKING:
    from collections.abc import Callable

OUTPUT_LIMIT_BYTES = 64 * 1024
READ_BYTES = 4096


@dataclass(slots=True)
class Chardev:
    """A character device: one end is a device of the machine, the other is a socket, a file or nothing.

    Attributes
    ----------
    device_id
        Its id.
    backend
        ``"socket"``, ``"stdio"``, ``"file"`` or ``"null"``.
    label
        What ``query-chardev`` would call its file name.
    sock
        The connected socket, or the listening one when `listening`.
    fds
        (input, output) of stdio and files; -1 for none.
    path
        Path of a listening socket: ours to unlink.
    used_by
        Name of the device that holds it.
    """

    device_id: str
    backend: str
    label: str = ""
    sock: socket.socket | None = None
    listening: bool = False
    fds: tuple[int, int] = (-1, -1)
    path: str | None = None
    used_by: str | None = None

    def close(self) -> None:
        """Close what is ours."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                Path(self.path).unlink()
            self.path = None
        if self.backend == "file" and self.fds[1] >= 0:
            os.close(self.fds[1])
            self.fds = (-1, -1)


def open_chardev(properties: dict[str, str]) -> Chardev:
    """Open a character device from ``-chardev`` properties (with ``backend`` and ``id``).

    Raises
    ------
    UsageError
        When a property is missing, unknown or wrong.
    VmError
        When the file or socket cannot be opened; the text is QEMU's.
    """
    pairs = dict(properties)
    backend = pairs.pop("backend", "")
    device_id = pairs.pop("id", "")
    if not device_id:
        raise UsageError(f"-chardev {backend}: id=NAME is missing")
    if backend == "null":
        chardev = Chardev(device_id, backend, "null")
    elif backend == "stdio":
        pairs.pop("signal", None)
        chardev = Chardev(device_id, backend, "stdio", fds=(0, 1))
    elif backend == "file":
        chardev = _open_file(device_id, pairs)
    elif backend == "socket":
        chardev = _open_socket(device_id, pairs)
    else:
        raise UsageError(f"-chardev {backend}: this machine has the backends socket, stdio, file and null")
    if pairs:
        chardev.close()
        raise UsageError(f"-chardev {backend},id={device_id}: no property {next(iter(pairs))!r}")
    return chardev


def _open_file(device_id: str, pairs: dict[str, str]) -> Chardev:
    path = pairs.pop("path", "")
    if not path:
        raise UsageError(f"-chardev file,id={device_id}: path=FILE is missing")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise VmError(f"Failed to add chardev '{device_id}': Unable to open '{path}': {error.strerror}") from error
    return Chardev(device_id, "file", "file", fds=(-1, fd))


def _open_socket(device_id: str, pairs: dict[str, str]) -> Chardev:
    what = f"-chardev socket,id={device_id}"
    server = parse_switch(pairs.pop("server", "off"), f"{what},server")
    wait = parse_switch(pairs.pop("wait", "on" if server else "off"), f"{what},wait")
    path, fd = pairs.pop("path", None), pairs.pop("fd", None)
    if (path is None) == (fd is None):
        raise UsageError(f"{what}: one of path=SOCKET and fd=NUMBER is needed")
    if fd is not None:
        return Chardev(device_id, "socket", f"fd:{fd}", sock=_inherited(fd, what))
    assert path is not None
    check_socket_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not server:
            sock.connect(path)
            return Chardev(device_id, "socket", f"unix:{path}", sock=sock)
        sock.bind(path)
        sock.listen(1)
    except OSError as error:
        sock.close()
        verb = "bind socket" if server else "connect"
        raise VmError(f"Failed to add chardev '{device_id}': Failed to {verb} to '{path}': {error.strerror}") from error
    if wait:
        accepted, _ = sock.accept()
        sock.close()
        return Chardev(device_id, "socket", f"unix:{path},server=on", sock=accepted, path=path)
    return Chardev(device_id, "socket", f"unix:{path},server=on", sock=sock, listening=True, path=path)


def _inherited(text: str, what: str) -> socket.socket:
    if not text.isdecimal():
        raise UsageError(f"{what}: fd={text} is not a file descriptor number")
    try:
        if not stat.S_ISSOCK(os.fstat(int(text)).st_mode):
            raise UsageError(f"{what}: fd={text} is not a socket")
    except OSError as error:
        raise UsageError(f"{what}: fd={text} was not passed to this process") from error
    sock = socket.socket(fileno=int(text))
    sock.set_inheritable(False)
    return sock


class SerialLine:
    """The far end of the serial port: takes bytes from the vCPU thread, writes them on the event loop.

    Parameters
    ----------
    chardev
        Where the bytes go, or None for nowhere.
    on_input
        Called on the event loop with what was typed; returns how much was taken.
    """

    def __init__(self, chardev: Chardev | None, on_input: Callable[[bytes], None]) -> None:
        self._chardev = chardev
        self._on_input = on_input
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._output = bytearray()
        self._scheduled = False
        self._input_fd = self._output_fd = -1
        self._accepted: socket.socket | None = None
        if chardev is None:
            return
        if chardev.sock is not None and chardev.listening:
            self._loop.add_reader(chardev.sock, self._accept)
        elif chardev.sock is not None:
            self._connect(chardev.sock)
        else:
            self._input_fd, self._output_fd = chardev.fds
            if self._input_fd >= 0:
                self._watch_input()

    def _watch_input(self) -> None:
        try:
            self._loop.add_reader(self._input_fd, self._readable)
        except PermissionError:
            self._input_fd = -1  # standard input is a file: epoll has no news of files

    def _accept(self) -> None:
        assert self._chardev is not None
        assert self._chardev.sock is not None
        accepted, _ = self._chardev.sock.accept()
        if self._accepted is not None:
            accepted.close()
            return
        self._accepted = accepted
        self._connect(accepted)

    def _connect(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._input_fd = self._output_fd = sock.fileno()
        self._loop.add_reader(self._input_fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._input_fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_input(data)
            return
        self._loop.remove_reader(self._input_fd)
        self._input_fd = -1
        if self._accepted is not None:
            self._loop.remove_writer(self._output_fd)
            self._accepted.close()
            self._accepted, self._output_fd = None, -1

    # -- vCPU thread ---------------------------------------------------------------------------------

    def write(self, byte: int) -> None:
        """Take one byte."""
        with self._lock:
            self._output.append(byte)
            if self._scheduled:
                return
            self._scheduled = True
        # A loop that is closing has no use for more output.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.flush)

    def ready(self) -> bool:
        """Tell whether there is room for more."""
        return len(self._output) < OUTPUT_LIMIT_BYTES

    # -- event loop ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what there is; the rest when the other end takes it."""
        with self._lock:
            self._scheduled = False
            pending = bytes(self._output)
        if self._output_fd < 0:
            written = len(pending)
        else:
            try:
                written = os.write(self._output_fd, pending) if pending else 0
            except BlockingIOError:
                written = 0
            except OSError:
                written = len(pending)  # nobody reads any more
        with self._lock:
            del self._output[:written]
            left = bool(self._output)
        if self._output_fd >= 0:
            if left:
                with contextlib.suppress(PermissionError):
                    self._loop.add_writer(self._output_fd, self.flush)
            elif self._accepted is not None or (self._chardev is not None and self._chardev.sock is not None):
                self._loop.remove_writer(self._output_fd)

    def close(self) -> None:
        """Write what fits, and let go."""
        self.flush()
        if self._input_fd >= 0:
            self._loop.remove_reader(self._input_fd)
        if self._chardev is not None and self._chardev.sock is not None:
            self._loop.remove_reader(self._chardev.sock)
        if self._output_fd >= 0:
            self._loop.remove_writer(self._output_fd)
        if self._accepted is not None:
            self._accepted.close()
