"""QMP, the server's end: JSON objects on a stream socket, one client at a time.

Ref: QEMU ``docs/interop/qmp-spec.rst``. An object ends at its closing brace: clients (``qemu.qmp`` among them)
need not send a line end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..errors import IvshmemLabError

log = logging.getLogger("ivshmem_lab.emulator")

Json = dict[str, Any]
Command = Callable[[Json], Awaitable[Any]]

OBJECT_LIMIT_BYTES = 1 << 20
UNREAD_LIMIT_BYTES = 1 << 20
READ_BYTES = 1 << 16
VERSION: Json = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "ivshmem_lab unicorn"}

GENERIC = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"
DEVICE_NOT_FOUND = "DeviceNotFound"


class QmpError(IvshmemLabError):
    """A command was refused.

    Parameters
    ----------
    desc
        The words.
    qmp_class
        QMP's error class.
    """

    def __init__(self, desc: str, qmp_class: str = GENERIC) -> None:
        super().__init__(desc)
        self.desc = desc
        self.qmp_class = qmp_class


class JsonSplitter:
    """Cuts a byte stream into JSON objects, by counting braces outside of strings."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._skipping = False
        """Inside of what is no object: up to the next line end or brace."""

    def feed(self, data: bytes) -> list[bytes | QmpError]:
        """Take bytes.

        Returns
        -------
        list
            The texts of the objects that are complete now. In its place, an error for text outside of objects,
            and for an object that is too long: what was read of it is forgotten.
        """
        self._buffer += data
        found: list[bytes | QmpError] = []
        start = 0
        for index in range(self._scanned, len(self._buffer)):
            char = self._buffer[index]
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == 0x5C:
                    self._escaped = True
                elif char == 0x22:
                    self._in_string = False
            elif char in b"{[":
                if self._depth == 0:
                    start = index
                    self._skipping = False
                self._depth += 1
            elif self._depth == 0:
                if char == 0x0A:
                    self._skipping = False
                elif char not in b" \t\r" and not self._skipping:
                    self._skipping = True
                    found.append(QmpError(f"JSON parse error, unexpected {chr(char)!r} outside of an object"))
            elif char in b"}]":
                self._depth -= 1
                if self._depth == 0:
                    found.append(bytes(self._buffer[start : index + 1]))
            elif char == 0x22:
                self._in_string = True
        del self._buffer[: start if self._depth else len(self._buffer)]
        self._scanned = len(self._buffer)
        if self._scanned > OBJECT_LIMIT_BYTES:
            self._buffer.clear()
            self._scanned = self._depth = 0
            self._in_string = self._escaped = False
            self._skipping = True
            found.append(QmpError(f"JSON parse error, an object is longer than {OBJECT_LIMIT_BYTES} bytes"))
        return found


def timestamp() -> dict[str, int]:
    """Return the time as QMP events carry it."""
    now_us = time.time_ns() // 1000
    return {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000}


class QmpSession:
    """One client's conversation.

    Parameters
    ----------
    commands
        Command handlers by name; each gets the arguments.
    """

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        self._negotiated = False
        self.idle = asyncio.Event()
        """Set while no command is being carried out."""
        self.idle.set()
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk until the client goes."""
        self._writer = writer
        splitter = JsonSplitter()
        self._send({"QMP": {"version": VERSION, "capabilities": []}})
        try:
            while data := await reader.read(READ_BYTES):
                self.idle.clear()
                for found in splitter.feed(data):
                    self._send(_error(found) if isinstance(found, QmpError) else await self._answer(found))
                self.idle.set()
                await writer.drain()
        except (ConnectionError, BrokenPipeError):
            pass
        finally:
            self.idle.set()
            self._writer = None
            writer.close()

    def event(self, name: str, data: Json | None = None) -> None:
        """Tell the client of an event, once it has negotiated."""
        if self._negotiated:
            self._send({"timestamp": timestamp(), "event": name, **({"data": data} if data is not None else {})})

    def _send(self, message: Json) -> None:
        if self._writer is None or self._writer.is_closing():
            return
        self._writer.write(json.dumps(message).encode() + b"\r\n")
        if self._writer.transport.get_write_buffer_size() > UNREAD_LIMIT_BYTES:
            self._writer.transport.abort()  # a client that does not read costs itself only

    async def _answer(self, text: bytes) -> Json:
        request: Any = None
        try:
            request = _parse(text)
            return {"return": await self._execute(request), **_id_of(request)}
        except QmpError as error:
            return {**_error(error), **_id_of(request)}
        except IvshmemLabError as error:
            return {**_error(QmpError(str(error))), **_id_of(request)}
        except Exception as error:
            # A fault of ours; the client and the machine go on.
            log.exception("QMP command failed")
            return {**_error(QmpError(f"internal error: {error!r}")), **_id_of(request)}

    async def _execute(self, request: Any) -> Any:
        if not isinstance(request, dict):
            raise QmpError("QMP input must be a JSON object")
        for key in request:
            if key not in ("execute", "arguments", "id"):
                raise QmpError(f"QMP input member '{key}' is unexpected")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError(
                "QMP input lacks member 'execute'" if name is None else "QMP input member 'execute' must be a string"
            )
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            if self._negotiated:
                raise QmpError("Capabilities negotiation is already complete, command ignored", COMMAND_NOT_FOUND)
            take(arguments, "enable", list, [])
            no_more(arguments)
            self._negotiated = True
            return {}
        if not self._negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", COMMAND_NOT_FOUND)
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", COMMAND_NOT_FOUND)
        return await command(arguments)


def _parse(text: bytes) -> Any:
    """Read one JSON text; a name given twice is an error, as in QEMU."""

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("duplicate key")
        return found

    try:
        request = json.loads(text, object_pairs_hook=unique)
        # Half of a surrogate pair can be written, and is no text.
        json.dumps(request, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise QmpError(f"JSON parse error, {error}") from error
    else:
        return request


def _id_of(request: Any) -> Json:
    return {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}


def _error(error: QmpError) -> Json:
    return {"error": {"class": error.qmp_class, "desc": error.desc}}


def take(arguments: Json, name: str, kind: type, default: Any = ..., within: str = "") -> Any:
    """Take one argument out of a command's arguments, or of the object `within` them (such as ``"backend."``).

    Raises
    ------
    QmpError
        When it is missing or of another type; the texts are QEMU's.
    """
    if name not in arguments:
        if default is ...:
            raise QmpError(f"Parameter '{within}{name}' is missing")
        return default
    value = arguments.pop(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = {str: "string", int: "integer", bool: "boolean", dict: "object", list: "array"}[kind]
        raise QmpError(f"Invalid parameter type for '{within}{name}', expected: {expected}")
    return value


def no_more(arguments: Json, within: str = "") -> None:
    """Refuse what is left of a command's arguments."""
    for name in arguments:
        raise QmpError(f"Parameter '{within}{name}' is unexpected")
