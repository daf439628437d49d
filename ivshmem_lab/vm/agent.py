"""Running commands in a guest through the agent that waits there at a virtio-serial port.

The guest is not trusted: what it sends is checked (`frames`), bounded and costs only itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from typing import TYPE_CHECKING

from ..errors import UsageError, VmError
from .completed import Completed
from .frames import MOST_BYTES, AgentProtocolError, Frame, FrameDecoder, FrameType
from .text import VmTimeoutError

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

PORT_NAME = "org.ivshmem_lab.agent"
"""The name of the virtio-serial port at which the agent of our images waits."""

BOOT_TIME_LIMIT_S = 90.0
RUN_TIME_LIMIT_S = 30.0
MOST_OUTPUT_BYTES = 64 << 20

_READ_BYTES = 262144
_MOST_WORDS = 255
_KILL_TIME_LIMIT_S = 5.0


class GuestCommand:
    """A command that runs in a guest; made by `GuestAgent.start`."""

    def __init__(self, agent: GuestAgent, number: int, args: tuple[str, ...]) -> None:
        self.args = args
        self.number = number
        self._agent = agent
        self._began_s = time.monotonic()
        self._output = {FrameType.OUTPUT: bytearray(), FrameType.ERROR: bytearray()}
        self._news = asyncio.Event()
        self._failure: VmError | None = None
        self._completed: Completed | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended, or is lost."""
        return self._completed is not None or self._failure is not None

    async def wait(self, timeout_s: float | None = RUN_TIME_LIMIT_S) -> Completed:
        """Wait for its end.

        Raises
        ------
        VmTimeoutError
            It did not end in time, and was killed in the guest.
        VmError
            It could not be run, wrote too much, or the machine is gone.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not self.ended:
                    await self._news.wait()
        except TimeoutError as error:
            dead = await self.kill()
            said = self._output[FrameType.ERROR] or self._output[FrameType.OUTPUT]
            raise VmTimeoutError(
                f"{' '.join(self.args)!r} in {self._agent.name} did not end in {timeout_s:g} s and "
                f"{'was killed' if dead else 'could not be killed: the guest does not answer'}; "
                f"its last words: {bytes(said[-200:]).decode('utf-8', 'replace')!r}"
            ) from error
        except asyncio.CancelledError:
            with contextlib.suppress(VmError):
                await self._agent.send(Frame(FrameType.KILL, self.number))
            raise
        if self._failure is not None:
            raise self._failure
        assert self._completed is not None
        return self._completed

    async def wait_text(self, text: str, timeout_s: float = RUN_TIME_LIMIT_S) -> None:
        """Wait until it has written a text to its standard output or error.

        Raises
        ------
        VmTimeoutError
            It did not in time.
        VmError
            It ended without.
        """
        wanted = text.encode()
        try:
            async with asyncio.timeout(timeout_s):
                while not any(wanted in part for part in self._output.values()):
                    if self.ended:
                        if self._failure:
                            raise self._failure
                        raise VmError(
                            f"{' '.join(self.args)!r} in {self._agent.name} ended without {text!r}; "
                            f"it said: {bytes(self._output[FrameType.ERROR][-300:]).decode('utf-8', 'replace')!r}"
                        )
                    await self._news.wait()
        except TimeoutError as error:
            raise VmTimeoutError(
                f"{' '.join(self.args)!r} in {self._agent.name} did not say {text!r} in {timeout_s:g} s"
            ) from error

    async def kill(self) -> bool:
        """End it and the processes of its group with SIGKILL; tell whether it has ended."""
        if not self.ended:
            with contextlib.suppress(VmError, TimeoutError):
                async with asyncio.timeout(_KILL_TIME_LIMIT_S):
                    await self._agent.send(Frame(FrameType.KILL, self.number))
                    while not self.ended:
                        await self._news.wait()
        return self.ended

    def take(self, frame: Frame) -> None:
        """Take a frame of the guest's."""
        if frame.type in self._output:
            self._output[frame.type] += frame.data
            if sum(map(len, self._output.values())) > MOST_OUTPUT_BYTES:
                self.fail(
                    VmError(f"{' '.join(self.args)!r} wrote more than {MOST_OUTPUT_BYTES >> 20} MiB; redirect it")
                )
        elif len(frame.data) != 4:
            raise AgentProtocolError(
                f"the guest's agent sent a {frame.type.name} of {len(frame.data)} bytes instead of 4"
            )
        elif frame.type is FrameType.EXIT:
            out, err = self._output[FrameType.OUTPUT], self._output[FrameType.ERROR]
            code = os.waitstatus_to_exitcode(_wait_status(frame.data))
            self._completed = Completed(self.args, code, bytes(out), bytes(err), time.monotonic() - self._began_s)
        else:
            number = struct.unpack("<I", frame.data)[0]
            self.fail(VmError(f"{' '.join(self.args)!r} could not be run in {self._agent.name}: {os.strerror(number)}"))
        self._tell()

    def fail(self, error: VmError) -> None:
        """End it with an error, unless it has ended."""
        if not self.ended:
            self._failure = error
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def _wait_status(data: bytes) -> int:
    status = int(struct.unpack("<I", data)[0])
    if not os.WIFEXITED(status) and not os.WIFSIGNALED(status):
        raise AgentProtocolError(f"the guest's agent sent {status:#x}, which is no end of a process")
    return status


