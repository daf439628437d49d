"""A topology carried out: its plan, step by step, in a new lab."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ..topology.plan import Action, Verb, is_plugged, plan
from ..topology.validate import validate
from .lab import Lab

if TYPE_CHECKING:
    from .members import LabVm
    from .servers import LabMemory, LabServer


def lab_from_topology(topology: Topology) -> Lab:
    """Make a lab as written down and start it; when a step fails, nothing of it is left.

    Raises
    ------
    UsageError
        The topology has a problem.
    LabError, VmError, PeerError
        A step could not be done.
    """
    problems = validate(topology)
    if problems:
        raise UsageError("; ".join(map(str, problems)))
    lab = Lab()
    try:
        _Maker(lab).make(plan(Topology(), topology))
    except BaseException:
        lab.close()
        raise
    return lab


class _Maker:
    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._servers: dict[str, LabServer] = {}
        self._memories: dict[str, LabMemory] = {}
        self._vms: dict[str, LabVm] = {}

    def make(self, actions: tuple[Action, ...]) -> None:
        started = False
        for action in actions:
            match action.item:
                case Server() as item:
                    self._servers[item.name] = self._lab.server(item.name, item.size_bytes, item.vectors)
                case Memory() as item:
                    self._memories[item.name] = self._lab.memory(item.name, item.size_bytes)
                case HostPeer() as item:
                    self._lab.peer(item.name, self._servers[item.server])
                case Vm() as item if action.verb is Verb.DEFINE:
                    self._vms[item.name] = self._define(item)
                case Vm() if not started:  # all of them at once: peer ids follow the order of the file
                    self._lab.start()
                    started = True
                case Link(server=str() as name, vectors=vectors):
                    self._vms[action.name].plug(self._servers[name], vectors=vectors)
                case Link(memory=str() as name):
                    self._vms[action.name].plug(self._memories[name])

    def _define(self, vm: Vm) -> LabVm:
        connect = [self._servers[link.target] for link in vm.devices if not is_plugged(link)]
        return self._lab.vm(
            vm.name,
            vm.guest,
            vm.args,
            emulator=vm.emulator,
            connect=connect,
            memory=vm.memory_bytes,
            machine=vm.machine,
            cpu=vm.cpu,
        )
