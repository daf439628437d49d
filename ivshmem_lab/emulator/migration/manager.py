"""Migration as QMP sees it: commands, status, events.

Ref: QEMU 7.2 QMP reference, "Migration"; texts and order of events as measured on QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ...errors import IvshmemLabError
from ..qmp import QmpError, no_more, take
from ..runner import RunState
from . import state
from .address import Address, Listener, parse_address
from .description import MASTER_BLOCKER
from .incoming import Incoming
from .outgoing import Outgoing
from .progress import Progress
from .stream import Stream

if TYPE_CHECKING:
    from ..emulator import Emulator
    from ..qmp import Command, Json

log = logging.getLogger("ivshmem_lab.emulator")

DEFER = "defer"
CAPABILITIES = (
    *("xbzrle", "rdma-pin-all", "auto-converge", "zero-blocks", "compress", "events", "postcopy-ram", "x-colo"),
    *("release-ram", "block", "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps"),
    *("postcopy-blocktime", "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot"),
    *("zero-copy-send", "postcopy-preempt"),
)
"""QEMU 7.2's, in its order; this machine has ``events``."""
_UNDER_WAY = ("setup", "active", "cancelling")


class Migration:
    """One machine's migrations, in either direction.

    Parameters
    ----------
    emulator
        The machine.
    """

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._events = False
        self._status: str | None = None
        self._error: str | None = None
        self._progress: Progress | None = None
        self._outgoing: Outgoing | None = None
        self._incoming = Incoming(emulator, self._tell) if emulator.options.incoming is not None else None
        self._listener: Listener | None = None
        self._task: asyncio.Task[None] | None = None

    def commands(self) -> dict[str, Command]:
        """Return the QMP commands, by name."""
        return {
            "migrate": self._migrate,
            "migrate_cancel": self._migrate_cancel,
            "migrate-incoming": self._migrate_incoming,
            "query-migrate": self._query_migrate,
            "migrate-set-capabilities": self._set_capabilities,
            "query-migrate-capabilities": self._query_capabilities,
        }

    def check_idle(self, what: str) -> None:
        """Refuse to change the machine while it is being sent.

        Raises
        ------
        QmpError
            In QEMU's words.
        """
        if self._status in _UNDER_WAY and self._outgoing is not None:
            raise QmpError(f"{what} not allowed while migrating")

    def check_migratable(self, master: str, peer_id: int) -> None:
        """Refuse a device that cannot move, under ``-only-migratable``.

        Raises
        ------
        QmpError
            In QEMU's words.
        """
        if self._emulator.options.only_migratable and not state.moves(master, peer_id):
            raise QmpError(f"disallowing migration blocker (--only-migratable) for: {MASTER_BLOCKER}")

    def start_on_arrival(self, *, start: bool) -> bool:
        """Take ``cont`` and ``stop`` of a machine that has not arrived; False when there is none."""
        if self._incoming is None or self._emulator.state is not RunState.INMIGRATE:
            return False
        self._incoming.start_at_once = start
        return True

    async def close(self) -> None:
        """Give up what is under way."""
        if self._listener is not None:
            self._listener.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _tell(self, status: str) -> None:
        self._status = status
        if self._events:
            self._emulator.emit("MIGRATION", {"status": status})

    # -- source --------------------------------------------------------------------------------------

    async def _migrate(self, arguments: Json) -> Json:
        uri = take(arguments, "uri", str)
        take(arguments, "detach", bool, default=False)
        for name in ("blk", "inc", "resume"):
            if take(arguments, name, bool, default=False):
                raise QmpError(f"Parameter '{name}' is not there: this machine stops, copies and goes on")
        no_more(arguments)
        if self._status in _UNDER_WAY:
            raise QmpError("There's a migration process in progress")
        if self._emulator.state is RunState.INMIGRATE:
            raise QmpError("Guest is waiting for an incoming migration")
        if self._emulator.state is RunState.POSTMIGRATE:
            raise QmpError("Can't migrate the vm that was paused due to previous migration")
        if reasons := state.blockers(self._emulator):
            raise QmpError(reasons[0])
        self._error, self._outgoing = None, None
        self._tell("setup")
        try:
            address = parse_address(uri, "Parameter 'uri' expects a valid migration protocol")
        except IvshmemLabError as error:
            self._error = str(error)
            self._tell("failed")
            raise
        self._progress = Progress()
        self._outgoing = Outgoing(self._emulator, self._progress, self._tell)
        if self._events:
            self._emulator.emit("MIGRATION_PASS", {"pass": 1})
        self._progress.passes = 1
        self._task = asyncio.create_task(self._send(self._outgoing, self._progress, address))
        return {}

    async def _send(self, outgoing: Outgoing, progress: Progress, address: Address) -> None:
        try:
            await outgoing.run(address)
        except (IvshmemLabError, OSError) as error:
            await self._failed(outgoing, progress, "failed", str(error))
            log.warning("migration to %s failed: %s", address, error)
        except asyncio.CancelledError:
            if self._status != "cancelling":
                raise
            await self._failed(outgoing, progress, "cancelled", None)
        else:
            progress.ended()
            await self._emulator.on_vcpu(self._is_elsewhere)
            self._tell("completed")

    def _is_elsewhere(self) -> None:
        self._emulator.runner.state = RunState.POSTMIGRATE

    async def _failed(self, outgoing: Outgoing, progress: Progress, status: str, error: str | None) -> None:
        progress.ended()
        self._error = error
        self._tell(status)
        await outgoing.go_on_here()

    async def _migrate_cancel(self, arguments: Json) -> Json:
        no_more(arguments)
        if self._outgoing is None or self._task is None or self._status not in ("setup", "active"):
            return {}
        if not self._outgoing.committed:
            self._tell("cancelling")
            self._task.cancel()
            await asyncio.wait([self._task])
        return {}

    # -- destination ---------------------------------------------------------------------------------

    async def listen(self, uri: str) -> None:
        """Wait for a source at an address, or for the command that names one (``defer``).

        Raises
        ------
        QmpError, UsageError
            When the address cannot be used.
        """
        if uri == DEFER:
            return
        address = parse_address(uri, f"unknown migration protocol: {uri}")
        self._listener = await Listener.open(address, self._arrived)

    async def _migrate_incoming(self, arguments: Json) -> Json:
        uri = take(arguments, "uri", str)
        no_more(arguments)
        if self._incoming is None or self._emulator.options.incoming != DEFER:
            raise QmpError("'-incoming' was not specified on the command line")
        if self._listener is not None:
            raise QmpError("The incoming migration has already been started")
        await self.listen(uri)
        return {}

    async def _arrived(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._task is not None or self._listener is None:
            writer.transport.abort()
            return
        self._listener.close()
        self._task = asyncio.current_task()
        assert self._incoming is not None
        stream = Stream(reader, writer)
        try:
            await self._incoming.run(stream)
        except (IvshmemLabError, OSError) as error:
            self._tell("failed")
            log.error("load of migration failed: %s", error)  # noqa: TRY400 - it is no fault of ours
            self._emulator.end(1)
        except asyncio.CancelledError:
            pass  # the machine ends
        else:
            self._tell("completed")
        finally:
            stream.close()

    # -- looking -------------------------------------------------------------------------------------

    async def _query_migrate(self, arguments: Json) -> Json:
        no_more(arguments)
        told: Json = {}
        if reasons := state.blockers(self._emulator):
            told["blocked-reasons"] = reasons
        if self._listener is not None and self._status is None:
            told["socket-address"] = [self._listener.address.as_qmp]
        if self._status is not None:
            told["status"] = self._status
        if self._progress is not None and self._status in ("active", "cancelling", "completed"):
            told |= self._progress.as_qmp()
        if self._error is not None:
            told["error-desc"] = self._error
        return told

    async def _set_capabilities(self, arguments: Json) -> Json:
        wanted: list[Any] = take(arguments, "capabilities", list)
        no_more(arguments)
        events = self._events
        for index, pair in enumerate(wanted):
            within = f"capabilities[{index}]."
            if not isinstance(pair, dict):
                raise QmpError(f"Invalid parameter type for '{within[:-1]}', expected: object")
            name = take(pair, "capability", str, within=within)
            on = take(pair, "state", bool, within=within)
            no_more(pair, within)
            if name not in CAPABILITIES:
                raise QmpError(f"Parameter 'capability' does not accept value '{name}'")
            if name == "events":
                events = on
            elif on:
                raise QmpError(f"capability '{name}' is not there: this machine stops, copies and goes on")
        if self._status in _UNDER_WAY:
            raise QmpError("There's a migration process in progress")
        self._events = events
        return {}

    async def _query_capabilities(self, arguments: Json) -> list[Json]:
        no_more(arguments)
        return [{"state": name == "events" and self._events, "capability": name} for name in CAPABILITIES]
