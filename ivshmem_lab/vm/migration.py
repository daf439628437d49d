"""Moving a running machine into another process: the source's and the destination's part, over QMP.

Ref: QEMU 7.2, ``migrate``, ``query-migrate``, ``migrate-incoming`` (QMP reference manual); our emulator answers alike.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

from ..errors import MigrationError, QmpCommandError, VmError
from .state import VmState
from .text import VmTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .vm import Vm

MIGRATION_TIME_LIMIT_S = 120.0
_LOOK_EVERY_S = 0.01
_DYING_TIME_LIMIT_S = 2.0
_PROGRAM = re.compile(r"^(?:qemu|unicorn)-system-\w+: ")
_OVER = frozenset({"completed", "failed", "cancelled"})
_NO_LIMIT_BYTES_PER_S = 10 << 30

_HINTS = {
    "peer mode": 'a peer stays: unplug it, or let that be done with peers="replug"; or plug it with master="on"',
    "'peer' devices are not migratable": 'plug it at the destination with master="on"',
    "before any peers": "a master needs id 0: give it a server that nobody has joined before, in sources=",
    "in use": "another machine listens or works there already; choose another address",
    "size": "give the destination a memory of the same size",
    "memory of": "give the destination a memory of the same size",
    "Length mismatch": "give the destination a memory of the same size",
    "vectors": "give the destination's device the same number of vectors",
    "Bad config data": "give the destination the same devices, with the same vectors, in the same slots",
    "Unknown savevm section": "give the destination the same devices in the same slots",
    "Unknown ramblock": "give the destination the same devices in the same slots",
    "is missing": "give the destination the same devices in the same slots",
}
_HINT = "the destination needs the same machine: memory, guest options, devices in the same slots with the same sizes and vectors"


def hint_for_migration(desc: str, otherwise: str = "") -> str:
    """Return the remedy for an emulator's words about a migration."""
    return next((hint for words, hint in _HINTS.items() if words in desc), otherwise or _HINT)


def refused(side: str, error: QmpCommandError) -> MigrationError:
    """Return an emulator's refusal as what it is: an end of a migration."""
    return MigrationError(side, error.desc, hint_for_migration(error.desc, error.hint))


async def blocked_reasons(source: Vm) -> list[str]:
    """Ask why a machine cannot move now; empty when nothing is in the way."""
    reasons = (await source.execute("query-migrate")).get("blocked-reasons", [])
    return [str(reason) for reason in reasons]


async def receive(destination: Vm, uri: str) -> None:
    """Have a machine that was launched for that wait at an address.

    Raises
    ------
    MigrationError
        It cannot wait there.
    """
    try:
        await destination.execute("migrate-incoming", uri=uri)
    except QmpCommandError as error:
        raise refused("destination", error) from error


async def send(
    source: Vm, uri: str, *, timeout_s: float, on_progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    """Send a machine to an address; cancelled, it takes the migration back.

    Parameters
    ----------
    source
        The machine; its guest runs on wherever it does not arrive.
    uri
        Where a destination waits.
    timeout_s
        How long it may take.
    on_progress
        Called with the bytes that are sent and those that there are.

    Returns
    -------
    dict
        What ``query-migrate`` says at the end.

    Raises
    ------
    MigrationError
        The source says why not. A destination that refuses is known by its own end: see `arrived`.
    VmTimeoutError
        It took too long; it was cancelled.
    VmError
        The source has ended.
    """
    if source.emulator.kind == "qemu":  # which else sends 128 MiB a second, whatever the guest writes meanwhile
        await source.execute("migrate-set-parameters", **{"max-bandwidth": _NO_LIMIT_BYTES_PER_S})
    deadline = time.monotonic() + timeout_s
    try:
        try:
            await source.execute("migrate", uri=uri)
        except QmpCommandError as error:
            raise refused("source", error) from error
        while (told := await source.execute("query-migrate")).get("status") not in _OVER:
            if on_progress is not None and (ram := told.get("ram")):
                on_progress(int(ram["total"]) - int(ram["remaining"]), int(ram["total"]))
            if time.monotonic() >= deadline:
                raise VmTimeoutError(
                    f"{source.name} has not arrived in {timeout_s:g} s and was called back; give it a larger timeout_s, "
                    "or pause it first: a guest that writes faster than it is sent never ends"
                )
            await asyncio.sleep(_LOOK_EVERY_S)
    except BaseException:
        if source.state in {VmState.PAUSED, VmState.RUNNING}:
            await source.execute("migrate_cancel")
        raise
    if told["status"] != "completed":
        desc = str(told.get("error-desc") or f"the migration was {told['status']}")
        raise MigrationError("source", desc, hint_for_migration(desc))
    return dict(told)


async def arrived(destination: Vm, timeout_s: float = _DYING_TIME_LIMIT_S) -> None:
    """Wait until a destination has the machine.

    Raises
    ------
    MigrationError
        It has refused, and ended; with its own words.
    VmTimeoutError
        Nothing came.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            status = (await destination.execute("query-status"))["status"]
        except VmError as error:
            await destination.wait_end(_DYING_TIME_LIMIT_S)
            desc = _last_words(destination) or destination.reason
            raise MigrationError("destination", desc, hint_for_migration(desc)) from error
        if status != "inmigrate":
            return
        if time.monotonic() >= deadline:
            raise VmTimeoutError(f"{destination.name} still waits for what shall arrive, after {timeout_s:g} s")
        await asyncio.sleep(_LOOK_EVERY_S)


async def blame(destination: Vm, error: MigrationError) -> MigrationError:
    """Return what ended a migration: a destination that has ended said why, the source mostly ``Broken pipe``."""
    if await destination.wait_end(_DYING_TIME_LIMIT_S) and (desc := _last_words(destination)):
        return MigrationError("destination", desc, hint_for_migration(desc))
    return error


def _last_words(vm: Vm) -> str:
    """Return what a machine has said about its end, without the name of its program before each line."""
    lines = (_PROGRAM.sub("", line).strip() for line in vm.log_text.splitlines())
    return "; ".join(line for line in lines if line)
