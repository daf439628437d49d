"""The destination's end of a migration."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ..runner import RunState
from . import state
from .description import Description, mismatch
from .memory import Filler
from .stream import Kind, MigrationError, Stream, decode, split_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..emulator import Emulator


class Incoming:
    """Takes a machine over.

    Parameters
    ----------
    emulator
        The machine that waits.
    tell
        Called with a status, as in the event MIGRATION, when it begins.
    """

    def __init__(self, emulator: Emulator, tell: Callable[[str], None]) -> None:
        self._emulator = emulator
        self._tell = tell
        self.start_at_once = not emulator.options.paused
        """The guest runs when it is here, if it ran there."""

    async def run(self, stream: Stream) -> None:
        """Receive everything; returns when the guest is ours.

        Raises
        ------
        MigrationError
            Why not; the source has been told.
        OSError
            The source is gone.
        """
        try:
            await stream.receive_start()
            self._tell("active")
            source = await self._agree(stream)
            await stream.answer()
            await self._receive(stream)
            await stream.answer()
            await stream.receive(Kind.GO)
        except MigrationError as error:
            with contextlib.suppress(OSError):  # the source may be gone
                await stream.answer(str(error))
                await stream.finish()
            raise
        await self._go_on(source)
        await stream.finish()

    async def _agree(self, stream: Stream) -> Description:
        emulator = self._emulator
        _, payload = await stream.receive(Kind.DESCRIPTION)
        source = Description.from_plain(decode(payload))
        here = await emulator.on_vcpu(lambda: state.describe(emulator))
        difference = mismatch(source, here) or state.peer_devices(emulator)
        reasons = [difference] if difference is not None else state.blockers(emulator)
        if reasons:
            raise MigrationError(reasons[0])
        return source

    async def _receive(self, stream: Stream) -> None:
        emulator = self._emulator
        saved: dict[str, Any] = {}
        with state.memory_blocks(emulator, fresh=True) as blocks:
            filler = Filler(blocks)
            while True:
                kind, payload = await stream.receive(Kind.STATE, Kind.MEMORY, Kind.END)
                if kind is Kind.MEMORY:
                    filler.take(*split_memory(payload))
                elif kind is Kind.STATE:
                    _keep(saved, decode(payload), state.SECTIONS)
                else:
                    break
            filler.finish()
        if missing := [name for name in state.SECTIONS if name not in saved]:
            raise MigrationError(f"the migration stream lacks the state of {', '.join(missing)}")
        await emulator.on_vcpu(lambda: state.load(emulator, saved))

    async def _go_on(self, source: Description) -> None:
        emulator = self._emulator
        was_running = source.run_state == RunState.RUNNING.value
        states = {known.value: known for known in (RunState.PAUSED, RunState.PRELAUNCH)}
        runs = was_running and self.start_at_once

        def go_on() -> None:
            paused = RunState.PAUSED if was_running else states.get(source.run_state, RunState.PAUSED)
            emulator.runner.state = RunState.RUNNING if runs else paused
            if runs:
                emulator.emit_later("RESUME", None)  # before whatever the guest makes of it

        await emulator.on_vcpu(go_on)


def _keep(saved: dict[str, Any], section: Any, known: tuple[str, ...]) -> None:
    if not isinstance(section, list) or len(section) != 2 or section[0] not in known or section[0] in saved:
        raise MigrationError("the migration stream is damaged: a section without a name, unknown, or twice")
    saved[section[0]] = section[1]
