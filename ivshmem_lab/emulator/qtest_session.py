"""The connection of a qtest client: bytes in, lines out, and a log of both.

A client that sends a line without end, or does not read, loses its connection and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..errors import UsageError
from .qtest import LINE_LIMIT_BYTES, Qtest

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ..pc.machine import Machine
    from .events import Events

READ_BYTES = 1 << 20
UNREAD_LIMIT_BYTES = 4 * LINE_LIMIT_BYTES
LINES_AT_ONCE = 256
"""A client that sends more goes on when others had their turn."""


class QtestLog:
    """Where requests and answers are written: ``[R +SECONDS] request`` and ``[S +SECONDS] answer``, as QEMU has it.

    Parameters
    ----------
    path
        A file's path; None for standard error, ``"none"`` for nowhere.

    Raises
    ------
    UsageError
        When the file cannot be written.
    """

    def __init__(self, path: str | None) -> None:
        self._stream: TextIO | None = sys.stderr
        self._ours = False
        self._start_s = time.monotonic()
        if path in ("none", "/dev/null"):
            self._stream = None
        elif path is not None:
            try:
                self._stream = Path(path).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
            except OSError as error:
                raise UsageError(f"-qtest-log {path}: cannot be written: {error.strerror}") from error
            self._ours = True

    @property
    def is_on(self) -> bool:
        """Tell whether lines go anywhere."""
        return self._stream is not None

    def line(self, kind: str, text: str) -> None:
        """Write one line: kind R for a request, S for an answer, I for news of the connection."""
        if self._stream is not None:
            # A log that nobody can take any more is no reason to stop.
            with contextlib.suppress(OSError, ValueError):
                self._stream.write(f"[{kind} +{time.monotonic() - self._start_s:.06f}] {text}\n")

    def close(self) -> None:
        """Close a file of ours."""
        if self._ours and self._stream is not None:
            self._stream.close()
        self._stream = None


class QtestSession:
    """One client's conversation, on the event loop; requests are carried out on the vCPU's thread.

    Parameters
    ----------
    machine
        The machine, or None for one without anything.
    has_clock
        See `Qtest`.
    events
        The vCPU's: doorbells of peers are heard between any two requests.
    on_vcpu
        Has something done on the vCPU's thread.
    log
        Gets every line.
    """

    def __init__(
        self,
        machine: Machine | None,
        *,
        has_clock: bool,
        events: Events,
        on_vcpu: Callable[[Callable[[], None]], Awaitable[None]],
        log: QtestLog,
    ) -> None:
        self._qtest = Qtest(machine, has_clock=has_clock, send=self._say)
        self._events = events
        self._on_vcpu = on_vcpu
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._out: deque[str] = deque()
        self._busy = False
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk until the client goes."""
        self._writer = writer
        self._log.line("I", "OPENED")
        buffer = bytearray()
        try:
            while data := await reader.read(READ_BYTES):
                seen = len(buffer)
                buffer += data
                if buffer.find(b"\n", seen) >= 0:
                    *lines, buffer = buffer.split(b"\n")
                    for first in range(0, len(lines), LINES_AT_ONCE):
                        batch = [line.decode("latin-1") for line in lines[first : first + LINES_AT_ONCE]]
                        await self._on_vcpu(lambda batch=batch: self._execute(batch))  # type: ignore[misc]
                        self._flush()
                        await writer.drain()
                if len(buffer) > LINE_LIMIT_BYTES:
                    self._log.line("I", f"CLOSED: a line is longer than {LINE_LIMIT_BYTES} bytes")
                    return
            self._log.line("I", "CLOSED")
        except (ConnectionError, BrokenPipeError):
            self._log.line("I", "CLOSED")
        finally:
            self._writer = None
            with contextlib.suppress(Exception):
                await self._on_vcpu(self._qtest.detach)
            writer.close()

    # -- on the vCPU's thread ------------------------------------------------------------------------

    def _execute(self, lines: list[str]) -> None:
        self._busy = True
        try:
            for line in lines:
                self._log.line("R", line[:1000])
                self._qtest.execute(line)
                self._events.serve_descriptors()
        finally:
            self._busy = False

    def _say(self, line: str) -> None:
        self._log.line("S", line[:1000])
        self._out.append(line)
        if not self._busy:
            # An interrupt line has changed while nobody asked.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._flush)

    # -- on the event loop ---------------------------------------------------------------------------

    def _flush(self) -> None:
        lines = []
        while self._out:
            lines.append(self._out.popleft())
        if not lines or self._writer is None or self._writer.is_closing():
            return
        lines.append("")
        self._writer.write("\n".join(lines).encode("latin-1", "replace"))
        if self._writer.transport.get_write_buffer_size() > UNREAD_LIMIT_BYTES:
            self._writer.transport.abort()
