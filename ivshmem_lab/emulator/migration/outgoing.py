"""The source's end of a migration."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ...units import PAGE_BYTES
from ..runner import RunState
from . import state
from .address import connect
from .stream import Kind, MigrationError, Stream, encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..emulator import Emulator
    from .address import Address
    from .progress import Progress

TURN_CHUNKS = 16
"""So much memory is looked through before others get their turn."""


class Outgoing:
    """Sends the machine; when that fails, the guest runs on here.

    Parameters
    ----------
    emulator
        The machine.
    progress
        Is kept up to date.
    tell
        Called with a status, as in the event MIGRATION, when it begins.
    """

    def __init__(self, emulator: Emulator, progress: Progress, tell: Callable[[str], None]) -> None:
        self._emulator = emulator
        self._progress = progress
        self._tell = tell
        self._was = RunState.RUNNING
        self.committed = False
        """The destination has been told to go on: there is no way back."""

    async def run(self, address: Address) -> None:
        """Send everything; returns when the guest is the destination's.

        Raises
        ------
        QmpError, MigrationError, OSError
            Why not.
        """
        stream = Stream(*await connect(address))
        try:
            self._progress.set_up()
            self._tell("active")
            await self._send(stream)
            self.committed = True
            await stream.send(Kind.GO)
            self._progress.sent_bytes = stream.sent_bytes
            await stream.finish()
        except OSError as error:
            if not self.committed:
                raise MigrationError(f"the destination is gone: {error.strerror or error}") from error
        finally:
            stream.close()

    async def _send(self, stream: Stream) -> None:
        emulator = self._emulator
        description = await emulator.on_vcpu(lambda: state.describe(emulator))
        await stream.send_start()
        await stream.send(Kind.DESCRIPTION, encode(description.plain()))
        await stream.receive_answer()
        await self._stop()
        if (await emulator.on_vcpu(lambda: state.describe(emulator))).devices != description.devices:
            raise MigrationError("the guest let a device go while the migration began; try again")
        saved = await emulator.on_vcpu(lambda: state.save(emulator))
        for name, value in saved.items():
            await stream.send(Kind.STATE, encode([name, value]))
        with state.memory_blocks(emulator) as blocks:
            self._progress.total_bytes = sum(len(block.memory) for block in blocks)
            for number, block in enumerate(blocks):
                for turn, (size_bytes, runs) in enumerate(block.chunks()):
                    for offset, data in runs:
                        await stream.send_memory(number, offset, data)
                    self._count(stream, size_bytes, sum(len(data) for _, data in runs))
                    if turn % TURN_CHUNKS == 0:
                        await asyncio.sleep(0)
        await stream.send(Kind.END)
        await stream.receive_answer()

    def _count(self, stream: Stream, size_bytes: int, sent_bytes: int) -> None:
        progress = self._progress
        progress.normal_pages += sent_bytes // PAGE_BYTES
        progress.zero_pages += (size_bytes - sent_bytes) // PAGE_BYTES
        progress.sent_bytes = stream.sent_bytes

    async def _stop(self) -> None:
        emulator = self._emulator

        def stop() -> RunState:
            before = emulator.runner.state
            if before is RunState.INTERNAL_ERROR:
                raise MigrationError("the guest cannot go on here, and could not anywhere else")
            emulator.runner.state = RunState.FINISH_MIGRATE
            return before

        self._was = await emulator.on_vcpu(stop)
        self._progress.stopped()
        if self._was is RunState.RUNNING:
            emulator.emit("STOP", None)

    async def go_on_here(self) -> None:
        """Let the guest run again, if it did."""
        emulator = self._emulator
        if emulator.state is not RunState.FINISH_MIGRATE:
            return

        def resume() -> None:
            emulator.runner.state = self._was

        await emulator.on_vcpu(resume)
        if self._was is RunState.RUNNING:
            emulator.emit("RESUME", None)
