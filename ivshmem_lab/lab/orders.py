"""What other processes may ask of a running lab: each order with its arguments, as plain values in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import GuestSilentError, UsageError
from ..vm.device import ENDED, GUEST_TIME_LIMIT_S, LIVE, DeviceState
from ..vm.migration import MIGRATION_TIME_LIMIT_S
from ..vm.state import VmState
from .members import LabVm
from .servers import LabMemory, LabServer

if TYPE_CHECKING:
    from .attached import Attached
    from .lab import Lab
    from .plugged import LabDevice, Source

Tell = Callable[[dict[str, Any]], None]
"""Called with each step while an order is carried out, on any thread."""
Arguments = dict[str, Any]

_TEXT, _NUMBER, _SECONDS, _SWITCH = (str,), (int,), (int, float), (bool,)


def take(arguments: Arguments, known: Mapping[str, tuple[type, ...]], *needed: str) -> Arguments:
    """Check arguments by name and type.

    Raises
    ------
    UsageError
        One is unknown, of another type, or missing.
    """
    for name, value in arguments.items():
        if name not in known:
            raise UsageError(f"unknown argument {name!r}; there are {', '.join(known)}")
        if not isinstance(value, known[name]) or (isinstance(value, bool) and bool not in known[name]):
            kinds = " or ".join(kind.__name__ for kind in known[name])
            raise UsageError(f"{name} is {value!r}; it is a {kinds}")
    for name in needed:
        if name not in arguments:
            raise UsageError(f"the argument {name!r} is missing")
    return arguments


def find_vm(lab: Lab, arguments: Arguments) -> LabVm:
    """Return the machine that ``vm`` names.

    Raises
    ------
    UsageError
        There is none.
    """
    name = arguments.get("vm")
    found = lab.members.get(name) if isinstance(name, str) else None
    if not isinstance(found, LabVm):
        there = ", ".join(name for name, each in lab.members.items() if isinstance(each, LabVm)) or "none"
        raise UsageError(f"there is no VM {name!r} in this lab; there are {there}")
    return found


def find_source(lab: Lab, name: str) -> Source:
    """Return the server or memory of the lab of this name; a path is the socket of any server.

    Raises
    ------
    UsageError
        There is none.
    """
    if "/" in name:
        return name
    found = lab.members.get(name)
    if not isinstance(found, LabServer | LabMemory):
        there = [each for each, member in lab.members.items() if isinstance(member, LabServer | LabMemory)]
        raise UsageError(f"there is no server and no memory {name!r}; there are {', '.join(there) or 'none'}")
    return found


# -- the orders ------------------------------------------------------------------------------------------


def ps(lab: Lab, arguments: Arguments, tell: Tell) -> list[dict[str, Any]]:
    """Tell how each machine stands."""
    del tell
    take(arguments, {})
    return [_machine(each) for each in lab.members.values() if isinstance(each, LabVm)]


def _machine(vm: LabVm) -> dict[str, Any]:
    return {
        "vm": vm.name,
        "emulator": vm.emulator,
        "guest": vm.definition.guest,
        "state": str(vm.state),
        "reason": vm.reason,
        "pid": vm.pid,
        "devices": [_device(each) for each in vm.attached],
        "guards": vm.guards,
    }


def _device(each: Attached) -> dict[str, Any]:
    source = each.source if isinstance(each.source, str) else getattr(each.source, "name", str(each.source))
    return {
        "id": each.device_id,
        "source": source,
        "driver": "ivshmem-plain" if isinstance(each.source, LabMemory) else "ivshmem-doorbell",
        "peer_id": each.peer_id,
        "state": str(each.device.state) if each.device else str(DeviceState.PLUGGED),
        "place": each.device.place if each.device else "",
    }


def start(lab: Lab, arguments: Arguments, tell: Tell) -> dict[str, Any]:
    """Start a machine: a new one, or one that was defined, or has ended and begins anew."""
    known: dict[str, tuple[type, ...]] = {
        "vm": _TEXT,
        "guest": _TEXT,
        "args": _TEXT,
        "emulator": _TEXT,
        "memory": (str, int),
        "machine": _TEXT,
    }
    known |= {"root_ports": _NUMBER, "cpu": _NUMBER, "accel": _TEXT, "connect": (list,)}
    given = dict(take(arguments, known, "vm"))
    name = given.pop("vm")
    there = lab.members.get(name)
    if not isinstance(there, LabVm):
        given["connect"] = [find_source(lab, str(each)) for each in given.get("connect", [])]
        there = lab.vm(name, **given)
    elif given:
        raise UsageError(f"{name} is in the lab already, as it was defined; leave {', '.join(given)} out")
    elif there.state in LIVE:
        raise UsageError(f"{name} is {there.state} already")
    elif there.state in ENDED:
        tell({"step": f"{name} is defined anew: it was {there.state} ({there.reason})"})
        servers = [server for server in there.servers if lab.members.get(server.name) is server]
        there.close()
        there = lab.define_like(there, name, servers)
    there.start()
    return _machine(there)


def stop(lab: Lab, arguments: Arguments, tell: Tell) -> dict[str, Any]:
    """End a machine; it stays in the lab, with its console, or leaves it."""
    del tell
    vm = find_vm(lab, take(arguments, {"vm": _TEXT, "remove": _SWITCH}, "vm"))
    if arguments.get("remove"):
        vm.close()
    else:
        vm.stop()
    return _machine(vm)


def text(lab: Lab, arguments: Arguments, tell: Tell) -> dict[str, Any]:
    """Tell what a machine has written to its serial port; the last 256 KiB are kept, also after its end."""
    del tell
    vm = find_vm(lab, take(arguments, {"vm": _TEXT}, "vm"))
    return {"text": vm.console.text(), "state": str(vm.state), "reason": vm.reason}


def plug(lab: Lab, arguments: Arguments, tell: Tell) -> dict[str, Any]:
    """Plug a server or a memory into a running machine, and wait until its guest has seen it."""
    known = {"vm": _TEXT, "source": _TEXT, "vectors": _NUMBER, "id": _TEXT, "bus": (str, int), "wait_s": _SECONDS}
    known |= {"properties": (dict,)}
    vm = find_vm(lab, take(arguments, known, "vm", "source"))
    properties = arguments.get("properties", {})
    if taken := {"source", "vectors", "device_id", "bus", "timeout_s", "on_step"} & properties.keys():
        raise UsageError(f"{', '.join(sorted(taken))} is no property of a device; say it with an argument of its own")
    device = vm.plug(
        find_source(lab, arguments["source"]),
        vectors=arguments.get("vectors"),
        device_id=arguments.get("id"),
        bus=arguments.get("bus"),
        on_step=lambda step: tell(asdict(step)),
        **properties,
    )
    try:
        if vm.state is VmState.RUNNING and (wait_s := arguments.get("wait_s", GUEST_TIME_LIMIT_S)) > 0:
            device.wait_seen(wait_s)
    finally:
        device.listen(None)
    return _plugged(device)


def unplug(lab: Lab, arguments: Arguments, tell: Tell) -> dict[str, Any]:
    """Unplug a device, by what it shows or by its id; a guest that does not answer leaves a choice."""
    known = {"vm": _TEXT, "source": _TEXT, "id": _TEXT, "timeout_s": _SECONDS, "force": _SWITCH, "give_up": _SWITCH}
    vm = find_vm(lab, take(arguments, known, "vm"))
    if ("source" in arguments) == ("id" in arguments):
        raise UsageError("name what is unplugged: either source or id")
    if arguments.get("force") and arguments.get("give_up"):
        raise UsageError("force and give_up exclude each other")
    source = find_source(lab, arguments["source"]) if "source" in arguments else None
    device = vm.device(source, device_id=arguments.get("id"))
    device.listen(lambda step: tell(asdict(step)))
    try:
        device.unplug(arguments.get("timeout_s", GUEST_TIME_LIMIT_S))
    except GuestSilentError:
        if arguments.get("give_up"):
            device.give_up()
        elif arguments.get("force"):
            device.force()
        else:
            raise
    finally:
        device.listen(None)
    return _plugged(device)


def migrate(lab: Lab, arguments: Arguments, tell: Tell) -> dict[str, Any]:
    """Move a machine into another process."""
    known = {"vm": _TEXT, "to": _TEXT, "sources": (dict,), "peers": _TEXT, "timeout_s": _SECONDS}
    vm = find_vm(lab, take(arguments, known, "vm", "to"))
    sources = {
        find_source(lab, str(here)): None if there is None else find_source(lab, str(there))
        for here, there in arguments.get("sources", {}).items()
    }
    moved = vm.migrate(
        arguments["to"],
        sources=sources,
        peers=arguments.get("peers", "refuse"),
        timeout_s=arguments.get("timeout_s", MIGRATION_TIME_LIMIT_S),
        on_step=lambda step: tell(asdict(step)),
        on_progress=lambda sent, total: tell({"sent_bytes": sent, "total_bytes": total}),
    )
    return {
        "vm": moved.vm.name if moved.vm else None,
        "total_s": moved.total_s,
        "downtime_s": moved.downtime_s,
        "sent_bytes": moved.sent_bytes,
        "peer_ids": moved.peer_ids,
        "left": moved.left,
    }


def _plugged(device: LabDevice) -> dict[str, Any]:
    return {
        "id": device.device_id,
        "state": str(device.state),
        "place": device.place,
        "peer_id": device.peer_id,
    }


ORDERS: dict[str, Callable[[Lab, Arguments, Tell], Any]] = {
    "ps": ps,
    "start": start,
    "stop": stop,
    "text": text,
    "plug": plug,
    "unplug": unplug,
    "migrate": migrate,
}
