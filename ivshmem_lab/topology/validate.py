"""What is wrong with a topology: every problem at once, each with its place and a remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..units import check_memory_size
from .plan import is_plugged

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .model import Link, Topology, Vm

NAME = re.compile(r"\w[\w.-]{0,31}")
"""What a member of a lab may be called."""

MASTERS = ("on", "off", "auto")
ACCELERATORS = ("tcg", "kvm", "auto")
PC_PLACES = 30
"""Slots of a pc's bus that the chipset leaves (i440FX; QEMU 7.2 with ``-nodefaults``)."""
DEFAULT_ROOT_PORTS = 4
MOST_ROOT_PORTS = 24
"""A q35's first bus has 32 slots, of which the chipset and devices given at the start take some."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes
    ----------
    code
        A short name for programs: ``"name"``, ``"name-taken"``, ``"size"``, ``"vectors"``, ``"choice"``, ``"unknown"``,
        ``"link"``, ``"places"``.
    path
        Where, such as ``vms.alice.devices[0].server``.
    what, allowed, hint
        What is there, what may be there, what to do.
    """

    code: str
    path: str
    what: str
    allowed: str
    hint: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; allowed: {self.allowed}; {self.hint}"


def validate(topology: Topology) -> list[Problem]:
    """Find every problem, in the order servers, memories, machines, peers; empty when there is none."""
    return list(_problems(topology))


def _problems(topology: Topology) -> Iterator[Problem]:
    yield from _names(topology)
    for kind, sized in (("servers", topology.servers), ("memories", topology.memories)):
        for item in sized:
            try:
                check_memory_size(item.size_bytes)
            except UsageError as error:
                hint = "choose the next power of two"
                yield Problem("size", f"{kind}.{item.name}.size", str(error), "a power of two from 4K on", hint)
    for server in topology.servers:
        if server.vectors < 0:
            yield _vectors(f"servers.{server.name}.vectors", server.vectors, 0)
        if server.peers_per_uid is not None and server.peers_per_uid < 1:
            what = f"{server.peers_per_uid} peers per uid"
            hint = "choose a larger number, or leave it out"
            yield Problem("choice", f"servers.{server.name}.peers_per_uid", what, "1 or more", hint)
        if server.observer_uid is not None and not 0 <= server.observer_uid < 1 << 32:
            what = f"there is no uid {server.observer_uid}"
            yield Problem("choice", f"servers.{server.name}.observer_uid", what, "0 to 4294967294", "give a user's uid")
    servers = [server.name for server in topology.servers]
    memories = [memory.name for memory in topology.memories]
    for vm in topology.vms:
        yield from _vm(vm)
        for index, link in enumerate(vm.devices):
            yield from _link(f"vms.{vm.name}.devices[{index}]", link, servers, memories)
        if places_left(vm) < 0:
            what = f"{-places_left(vm)} devices more than there is room for"
            allowed = f"{PC_PLACES} on pc; on q35 one for each root port, besides those of the start"
            yield Problem("places", f"vms.{vm.name}.devices", what, allowed, "take some away, or add root_ports on q35")
    for peer in topology.peers:
        if not peer.server:
            hint = "connect it, or take it away"
            yield Problem("link", f"peers.{peer.name}.server", "it joins no server", "server: NAME", hint)
            continue
        yield from _known(f"peers.{peer.name}.server", "server", peer.server, servers)


def places_left(vm: Vm, link: Link | None = None) -> int:
    """Return how many more devices a machine has room for; less than 0 for too many.

    Parameters
    ----------
    vm
        The machine.
    link
        The next device: on q35 only those that are plugged into the running machine need a root port.
    """
    if vm.machine == "pc" and vm.guest != "linux":
        return PC_PLACES - len(vm.devices)
    if link is not None and not is_plugged(link, vm):
        return 1
    ports = DEFAULT_ROOT_PORTS if vm.root_ports is None else vm.root_ports
    return ports - sum(is_plugged(each, vm) for each in vm.devices)


