"""Changes to a topology, undo, and where its parts are drawn."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.topology import edit
from ivshmem_lab.topology.edit import History
from ivshmem_lab.topology.layout import GRID_PX, complete, layout, node_size, nodes, snap
from ivshmem_lab.topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ivshmem_lab.topology.validate import validate

LAB = Topology(
    (Server("board"), Server("other", 1 << 20, 1)),
    (Memory("frame", 1 << 20),),
    (Vm("alice", devices=(Link(server="board"), Link(memory="frame"))), Vm("bob")),
    (HostPeer("me", "board"),),
)
NAMES = [node.name for node in nodes(LAB)]


def test_what_is_added_by_name_is_there_and_removing_it_gives_the_topology_back() -> None:
    for node in (Server("new"), Memory("new"), Vm("new"), HostPeer("new", "")):
        more = edit.add(LAB, node)
        assert edit.find(more, "new") is node
        assert edit.remove(more, "new") == LAB
    assert edit.new_name(LAB, "alice") == "alice2"


def test_who_used_what_is_removed_stays_and_is_not_linked() -> None:
    left = edit.remove(LAB, "board")
    assert left.vms[0].devices == (Link(memory="frame"),)
    assert left.peers == (HostPeer("me", ""),)
    (problem,) = validate(left)
    assert (problem.code, problem.path) == ("link", "peers.me.server")


def test_links_follow_a_new_name_and_back() -> None:
    for name in NAMES:
        renamed = edit.rename(LAB, name, "new")
        assert validate(renamed) == []
        assert edit.rename(renamed, "new", name) == LAB
        assert edit.rename(LAB, name, name) == LAB
    assert edit.rename(LAB, "board", "desk").vms[0].devices[0] == Link(server="desk")


def test_a_connection_is_the_same_from_either_end() -> None:
    for shared in ("board", "other", "frame"):
        both = edit.connect(LAB, "bob", shared), edit.connect(LAB, shared, "bob")
        assert both[0] == both[1]
        assert both[0].vms[1].devices[0].target == shared
        assert edit.disconnect(both[0], "bob") == LAB
    own = edit.connect(LAB, "bob", "board", vectors=1)
    assert own.vms[1].devices == (Link(server="board", vectors=1),)
    free = edit.disconnect(LAB, "me")
    assert edit.connect(free, "board", "me") == LAB
    assert edit.what_happens(free, "me", "other") == "me joins other: 1M, 1 vector"
    assert edit.what_happens(LAB, "frame", "bob") == "bob gets 1M of frame, no interrupts"


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("alice", "bob", "alice cannot be connected with bob: they meet at a server or a memory; add one"),
        ("alice", "alice", "alice cannot be connected with itself"),
        ("me", "alice", "me cannot be connected with alice"),
        ("board", "frame", "board and frame are both shared; connect a machine"),
        ("frame", "me", "frame is memory without a server, which a peer cannot join"),
        ("me", "other", "me has joined board; a peer joins one server: disconnect it, or add another"),
        ("me", "nope", "there is no 'nope'; there is board, other"),
        ("full", "board", "full has no place left for a device; add another machine"),
        ("ports", "frame", "ports has no place left for a device; give it more root_ports"),
    ],
)
def test_the_reason_why_two_cannot_be_connected_is_told(source: str, target: str, reason: str) -> None:
    full = edit.add(LAB, Vm("full", devices=30 * (Link(memory="frame"),)))
    full = edit.add(full, Vm("ports", machine="q35", root_ports=1, devices=(Link(memory="frame"),)))
    assert validate(full) == []
    assert (edit.why_not(full, source, target) or "").startswith(reason)
    with pytest.raises(UsageError, match=re.escape(reason)):
        edit.connect(full, source, target)
    with pytest.raises(UsageError, match=re.escape(reason)):
        edit.what_happens(full, source, target)
    assert edit.why_not(full, "ports", "board") is None


@pytest.mark.parametrize(
    "vm",
    [
        Vm("a", devices=31 * (Link(memory="frame"),)),
        Vm("a", machine="q35", devices=5 * (Link(memory="frame"),)),
        Vm("a", "qemu", "linux", devices=5 * (Link(server="board"),)),
    ],
)
def test_too_many_devices_are_a_problem(vm: Vm) -> None:
    assert [(problem.code, problem.path) for problem in validate(edit.add(LAB, vm))] == [("places", "vms.a.devices")]
    assert validate(edit.add(LAB, replace(vm, devices=vm.devices[1:]))) == []


def test_properties_are_changed_in_place() -> None:
    assert edit.set_property(LAB, "board", "vectors", 8).servers[0] == Server("board", vectors=8)
    assert edit.set_property(LAB, "alice", "guest", None).vms[0].guest is None
    own = edit.set_property(LAB, "alice", "ioeventfd", False, device=0)
    assert own.vms[0].devices[0] == Link(server="board", ioeventfd=False)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("board", "sise", 1), "there is no property 'sise'; there are size_bytes, vectors"),
        (("board", "vectors", "2"), "vectors='2' is of the wrong kind; it is int"),
        (("board", "vectors", True), "vectors=True is of the wrong kind"),
        (("board", "name", "x"), "name is no property; use rename"),
        (("me", "server", "x"), "server is no property"),
        (("alice", "server", "x", 0), "server is no property; use disconnect"),
        (("alice", "vectors", 1, 2), "alice has no device 2; its devices: 0: board, 1: frame"),
        (("board", "vectors", 1, 0), "board is no machine"),
        (("nope", "vectors", 1), "there is no 'nope'"),
    ],
)
def test_a_wrong_change_is_refused(arguments: tuple[str, str, object], error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        edit.set_property(LAB, *arguments)


@pytest.mark.parametrize("name", ["", "a b", "board"])
def test_a_wrong_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"is no name: 1 to 32|is taken; choose another, such as 'board2'"):
        edit.add(LAB, Server(name))
    with pytest.raises(UsageError):
        edit.rename(LAB, "alice", name)


def test_what_cannot_be_disconnected_is_told() -> None:
    with pytest.raises(UsageError, match="alice has no device None; its devices: 0: board, 1: frame"):
        edit.disconnect(LAB, "alice")
    with pytest.raises(UsageError, match="board is not linked to others"):
        edit.disconnect(LAB, "board")


@given(st.lists(st.one_of(st.integers(0, 9), st.sampled_from(["undo", "redo"])), max_size=200))
def test_undo_and_redo_walk_through_the_last_steps(moves: list[int | str]) -> None:
    history, past, at = History(0, 5), [0], 0
    for move in moves:
        if move == "undo":
            at = max(at - 1, 0)
            assert history.undo() == past[at]
        elif move == "redo":
            at = min(at + 1, len(past) - 1)
            assert history.redo() == past[at]
        else:
            history.do(f"to {move}", move)
            if move != past[at]:
                past = [*past[: at + 1], move][-6:]
                at = len(past) - 1
        assert history.value == past[at]
        assert history.undoable == (f"to {past[at]}" if at else None)
        assert history.redoable == (f"to {past[at + 1]}" if at + 1 < len(past) else None)


@st.composite
def drawings(draw: st.DrawFn) -> Topology:
    servers = tuple(Server(f"s{n}") for n in range(draw(st.integers(0, 4))))
    memories = tuple(Memory(f"m{n}") for n in range(draw(st.integers(0, 3))))
    ends = [Link(server=x.name) for x in servers] + [Link(memory=x.name) for x in memories]
    links = st.lists(st.sampled_from(ends), max_size=5).map(tuple) if ends else st.just(())
    vms = tuple(Vm(f"v{n}", devices=draw(links)) for n in range(draw(st.integers(0, 16))))
    peers = tuple(HostPeer(f"p{n}", draw(st.sampled_from(servers)).name) for n in range(3) if servers)
    return Topology(servers, memories, vms, peers)


def overlapping(topology: Topology, places: dict[str, tuple[int, int]]) -> list[tuple[str, str]]:
    boxes = [(node.name, *places[node.name], *node_size(node)) for node in nodes(topology)]
    return [
        (one[0], other[0])
        for number, one in enumerate(boxes)
        for other in boxes[:number]
        if one[1] < other[1] + other[3]
        and other[1] < one[1] + one[3]
        and one[2] < other[2] + other[4]
        and other[2] < one[2] + one[4]
    ]


@given(drawings(), st.data())
def test_the_layout_puts_every_node_on_the_grid_and_none_on_another(topology: Topology, data: st.DataObject) -> None:
    places = layout(topology)
    assert list(places) == [node.name for node in nodes(topology)]
    assert overlapping(topology, places) == []
    assert all(x % GRID_PX == y % GRID_PX == 0 <= min(x, y) for x, y in places.values())
    assert layout(replace(topology)) == places
    middle = {places[node.name][0] for node in (*topology.servers, *topology.memories)}
    assert len(middle) <= 1
    assert complete(topology, {}) == places
    known = {name: place for name, place in places.items() if data.draw(st.booleans())}
    moved = {name: (snap(x + 37), snap(y + 91)) for name, (x, y) in known.items()}
    found = complete(topology, moved)
    assert {name: found[name] for name in moved} == moved
    assert overlapping(topology, found) == []
