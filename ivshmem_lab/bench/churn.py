"""Whether a server grows while peers come and go without end.

One client after the other joins, reads its introduction and leaves, beside one that stays and reads. What the server
has open and how much memory it holds is looked at after the first tenth (caches are warm by then) and at the end.
"""

from __future__ import annotations

import select
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import ServerError, UsageError
from ..wire.messages import MEMORY
from .server import START_S, Client, cpu_seconds, rss_mb, running_server

_LEAST_CYCLES = 10
_STALL_S = 3.0


def bench_churn(command: list[str], cycles: int, vectors: int) -> dict[str, Any]:
    """Let `cycles` peers join and leave one after the other.

    Parameters
    ----------
    command
        The server's program.
    cycles
        How many join and leave, at least 10.
    vectors
        Of each.

    Returns
    -------
    dict
        ``cycles``, ``complete`` (how many had their whole introduction), ``lost`` (how many had not), ``seconds``, ``server_cpu_seconds``, and
        ``server_fds`` and ``server_rss_mb`` as ``[after the first tenth, at the end]``.

    Raises
    ------
    UsageError
        When there are too few cycles.
    ServerError
        When the server lets nobody in any more.
    """
    if cycles < _LEAST_CYCLES:
        raise UsageError(f"{cycles} cycles are not allowed; at least {_LEAST_CYCLES}")
    complete = 0
    looks: list[tuple[int, float]] = []
    with running_server(command, vectors) as (server, path, _), _join(path, START_S) as staying:
        resident = Client(staying)
        _introduce(resident, vectors)
        files = _open_files(server.pid)
        cpu_before, began = cpu_seconds(server.pid), time.monotonic()
        for cycle in range(cycles):
            with _join(path, _STALL_S) as sock:
                complete += _introduce(Client(sock), vectors)
            resident.read()
            if cycle == cycles // _LEAST_CYCLES:
                looks.append(_look(server.pid, files, resident))
        seconds = time.monotonic() - began
        looks.append(_look(server.pid, files, resident))
        spent = cpu_seconds(server.pid) - cpu_before
    return {
        "cycles": cycles,
        "vectors": vectors,
        "complete": complete,
        "lost": cycles - complete,
        "seconds": round(seconds, 3),
        "server_cpu_seconds": round(spent, 3),
        "server_fds": [fds for fds, _ in looks],
        "server_rss_mb": [round(megabytes, 2) for _, megabytes in looks],
    }


def _join(path: str, timeout_s: float) -> socket.socket:
    """Connect as soon as the server lets us."""
    deadline = time.monotonic() + timeout_s
    pause = select.poll()
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            if time.monotonic() > deadline:
                raise ServerError(f"the server on {path!r} lets nobody in: {error}") from error
            pause.poll(1)
        else:
            return sock


def _introduce(client: Client, vectors: int) -> bool:
    """Let a client read until it has the memory and all of its own vectors; tell whether it has."""
    poller = select.poll()
    poller.register(client.sock, select.POLLIN)
    while client.vectors[MEMORY] != 1 or client.vectors[client.own_id] != vectors:
        if not poller.poll(_STALL_S * 1e3) or client.read() < 0:
            return False
    return True


def _look(pid: int, files: int, resident: Client) -> tuple[int, float]:
    """Return open files and memory (MB), once the server has noticed the last one's leaving."""
    deadline = time.monotonic() + _STALL_S
    pause = select.poll()
    while _open_files(pid) > files and time.monotonic() < deadline:
        resident.read()
        pause.poll(1)
    return _open_files(pid), rss_mb(pid)


def _open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
