"""The bytes between source and destination.

Both sides begin with nothing but the source's eight bytes of magic and its version. Then come frames: one byte kind, four
bytes length (big endian), the payload. In order::

    source                                         destination
    magic, version, DESCRIPTION            ->      compares it with itself
                                           <-      ANSWER: an empty text, or why not
    (stops the guest)
    STATE ..., MEMORY ..., END             ->      loads it
                                           <-      ANSWER
    GO                                     ->      runs the guest

Until GO the guest is the source's, and from GO on the destination's: there are never two of it. Every length is
bounded before it is read, sections come once, and memory comes in ascending order: a hostile source can send a
destination no more than it has room for anyway.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from ...errors import VmError

if TYPE_CHECKING:
    import asyncio

MAGIC = b"IVLABMIG"
QEMU_MAGIC = b"QEVM"
VERSION = 1
CHUNK_BYTES = 1 << 16
"""Longest run of memory in one frame."""
TEXT_LIMIT_BYTES = 1 << 20

_START = struct.Struct(">8sI")
_FRAME = struct.Struct(">BI")
_PLACE = struct.Struct(">HQ")


class Kind(IntEnum):
    """What a frame holds."""

    DESCRIPTION = 1
    STATE = 2
    MEMORY = 3
    END = 4
    GO = 5
    ANSWER = 6


_LIMITS = {
    Kind.DESCRIPTION: TEXT_LIMIT_BYTES,
    Kind.STATE: TEXT_LIMIT_BYTES,
    Kind.MEMORY: _PLACE.size + CHUNK_BYTES,
    Kind.END: 0,
    Kind.GO: 0,
    Kind.ANSWER: TEXT_LIMIT_BYTES,
}


class MigrationError(VmError):
    """A migration cannot go on; the text is for both sides."""


def _plain(value: object) -> object:
    if isinstance(value, bytes | bytearray):
        return {"hex": value.hex()}
    raise TypeError(f"{value!r} has no form in a migration stream")


def _unplain(pairs: dict[str, Any]) -> Any:
    return bytes.fromhex(pairs["hex"]) if pairs.keys() == {"hex"} and isinstance(pairs["hex"], str) else pairs


def encode(value: object) -> bytes:
    """Write plain values: numbers, texts, switches, lists, dicts, and bytes as ``{"hex": …}``."""
    return json.dumps(value, default=_plain, separators=(",", ":")).encode()


def decode(payload: bytes) -> Any:
    """Read what `encode` wrote.

    Raises
    ------
    MigrationError
        When it is something else.
    """
    try:
        return json.loads(payload, object_hook=_unplain)
    except (ValueError, RecursionError) as error:
        raise MigrationError(f"a section of the migration stream is damaged: {error}") from error


class Stream:
    """One side of a migration.

    Attributes
    ----------
    sent_bytes
        How many have been written.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.sent_bytes = 0

    async def send_start(self) -> None:
        """Write the magic and the version."""
        await self._write(_START.pack(MAGIC, VERSION))

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Write a frame."""
        assert len(payload) <= _LIMITS[kind], f"{kind.name} of {len(payload)} bytes"
        await self._write(_FRAME.pack(kind, len(payload)) + payload)

    async def send_memory(self, block: int, offset: int, data: bytes) -> None:
        """Write a piece of a memory block."""
        await self.send(Kind.MEMORY, _PLACE.pack(block, offset) + data)

    async def answer(self, error: str = "") -> None:
        """Say that all is well, or why not."""
        await self.send(Kind.ANSWER, error.encode()[:TEXT_LIMIT_BYTES])

    async def _write(self, data: bytes) -> None:
        self._writer.write(data)
        self.sent_bytes += len(data)
        await self._writer.drain()

    async def receive_start(self) -> None:
        """Read magic and version.

        Raises
        ------
        MigrationError
            When something else talks here, or another version.
        """
        magic, version = _START.unpack(await self._exactly(_START.size))
        if magic.startswith(QEMU_MAGIC):
            raise MigrationError("this is QEMU's migration stream; a machine on Unicorn moves to its own kind only")
        if magic != MAGIC:
            raise MigrationError(f"not a migration stream: it begins with {magic!r}")
        if version != VERSION:
            raise MigrationError(f"the migration stream has version {version}, and version {VERSION} is known here")

    async def receive(self, *expected: Kind) -> tuple[Kind, bytes]:
        """Read a frame of one of the kinds that may come now.

        Raises
        ------
        MigrationError
            When another one comes, a longer one than there may be, or the connection ends.
        """
        number, size_bytes = _FRAME.unpack(await self._exactly(_FRAME.size))
        if number not in [kind.value for kind in expected]:
            names = " or ".join(kind.name for kind in expected)
            raise MigrationError(
                f"the migration stream is damaged: a frame of kind {number} where {names} was expected"
            )
        kind = Kind(number)
        if size_bytes > _LIMITS[kind]:
            raise MigrationError(
                f"the migration stream is damaged: {kind.name} of {size_bytes} bytes; there may be {_LIMITS[kind]}"
            )
        return kind, await self._exactly(size_bytes)

    async def receive_answer(self) -> None:
        """Read what the destination thinks of it.

        Raises
        ------
        MigrationError
            When it says no, in its words, or is gone.
        """
        _, text = await self.receive(Kind.ANSWER)
        if text:
            raise MigrationError(f"the destination refused: {text.decode(errors='replace')}")

    async def _exactly(self, size_bytes: int) -> bytes:
        try:
            return await self._reader.readexactly(size_bytes)
        except EOFError as error:  # asyncio.IncompleteReadError is one
            raise MigrationError("the other side of the migration closed the connection in the middle") from error

    def close(self) -> None:
        """Hang up, at once."""
        self._writer.transport.abort()

    async def finish(self) -> None:
        """Hang up when everything is written."""
        self._writer.close()
        await self._writer.wait_closed()


def split_memory(payload: bytes) -> tuple[int, int, memoryview]:
    """Take a MEMORY frame apart: number of the block, offset, data.

    Raises
    ------
    MigrationError
        When it is too short.
    """
    if len(payload) <= _PLACE.size:
        raise MigrationError("the migration stream is damaged: memory without data")
    block, offset = _PLACE.unpack_from(payload)
    return block, offset, memoryview(payload)[_PLACE.size :]
