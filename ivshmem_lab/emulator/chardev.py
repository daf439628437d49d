"""Character devices: what the serial port, QMP and ivshmem devices are connected to.

Ref: QEMU 7.2 manual, ``-chardev`` (backends socket, stdio, file, null).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, VmError
from ..ipc.runtime_dir import check_socket_path
from ..ipc.sockets import bind_unix, connect_unix
from ..keyval import parse_switch

if TYPE_CHECKING:
    from collections.abc import Callable

BACKENDS = ("socket", "stdio", "file", "null")
CONNECT_S = 5.0
OUTPUT_LIMIT_BYTES = 64 * 1024
READ_BYTES = 4096
PIPE_BYTES = 4096
DRAIN_S = 1.0
"""At the end of the machine: for so long a reader may take nothing before what is left is lost."""


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
    wait
        The first client of a listening socket becomes its only one: see `accepted`.
    """

    device_id: str
    backend: str
    label: str = ""
    sock: socket.socket | None = None
    listening: bool = False
    fds: tuple[int, int] = (-1, -1)
    path: str | None = None
    used_by: str | None = None
    wait: bool = False

    def accepted(self, sock: socket.socket) -> None:
        """Take the client that was waited for."""
        assert self.sock is not None
        self.sock.close()
        self.sock, self.listening, self.wait = sock, False, False

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
        raise UsageError("id=NAME is missing")
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
        raise UsageError(f"'{backend}' is not a valid char driver name; this machine has {', '.join(BACKENDS)}")
    if pairs:
        chardev.close()
        raise UsageError(f"Invalid parameter '{next(iter(pairs))}'; it is not one of a {backend} chardev")
    return chardev


def _open_file(device_id: str, pairs: dict[str, str]) -> Chardev:
    path = pairs.pop("path", "")
    if not path or "\0" in path:
        raise UsageError(f"chardev {device_id}: path=FILE is missing, or holds a zero byte")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise VmError(f"Failed to add chardev '{device_id}': Could not open '{path}': {error.strerror}") from error
    return Chardev(device_id, "file", "file", fds=(-1, fd))


def _open_socket(device_id: str, pairs: dict[str, str]) -> Chardev:
    what = f"chardev {device_id}"
    server = parse_switch(pairs.pop("server", "off"), f"{what}: server")
    wait = parse_switch(pairs.pop("wait", "on" if server else "off"), f"{what}: wait")
    path, fd = pairs.pop("path", None), pairs.pop("fd", None)
    if (path is None) == (fd is None):
        raise UsageError(f"{what}: one of path=SOCKET and fd=NUMBER is needed")
    if fd is not None:
        return Chardev(device_id, "socket", f"fd:{fd}", sock=_inherited(fd, what))
    assert path is not None
    check_socket_path(path)
    try:
        if not server:
            return Chardev(device_id, "socket", f"unix:{path}", sock=connect_unix(path, CONNECT_S))
        sock = bind_unix(path)
        sock.listen(1)
    except OSError as error:
        failed = f"bind socket to {path}" if server else f"connect to '{path}'"
        raise VmError(f"Failed to add chardev '{device_id}': Failed to {failed}: {error.strerror}") from error
    sock.setblocking(False)
    return Chardev(device_id, "socket", f"unix:{path},server=on", sock=sock, listening=True, path=path, wait=wait)


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
        Called on the event loop with what was typed, and what to call with the number of bytes that were taken.
    """

    def __init__(self, chardev: Chardev | None, on_input: Callable[[bytes, Callable[[int], None]], None]) -> None:
        self._chardev = chardev
        self._on_input = on_input
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._output = bytearray()
        self._scheduled = False
        self._typed = b""
        """Input on its way to the guest; meanwhile no more is read."""
        self._input_fd = self._output_fd = -1
        self._accepted: socket.socket | None = None
        self._may_block = chardev is not None and chardev.sock is None
        self._writing = False
        """The event loop waits for the other end to take more."""
        self._drained = asyncio.Event()
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
        if not self._typed:
            self._watch_input()

    def _readable(self) -> None:
        try:
            data = os.read(self._input_fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._loop.remove_reader(self._input_fd)
        if data:
            self._typed = data
            self._offer()
            return
        self._input_fd = -1
        if self._accepted is not None:
            self._stop_writing()
            self._accepted.close()
            self._accepted, self._output_fd = None, -1
            self.flush()

    def _stop_writing(self) -> None:
        if self._writing:
            self._loop.remove_writer(self._output_fd)
        self._writing = False

    def _offer(self) -> None:
        if self._typed:
            self._on_input(self._typed, self._taken)

    def _taken(self, count: int) -> None:
        self._typed = self._typed[count:]
        if not self._typed and self._input_fd >= 0:
            self._watch_input()

    # -- vCPU thread ---------------------------------------------------------------------------------

    def write(self, byte: int) -> None:
        """Take one byte."""
        with self._lock:
            if not self.ready():
                return  # a guest that does not look whether the line is busy loses its words, as on a wire
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

    def input_wanted(self) -> None:
        """Offer again what was not taken."""
        self._loop.call_soon_threadsafe(self._offer)

    # -- event loop ----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what there is; the rest when the other end takes it."""
        with self._lock:
            self._scheduled = False
            pending = bytes(self._output)
        written = self._write(pending)
        with self._lock:
            del self._output[:written]
            left = bool(self._output)
        if self._writing != left and self._output_fd >= 0:
            self._wait_for_room(left)
        if not left:
            self._drained.set()

    def _wait_for_room(self, wait: bool) -> None:
        self._writing = wait
        if not wait:
            self._loop.remove_writer(self._output_fd)
            return
        try:
            self._loop.add_writer(self._output_fd, self.flush)
        except PermissionError:  # a file, which always has room: the guest wrote more meanwhile
            self._writing = False
            self._loop.call_soon(self.flush)

    def _write(self, pending: bytes) -> int:
        """Write some bytes; returns how many are done with."""
        fd, done = self._output_fd, 0
        try:
            while fd >= 0 and done < len(pending):
                # Standard output is shared with others and may block: a pipe that has room takes PIPE_BUF bytes.
                if self._may_block and not select.select([], [fd], [], 0)[1]:
                    return done
                end = done + PIPE_BYTES if self._may_block else len(pending)
                done += os.write(fd, pending[done:end])
        except BlockingIOError:
            return done
        except OSError:
            pass  # nobody reads any more
        return len(pending)

    async def drain(self) -> None:
        """Wait until everything is written, as long as the other end goes on reading."""
        self.flush()
        left = None
        while self._output and left != len(self._output):
            left = len(self._output)
            self._drained.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_S):
                    await self._drained.wait()

    def close(self) -> None:
        """Let go."""
        if self._input_fd >= 0:
            self._loop.remove_reader(self._input_fd)
        if self._chardev is not None and self._chardev.sock is not None:
            self._loop.remove_reader(self._chardev.sock)
        self._stop_writing()
        if self._accepted is not None:
            self._accepted.close()
