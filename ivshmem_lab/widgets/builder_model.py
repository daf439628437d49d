"""A topology that is being drawn: where its parts are, every change with its way back, what a running lab adds to it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..topology import edit
from ..topology.formats.whole import WHOLE_FORMATS, guess, named
from ..topology.layout import complete, layout, nodes, snap
from ..topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ..units import format_size, parse_size
from .topology_picture import draw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..topology.edit import Node
    from ..topology.formats.lost import Lost, Rendered
    from .topology_picture import Standing

Position = tuple[int, int]

FARTHEST_PX = 100_000
PALETTE: dict[str, tuple[Node, str, str]] = {
    # A guest that lets devices go when it is asked.
    "unicorn": (Vm("vm", guest="probe", args="watch=1"), "Unicorn VM", "no root, no KVM"),
    "qemu": (Vm("qemu", "qemu", "probe", "watch=1"), "QEMU VM", "real QEMU, QMP"),
    "server": (Server("board"), "Server", "memory + doorbells"),
    "memory": (Memory("frame"), "Memory", "plain, no doorbells"),
    "peer": (HostPeer("me", ""), "Host peer", "this Python process"),
}
"""What can be added: a first value, what it is called, and a few words."""

_KINDS = ("servers", "memories", "vms", "peers")
_CHOICES: dict[str, tuple[str, ...]] = {
    "emulator": ("unicorn", "qemu"),
    "machine": ("pc", "q35"),
    "accel": ("tcg", "kvm", "auto"),
    "master": ("", "on", "off", "auto"),
    "ioeventfd": ("", "on", "off"),
}
_LABELS = {
    "size_bytes": "Size",
    "memory_bytes": "RAM",
    "root_ports": "Root ports",
    "cpu": "Host CPU",
    "args": "Command line",
    "ioeventfd": "ioeventfd",
    "accel": "Accelerator",
    "peers_per_uid": "Peers per user",
    "observer_uid": "Observers: uid",
}
_EMPTY = {
    "memory_bytes": "32M",
    "cpu": "any",
    "root_ports": "4 on q35",
    "vectors": "as the server",
    "peers_per_uid": "any number",
    "observer_uid": "nobody",
    "args": "none",
}


@dataclass(frozen=True, slots=True)
class Sketch:
    """A topology and where its parts are drawn, in px."""

    topology: Topology
    places: dict[str, Position] = field(default_factory=dict)


class Draft:
    """What a person draws, step by step.

    Parameters
    ----------
    topology
        What is there at the beginning.

    Attributes
    ----------
    base : Topology
        What the lab was when it was last looked at: the draft's changes are those against it.
    """

    def __init__(self, topology: Topology) -> None:
        self.base = topology
        self.history = edit.History(Sketch(topology, dict(layout(topology))))

    @property
    def topology(self) -> Topology:
        """What is drawn."""
        return self.history.value.topology

    @property
    def places(self) -> dict[str, Position]:
        """Where everything is drawn, in px."""
        return complete(self.topology, self.history.value.places)

    # -- changes: each raises UsageError, and changes nothing, where it makes no sense -----------------

    def add(self, kind: str, x: float | None = None, y: float | None = None) -> str:
        """Add one thing of the palette, at a place or where there is room; returns its name."""
        if kind not in PALETTE:
            raise UsageError(f"there is no {kind!r} to add; there are {', '.join(PALETTE)}")
        first = PALETTE[kind][0]
        name = edit.new_name(self.topology, first.name)
        new = edit.add(self.topology, edit.put(first, name=name))
        places = self.places if x is None or y is None else {**self.places, name: _place(x, y)}
        self._do(f"add {name}", new, complete(new, places))
        return name

    def remove(self, names: Sequence[str]) -> None:
        """Remove nodes; what was connected to them stays."""
        new = self.topology
        for name in names:
            new = edit.remove(new, name)
        self._do(f"remove {', '.join(names)}", new)

    def connect(self, source: str, target: str) -> None:
        """Connect two nodes."""
        self._do(f"connect {source} with {target}", edit.connect(self.topology, source, target))

    def disconnect(self, name: str, device: int | None = None) -> None:
        """Take a device out of a machine, or let a host peer join nothing."""
        self._do(f"disconnect {name}", edit.disconnect(self.topology, name, device))

    def change(self, name: str, key: str, value: str, device: int | None = None) -> str:
        """Give a property another value, as it was typed; returns the node's name, which may be what changed."""
        node = edit.find(self.topology, name)
        if key == "name":
            new = edit.rename(self.topology, name, value.strip())
            places = {value.strip() if each == name else each: place for each, place in self.places.items()}
            self._do(f"rename {name}", new, places)
            return value.strip()
        item: Any = node
        if device is not None:
            if not isinstance(node, Vm) or not 0 <= device < len(node.devices):
                raise UsageError(f"{name} has no device {device}")
            item = node.devices[device]
        new = edit.set_property(self.topology, name, key, read_property(item, key, value), device)
        self._do(f"change {name}", new)
        return name

    def move(self, places: Mapping[str, Sequence[float]]) -> None:
        """Draw nodes elsewhere; the lab does not hear of it."""
        known = {node.name for node in nodes(self.topology)}
        moved = {name: _place(*place, grid=False) for name, place in places.items() if name in known}
        self._do(f"move {', '.join(moved)}", self.topology, {**self.places, **moved})

    def arrange(self) -> None:
        """Draw everything where there is order."""
        self._do("layout", self.topology, layout(self.topology))

    def load(self, text: str, form: str = "", guests: Mapping[str, str] | None = None) -> tuple[str, tuple[Lost, ...]]:
        """Draw what a text describes, in whatever format; returns that, and what has no place in a topology."""
        name = form or guess(text)
        parsed = named(name).parse(text, "what was pasted", guests)
        self._do(f"import {name}", parsed.topology, complete(parsed.topology, parsed.positions))
        return name, parsed.lost

    def replace(self, topology: Topology) -> None:
        """Draw another topology; what keeps its name keeps its place."""
        self._do("replace", topology)

    def discard(self) -> None:
        """Draw what the lab is."""
        self._do("discard", self.base)

    def export(self, form: str, guests: Mapping[str, str] | None = None) -> Rendered:
        """Write it in a format."""
        return named(form).write(self.topology, self.places, guests)

    # -- the lab's own changes -------------------------------------------------------------------------

    def follow(self, current: Topology) -> None:
        """Take over what has changed in the lab meanwhile, where nothing else was drawn; also in what can be undone."""
        if current != self.base:
            base, self.base = self.base, current
            self.history.rebase(lambda sketch: replace(sketch, topology=merged(base, current, sketch.topology)))

    def _do(self, what: str, topology: Topology, places: Mapping[str, Position] | None = None) -> None:
        self.history.do(what, Sketch(topology, dict(self.places if places is None else places)))


