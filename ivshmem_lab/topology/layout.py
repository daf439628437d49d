"""Where the parts of a topology are drawn: three layers from left to right, what is shared in the middle.

Sizes and the grid are those of the bench: a node is 216 px wide and 60 px high, and 28 px more for each device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .model import Vm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .model import HostPeer, Memory, Server, Topology

    Node = Server | Memory | Vm | HostPeer

GRID_PX = 8
WIDTH_PX = 216
HEIGHT_PX = 60
DEVICE_PX = 28
MARGIN_PX = 24
COLUMN_GAP_PX = 160
"""Room for the words at a link."""
ROW_GAP_PX = 32

Position = tuple[int, int]
"""Left and upper edge of a node, in px; right and down are positive."""


def node_size(node: Node) -> tuple[int, int]:
    """Return width and height of a node in px.

    >>> from .model import Link, Server
    >>> node_size(Server("board")), node_size(Vm("alice", devices=(Link(server="board"),)))
    ((216, 60), (216, 88))
    """
    return WIDTH_PX, HEIGHT_PX + DEVICE_PX * (len(node.devices) if isinstance(node, Vm) else 0)


def snap(px: float) -> int:
    """Return the nearest place on the grid."""
    return GRID_PX * round(px / GRID_PX)


def layout(topology: Topology) -> dict[str, Position]:
    """Place every node; the same topology always gives the same places, and none overlap.

    Servers and memories are in the middle, one half of the machines is left of them, the other and the host peers are
    right. In a column they follow what they are linked to.
    """
    shared: list[Node] = [*topology.servers, *topology.memories]
    half = (len(topology.vms) + 1) // 2
    row = {node.name: number for number, node in enumerate(shared)}
    order = sorted(topology.vms, key=lambda vm: _mean(row, [link.target for link in vm.devices]))
    left = set(order[:half])
    columns: list[list[Node]] = [
        [vm for vm in order if vm in left],
        shared,
        [*(vm for vm in order if vm not in left), *sorted(topology.peers, key=lambda peer: _mean(row, [peer.server]))],
    ]
    tallest = max(map(_height, columns))
    places: dict[str, Position] = {}
    for number, column in enumerate(column for column in columns if column):
        x = MARGIN_PX + number * (WIDTH_PX + COLUMN_GAP_PX)
        y = MARGIN_PX + _up((tallest - _height(column)) // 2)
        for node in column:
            places[node.name] = x, y
            y = _up(y + node_size(node)[1] + ROW_GAP_PX)
    return {node.name: places[node.name] for node in nodes(topology)}


def complete(topology: Topology, places: Mapping[str, Position]) -> dict[str, Position]:
    """Keep the places that are known, and put every other node where `layout` has it, or below what is there."""
    wanted = layout(topology)
    found = {node.name: places[node.name] for node in nodes(topology) if node.name in places}
    taken = [(*found[node.name], *node_size(node)) for node in nodes(topology) if node.name in found]
    for node in nodes(topology):
        if node.name not in found:
            x, y = wanted[node.name]
            width, height = node_size(node)
            while hit := next((box for box in taken if _overlap((x, y, width, height), box)), None):
                y = _up(hit[1] + hit[3] + ROW_GAP_PX)
            found[node.name] = x, y
            taken.append((x, y, width, height))
    return found


def nodes(topology: Topology) -> list[Node]:
    """Return every node, in the order of a file."""
    return [*topology.servers, *topology.memories, *topology.vms, *topology.peers]


def _mean(rows: Mapping[str, int], names: Sequence[str]) -> float:
    there = [rows[name] for name in names if name in rows]
    return sum(there) / len(there) if there else len(rows)


def _height(column: Iterable[Node]) -> int:
    return sum(_up(node_size(node)[1] + ROW_GAP_PX) for node in column)


def _up(px: int) -> int:
    return -(-px // GRID_PX) * GRID_PX


def _overlap(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))
