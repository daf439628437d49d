"""Where a migration goes to or comes from: ``unix:PATH``, ``tcp:HOST:PORT``.

Ref: QEMU 7.2 manual, ``-incoming``; the texts of refusals are QEMU's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...ipc.runtime_dir import check_socket_path
from ...ipc.sockets import bind_unix
from ..qmp import QmpError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@dataclass(frozen=True, slots=True)
class Address:
    """A Unix socket's path, or a host and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        """Write it as QEMU's messages do."""
        return self.path or f"{self.host}:{self.port}"

    @property
    def as_qmp(self) -> dict[str, Any]:
        """As in ``query-migrate``."""
        if self.path:
            return {"path": self.path, "type": "unix"}
        return {"port": str(self.port), "ipv4": True, "host": self.host, "type": "inet"}


def parse_address(uri: str, unknown: str) -> Address:
    """Read an address.

    Raises
    ------
    QmpError
        With `unknown` when it is of no kind that there is.
    UsageError
        When a path is too long.
    """
    kind, colon, rest = uri.partition(":")
    if kind == "unix" and colon:
        if not rest or "\0" in rest:
            raise QmpError("invalid Unix socket address")
        check_socket_path(rest)
        return Address(path=rest)
    if kind == "tcp" and colon:
        host, colon, port = rest.rpartition(":")
        if not colon or not port.isascii() or not port.isdecimal() or int(port) > 0xFFFF:
            raise QmpError(f"error parsing address '{rest}'")
        return Address(host=host or "0.0.0.0", port=int(port))
    raise QmpError(f"{unknown}; there are unix:PATH and tcp:HOST:PORT")


async def connect(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a waiting destination.

    Raises
    ------
    QmpError
        When nobody listens there.
    """
    try:
        if address.path:
            return await asyncio.open_unix_connection(address.path)
        return await asyncio.open_connection(address.host, address.port, family=socket.AF_INET)
    except OSError as error:
        raise QmpError(f"Failed to connect to '{address}': {_reason(error)}") from error


class Listener:
    """Waits for one source.

    Parameters
    ----------
    server
        Listens.
    address
        Where, with the port that it got.
    """

    def __init__(self, server: asyncio.Server, address: Address) -> None:
        self._server = server
        self.address = address

    @classmethod
    async def open(
        cls, address: Address, arrived: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    ) -> Listener:
        """Listen; `arrived` is called for whoever connects.

        Raises
        ------
        QmpError
            When the address cannot be used.
        """
        try:
            if address.path:
                server = await asyncio.start_unix_server(arrived, sock=bind_unix(address.path), backlog=1)
            else:
                server = await asyncio.start_server(
                    arrived, address.host, address.port, family=socket.AF_INET, backlog=1
                )
                address = Address(host=address.host, port=server.sockets[0].getsockname()[1])
        except OSError as error:
            raise QmpError(f"Failed to bind socket to {address}: {_reason(error)}") from error
        return cls(server, address)

    def close(self) -> None:
        """Listen no more; the socket's path is gone."""
        self._server.close()
        if self.address.path:
            with contextlib.suppress(FileNotFoundError):
                Path(self.address.path).unlink()


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
