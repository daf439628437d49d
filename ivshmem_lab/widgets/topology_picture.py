"""A lab as a drawing: where its nodes and links are, in px, with their words; and SVG made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from ..lab.members import LabVm
from ..lab.servers import LabServer
from ..peer.peer import Peer
from ..topology.layout import HEIGHT_PX, MARGIN_PX, complete, layout, node_size, nodes
from ..topology.model import HostPeer, Server, Vm
from ..units import format_size
from ..vm.device import LIVE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..lab.lab import Lab
    from ..topology.model import Memory, Topology

_SIGNS = {"running": "▶", "paused": "‖", "stopped": "■", "failed": "✕", "starting": "◔", "defined": "○", "present": "✓"}
_WORDS_PLACES = (0.3, 0.5, 0.64, 0.2)
_LETTER_PX, _LINE_PX = 7, 16


@dataclass(frozen=True, slots=True)
class Standing:
    """How a member of a lab stands: its state, a reason, its peer id by server (of a machine or a host peer)."""

    state: str
    reason: str = ""
    peer_ids: tuple[tuple[str, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """A box; `mark` is one of the front end's marks, `label` what a screen reader says, `devices` one word for each."""

    name: str
    kind: str
    mark: str
    words: str
    label: str
    x: int
    y: int
    width: int
    height: int
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Wire:
    """A link, as a path between two edges, with its badge."""

    key: str
    path: str
    words: str
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """All of it, with its size in px."""

    nodes: tuple[Node, ...]
    wires: tuple[Wire, ...]
    width: int
    height: int


def standing_of(lab: Lab, name: str) -> Standing:
    """Ask how a member of a lab stands; one that has left meanwhile is not there."""
    member = lab.members.get(name)
    if isinstance(member, LabVm):
        ids = tuple((each.source.name, each.peer_id) for each in member.attached if isinstance(each.source, LabServer))
        return Standing(str(member.state), member.reason, ids if member.state in LIVE else ())
    if isinstance(member, Peer):
        server = lab.server_of(name)
        return Standing("present", "", ((server.name, member.peer_id),) if server else ())
    return Standing("running" if member else "defined")


def draw(
    topology: Topology, standing: Mapping[str, Standing], places: Mapping[str, tuple[int, int]] | None = None
) -> Drawing:
    """Draw a topology as it stands, where it was drawn before, or where there is order."""
    places = complete(topology, places or layout(topology))
    boxes = {
        node.name: _node(node, places[node.name], standing.get(node.name, Standing("defined")))
        for node in nodes(topology)
    }
    wires: list[Wire] = []
    for vm in topology.vms:
        ids = standing.get(vm.name, Standing("")).peer_ids
        taken: list[int] = []
        for number, link in enumerate(vm.devices):
            if link.target not in boxes:
                continue
            found = next((at for at, (server, _) in enumerate(ids) if server == link.target and at not in taken), None)
            taken += [] if found is None else [found]
            peer = None if found is None else ids[found][1]
            words = "plain mapping" if link.memory else "not joined" if peer is None else f"peer {peer}"
            row = boxes[vm.name].y + HEIGHT_PX + 28 * number + 10
            wires.append(_wire(f"{vm.name}-{number}", boxes[vm.name], boxes[link.target], words, wires, row))
    for host in topology.peers:
        if host.server in boxes:
            peer = dict(standing.get(host.name, Standing("")).peer_ids).get(host.server)
            words = "" if peer is None else f"peer {peer}"
            wires.append(_wire(host.name, boxes[host.name], boxes[host.server], words, wires))
    width = max((node.x + node.width for node in boxes.values()), default=0) + MARGIN_PX
    height = max((node.y + node.height for node in boxes.values()), default=0) + MARGIN_PX
    return Drawing(tuple(boxes.values()), tuple(wires), width, height)


