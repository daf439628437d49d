"""What a process prints, kept in bounded memory."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from ..errors import VmError

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_BYTES = 65536


class VmTimeoutError(VmError, TimeoutError):
    """A virtual machine did not do in time what was waited for."""


class TextStream:
    """The tail of the text that arrives on a file descriptor, read by the running event loop.

    Parameters
    ----------
    fd
        A pipe or a stream socket; it belongs to this object from here on.
    what
        Name of the stream for error messages, for example ``"the console of alice"``.
    limit_bytes
        How much is kept; older text is dropped and counted in `dropped_bytes`.
    on_data
        Called with all that comes, on the loop's thread.
    """

    def __init__(self, fd: int, what: str, limit_bytes: int, on_data: Callable[[bytes], None] | None = None) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._what = what
        self._limit_bytes = limit_bytes
        self._on_data = on_data
        self._buffer = bytearray()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)
        self.dropped_bytes = 0

    @property
    def text(self) -> str:
        """What is kept of the text so far; carriage returns are dropped. Any thread may ask."""
        return bytes(self._buffer).decode("utf-8", "replace").replace("\r", "")

    @property
    def at_end(self) -> bool:
        """Whether no more can come."""
        return self._fd < 0

    def last_lines(self, count: int) -> str:
        """Return the last lines that are not empty."""
        return "\n".join([line for line in self.text.splitlines() if line.strip()][-count:])

    async def wait_text(self, text: str, timeout_s: float) -> str:
        """Wait until a text has been printed.

        Parameters
        ----------
        text
            What to wait for, anywhere in what has been printed and is kept.
        timeout_s
            How long, in seconds.

        Returns
        -------
        str
            Everything printed so far.

        Raises
        ------
        VmTimeoutError
            It was not printed in time.
        VmError
            The stream ended without it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while text not in (so_far := self.text):
                    if self.at_end:
                        raise VmError(f"{self._what} ended without {text!r}; its last lines: {self.last_lines(3)!r}")
                    await self._changed.wait()
        except TimeoutError as error:
            raise VmTimeoutError(
                f"{self._what} did not show {text!r} in {timeout_s:g} s; its last lines: {self.last_lines(3)!r}"
            ) from error
        return so_far

    def drain(self) -> None:
        """Read what has already arrived, without waiting."""
        while not self.at_end and self._read():
            pass

    def close(self) -> None:
        """Give the file descriptor back; the text stays."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._tell()

    def _read(self) -> bool:
        """Read once; tell whether there was something."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # a socket whose other end died with unread input
            data = b""
        if not data:
            self.close()
            return False
        self._buffer += data
        excess = len(self._buffer) - self._limit_bytes
        if excess > 0:
            del self._buffer[:excess]
            self.dropped_bytes += excess
        if self._on_data is not None:
            self._on_data(data)
        self._tell()
        return True

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
