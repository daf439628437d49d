"""Changes to a topology, each a new value; and going back and forth between them.

A topology that is being drawn may have problems that `validate` names, such as a host peer that has joined no server yet
(``server=""``). What makes no sense at all is refused, with the reason.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import UsageError
from ..units import format_size
from .layout import nodes
from .model import HostPeer, Link, Memory, Server, Topology, Vm
from .validate import NAME, places_left

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")

Node = Server | Memory | Vm | HostPeer
_KINDS: dict[type, str] = {Server: "servers", Memory: "memories", Vm: "vms", HostPeer: "peers"}
_STEPS = 50


def find(topology: Topology, name: str) -> Node:
    """Return what has this name.

    Raises
    ------
    UsageError
        Nothing has.
    """
    for node in nodes(topology):
        if node.name == name:
            return node
    there = ", ".join(node.name for node in nodes(topology)) or "nothing"
    raise UsageError(f"there is no {name!r}; there is {there}")


def new_name(topology: Topology, base: str) -> str:
    """Return a name that is free: the base, or with a number behind it."""
    taken = {node.name for node in nodes(topology)}
    name, number = base, 1
    while name in taken:
        number += 1
        name = f"{base}{number}"
    return name


def add(topology: Topology, node: Node) -> Topology:
    """Add a server, memory, machine or host peer.

    Raises
    ------
    UsageError
        Its name is none, or taken.
    """
    _check_name(topology, node.name)
    kind = _KINDS[type(node)]
    return replace(topology, **{kind: (*getattr(topology, kind), node)})


def remove(topology: Topology, name: str) -> Topology:
    """Remove a node; what was linked to it stays, and is linked to it no more.

    Raises
    ------
    UsageError
        There is no such node.
    """
    kind = _KINDS[type(find(topology, name))]
    left = replace(topology, **{kind: tuple(node for node in getattr(topology, kind) if node.name != name)})
    return replace(
        left,
        vms=tuple(replace(vm, devices=tuple(link for link in vm.devices if link.target != name)) for vm in left.vms),
        peers=tuple(replace(peer, server="") if peer.server == name else peer for peer in left.peers),
    )


def rename(topology: Topology, name: str, new: str) -> Topology:
    """Give a node another name; links follow.

    Raises
    ------
    UsageError
        There is no such node, or the new name is none, or taken.
    """
    node = find(topology, name)
    if name == new:
        return topology
    _check_name(topology, new)
    topology = _with(topology, name, replace(node, name=new))
    if not isinstance(node, Server | Memory):
        return topology
    end = "server" if isinstance(node, Server) else "memory"

    def led(link: Link) -> Link:
        return changed(link, {end: new}) if getattr(link, end) == name else link

    return replace(
        topology,
        vms=tuple(replace(vm, devices=tuple(map(led, vm.devices))) for vm in topology.vms),
        peers=tuple(replace(peer, server=new) if peer.server == name else peer for peer in topology.peers),
    )


def why_not(topology: Topology, source: str, target: str) -> str | None:
    """Tell why two nodes cannot be connected, and what to do instead; None when they can."""
    try:
        user, shared = _ends(topology, source, target)
    except UsageError as error:
        return str(error)
    if isinstance(user, HostPeer):
        if isinstance(shared, Memory):
            return (
                f"{shared.name} is memory without a server, which a peer cannot join; "
                f'this process has it as lab["{shared.name}"].memory'
            )
        if user.server:
            return f"{user.name} has joined {user.server}; a peer joins one server: disconnect it, or add another peer"
        return None
    link = _link(shared)
    if places_left(user, link) < 1:
        remedy = (
            "give it more root_ports, or"
            if user.machine == "q35" or user.guest == "linux"
            else "add another machine, or"
        )
        return f"{user.name} has no place left for a device; {remedy} disconnect one"
    return None


def what_happens(topology: Topology, source: str, target: str) -> str:
    """Tell in a few words what connecting two nodes means; see `why_not` for whether it can be.

    Raises
    ------
    UsageError
        They cannot be connected.
    """
    if reason := why_not(topology, source, target):
        raise UsageError(reason)
    user, shared = _ends(topology, source, target)
    size = format_size(shared.size_bytes)
    if isinstance(shared, Memory):
        return f"{user.name} gets {size} of {shared.name}, no interrupts"
    return f"{user.name} joins {shared.name}: {size}, {shared.vectors} vector{'' if shared.vectors == 1 else 's'}"


def targets(topology: Topology, source: str) -> dict[str, str | None]:
    """Return, for every other node, why it cannot be connected with this one; None for those that can."""
    return {node.name: why_not(topology, source, node.name) for node in nodes(topology) if node.name != source}


def connect(topology: Topology, source: str, target: str, **properties: Any) -> Topology:
    """Connect a machine or a host peer with a server or a memory, in either direction.

    Parameters
    ----------
    topology, source, target
        Two names in a topology.
    **properties
        Fields of the machine's `Link`, such as ``vectors=1``.

    Raises
    ------
    UsageError
        They cannot be connected; as `why_not` says.
    """
    if reason := why_not(topology, source, target):
        raise UsageError(reason)
    user, shared = _ends(topology, source, target)
    if isinstance(user, HostPeer):
        return _with(topology, user.name, replace(user, server=shared.name))
    link = changed(_link(shared), properties)
    return _with(topology, user.name, replace(user, devices=(*user.devices, link)))


def disconnect(topology: Topology, name: str, device: int | None = None) -> Topology:
    """Take a device from a machine, by its index, or a host peer from its server.

    Raises
    ------
    UsageError
        There is no such device.
    """
    match find(topology, name):
        case Vm() as vm:
            index = _index(vm, device)
            return _with(topology, name, replace(vm, devices=(*vm.devices[:index], *vm.devices[index + 1 :])))
        case HostPeer() as peer:
            return _with(topology, name, replace(peer, server=""))
    raise UsageError(f"{name} is not linked to others: they are linked to it; disconnect one of them")


def set_property(topology: Topology, name: str, key: str, value: Any, device: int | None = None) -> Topology:
    """Change a property of a node, or with `device` of a machine's device.

    Raises
    ------
    UsageError
        There is no such node, device or property, or the value is of another kind. Whether a value of the right kind
        is allowed is for `validate` to say.
    """
    node = find(topology, name)
    if key in ("name", "devices") or (isinstance(node, HostPeer) and key == "server"):
        raise UsageError(f"{key} is no property; use rename, connect or disconnect")
    if device is None:
        return _with(topology, name, changed(node, {key: value}))
    if not isinstance(node, Vm):
        raise UsageError(f"{name} is no machine, so it has no devices")
    if key in ("server", "memory"):
        raise UsageError(f"{key} is no property; use disconnect and connect")
    index = _index(node, device)
    new = changed(node.devices[index], {key: value})
    return _with(topology, name, replace(node, devices=(*node.devices[:index], new, *node.devices[index + 1 :])))


class History(Generic[_T]):
    """A value with those that were before it and those that were undone; 50 steps are kept.

    Attributes
    ----------
    value
        The one that is now.
    """

    def __init__(self, value: _T, steps: int = _STEPS) -> None:
        self.value = value
        self._steps = steps
        self._before: list[tuple[str, _T]] = []
        self._after: list[tuple[str, _T]] = []

    @property
    def undoable(self) -> str | None:
        """What `undo` would undo, in the words given to `do`; None when there is nothing."""
        return self._before[-1][0] if self._before else None

    @property
    def redoable(self) -> str | None:
        """What `redo` would do again; None when there is nothing."""
        return self._after[-1][0] if self._after else None

    def do(self, what: str, value: _T) -> _T:
        """Go on to a new value; what was undone before is forgotten. An equal value is no step."""
        if value != self.value:
            self._before = [*self._before, (what, self.value)][-self._steps :]
            self._after = []
            self.value = value
        return self.value

    def undo(self) -> _T:
        """Go back one step; nothing happens when there is none."""
        return self._go(self._before, self._after)

    def redo(self) -> _T:
        """Go forth one step; nothing happens when there is none."""
        return self._go(self._after, self._before)

    def rebase(self, change: Callable[[_T], _T]) -> None:
        """Change every value alike, also those that can be gone back to: something else has changed them all."""
        self.value = change(self.value)
        self._before = [(what, change(value)) for what, value in self._before]
        self._after = [(what, change(value)) for what, value in self._after]

    def _go(self, source: list[tuple[str, _T]], back: list[tuple[str, _T]]) -> _T:
        if source:
            what, value = source.pop()
            back.append((what, self.value))
            self.value = value
        return self.value


def _check_name(topology: Topology, name: str) -> None:
    if NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} is no name: 1 to 32 letters, digits, _ . -, the first a letter, a digit or _")
    if any(node.name == name for node in nodes(topology)):
        raise UsageError(f"the name {name!r} is taken; choose another, such as {new_name(topology, name)!r}")


def _with(topology: Topology, name: str, new: Node) -> Topology:
    kind = _KINDS[type(new)]
    changed: dict[str, Any] = {kind: tuple(new if node.name == name else node for node in getattr(topology, kind))}
    return replace(topology, **changed)


def _ends(topology: Topology, source: str, target: str) -> tuple[Vm | HostPeer, Server | Memory]:
    """Return who uses what, of two nodes in either order."""
    one, other = find(topology, source), find(topology, target)
    if isinstance(one, Server | Memory):
        if isinstance(other, Server | Memory):
            raise UsageError(f"{one.name} and {other.name} are both shared; connect a machine or a host peer with each")
        one, other = other, one
    if not isinstance(other, Server | Memory):
        what = "itself" if one is other else other.name
        raise UsageError(f"{one.name} cannot be connected with {what}: they meet at a server or a memory; add one")
    return one, other


def _link(shared: Server | Memory) -> Link:
    return Link(server=shared.name) if isinstance(shared, Server) else Link(memory=shared.name)


def _index(vm: Vm, device: int | None) -> int:
    if device is None and len(vm.devices) == 1:
        return 0
    if device is None or not 0 <= device < len(vm.devices):
        there = ", ".join(f"{number}: {link.target}" for number, link in enumerate(vm.devices)) or "none"
        raise UsageError(f"{vm.name} has no device {device!r}; its devices: {there}")
    return device


def put(item: _T, **values: Any) -> _T:
    """Replace fields of a part of a topology, or of one."""
    new: _T = replace(item, **values)  # type: ignore[type-var]
    return new


def changed(item: Any, properties: dict[str, Any]) -> Any:
    """Replace fields with values of their kind; not the name, and not devices.

    Raises
    ------
    UsageError
        There is no such field, or the value is of another kind.
    """
    known = {part.name: str(part.type) for part in fields(item) if part.name not in ("name", "devices")}
    kinds: dict[str, Callable[[Any], bool]] = {
        "int": lambda value: type(value) is int,
        "str": lambda value: isinstance(value, str),
        "bool": lambda value: isinstance(value, bool),
        "None": lambda value: value is None,
    }
    for key, value in properties.items():
        if key not in known:
            raise UsageError(f"there is no property {key!r}; there are {', '.join(known)}")
        if not any(kinds[kind](value) for kind in known[key].split(" | ")):
            raise UsageError(f"{key}={value!r} is of the wrong kind; it is {known[key]}")
    return replace(item, **properties)
