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


@dataclass(frozen=True, slots=True)
class Standing:
    """How the parts of a running lab stand, which a topology does not say; empty where all runs.

    Attributes
    ----------
    idle
        Machines that were defined and not started.
    ended
        Machines that have ended or failed: what is wanted of them is defined anew.
    fixed
        Devices that the running machine cannot let go, each with its machine's name, as often as there are such.
    broken
        Devices and peers whose server or memory is gone, each with the machine's or the peer's name.
    """

    idle: frozenset[str] = frozenset()
    ended: frozenset[str] = frozenset()
    fixed: tuple[tuple[str, Link], ...] = ()
    broken: frozenset[tuple[str, Link | HostPeer]] = frozenset()


def plan(current: Topology, wanted: Topology, standing: Standing | None = None) -> tuple[Action, ...]:
    """Order what leads from `current` to `wanted`; the latter is valid.

    First what ends, users before what they use; then what begins, the other way round. A machine of which more than
    the devices changes is stopped and defined anew, and so is one that has ended, or would have to let a fixed device
    go; otherwise its devices are unplugged and plugged while it runs. Nothing is done for what stays.
    """
    standing = standing or Standing()
    ends: list[Action] = []
    stores: tuple[tuple[Server | Memory, ...], tuple[Server | Memory, ...]] = (
        (*current.servers, *current.memories),
        (*wanted.servers, *wanted.memories),
    )
    gone, new = (set(stores[0]) - set(stores[1])), (set(stores[1]) - set(stores[0]))
    gone_names = {item.name for item in gone}
    peers_gone = [
        peer
        for peer in current.peers
        if peer not in wanted.peers or peer.server in gone_names or (peer.name, peer) in standing.broken
    ]
    ends += [Action(Verb.LEAVE, peer.name, peer) for peer in peers_gone]
    wanted_vms = {vm.name: vm for vm in wanted.vms}
    kept: dict[str, Vm] = {}
    for vm in current.vms:
        other = wanted_vms.get(vm.name)
        lost = _lost(vm, other, gone_names, standing)
        if lost is None:
            if vm.name not in standing.ended | standing.idle:
                ends.append(Action(Verb.STOP, vm.name, vm))
            ends.append(Action(Verb.REMOVE, vm.name, vm))
            continue
        kept[vm.name] = _less(vm, lost)
        ends += [Action(Verb.UNPLUG, vm.name, link) for link in lost]
    ends += [Action(Verb.REMOVE, item.name, item) for item in stores[0] if item in gone]
    begins = [Action(Verb.CREATE, item.name, item) for item in stores[1] if item in new]
    fresh = [vm for vm in wanted.vms if vm.name not in kept]
    begins += [Action(Verb.DEFINE, vm.name, vm) for vm in fresh]
    joining = [peer for peer in wanted.peers if peer not in current.peers or peer in peers_gone]
    begins += [Action(Verb.JOIN, peer.name, peer) for peer in joining]
    begins += [Action(Verb.START, vm.name, vm) for vm in wanted.vms if vm in fresh or vm.name in standing.idle]
    for vm in wanted.vms:
        links = (
            _without(vm.devices, kept[vm.name].devices)
            if vm.name in kept
            else [link for link in vm.devices if is_plugged(link, vm)]
        )
        begins += [Action(Verb.PLUG, vm.name, link) for link in links]
    return (*ends, *begins)


def is_plugged(link: Link, vm: Vm) -> bool:
    """Whether a device comes into a new machine only when it runs.

    Plain memory does, and a device with properties of its own; and all of a Linux guest, which can let go only of what was
    plugged into a root port (QEMU 7.2, q35).
    """
    return vm.guest == "linux" or link != Link(server=link.server)


def _lost(vm: Vm, other: Vm | None, gone: set[str], standing: Standing) -> list[Link] | None:
    """Return the devices that a machine has to let go; None when it has to be defined anew."""
    if other is None or replace(other, devices=()) != replace(vm, devices=()) or vm.name in standing.ended:
        return None
    sound = [link for link in vm.devices if link.target not in gone and (vm.name, link) not in standing.broken]
    lost = [*_without(vm.devices, sound), *_without(sound, other.devices)]
    if lost and vm.name in standing.idle:
        return None
    stuck = [link for name, link in standing.fixed if name == vm.name]
    return None if any(lost.count(link) > vm.devices.count(link) - stuck.count(link) for link in lost) else lost


def _less(vm: Vm, lost: list[Link]) -> Vm:
    return replace(vm, devices=tuple(_without(vm.devices, lost)))


def _without(links: tuple[Link, ...] | list[Link], others: tuple[Link, ...] | list[Link]) -> list[Link]:
    """Return the links that are left when the others are taken away, each as often as it is there."""
    left = list(others)
    found = []
    for link in links:
        if link in left:
            left.remove(link)
        else:
            found.append(link)
    return found
