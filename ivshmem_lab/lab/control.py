"""The control socket of a lab: other processes of the same user see and change it while it runs.

One JSON object per line asks, ``{"execute": "plug", "arguments": {"vm": "alice", "source": "board"}}``. What happens meanwhile comes as
``{"event": {...}}``, one line each, and the end as ``{"return": ...}`` or ``{"error": {"type": ..., "desc": ...}}``.
The socket lies in a directory of this user alone, and the kernel is asked who connects. A client costs itself only: lines and clients are
bounded, and what a client has begun is finished when it goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import select
import socket
import socketserver
import threading
from typing import TYPE_CHECKING, Any

from ..errors import IvshmemLabError, LabError, ServerError, UsageError
from ..ipc.runtime_dir import runtime_dir
from ..server.listener import Listener
from ..server.policy import Credentials
from ..vm.device import ENDED
from .orders import ORDERS, find_vm, take

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .lab import Lab

MOST_LINE_BYTES = 1 << 16
MOST_CLIENTS = 16
MOST_UNREAD_PIECES = 4096
_LOOK_EVERY_S = 0.2
_SEND_TIME_LIMIT_S = 10.0
_PLACE_TIME_LIMIT_S = 2.0
_NAME = re.compile(r"[\w.-]{1,32}")


def control_path(name: str) -> Path:
    """Return where the socket of a lab of this user is."""
    return runtime_dir() / f"up-{name}.sock"


def control_paths() -> dict[str, Path]:
    """Return the sockets of all labs of this user, by name; some may be of labs that were killed."""
    return {path.stem.removeprefix("up-"): path for path in sorted(runtime_dir().glob("up-*.sock"))}


class _Client(socketserver.BaseRequestHandler):
    """One connection, on a thread of its own."""

    server: _Server

    def setup(self) -> None:
        self.request.settimeout(None)
        self._sending = threading.Lock()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            for line in self._lines():
                self._answer(line)

    def _lines(self) -> Iterator[bytes]:
        buffer = b""
        while data := self.request.recv(MOST_LINE_BYTES):
            *lines, buffer = (buffer + data).split(b"\n")
            if len(buffer) > MOST_LINE_BYTES:
                return
            yield from (line for line in lines if line.strip())

    def _answer(self, line: bytes) -> None:
        try:
            name, arguments = _request(line)
            if name == "console":
                self._console(arguments)
                return
            done = ORDERS[name](self.server.lab, arguments, self._tell)
        except IvshmemLabError as error:
            kind = "UsageError" if isinstance(error, UsageError) else type(error).__name__
            self.say({"error": {"type": kind, "desc": str(error)}})
        else:
            self.say({"return": done})

    def _tell(self, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever has gone need not hear; what was begun is finished
            self.say({"event": event})

    def say(self, message: dict[str, Any]) -> None:
        """Send one line."""
        with self._sending:
            self.request.settimeout(_SEND_TIME_LIMIT_S)
            try:
                self.request.sendall(json.dumps(message).encode() + b"\n")
            finally:
                self.request.settimeout(None)

    def _console(self, arguments: dict[str, Any]) -> None:
        """Hand a serial port over until one side ends: text as events, ``{"input": "..."}`` lines to it."""
        vm = find_vm(self.server.lab, take(arguments, {"vm": (str,)}, "vm"))
        pieces: queue.Queue[str | None] = queue.Queue(MOST_UNREAD_PIECES)

        def write() -> None:
            with contextlib.suppress(OSError):
                while (piece := pieces.get()) is not None:
                    self.say({"event": {"text": piece}})

        def heard(piece: str) -> None:  # on the lab's thread: it must not wait
            with contextlib.suppress(queue.Full, OSError):
                if pieces.full():
                    self.request.shutdown(socket.SHUT_RDWR)  # it does not read
                pieces.put_nowait(piece)

        writer = threading.Thread(target=write, name=f"console of {vm.name}", daemon=True)
        writer.start()
        stop = vm.console.subscribe(heard)
        try:
            buffer = b""
            while vm.state not in ENDED:
                if not select.select([self.request], [], [], _LOOK_EVERY_S)[0]:
                    continue
                data = self.request.recv(MOST_LINE_BYTES)
                *lines, buffer = (buffer + data).split(b"\n")
                if not data or len(buffer) > MOST_LINE_BYTES:
                    return
                for line in lines:
                    vm.console.write(_input(line))
        finally:
            with contextlib.suppress(LabError):
                stop()
            with contextlib.suppress(queue.Full):
                pieces.put(None, timeout=_SEND_TIME_LIMIT_S)
            writer.join(_SEND_TIME_LIMIT_S)
        self.say({"return": {"state": str(vm.state), "reason": vm.reason}})


class _Server(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Gives each connection a thread; the socket is bound by `Listener`."""

    daemon_threads = False
    block_on_close = True

    def __init__(self, lab: Lab, listener: Listener) -> None:
        super().__init__(listener.path, _Client)
        self.lab = lab
        self.socket = listener.sock
        self._clients: set[socket.socket] = set()
        self._place = threading.Condition()

    def fileno(self) -> int:
        return self.socket.fileno()

    def get_request(self) -> tuple[socket.socket, str]:
        sock, _ = self.socket.accept()
        with self._place:
            self._clients.add(sock)
        return sock, ""

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take our own user and root, and not one too many; the others are told."""
        del client_address
        if Credentials.of(request).uid not in {os.getuid(), 0}:
            desc = "this lab belongs to another user"
        elif not self._wait_for_a_place():
            desc = f"{MOST_CLIENTS} others ask this lab already; try again"
        else:
            return True
        with contextlib.suppress(OSError):  # it fits in the socket, or nobody wants it
            request.send(
                json.dumps({"error": {"type": "UsageError", "desc": desc}}).encode() + b"\n", socket.MSG_DONTWAIT
            )
        return False

    def _wait_for_a_place(self) -> bool:
        """Wait a little while there are too many: those who have just hung up are still leaving."""
        with self._place:
            return self._place.wait_for(lambda: len(self._clients) <= MOST_CLIENTS, _PLACE_TIME_LIMIT_S)

    def shutdown_request(self, request: Any) -> None:
        with self._place:
            self._clients.discard(request)
            self._place.notify()
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
        request.close()

    def hang_up(self) -> None:
        """Let every client see the end."""
        with self._place:
            clients = tuple(self._clients)
        for sock in clients:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


class LabControl:
    """The open control socket of a lab.

    Parameters
    ----------
    lab
        The lab.
    name
        Under which others find it; letters, digits, ``_ . -``.

    Raises
    ------
    UsageError
        The name is not allowed, or a lab of this name runs.
    """

    def __init__(self, lab: Lab, name: str) -> None:
        if _NAME.fullmatch(name) is None:
            raise UsageError(f"{name!r} is no name for a lab: 1 to 32 letters, digits, _ . -")
        self.name = name
        try:
            self._listener = Listener.open(control_path(name))
        except ServerError as error:
            raise UsageError(f"a lab {name!r} runs already; end it, or give this one another --name") from error
        self._server = _Server(lab, self._listener)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": _LOOK_EVERY_S}, name="lab control", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Take nobody on any more and hang up; `join` waits for what they have begun."""
        self._server.shutdown()
        self._listener.close()
        self._server.hang_up()

    def join(self) -> None:
        """Wait for what clients have begun; best when the lab is closed, which ends it."""
        self._thread.join()
        self._server.server_close()


def _request(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'not JSON: {error}; ask for example {{"execute": "ps"}}') from error
    if not isinstance(request, dict) or not set(request) <= {"execute", "arguments"} or "execute" not in request:
        raise UsageError('a request is an object such as {"execute": "stop", "arguments": {"vm": "alice"}}')
    name, arguments = request["execute"], request.get("arguments", {})
    if not isinstance(name, str) or (name != "console" and name not in ORDERS):
        raise UsageError(f"unknown command {str(name)[:64]!r}; there are console, {', '.join(ORDERS)}")
    if not isinstance(arguments, dict):
        raise UsageError(f"the arguments of {name} are an object")
    return name, arguments


def _input(line: bytes) -> str:
    try:
        text = json.loads(line)["input"]
    except (ValueError, TypeError, KeyError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UsageError('what is typed is an object such as {"input": "ls\\n"}')
    return text
