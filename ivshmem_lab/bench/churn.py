"""Whether a server grows while peers come and go without end.

One client after the other joins, reads its introduction and leaves, beside one that stays and reads. What the server
has open and how much memory it holds is looked at after the first tenth (caches are warm by then) and at the end.
There are 65536 ids: with more cycles than that, they have come again.
"""

from __future__ import annotations

import select
import socket
import time
from pathlib import Path
from typing import Any

from ..errors import ServerError, UsageError
from ..wire.messages import MEMORY
from .process import cpu_seconds, rss_mb
from .server import OURS, START_S, Client, find_program, running_server

GROWN_MB = 1.0
"""Memory that may come and go with the allocator; a small object kept per cycle is more in 100 000 cycles."""

_LEAST_CYCLES = 10
_STALL_S = 3.0


def bench_churn(cycles: int, vectors: int = 1, against: str | None = None) -> dict[str, Any]:
    """Let `cycles` peers join and leave one after the other, at our server, and then at `against`.

    Parameters
    ----------
    cycles
        How many join and leave, at least 10.
    vectors
        Of each.
    against
        Another program with the flags of QEMU's; None: ours alone.

    Returns
    -------
    dict
        ``cycles``, ``complete`` (how many had their whole introduction), ``lost`` (how many had not), ``ids_used``
        (different ones), ``seconds``, ``server_cpu_seconds``, ``server_fds`` and ``server_rss_mb`` as ``[after the first
        tenth, at the end]``, and ``grown``: more open files, or :data:`GROWN_MB` more memory. Under ``against`` the same of the other.

    Raises
    ------
    UsageError
        When there are too few cycles, or the other program is not there.
    ServerError
        When the server lets nobody in any more.
    """
    if cycles < _LEAST_CYCLES:
        raise UsageError(f"{cycles} cycles are not allowed; at least {_LEAST_CYCLES}")
    program = find_program(against)
    result = _measure(OURS, cycles, vectors)
    if program is not None:
        result["against"] = {"program": program, **_measure([program], cycles, vectors)}
    return result


def _measure(command: list[str], cycles: int, vectors: int) -> dict[str, Any]:
    complete = 0
    ids: set[int] = set()
    looks: list[tuple[int, float]] = []
    with running_server(command, vectors) as (server, path, _), _join(path, START_S) as staying:
        resident = Client(staying)
        _introduce(resident, vectors)
        files = _open_files(server.pid)
        cpu_before, began = cpu_seconds(server.pid), time.monotonic()
        for cycle in range(cycles):
            with _join(path, _STALL_S) as sock:
                client = Client(sock)
                complete += _introduce(client, vectors)
            ids.add(client.own_id)
            resident.read()
            if cycle == cycles // _LEAST_CYCLES:
                looks.append(_look(server.pid, files, resident))
        seconds = time.monotonic() - began
        looks.append(_look(server.pid, files, resident))
        spent = cpu_seconds(server.pid) - cpu_before
    (fds_before, rss_before), (fds_after, rss_after) = looks
    return {
        "cycles": cycles,
        "vectors": vectors,
        "complete": complete,
        "lost": cycles - complete,
        "ids_used": len(ids),
        "seconds": round(seconds, 3),
        "server_cpu_seconds": round(spent, 3),
        "server_fds": [fds_before, fds_after],
        "server_rss_mb": [round(rss_before, 2), round(rss_after, 2)],
        "grown": fds_after > fds_before or rss_after > rss_before + GROWN_MB,
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