def drawing_svg(drawing: Drawing) -> str:
    """Return a drawing as SVG that needs nothing else."""
    parts = [f'<path d="{wire.path}" fill="none" stroke="#757575" stroke-width="1.4"/>' for wire in drawing.wires]
    parts += [
        f'<text x="{wire.x}" y="{wire.y}" text-anchor="middle" paint-order="stroke" stroke="#fff" stroke-width="4">'
        f"{escape(wire.words)}</text>"
        for wire in drawing.wires
    ]
    for node in drawing.nodes:
        bad = node.mark == "failed"
        parts.append(
            f'<rect x="{node.x}" y="{node.y}" width="{node.width}" height="{node.height}" rx="4" fill="#fff" stroke="{"#c62828" if bad else "#757575"}"/>'
        )
        parts.append(
            f'<text x="{node.x + 12}" y="{node.y + 22}" font-weight="600" font-size="13">{escape(node.name)}</text>'
        )
        parts.append(
            f'<text x="{node.x + node.width - 12}" y="{node.y + 22}" text-anchor="end">{escape(node.kind)}</text>'
        )
        parts.append(
            f'<text x="{node.x + 12}" y="{node.y + 44}">{_SIGNS.get(node.mark, "")} {escape(_short(node.words))}</text>'
        )
        for number, device in enumerate(node.devices):
            parts.append(f'<text x="{node.x + 20}" y="{node.y + HEIGHT_PX + 28 * number + 14}">{escape(device)}</text>')
    width, height = max(drawing.width, 240), max(drawing.height, 60)
    empty = '<text x="24" y="34">Nothing in this lab yet</text>' if not drawing.nodes else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'font-family="system-ui, \'DejaVu Sans\', sans-serif" font-size="12" fill="#212121"><title>Topology</title>'
        f"<desc>{escape('; '.join(node.label for node in drawing.nodes))}</desc>"
        f'<rect width="{width}" height="{height}" rx="4" fill="#fafafa"/>{"".join(parts)}{empty}</svg>'
    )


def _node(node: Server | Memory | Vm | HostPeer, place: tuple[int, int], standing: Standing) -> Node:
    devices: tuple[str, ...] = ()
    mark = standing.state
    match node:
        case Vm():
            kind, words = node.emulator, standing.state + (f": {standing.reason}" if standing.reason else "")
            devices = tuple(link.target for link in node.devices)
        case Server():
            kind, mark = "server", "running"
            words = f"{format_size(node.size_bytes)} · {node.vectors} vectors"
        case HostPeer():
            kind, mark, words = "host peer", "present", "joined"
        case _:
            kind, mark, words = "memory", "present", f"ready · {format_size(node.size_bytes)}"
    ids = [f"peer {peer}" for _, peer in standing.peer_ids if peer is not None]
    label = ", ".join([node.name, kind, words, *ids])
    return Node(node.name, kind, mark, words, label, *place, *node_size(node), devices)


def _wire(key: str, one: Node, other: Node, words: str, others: list[Wire], row: int | None = None) -> Wire:
    """Draw a link, with its words near the device, where the links of one machine are still apart, but not on those of another."""
    left = one.x < other.x
    x1, x2 = (one.x + one.width, other.x) if left else (one.x, other.x + other.width)
    y1, y2 = row if row is not None else one.y + one.height // 2, other.y + other.height // 2
    middle = (x1 + x2) // 2
    spots = [(_along(x1, middle, middle, x2, at), _along(y1, y1, y2, y2, at)) for at in _WORDS_PLACES]
    x, y = next((spot for spot in spots if not any(_covers(*spot, words, each) for each in others)), spots[0])
    return Wire(key, f"M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}", words, x, y)


def _covers(x: int, y: int, words: str, other: Wire) -> bool:
    width = _LETTER_PX * (len(words) + len(other.words)) / 2
    return abs(other.x - x) < width and abs(other.y - y) < _LINE_PX


def _along(start: int, one: int, other: int, end: int, at: float) -> int:
    """Return one coordinate of a point of a cubic Bézier curve."""
    rest = 1 - at
    return round(rest**3 * start + 3 * rest**2 * at * one + 3 * rest * at**2 * other + at**3 * end)


def _short(words: str) -> str:
    return words if len(words) <= 30 else words[:29] + "…"
