"""Devices of running machines, plugged in and out by hand, with every step and what the others see of it."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets

from ..errors import GuestSilentError, IvshmemLabError, UsageError, VmError
from ..lab.members import LabVm
from ..lab.servers import LabMemory, LabServer
from ..peer.peer import Peer
from ..topology.python_line import variable
from ..units import format_size
from ..vm.device import GUEST_TIME_LIMIT_S, LIVE
from .base import LabWidget, load_module, load_style
from .hotplug_model import ENDED, WAITING, Operation, Phase, Subject, Way, seen_by_others, stage_of

if TYPE_CHECKING:
    from ..lab.attached import Attached
    from ..lab.lab import Lab
    from ..lab.plugged import LabDevice
    from ..vm.device import Step

_MARKS = {"done": "✓", "now": "●", "todo": "○", "failed": "✕"}
_LONGEST_WAIT_S = 3600.0


class HotplugPanel(LabWidget):
    """Plugs devices into the running machines of a lab, and out again.

    What a person does here has its line in `python`; what happens is `operations`. One thing is done to a machine at a time.

    Parameters
    ----------
    lab
        Whose machines.
    """

    _esm = load_module("hotplug")
    _css = load_style()
    vms: traitlets.List[dict[str, Any]] = traitlets.List([]).tag(sync=True)
    """One dict for each machine: name, emulator, state, live, devices."""
    sources: traitlets.List[dict[str, Any]] = traitlets.List([]).tag(sync=True)
    """What can be plugged: name, kind, words, vectors."""
    slots = traitlets.Dict({}).tag(sync=True)
    """By machine: (place, id of the device there or empty, what to give as ``bus``)."""
    operations = traitlets.Dict({}).tag(sync=True)
    """By machine: what is or was done last, as `Operation.view` tells it."""
    others = traitlets.Dict({}).tag(sync=True)
    """By machine: what the other peers see of it: name, peer id, mark, words."""

    intents: ClassVar[dict[str, str]] = {
        "plug": "_plug",
        "unplug": "_unplug",
        "wait": "_wait",
        "force": "_force",
        "give_up": "_give_up",
    }

    def __init__(self, lab: Lab) -> None:
        self._operations: dict[str, Operation] = {}
        self._devices: dict[str, tuple[LabDevice, int]] = {}
        self._sources: dict[str, LabServer] = {}
        self._looked: dict[str, object] = {}
        self._turn = threading.Lock()
        super().__init__(lab)

    # -- what the base asks for -----------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring everything up to date that has changed."""
        now_s = time.monotonic()
        members = {} if self.lab.closed else self.lab.members
        machines = {name: each for name, each in members.items() if isinstance(each, LabVm)}
        self.vms = [_vm_row(name, each) for name, each in machines.items()]
        self.sources = [_source_row(each) for each in members.values() if isinstance(each, LabServer | LabMemory)]
        with self._turn:
            for name in list(self._operations):
                self._follow(name)
            views = {name: operation.view(now_s) for name, operation in self._operations.items() if name in machines}
        self.operations = views
        self.others = {name: self._others(name) for name in views if name in self._sources}
        for name, machine in machines.items():
            self._look_at_slots(name, machine)
        if views:
            latest = max((each for each in self._operations.values()), key=lambda each: each.begun_s)
            self.status = latest.sentence(now_s)

    def picture_lines(self) -> list[str]:
        """Return machines with their devices, and what was done last with its steps."""
        lines = []
        for vm in self.vms:
            lines.append(f"{vm['name']} ({vm['emulator']}): {vm['state']}")
            lines += [f"  {each['device_id']:<8} {each['source']} {each['words']}" for each in vm["devices"]]
            operation = self.operations.get(vm["name"])
            if operation is None:
                continue
            lines.append(f"  {operation['title']}: {operation['phase']}")
            lines += [f"    {_MARKS[each['mark']]} {each['label']:<34} {each['time']}" for each in operation["stages"]]
            lines += [f"    {operation['error']}"] if operation["error"] else []
            lines += [
                f"    {each['name']}, peer {each['peer_id']}: {each['words']}"
                for each in self.others.get(vm["name"], [])
            ]
        return lines or ["no machine in this lab yet"]

    # -- intents --------------------------------------------------------------------------------------

    def _plug(
        self,
        vm: str,
        source: str,
        vectors: int | None = None,
        bus: str | int | None = None,
        timeout_s: float = GUEST_TIME_LIMIT_S,
    ) -> None:
        machine, shown = self._machine(vm), self.lab[source]
        if not isinstance(shown, LabServer | LabMemory):
            raise UsageError(f"{source} cannot be plugged; give a server or a memory")
        has_peers = isinstance(shown, LabServer)
        subject = Subject(vm, source, "", has_peers, has_peers and machine.emulator == "qemu")
        operation = self._begin(Way.PLUG, subject, timeout_s, shown)
        words = [variable(source)]
        words += [] if vectors is None else [f"vectors={vectors}"]
        words += [] if bus is None else [f"bus={json.dumps(bus)}"]
        self.python = f"{variable(vm)}.plug({', '.join(words)}).wait_seen({timeout_s:g})"

        def note(step: Step) -> None:
            with self._turn:
                if self._operations.get(vm) is operation:
                    operation.note(step)

        with _Failing(operation):
            device = machine.plug(shown, vectors=vectors, bus=bus, on_step=note)
            with self._turn:
                operation.peer_id = device.peer_id
                operation.subject = dataclasses.replace(subject, device_id=device.device_id)
                self._devices[vm] = device, len(device.steps)
            self._looked.pop(vm, None)
            device.wait_seen(timeout_s)

    def _unplug(self, vm: str, device_id: str, timeout_s: float = GUEST_TIME_LIMIT_S) -> None:
        machine = self._machine(vm)
        found = next((each for each in machine.attached if each.device_id == device_id), None)
        if found is None:
            raise UsageError(f"{vm} has no device {device_id!r} any more")
        shown = found.source
        name = shown.name if isinstance(shown, LabServer | LabMemory) else str(shown)
        has_peers = not isinstance(shown, LabMemory)
        subject = Subject(vm, name, device_id, has_peers, has_peers and machine.emulator == "qemu")
        operation = self._begin(Way.UNPLUG, subject, timeout_s, shown if isinstance(shown, LabServer) else None)
        operation.peer_id = found.peer_id
        self.python = f"{self._device_line(machine, found)}.unplug({timeout_s:g})"
        with _Failing(operation):
            device = machine.device(device_id=device_id)
            with self._turn:
                self._devices[vm] = device, len(device.steps)
                if any(stage_of(Way.UNPLUG, step) == "asked" and not step.error for step in device.steps):
                    operation.asked_before(time.monotonic())
            device.unplug(timeout_s)

    def _wait(self, vm: str) -> None:
        operation, device = self._waiting(vm)
        operation.wait(time.monotonic())
        line = self._line_of(vm, device)
        if operation.way is Way.PLUG:
            self.python = f"{line}.wait_seen({operation.limit_s:g})"
            with _Failing(operation):
                device.wait_seen(operation.limit_s)
        else:
            self.python = f"{line}.unplug({operation.limit_s:g})"
            with _Failing(operation):
                device.unplug(operation.limit_s)

    def _force(self, vm: str) -> None:
        operation, device = self._waiting(vm)
        if operation.way is not Way.UNPLUG:
            raise UsageError("only an unplug can be forced")
        operation.wait(time.monotonic())
        self.python = f"{self._line_of(vm, device)}.force({operation.limit_s:g})"
        with _Failing(operation):
            device.force(operation.limit_s)

    def _give_up(self, vm: str) -> None:
        operation, device = self._waiting(vm)
        if operation.way is Way.UNPLUG:
            self.python = f"{self._line_of(vm, device)}.give_up()"
            device.give_up()
        operation.give_up(time.monotonic())

    # -- inside ---------------------------------------------------------------------------------------

    def _machine(self, name: str) -> LabVm:
        machine = self.lab[name]
        if not isinstance(machine, LabVm):
            raise UsageError(f"{name} is no machine")
        return machine

    def _begin(self, way: Way, subject: Subject, timeout_s: float, server: object) -> Operation:
        if (
            isinstance(timeout_s, bool)
            or not isinstance(timeout_s, int | float)
            or not 0 < timeout_s <= _LONGEST_WAIT_S
        ):
            raise UsageError(
                f"a time limit of {timeout_s!r} s is not allowed: more than 0, at most {_LONGEST_WAIT_S:g}"
            )
        with self._turn:
            before = self._operations.get(subject.vm)
            if before is not None and before.phase not in ENDED:
                raise UsageError(f"{before.sentence(time.monotonic())}; wait for it, or give it up")
            operation = Operation(way, subject, time.monotonic(), time.time(), float(timeout_s))
            self._operations[subject.vm] = operation
            self._devices.pop(subject.vm, None)
            self._sources.pop(subject.vm, None)
            if isinstance(server, LabServer):
                self._sources[subject.vm] = server
        return operation

    def _waiting(self, vm: str) -> tuple[Operation, LabDevice]:
        with self._turn:
            operation, found = self._operations.get(vm), self._devices.get(vm)
        if operation is None or found is None or operation.phase not in WAITING:
            raise UsageError(f"{vm} is not waiting for its guest any more")
        return operation, found[0]

    def _follow(self, vm: str) -> None:
        """Take the steps of a device that have been done since the last look."""
        operation, found = self._operations[vm], self._devices.get(vm)
        if found is None:
            return
        device, taken = found
        steps = device.steps
        self._devices[vm] = device, len(steps)
        if operation.way is Way.UNPLUG:
            for step in steps[taken:]:
                operation.note(step)

    def _others(self, vm: str) -> list[dict[str, Any]]:
        server, operation = self._sources[vm], self._operations[vm]
        about = operation.peer_id
        if about is None or self.lab.closed:
            return []
        names: dict[int, str] = {}
        heard: dict[int, set[int]] = {}
        for name, member in self.lab.members.items():
            if isinstance(member, LabVm):
                names |= {
                    each.peer_id: name for each in member.attached if each.source is server and each.peer_id is not None
                }
            elif isinstance(member, Peer) and self.lab.server_of(name) is server:
                names[member.peer_id] = name
                heard[member.peer_id] = set(member.peers)
        seen = seen_by_others(about, server.peers, server.events, names, heard)
        return [dataclasses.asdict(each) for each in seen]

    def _look_at_slots(self, name: str, machine: LabVm) -> None:
        """Ask a machine for its places, when something has changed there; it may take its time to answer."""
        operation = self._operations.get(name)
        devices = [(each.device_id, str(each.device and each.device.state)) for each in machine.attached]
        stamp = (
            machine.pid,
            machine.state in LIVE,
            devices,
            operation and (operation.begun_s, operation.phase in ENDED),
        )
        if self._looked.get(name) == stamp:
            return
        self._looked[name] = stamp
        if machine.state not in LIVE:
            self.slots = {key: value for key, value in self.slots.items() if key != name}
            return

        def look() -> None:
            try:
                rows = machine.slots
            except IvshmemLabError as error:
                if not self.lab.closed:
                    self.problem = f"{name} does not tell its slots: {error}"
                return
            if self._looked.get(name) == stamp:  # else it has changed meanwhile, and somebody else looks
                self.slots = {**self.slots, name: [[place, device, _bus(place)] for place, device in rows]}

        threading.Thread(target=look, name=f"slots of {name}", daemon=True).start()

    def _line_of(self, vm: str, device: LabDevice) -> str:
        machine = self._machine(vm)
        found = next((each for each in machine.attached if each.device_id == device.device_id), None)
        return (
            f'{variable(vm)}.device(device_id="{device.device_id}")'
            if found is None
            else self._device_line(machine, found)
        )

    def _device_line(self, machine: LabVm, found: Attached) -> str:
        same = [each for each in machine.attached if each.source is found.source]
        if len(same) == 1 and isinstance(found.source, LabServer | LabMemory):
            return f"{variable(machine.name)}.device({variable(found.source.name)})"
        return f"{variable(machine.name)}.device(device_id={json.dumps(found.device_id)})"


