"""Records what a server says, one JSON object a line: :mod:`ivshmem_lab.trace` reads, draws and replays it.

::

    {"ivshmem_trace": 1, "started": 1700000000.0, "vectors": 2, "memory_bytes": 4194304}
    {"time_ns": 1200, "direction": "out", "peer": 0, "value": -1, "has_fd": true}
    {"time_ns": 1300, "event": "PeerJoined", "peer_id": 0, "pid": 4711, "uid": 1000}

1. The first line says what the server was; ``started`` is in seconds since 1970.
2. Times are in ns since then, on the clock that never goes back (:func:`time.monotonic_ns`).
3. ``direction`` is ``"out"``, from the server to the peer: the protocol knows no other.
4. Each line is written at once, so the trace of a server that was killed ends with its last message.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from typing import TYPE_CHECKING, Any, Self

from ..errors import UsageError

if TYPE_CHECKING:
    from .events import ServerEvent

FORMAT = 1
"""The first line's ``ivshmem_trace``."""


class Recorder:
    """A :class:`~ivshmem_lab.server.events.ServerTap` that writes a trace file.

    When the file takes no more (the disk is full), recording ends and the server goes on.

    Parameters
    ----------
    path
        The file; mode 0600, and an old one is overwritten.
    vectors, memory_bytes
        Those of the server, for a replay.

    Attributes
    ----------
    failure
        Why recording ended early; None while it goes on.

    Raises
    ------
    UsageError
        When the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], vectors: int, memory_bytes: int) -> None:
        self.path = os.fspath(path)
        self.failure: str | None = None
        try:
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except (OSError, ValueError) as error:
            raise UsageError(f"the trace {self.path!r} cannot be written: {error}; choose another file") from error
        self._start_ns = time.monotonic_ns()
        header = {"ivshmem_trace": FORMAT, "started": time.time(), "vectors": vectors, "memory_bytes": memory_bytes}
        self._write(json.dumps(header))

    def message(self, now_ns: int, peer_id: int, value: int, has_fd: bool) -> None:
        """Record a message to a peer."""
        # Written by hand: a third of the time of json.dumps, and there can be millions.
        self._write(
            f'{{"time_ns": {now_ns - self._start_ns}, "direction": "out", "peer": {peer_id}, '
            f'"value": {value}, "has_fd": {"true" if has_fd else "false"}}}'
        )

    def event(self, now_ns: int, event: ServerEvent) -> None:
        """Record an event: its class, and all that it says."""
        record: dict[str, Any] = {"time_ns": now_ns - self._start_ns, "event": type(event).__name__}
        self._write(json.dumps(record | dataclasses.asdict(event)))

    def close(self) -> None:
        """End the recording. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _write(self, line: str) -> None:
        if self._fd < 0:
            return
        data = line.encode() + b"\n"
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self.failure = f"the trace {self.path!r} ends here: {error.strerror}"
        else:
            if written < len(data):
                self.failure = f"the trace {self.path!r} ends here: the disk is full"
        if self.failure is not None:
            self.close()
