"""A client made of the wire room and a raw socket, and a server whose events can be awaited."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ivshmem_lab.ipc.fdpass import close_all, receive_message
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.server import Server
from ivshmem_lab.wire.client import ClientProtocol, MemoryArrived, PeerLeft, VectorAdded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from ivshmem_lab.server.events import ServerEvent

LIMIT_S = 20.0

E = TypeVar("E")

_names = itertools.count()


class Client:
    """Reads only when it is told to; keeps every event it saw and every descriptor it got."""

    def __init__(self, path: str, lease: str = "") -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if lease:
            self.sock.bind(f"\0ivshmem-lease/{lease}/{os.getpid()}-{next(_names)}")
        self.sock.connect(path)
        self.protocol: ClientProtocol[int] = ClientProtocol()
        self.fds: dict[int, list[int]] = {}
        self.memory_fd = -1
        self.departures: list[int] = []
        self.at_end = False

    @property
    def peer_id(self) -> int:
        assert self.protocol.peer_id is not None
        return self.protocol.peer_id

    @property
    def vectors(self) -> dict[int, int]:
        return self.protocol.vectors

    def drain(self) -> None:
        """Read what is there."""
        with contextlib.suppress(BlockingIOError):
            while not self.at_end:
                data, fds = receive_message(self.sock, 4096)
                self.at_end = not data
                for event in self.protocol.receive(data, fds):
                    if isinstance(event, VectorAdded):
                        assert len(self.fds.setdefault(event.peer_id, [])) == event.vector
                        self.fds[event.peer_id].append(event.fd)
                    elif isinstance(event, MemoryArrived):
                        self.memory_fd = event.fd
                    elif isinstance(event, PeerLeft):
                        self.departures.append(event.peer_id)
                        close_all(self.fds.pop(event.peer_id))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read until something is so."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(LIMIT_S):
            self.drain()
            while not condition():
                assert not self.at_end, "the server closed the connection"
                readable = asyncio.Event()
                loop.add_reader(self.sock, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(self.sock)
                self.drain()

    async def until_vectors(self, vectors: dict[int, int]) -> None:
        await self.until(lambda: self.protocol.ready and self.vectors == vectors)

    async def until_end(self) -> None:
        await self.until(lambda: self.at_end)

    def close(self) -> None:
        self.sock.close()
        for fds in self.fds.values():
            close_all(fds)
        self.fds.clear()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Watched:
    """A server, and what it told."""

    def __init__(self, path: Path, vectors: int, **options: Any) -> None:
        self.memory = SharedMemory.create_memfd(1 << 16)
        self.events: list[ServerEvent] = []
        self._news = asyncio.Event()
        self.server = Server(path, self.memory, vectors, self._note, **options)
        self.path = str(path)

    def _note(self, event: ServerEvent) -> None:
        self.events.append(event)
        self._news.set()

    async def event(self, kind: type[E], count: int = 1) -> E:
        """Wait for the `count`-th event of a kind, counted from the start."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                found = [event for event in self.events if isinstance(event, kind)]
                if len(found) >= count:
                    return found[count - 1]
                self._news.clear()
                await self._news.wait()

    async def join(self, vectors: dict[int, int], lease: str = "") -> Client:
        """Connect a client and let it read until it knows these peers."""
        client = Client(self.path, lease)
        try:
            await client.until_vectors(vectors)
        except BaseException:
            client.close()
            raise
        return client


@contextlib.asynccontextmanager
async def serving(path: Path, vectors: int = 1, **options: Any) -> AsyncIterator[Watched]:
    watched = Watched(path, vectors, **options)
    try:
        await watched.server.start()
        try:
            yield watched
        finally:
            await watched.server.close()
    finally:
        watched.memory.close()


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until something is so that nobody announces."""
    async with asyncio.timeout(LIMIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def limit_that_leaves(count: int) -> int:
    """Return the limit of open files (of their numbers, in truth) under which `count` more can be opened."""
    used = {int(entry.name) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
    free = (number for number in range(1 << 20) if number not in used)
    return next(number for index, number in enumerate(free) if index == count)
