"""A server that runs beside the test."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def server_beside(tmp_path: Path) -> Iterator[Server]:
    """An ivshmem server with 4 MiB and two vectors, on a loop and thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    memory = SharedMemory.create_memfd(4 << 20)
    server = Server(str(tmp_path / "s"), memory, vectors=2)
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(5)
    yield server
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    memory.close()


@pytest.fixture
def server(server_beside: Server) -> str:
    """Its socket's path."""
    return server_beside.path
