"""Both emulators as processes, with QMP and the serial port on sockets that they inherit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT_S = 30.0
MIB = 1 << 20
PROGRAMS = {
    "unicorn": [sys.executable, "-m", "ivshmem_lab.emulator"],
    "qemu": ["qemu-system-x86_64", "-machine", "pc", "-accel", "tcg"],
}
COMMON = ["-nodefaults", "-no-user-config", "-display", "none", "-m", "32"]

Json = dict[str, Any]


def readable(sock: socket.socket, deadline: float) -> bool:
    """Wait until there is something to read; False when the time is over."""
    return bool(select.select([sock], [], [], max(0.0, deadline - time.monotonic()))[0])


class Qmp:
    """A QMP client that shows everything it is told."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.events: list[Json] = []
        self._buffer = b""
        self._answers: list[Json] = []

    def negotiate(self) -> Json:
        greeting = self.answer()
        assert self.execute("qmp_capabilities") == {"return": {}}
        return greeting

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def execute(self, command: str, /, **arguments: Any) -> Json:
        """Send a command; returns the whole answer, an error too."""
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self.send(json.dumps(request).encode())
        return self.answer()

    def ok(self, command: str, /, **arguments: Any) -> Any:
        answer = self.execute(command, **arguments)
        assert "return" in answer, (command, arguments, answer)
        return answer["return"]

    def answer(self) -> Json:
        """Read the next message that is no event."""
        self._until(lambda: bool(self._answers), "no answer")
        return self._answers.pop(0)

    def event(self, name: str) -> Json:
        """Wait for an event that has not been asked for yet; earlier ones of other names are dropped."""
        self.hears(name)
        while (event := self.events.pop(0))["event"] != name:
            pass
        return event

    def hears(self, name: str, **data: Any) -> None:
        """Wait for an event, with these data, and keep it."""
        self._until(
            lambda: any(
                event["event"] == name and data.items() <= event.get("data", {}).items() for event in self.events
            ),
            f"no event {name}",
        )

    def closed(self) -> bool:
        """Tell whether the other side hangs up."""
        deadline = time.monotonic() + LIMIT_S
        while readable(self.sock, deadline):
            if not self._read():
                return True
        return False

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert readable(self.sock, deadline), f"{what} in {LIMIT_S} s; events: {self.events}"
            assert self._read(), f"{what} before the end; events: {self.events}"

    def _read(self) -> bool:
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\r\n")
        for line in lines:
            message = json.loads(line)
            (self.events if "event" in message else self._answers).append(message)
        return bool(data)


class Machine:
    """One emulator process.

    Parameters
    ----------
    kind
        ``"unicorn"`` or ``"qemu"``.
    options
        Further options.
    """

    def __init__(self, kind: str, *options: str, pass_fds: tuple[int, ...] = ()) -> None:
        serial, serial_far = socket.socketpair()
        qmp, qmp_far = socket.socketpair()
        self.serial = serial
        self.text = ""
        self.qmp = Qmp(qmp)
        command = [
            *PROGRAMS[kind],
            *COMMON,
            *("-chardev", f"socket,id=serial,fd={serial_far.fileno()}", "-serial", "chardev:serial"),
            *("-chardev", f"socket,id=monitor,fd={qmp_far.fileno()}", "-mon", "chardev=monitor,mode=control"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"),
            *options,
        ]
        inherited = (serial_far.fileno(), qmp_far.fileno(), *pass_fds)
        # What it says on stderr is read at the end, from a file: a full pipe would stop it.
        self._said = os.memfd_create("stderr")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._said, pass_fds=inherited
        )
        serial_far.close()
        qmp_far.close()

    @property
    def errors(self) -> str:
        """What it said on stderr until now."""
        return os.pread(self._said, 1 << 20, 0).decode()

    def says(self, text: str) -> None:
        """Wait until the serial port has said a text, once more than those that were waited for; forget it."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.text:
            assert readable(self.serial, deadline), f"no {text!r} after {self.text!r}; stderr: {self.errors}"
            data = self.serial.recv(1 << 16)
            assert data, f"ended before {text!r}, after {self.text!r}; stderr: {self.errors}"
            self.text += data.decode()
        self.text = self.text[self.text.index(text) + len(text) :]

    def line(self) -> str:
        """Wait for the end of a line; returns what came before it."""
        text = self.text
        while "\n" not in text:
            assert readable(self.serial, time.monotonic() + LIMIT_S), f"no line after {text!r}; stderr: {self.errors}"
            data = self.serial.recv(1 << 16)
            assert data, f"ended in the middle of {text!r}; stderr: {self.errors}"
            text += data.decode()
        line, _, self.text = text.partition("\n")
        return line

    def lines(self) -> list[str]:
        """Read the serial port to its end."""
        deadline = time.monotonic() + LIMIT_S
        while readable(self.serial, deadline):
            data = self.serial.recv(1 << 16)
            if not data:
                return self.text.splitlines()
            self.text += data.decode()
        raise AssertionError(f"still running after {self.text!r}")

    def wait(self) -> int:
        return self.process.wait(LIMIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.serial.close()
        self.qmp.sock.close()
        os.close(self._said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def memfd_backend(memory: SharedMemory, name: str = "m") -> list[str]:
    """This process's memfd as a memory backend: by path, since QEMU takes over no memfd."""
    path = f"/proc/{os.getpid()}/fd/{memory.fd}"
    return ["-object", f"memory-backend-file,id={name},mem-path={path},size={memory.size_bytes},share=on"]


@contextlib.contextmanager
def served(path: Path, vectors: int = 1, size_bytes: int = 1 << 16) -> Iterator[Callable[[], None]]:
    """Run our server on a thread of its own; what is given can end it early."""
    loop = asyncio.new_event_loop()
    over = asyncio.Event()
    started = threading.Event()

    async def serve(memory: SharedMemory) -> None:
        server = Server(path, memory, vectors)
        await server.start()
        started.set()
        await over.wait()
        await server.close()

    with SharedMemory.create_memfd(size_bytes) as memory:
        thread = threading.Thread(target=loop.run_until_complete, args=(serve(memory),))
        thread.start()

        def end() -> None:
            if thread.is_alive():
                loop.call_soon_threadsafe(over.set)
                thread.join(LIMIT_S)

        try:
            assert started.wait(LIMIT_S)
            yield end
        finally:
            end()
            loop.close()
