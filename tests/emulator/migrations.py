"""Two machines of one kind, and what moves between them."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

from machines import Machine, Qmp

from ivshmem_lab.guests import guest_path

if TYPE_CHECKING:
    from collections.abc import Iterator

MIGRANT = ["-kernel", str(guest_path("migrant"))]
EVENTS = [{"capability": "events", "state": True}]
BLOCKER = "Migration is disabled when using feature 'peer mode' in device 'ivshmem'"


def negotiated(machine: Machine) -> Machine:
    """Begin QMP, and ask for the events of migrations."""
    machine.qmp.negotiate()
    machine.qmp.ok("migrate-set-capabilities", capabilities=EVENTS)
    return machine


@contextlib.contextmanager
def pair(kind: str, here: list[str], there: list[str], *, incoming: str) -> Iterator[tuple[Machine, Machine]]:
    """Start a source and a destination that waits at an address."""
    with Machine(kind, *here) as source, Machine(kind, *there, "-incoming", incoming) as destination:
        yield negotiated(source), negotiated(destination)


def ended(qmp: Qmp) -> dict[str, Any]:
    """Wait until a migration is over for one side, whichever way; returns what query-migrate says."""
    while qmp.event("MIGRATION")["data"]["status"] not in ("completed", "failed", "cancelled"):
        pass
    told: dict[str, Any] = qmp.ok("query-migrate")
    return told


def migrate(source: Machine, uri: str) -> dict[str, Any]:
    """Send a machine; returns what query-migrate says at the end."""
    source.qmp.ok("migrate", uri=uri)
    return ended(source.qmp)


def state(machine: Machine) -> dict[str, int]:
    """Ask the migrant for its state; it checks its memory in each round, and ends when it finds something wrong."""
    machine.serial.sendall(b"c")
    machine.says("migrant: ")
    text = machine.line()
    assert text.startswith("round="), text
    return {name: int(number, 16 if name == "mask" else 10) for name, number in re.findall(r"(\w+)=(\w+)", text)}


def goes_on(machine: Machine, rounds: int = 3) -> dict[str, int]:
    """Let the migrant do some rounds, and return its last state."""
    last = first = state(machine)
    while last["round"] < first["round"] + rounds:
        last = state(machine)
    return last


def status(machine: Machine) -> str:
    """Return the run state."""
    name: str = machine.qmp.ok("query-status")["status"]
    return name


def detach(machine: Machine) -> None:
    """Unplug the device ``iv`` in slot 5, with the guest's help."""
    machine.qmp.ok("device_del", id="iv")
    machine.serial.sendall(b"e")
    machine.says("migrant: ejected 00000020\n")
    machine.qmp.event("DEVICE_DELETED")


def attach(machine: Machine) -> None:
    """Plug ``iv`` in again, as a peer at the server behind the chardev ``c``, and let the guest open it."""
    machine.qmp.ok("device_add", driver="ivshmem-doorbell", id="iv", chardev="c", addr="5", master="off")
    machine.serial.sendall(b"o")
    machine.says("migrant: opened\n")
