"""From one topology to another, as a list of actions that can be read before it is carried out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from ..units import format_size
from .model import HostPeer, Link, Memory, Server, Vm

if TYPE_CHECKING:
    from .model import Topology

Item = Server | Memory | Vm | HostPeer | Link


class Verb(Enum):
    """What is done."""

    LEAVE = "leave"
    UNPLUG = "unplug"
    STOP = "stop"
    REMOVE = "remove"
    CREATE = "create"
    DEFINE = "define"
    JOIN = "join"
    START = "start"
    PLUG = "plug"


@dataclass(frozen=True, slots=True)
class Action:
    """One step: what is done to which item; `name` is the machine's for a device."""

    verb: Verb
    name: str
    item: Item

    def __str__(self) -> str:
        item = self.item
        match item:
            case Server():
                text = f"server {item.name} ({format_size(item.size_bytes)}, {item.vectors} vectors)"
            case Memory():
                text = f"memory {item.name} ({format_size(item.size_bytes)})"
            case Vm():
                text = f"vm {item.name} ({item.emulator}, {item.machine}, guest {item.guest or 'none'})"
            case HostPeer():
                text = f"peer {item.name} of server {item.server}"
            case Link():
                text = f"{self.name}: {'server' if item.server else 'memory'} {item.target}"
        return f"{self.verb.value} {text}"


def plan(current: Topology, wanted: Topology) -> tuple[Action, ...]:
    """Order what leads from `current` to `wanted`; both are valid.

    First what ends, users before what they use; then what begins, the other way round. A machine of which more than
    the devices changes is stopped and defined anew; otherwise its devices are
    unplugged and plugged while it runs. Nothing is done for what stays.
    """
    ends: list[Action] = []
    stores: tuple[tuple[Server | Memory, ...], tuple[Server | Memory, ...]] = (
        (*current.servers, *current.memories),
        (*wanted.servers, *wanted.memories),
    )
    gone, new = (set(stores[0]) - set(stores[1])), (set(stores[1]) - set(stores[0]))
    gone_names = {item.name for item in gone}
    peers_gone = [peer for peer in current.peers if peer not in wanted.peers or peer.server in gone_names]
    ends += [Action(Verb.LEAVE, peer.name, peer) for peer in peers_gone]
    wanted_vms = {vm.name: vm for vm in wanted.vms}
    kept: dict[str, Vm] = {}
    for vm in current.vms:
        other = wanted_vms.get(vm.name)
        if other is None or replace(other, devices=()) != replace(vm, devices=()):
            ends += [Action(Verb.STOP, vm.name, vm), Action(Verb.REMOVE, vm.name, vm)]
            continue
        kept[vm.name] = vm
        ends += [Action(Verb.UNPLUG, vm.name, link) for link in _without(vm, other, gone_names)]
    ends += [Action(Verb.REMOVE, item.name, item) for item in stores[0] if item in gone]
    begins = [Action(Verb.CREATE, item.name, item) for item in stores[1] if item in new]
    fresh = [vm for vm in wanted.vms if vm.name not in kept]
    begins += [Action(Verb.DEFINE, vm.name, vm) for vm in fresh]
    joining = [peer for peer in wanted.peers if peer not in current.peers or peer in peers_gone]
    begins += [Action(Verb.JOIN, peer.name, peer) for peer in joining]
    begins += [Action(Verb.START, vm.name, vm) for vm in fresh]
    for vm in wanted.vms:
        links = _without(vm, kept[vm.name], gone_names) if vm.name in kept else [x for x in vm.devices if is_plugged(x)]
        begins += [Action(Verb.PLUG, vm.name, link) for link in links]
    return (*ends, *begins)


def is_plugged(link: Link) -> bool:
    """Whether a device comes into a new machine only when it runs: plain memory, and vectors of its own number."""
    return link.server is None or link.vectors is not None


def _without(vm: Vm, other: Vm, gone: set[str]) -> list[Link]:
    """Return the links of a machine that the other one has not, or whose end is gone."""
    left = [link for link in other.devices if link.target not in gone]
    found = []
    for link in vm.devices:
        if link in left:
            left.remove(link)
        else:
            found.append(link)
    return found