def merged(base: Topology, theirs: Topology, ours: Topology) -> Topology:
    """Put two changes of a topology together: where we have changed nothing, theirs; else ours.

    >>> base, theirs, ours = Topology((Server("a"),)), Topology((Server("a"), Server("b"))), Topology()
    >>> [server.name for server in merged(base, theirs, ours).servers]
    ['b']
    """
    found: dict[str, Any] = {}
    for kind in _KINDS:
        was, is_, drawn = ({each.name: each for each in getattr(where, kind)} for where in (base, theirs, ours))
        names = dict.fromkeys([*drawn, *is_])
        chosen = [is_.get(name) if drawn.get(name) == was.get(name) else drawn.get(name) for name in names]
        found[kind] = tuple(each for each in chosen if each is not None)
    return Topology(**found)


def read_property(item: Any, key: str, text: str) -> Any:
    """Read a property as it is typed: sizes with suffixes, numbers, on and off; nothing is the default.

    Raises
    ------
    UsageError
        It cannot be read.
    """
    part = next((each for each in fields(item) if each.name == key), None)
    if part is None:
        raise UsageError(f"there is no property {key!r}")
    kind, text = str(part.type), text.strip()
    if not text and "None" in kind:
        return None
    if key.endswith("_bytes"):
        return parse_size(text, _LABELS[key], default_suffix="m" if key == "memory_bytes" else "")
    if "bool" in kind:
        return text == "on"
    if "int" in kind:
        if re.fullmatch(r"\d{1,9}", text) is None:
            raise UsageError(f"{_label(key)} is a whole number, not {text!r}")
        return int(text)
    return text


