"""The serial port's other end as a file: it always has room, so that nobody can wait for some."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ivshmem_lab.emulator.chardev import SerialLine, open_chardev

if TYPE_CHECKING:
    from pathlib import Path


class Busy(SerialLine):
    """A line on which the guest writes while what it wrote before is being written."""

    def __init__(self, path: Path, more: bytes) -> None:
        self.chardev = open_chardev({"backend": "file", "id": "serial", "path": str(path)})
        self._more = bytearray(more)
        super().__init__(self.chardev, lambda data, taken: None)

    def _write(self, pending: bytes) -> int:
        if self._more:
            self.write(self._more.pop(0))
        return super()._write(pending)


def test_what_a_guest_writes_meanwhile_goes_to_the_file_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        line = Busy(tmp_path / "serial", b"bcd")
        line.write(ord("a"))
        async with asyncio.timeout(10):
            await line.drain()
        assert (tmp_path / "serial").read_bytes() == b"abcd"
        line.close()
        line.chardev.close()

    asyncio.run(scenario())