def _names(topology: Topology) -> Iterator[Problem]:
    taken: dict[str, str] = {}
    kinds = {field: getattr(topology, field) for field in ("servers", "memories", "vms", "peers")}
    for kind, items in kinds.items():
        for item in items:
            path = f"{kind}.{item.name}"
            if NAME.fullmatch(item.name) is None:
                allowed = "1 to 32 letters, digits, _ . -, the first a letter, a digit or _"
                yield Problem("name", path, f"{item.name!r} is no name", allowed, "rename it")
            if item.name in taken:
                what = f"the name {item.name!r} is that of {taken[item.name]}"
                yield Problem("name-taken", path, what, "a name once in the whole file", "rename one of the two")
            taken.setdefault(item.name, path)


def _vm(vm: Vm) -> Iterator[Problem]:
    path = f"vms.{vm.name}"
    if vm.guest == "linux" and vm.emulator != "qemu":
        what = f"{vm.emulator} runs no Linux"
        yield Problem("choice", f"{path}.emulator", what, "qemu for guest: linux", "write emulator: qemu")
    if vm.root_ports is not None:
        most = MOST_ROOT_PORTS if vm.machine == "q35" or vm.guest == "linux" else 0
        if not 0 <= vm.root_ports <= most:
            what = f"{vm.root_ports} root ports of a {vm.machine}"
            hint = "a pc needs none: devices go into its slots" if not most else "choose a smaller number"
            yield Problem("choice", f"{path}.root_ports", what, f"0 to {most}", hint)
    if vm.emulator == "unicorn" and vm.accel == "kvm":
        what = "unicorn has no accelerator kvm"
        yield Problem("choice", f"{path}.accel", what, "tcg or auto", "write emulator: qemu, or leave accel out")
    choices = {"emulator": ("unicorn", "qemu"), "machine": ("pc", "q35"), "accel": ACCELERATORS}
    for field, allowed in choices.items():
        value = getattr(vm, field)
        if value not in allowed:
            hint = f"write {field}: {allowed[0]}"
            yield Problem("choice", f"{path}.{field}", f"there is no {field} {value!r}", " or ".join(allowed), hint)


def _link(path: str, link: Link, servers: list[str], memories: list[str]) -> Iterator[Problem]:
    if (link.server is None) == (link.memory is None):
        yield Problem("link", path, "a device has one end", "server: NAME or memory: NAME", "name one of the two")
        return
    if link.master not in (None, *MASTERS):
        what = f"there is no master {link.master!r}"
        yield Problem("choice", f"{path}.master", what, ", ".join(MASTERS), "write one of them, or leave it out")
    if link.server is not None:
        yield from _known(f"{path}.server", "server", link.server, servers)
        if link.vectors is not None and link.vectors < 1:
            yield _vectors(f"{path}.vectors", link.vectors, 1)
    else:
        yield from _known(f"{path}.memory", "memory", str(link.memory), memories)
        if link.vectors is not None:
            what = "memory without a server has no interrupts"
            yield Problem("vectors", f"{path}.vectors", what, "vectors at a server", "take vectors away")
        if link.ioeventfd is not None:
            what = "memory without a server has no doorbell"
            yield Problem("choice", f"{path}.ioeventfd", what, "ioeventfd at a server", "take ioeventfd away")


def _vectors(path: str, vectors: int, least: int) -> Problem:
    return Problem("vectors", path, f"{vectors} vectors", f"{least} or more", "choose a larger number")


def _known(path: str, kind: str, name: str, there: Iterable[str]) -> Iterator[Problem]:
    if name not in there:
        hint = f"write {name!r} into the file as a {kind}, or name one that is there"
        yield Problem("unknown", path, f"there is no {kind} {name!r}", ", ".join(there) or "none is there", hint)
