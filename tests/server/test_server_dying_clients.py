"""Clients that die or run out of descriptors in the middle of their introduction cost only themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import select
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from server_tools import LIMIT_S, open_fds, serving

from ivshmem_lab.ipc.fdpass import PassedFdLostError, receive_message
from ivshmem_lab.server.events import PeerDeparted, PeerJoined

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VECTORS = 300  # more than a socket holds: the introduction is never whole in the kernel


def reads_nothing(sock: socket.socket) -> None:
    """Only hold the connection."""


def reads_a_part(sock: socket.socket) -> None:
    sock.recv(20)


def exhausts_its_descriptors(sock: socket.socket) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 8, hard))
    with contextlib.suppress(PassedFdLostError):
        while select.select([sock], [], [], LIMIT_S)[0]:
            receive_message(sock, 8)


def client_process(path: str, deed: Callable[[socket.socket], None]) -> tuple[int, int]:
    """Start a process that connects, does something, says so into a pipe, and waits to be killed; return pid and pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            deed(sock)
            os.write(writing, b"d")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    os.set_blocking(reading, False)
    return pid, reading


def end(pid: int, pipe: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(pipe)


async def until_done(fd: int) -> None:
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, readable.set)
    try:
        async with asyncio.timeout(LIMIT_S):
            await readable.wait()
        assert os.read(fd, 1) == b"d", "the client died by itself"
    finally:
        asyncio.get_running_loop().remove_reader(fd)


@pytest.mark.parametrize("deed", [reads_nothing, reads_a_part, exhausts_its_descriptors])
def test_client_killed_in_its_introduction_is_taken_leave_of(
    deed: Callable[[socket.socket], None], tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=VECTORS) as watched:
            with await watched.join({0: VECTORS}) as alice:
                pid, reading = client_process(watched.path, deed)
                try:
                    await until_done(reading)
                    joined = await watched.event(PeerJoined, 2)
                    assert (joined.peer_id, joined.pid) == (1, pid)
                    await alice.until_vectors({0: VECTORS, 1: VECTORS})
                finally:
                    end(pid, reading)
                gone = await watched.event(PeerDeparted)
                assert gone.peer_id == 1
                await alice.until_vectors({0: VECTORS})
                with await watched.join({0: VECTORS, 2: VECTORS}):
                    assert alice.departures == [1]

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before
