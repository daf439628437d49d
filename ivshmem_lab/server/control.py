"""The control socket: one JSON object per line asks, one per line answers.

``{"execute": "status"}`` answers ``{"return": {...}}``; what is not understood answers ``{"error": {"desc": ...}}``.
Lines are bounded, clients too, and nothing that they send is followed further than that.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..ipc.runtime_dir import check_socket_path
from .listener import Listener

if TYPE_CHECKING:
    import asyncio
    import os
    import socket
    from collections.abc import Callable

MOST_LINE_BYTES = 4096
MOST_CLIENTS = 16
_READ_BYTES = 4096
_MOST_UNSENT_BYTES = 4 << 20  # a status of 65 536 peers is about twice that: nobody needs two of them at once


class _Client:
    """One connection: what came without its end of line, and what it has not taken yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.asked = b""
        self.unsent = bytearray()  # bytes would be copied whole for every answer


class ControlSocket:
    """Answers questions about a server.

    Parameters
    ----------
    path
        Where the socket is to be; mode 0600.
    status
        Asked for the answer to ``status``; must be something that JSON can carry.
    """

    def __init__(self, path: str | os.PathLike[str], status: Callable[[], dict[str, Any]]) -> None:
        self.path = check_socket_path(path)
        self._commands = {"status": status, "help": self._help}
        self._clients: dict[int, _Client] = {}
        self._listener: Listener | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to listen.

        Raises
        ------
        UsageError, ServerError
            As :meth:`~ivshmem_lab.server.listener.Listener.open`.
        """
        self._listener = Listener.open(self.path)
        self._loop = loop
        loop.add_reader(self._listener.sock, self._accept)

    def close(self) -> None:
        """Stop, and remove the socket. May be called twice."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener.sock)
        self._listener.close()
        self._listener = None
        for client in list(self._clients.values()):
            self._drop(client)

    def answer(self, line: bytes) -> bytes:
        """Answer one line; whatever it holds, the answer is one line of JSON."""
        try:
            answer = {"return": self._execute(line)}
        except ValueError as error:
            answer = {"error": {"desc": str(error)}}
        return json.dumps(answer).encode() + b"\n"

    def _execute(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'not JSON: {error}; ask for example {{"execute": "status"}}') from error
        if not isinstance(request, dict) or set(request) != {"execute"}:
            raise ValueError('a request is an object with one key, for example {"execute": "status"}')
        name = request["execute"]
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            raise ValueError(f"unknown command {str(name)[:64]!r}; there are {', '.join(self._commands)}")
        return command()

    def _help(self) -> dict[str, Any]:
        return {"commands": list(self._commands)}

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.sock.accept()
        except OSError:  # gone again, or the server is short of descriptors: it asks again
            return
        if len(self._clients) >= MOST_CLIENTS:
            sock.close()
            return
        sock.setblocking(False)
        client = self._clients[sock.fileno()] = _Client(sock)
        self._loop.add_reader(sock, self._read, client)

    def _read(self, client: _Client) -> None:
        try:
            data = client.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
            return
        *lines, client.asked = (client.asked + data).split(b"\n")
        too_long = len(client.asked) > MOST_LINE_BYTES or any(len(line) > MOST_LINE_BYTES for line in lines)
        for line in lines:
            if line.strip():
                client.unsent += self.answer(line)
            if len(client.unsent) > _MOST_UNSENT_BYTES:
                break
        self._write(client)
        if too_long or len(client.unsent) > _MOST_UNSENT_BYTES:
            self._drop(client)

    def _write(self, client: _Client) -> None:
        try:
            sent = client.sock.send(client.unsent) if client.unsent else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(client)
            return
        del client.unsent[:sent]
        if client.unsent:
            self._loop.add_writer(client.sock, self._write, client)
        else:
            self._loop.remove_writer(client.sock)

    def _drop(self, client: _Client) -> None:
        if self._clients.pop(client.sock.fileno(), None) is not None:
            self._loop.remove_reader(client.sock)
            self._loop.remove_writer(client.sock)
        client.sock.close()