class GuestAgent:
    """The agent of one guest; belongs to the running loop.

    Parameters
    ----------
    name
        The machine's name.
    sock
        Our end of the port; it belongs to this object from here on.
    """

    def __init__(self, name: str, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.name = name
        self._sock: socket.socket | None = sock
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder()
        self._ready = asyncio.Event()
        self._sending = asyncio.Lock()
        self._jobs: dict[int, GuestCommand] = {}
        self._numbers = 0
        self._lost: VmError | None = None
        self._loop.add_reader(sock.fileno(), self._read)

    async def wait_ready(self, timeout_s: float = BOOT_TIME_LIMIT_S) -> None:
        """Wait until the guest has booted and its agent is there.

        Raises
        ------
        VmTimeoutError
            It is not, in time.
        VmError
            The machine is gone.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError as error:
            raise VmTimeoutError(
                f"the agent of {self.name} said nothing in {timeout_s:g} s; is it running (start()), does its initrd start "
                "`ivshmem-tool agent`? Its console tells how far it came"
            ) from error
        if self._lost is not None:
            raise self._lost

    def take_over(self, other: GuestAgent) -> None:
        """Go on where another one was: its guest has moved here with its agent, which greets nobody a second time."""
        self._numbers = other._numbers
        if other._ready.is_set() and other._lost is None:
            self._ready.set()

    async def start(self, args: Sequence[str], *, stdin: bytes = b"") -> GuestCommand:
        """Start a command.

        Parameters
        ----------
        args
            Its words, at most 255 and 32 KiB; the first is a path, or looked for in ``/bin`` and ``/sbin``.
        stdin
            Its standard input.

        Raises
        ------
        UsageError
            The words are not allowed.
        VmError
            The machine is gone.
        """
        words = _read_words(args)
        if self._lost is not None:
            raise self._lost
        self._numbers += 1
        job = self._jobs[self._numbers] = GuestCommand(self, self._numbers, tuple(args))
        try:
            for at in range(0, len(stdin), MOST_BYTES):
                await self.send(Frame(FrameType.INPUT, job.number, stdin[at : at + MOST_BYTES]))
            await self.send(Frame(FrameType.RUN, job.number, words))
        except BaseException:
            self._jobs.pop(job.number, None)
            raise
        return job

    async def run(
        self, args: Sequence[str], *, stdin: bytes = b"", timeout_s: float | None = RUN_TIME_LIMIT_S
    ) -> Completed:
        """Run a command and wait for its end; errors as `start` and `GuestCommand.wait`."""
        job = await self.start(args, stdin=stdin)
        return await job.wait(timeout_s)

    async def send(self, frame: Frame) -> None:
        """Send a frame; raises VmError when the machine is gone."""
        async with self._sending:
            if self._sock is None:
                raise self._lost or VmError(f"the agent of {self.name} is gone")
            data = memoryview(frame.to_bytes())
            while data:
                try:
                    data = data[self._sock.send(data) :]
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    self._lose(VmError(f"{self.name} is gone: {error.strerror}"))
                if self._sock is None:
                    raise self._lost or VmError(f"the agent of {self.name} is gone")

    def close(self) -> None:
        """Give the port back. May be repeated."""
        self._lose(VmError(f"{self.name} was closed"))

    async def _writable(self) -> None:
        assert self._sock is not None
        ready = asyncio.Event()
        fd = self._sock.fileno()
        self._loop.add_writer(fd, ready.set)
        try:
            # The other end may never read, and a closed port has to be noticed too.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await ready.wait()
        finally:
            if self._sock is not None:
                self._loop.remove_writer(fd)

    def _read(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose(VmError(f"{self.name} ended; its console and its log tell why"))
            return
        try:
            for frame in self._decoder.feed(data):
                self._take(frame)
        except AgentProtocolError as error:
            self._lose(error)

    def _take(self, frame: Frame) -> None:
        if frame.type is FrameType.HELLO:
            self._ready.set()
            return
        job = self._jobs.get(frame.job)
        if job is None:  # one that was given up
            return
        job.take(frame)
        if job.ended:
            del self._jobs[frame.job]
            if frame.type in {FrameType.OUTPUT, FrameType.ERROR}:  # it wrote too much
                task = self._loop.create_task(self._stop(frame.job))
                task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _stop(self, number: int) -> None:
        with contextlib.suppress(VmError):
            await self.send(Frame(FrameType.KILL, number))

    def _lose(self, error: VmError) -> None:
        if self._sock is None:
            return
        self._lost = error
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._sock = None
        for job in self._jobs.values():
            job.fail(error)
        self._jobs.clear()
        self._ready.set()


def _read_words(args: Sequence[str]) -> bytes:
    if isinstance(args, (str, bytes)) or not args or not all(isinstance(word, str) for word in args):
        raise UsageError(f'args {args!r} is no list of texts; write ["ls", "/"], or ["sh", "-c", "…"] for a shell')
    words = b"".join(word.encode() + b"\0" for word in args)
    if len(words) > MOST_BYTES or len(args) > _MOST_WORDS or any("\0" in word for word in args) or not args[0]:
        raise UsageError(
            f"a command has 1 to {_MOST_WORDS} words without NUL, {MOST_BYTES} bytes in all; this has {len(args)} words, "
            f"{len(words)} bytes; put long texts into stdin"
        )
    return words
