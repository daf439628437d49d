"""Memory blocks: reading those of the source, without pages of zeros, and filling those of the destination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...units import PAGE_BYTES
from .stream import CHUNK_BYTES, MigrationError

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOTHING = bytes(CHUNK_BYTES)
_NO_PAGE = bytes(PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of memory that moves.

    Attributes
    ----------
    name
        ``"pc.ram"``, or the PCI address and name of a device's memory, as QEMU calls it.
    memory
        A writable buffer of whole pages.
    fresh
        Nobody has written to it yet.
    """

    name: str
    memory: memoryview
    fresh: bool = False

    def chunks(self) -> Iterator[tuple[int, list[tuple[int, bytes]]]]:
        """Yield, for one chunk after the other, its size and the runs of pages in it that are not zero, by offset."""
        for start in range(0, len(self.memory), CHUNK_BYTES):
            chunk = bytes(self.memory[start : start + CHUNK_BYTES])
            if chunk == _NOTHING[: len(chunk)]:
                yield len(chunk), []
                continue
            full = [at for at in range(0, len(chunk), PAGE_BYTES) if chunk[at : at + PAGE_BYTES] != _NO_PAGE]
            runs: list[tuple[int, bytes]] = []
            for at in full:
                page = chunk[at : at + PAGE_BYTES]
                if runs and runs[-1][0] + len(runs[-1][1]) == start + at:
                    runs[-1] = (runs[-1][0], runs[-1][1] + page)
                else:
                    runs.append((start + at, page))
            yield len(chunk), runs


class Filler:
    """Fills blocks from pieces that come in ascending order; what does not come is zero.

    Parameters
    ----------
    blocks
        In the order in which they come.
    """

    def __init__(self, blocks: list[Block]) -> None:
        self._blocks = blocks
        self._block = 0
        self._next = 0

    def take(self, number: int, offset: int, data: memoryview) -> None:
        """Store a piece.

        Raises
        ------
        MigrationError
            When it is outside of its block, not in whole pages, or behind what came already.
        """
        place = f"{len(data)} bytes at {offset:#x} of memory block {number}"
        if number < self._block or (number == self._block and offset < self._next):
            raise MigrationError(f"the migration stream is damaged: {place} come too late")
        if number >= len(self._blocks):
            raise MigrationError(f"the migration stream is damaged: {place}, and there are {len(self._blocks)}")
        while self._block < number:
            self._skip_block()
        memory = self._blocks[number].memory
        if offset % PAGE_BYTES or len(data) % PAGE_BYTES or offset + len(data) > len(memory):
            raise MigrationError(f"the migration stream is damaged: {place} do not fit into {len(memory)} bytes")
        self._clear(self._blocks[number], self._next, offset)
        memory[offset : offset + len(data)] = data
        self._next = offset + len(data)

    def finish(self) -> None:
        """Clear what has not come."""
        while self._block < len(self._blocks):
            self._skip_block()

    def _skip_block(self) -> None:
        block = self._blocks[self._block]
        self._clear(block, self._next, len(block.memory))
        self._block, self._next = self._block + 1, 0

    def _clear(self, block: Block, start: int, end: int) -> None:
        for at in range(start, end, CHUNK_BYTES) if not block.fresh else ():
            piece = block.memory[at : min(at + CHUNK_BYTES, end)]
            if bytes(piece) != _NOTHING[: len(piece)]:
                piece[:] = _NOTHING[: len(piece)]
