"""Servers for a peer to talk to: ours in a thread, and one that says exactly what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING

from ivshmem_lab.ipc.eventfd import EventFd
from ivshmem_lab.ipc.fdpass import send_message
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.server import Server
from ivshmem_lab.wire.messages import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LIMIT_S = 20.0


@contextlib.contextmanager
def served(path: Path, vectors: int = 1, size_bytes: int = 1 << 16) -> Iterator[Callable[[], None]]:
    """Run our server; what is given can end it early."""
    with SharedMemory.create_memfd(size_bytes) as memory:
        started = threading.Event()
        hooks: list[Callable[[], object]] = []

        async def run() -> None:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            hooks.append(lambda: loop.call_soon_threadsafe(stop.set))
            server = Server(path, memory, vectors)
            await server.start()
            started.set()
            await stop.wait()
            await server.close()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        assert started.wait(LIMIT_S)

        def end() -> None:
            if thread.is_alive():
                hooks[0]()
                thread.join(LIMIT_S)

        try:
            yield end
        finally:
            end()


class Script:
    """A server for one client, which says what the test says, when it says it."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.listener.settimeout(LIMIT_S)
        self.memory = SharedMemory.create_memfd(1 << 16)
        self.lines = {(peer_id, vector): EventFd.create() for peer_id in range(3) for vector in range(2)}
        self.client: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def introduce(
        self, *said: tuple[int, int | None], end: bool = False, tail: bytes = b"", cut_with: int | None = None
    ) -> None:
        """Accept the client in a thread and say this to it.

        `cut_with`: end in the middle of a message that brought this descriptor.
        """

        def run() -> None:
            self.client, _ = self.listener.accept()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.say(*said, tail=tail)
                if cut_with is not None:
                    send_message(self.client, b"abc", [cut_with])
            if end or cut_with is not None:
                self.hang_up()

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def say(self, *said: tuple[int, int | None], tail: bytes = b"") -> None:
        assert self.client is not None
        for number, fd in said:
            send_message(self.client, encode(number), [] if fd is None else [fd])
        if tail:
            self.client.sendall(tail)

    def hang_up(self) -> None:
        if self.client is not None:
            self.client.close()

    def line(self, peer_id: int, vector: int = 0) -> int:
        return self.lines[peer_id, vector].fileno()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join(LIMIT_S)
        self.hang_up()
        self.listener.close()
        self.memory.close()
        for line in self.lines.values():
            line.close()


@contextlib.contextmanager
def scripted(path: Path) -> Iterator[Script]:
    script = Script(path)
    try:
        yield script
    finally:
        script.close()


def not_an_eventfd() -> int:
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
