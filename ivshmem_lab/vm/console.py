"""A machine's serial port from outside: what the guest writes, and what is typed to it."""

from __future__ import annotations

import asyncio
import codecs
import os
from typing import TYPE_CHECKING

from ..errors import VmError
from .text import TextStream, VmTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

CONSOLE_BYTES = 256 * 1024


class SerialConsole:
    """The serial port of one machine, from before its start until after its end.

    The coroutines and `listen` belong to the loop's thread; `text` may be asked for from any.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._stream: TextStream | None = None
        self._fd = -1
        self._writing = asyncio.Lock()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._listeners: list[Callable[[str], None]] = []

    @property
    def text(self) -> str:
        """What the guest has written; the last 256 KiB are kept."""
        return "" if self._stream is None else self._stream.text

    def open(self, fd: int) -> TextStream:
        """Take our end of the socket that is the machine's serial port."""
        self._fd = fd
        self._stream = TextStream(fd, f"the console of {self._name}", CONSOLE_BYTES, self._tell)
        return self._stream

    def listen(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Have told what is kept, at once, and everything that comes; return the function that ends it."""
        if self.text:
            listener(self.text)
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    async def wait_text(self, text: str, timeout_s: float) -> str:
        """Wait until a text has been written; see `TextStream.wait_text`."""
        if self._stream is None:
            raise VmError(f"{self._name} has written nothing: it has not been started")
        return await self._stream.wait_text(text, timeout_s)

    async def write(self, data: bytes, timeout_s: float) -> None:
        """Type something.

        Raises
        ------
        VmTimeoutError
            The machine does not take it: its guest does not read, and what is under way is full.
        VmError
            There is no machine to type to.
        """
        async with self._writing:
            try:
                async with asyncio.timeout(timeout_s):
                    while data:
                        if self._stream is None or self._stream.at_end:
                            raise VmError(f"{self._name} has no console to write to: it is not running")
                        try:
                            data = data[os.write(self._fd, data) :]
                        except BlockingIOError:
                            await self._room()
                        except BrokenPipeError:
                            raise VmError(f"{self._name} has ended; nothing reads its console") from None
            except TimeoutError as error:
                if isinstance(error, VmTimeoutError):
                    raise
                raise VmTimeoutError(
                    f"{self._name} did not take {len(data)} bytes for its console in {timeout_s:g} s; "
                    "its guest does not read the serial port"
                ) from error

    async def _room(self) -> None:
        """Wait until the socket takes more, or has ended."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(self._fd, ready.set)
        try:
            await ready.wait()
        finally:
            if self._stream is not None and not self._stream.at_end:
                loop.remove_writer(self._fd)

    def _tell(self, data: bytes) -> None:
        text = self._decoder.decode(data)
        for listener in tuple(self._listeners):
            listener(text)