class _Failing:
    """Lets an operation take what goes wrong: it is shown there, with the way back."""

    def __init__(self, operation: Operation) -> None:
        self._operation = operation

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        match error:
            case GuestSilentError():
                self._operation.silent()
            case IvshmemLabError():
                if not (self._operation.phase is Phase.GIVEN_UP and isinstance(error, VmError)):
                    self._operation.fail(str(error), time.monotonic())
            case _:
                return False
        return True


def _vm_row(name: str, machine: LabVm) -> dict[str, Any]:
    return {
        "name": name,
        "emulator": machine.emulator,
        "state": str(machine.state),
        "reason": machine.reason,
        "live": machine.state in LIVE,
        "devices": [_device_row(each) for each in machine.attached],
    }


def _device_row(each: Attached) -> dict[str, Any]:
    shown = each.source
    peer = "" if each.peer_id is None else f"peer {each.peer_id}"
    place = "there since the start" if each.device is None else each.device.place
    return {
        "device_id": each.device_id,
        "source": shown.name if isinstance(shown, LabServer | LabMemory) else str(shown),
        "peer": peer,
        "place": place,
        "fixed": each.fixed,
        "words": " · ".join(filter(None, (place, peer))),
    }


def _source_row(source: LabServer | LabMemory) -> dict[str, Any]:
    if isinstance(source, LabServer):
        words = f"server, {format_size(source.size_bytes)}, {source.vectors} vectors"
        return {"name": source.name, "kind": "server", "words": words, "vectors": source.vectors}
    return {"name": source.name, "kind": "memory", "words": f"memory, {format_size(source.size_bytes)}", "vectors": 0}


def _bus(place: str) -> str | int:
    """Return what `LabVm.plug` takes as ``bus`` for a place: a slot's number on a pc, a root port's name on q35."""
    bus, _, slot = place.partition(" slot ")
    return int(slot, 16) if bus == "pci.0" else bus