def properties(item: Any) -> list[dict[str, Any]]:
    """Return what a person may change of a node or a device: key, label, value as text, choices, what nothing means."""
    found = []
    for part in fields(item):
        if part.name in ("devices", "server", "memory") or (
            isinstance(item, Link) and item.memory and part.name != "master"
        ):
            continue
        value = getattr(item, part.name)
        text = "" if value is None else format_size(value) if part.name.endswith("_bytes") else str(value)
        if isinstance(value, bool):
            text = "on" if value else "off"
        choices = _CHOICES.get(part.name, ())
        empty = _EMPTY.get(part.name, "default")
        found.append(
            {"key": part.name, "label": _label(part.name), "value": text, "choices": list(choices), "empty": empty}
        )
    return found


def view(
    draft: Topology, current: Topology, places: Mapping[str, Position], standing: Mapping[str, Standing]
) -> dict[str, Any]:
    """Return a draft for the front end, as JSON values, with how the lab stands on top.

    Parameters
    ----------
    draft, current
        What is drawn, and what the lab is.
    places
        Where, in px; of every node.
    standing
        How the members of the lab stand.
    """
    picture = draw(draft, standing, places)
    there = {node.name: node for node in nodes(current)}
    served = {server.name: server.vectors for server in draft.servers}
    found = []
    for node, box in zip(nodes(draft), picture.nodes, strict=True):
        old = there.get(node.name)
        is_new = old is None
        old_devices = old.devices if isinstance(old, Vm) else ()
        devices = node.devices if isinstance(node, Vm) else ()
        found.append(
            {
                "name": node.name,
                "kind": box.kind,
                "mark": "todo" if is_new else box.mark,
                "words": "draft, not applied" if is_new else box.words,
                "label": f"{node.name}, {box.kind}, draft, not applied" if is_new else box.label,
                "draft": "draft" if is_new else "" if old == node else "changed",
                "x": box.x,
                "y": box.y,
                "width": box.width,
                "height": box.height,
                "applied": not is_new,
                "fields": properties(node),
                "server": node.server if isinstance(node, HostPeer) else "",
                "vectors": served.get(node.server, 0) if isinstance(node, HostPeer) else 0,
                "devices": [
                    {
                        "target": link.target,
                        "new": devices[: number + 1].count(link) > old_devices.count(link),
                        "vectors": link.vectors or served.get(link.target, 0),
                        "fields": properties(link),
                    }
                    for number, link in enumerate(devices)
                ],
            }
        )
    return {"nodes": found, "words": {wire.key: wire.words for wire in picture.wires}}


def formats() -> list[tuple[str, str]]:
    """Return the formats that a topology can be written in, each with a few words."""
    return [(name, form.what) for name, form in WHOLE_FORMATS.items()]


def _label(key: str) -> str:
    return _LABELS.get(key, key.replace("_", " ").capitalize())


def _place(x: float, y: float, *, grid: bool = True) -> Position:
    if not all(isinstance(each, int | float) and abs(each) <= FARTHEST_PX for each in (x, y)):
        raise UsageError(f"({x!r}, {y!r}) is no place; up to {FARTHEST_PX} px in each direction")
    return (max(0, snap(x)), max(0, snap(y))) if grid else (max(0, round(x)), max(0, round(y)))
