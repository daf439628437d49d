"""The draft of the topology builder: changes, their way back, and what the lab does meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ivshmem_lab.widgets.builder_model import PALETTE, Draft, merged, properties, read_property, view
from ivshmem_lab.widgets.topology_picture import Standing

BOARD, FRAME = Server("board", 1 << 20), Memory("frame", 1 << 20)
ALICE = Vm("alice", devices=(Link(server="board"),))


def drawn() -> Draft:
    return Draft(Topology((BOARD,), (FRAME,), (ALICE,), (HostPeer("me", "board"),)))


def test_everything_of_the_palette_can_be_added_and_taken_back_step_by_step() -> None:
    draft = Draft(Topology())
    names = [draft.add(kind) for kind in (*PALETTE, "server")]
    assert names == ["vm", "qemu", "board", "frame", "me", "board2"]
    assert len(set(draft.places.values())) == len(names)
    for _ in names:
        draft.history.undo()
    assert draft.topology == Topology()
    for _ in names:
        draft.history.redo()
    assert [vm.emulator for vm in draft.topology.vms] == ["unicorn", "qemu"]


def test_what_is_dropped_lies_on_the_grid_and_what_is_moved_where_it_was_put() -> None:
    draft = drawn()
    name = draft.add("memory", 101, 50)
    assert draft.places[name] == (104, 48)
    draft.move({name: (105, 49), "nobody": (0, 0)})
    assert draft.places[name] == (105, 49)
    before = draft.places
    with pytest.raises(UsageError, match="is no place"):
        draft.move({name: (float("1e9"), 0)})
    assert draft.places == before
    draft.history.undo()
    assert draft.places[name] == (104, 48)


def test_a_new_name_keeps_links_and_place() -> None:
    draft = drawn()
    place = draft.places["board"]
    assert draft.change("board", "name", " bus ") == "bus"
    assert draft.places["bus"] == place
    assert draft.topology.vms[0].devices == (Link(server="bus"),)
    assert draft.topology.peers[0].server == "bus"


@pytest.mark.parametrize(
    ("item", "key", "text", "value"),
    [
        (BOARD, "size_bytes", "2M", 2 << 20),
        (BOARD, "vectors", "4", 4),
        (ALICE, "memory_bytes", "64", 64 << 20),
        (ALICE, "memory_bytes", "", None),
        (ALICE, "guest", "", None),
        (ALICE, "cpu", " 1 ", 1),
        (Link(server="board"), "ioeventfd", "off", False),
        (Link(server="board"), "ioeventfd", "", None),
        (Link(server="board"), "master", "on", "on"),
    ],
)
def test_properties_are_read_as_they_are_typed_and_shown_so(item, key, text, value) -> None:
    assert read_property(item, key, text) == value
    (shown,) = (each for each in properties(replace(item, **{key: value})) if each["key"] == key)
    assert read_property(item, key, shown["value"]) == value


@pytest.mark.parametrize(("key", "text"), [("vectors", "x"), ("vectors", "-1"), ("size_bytes", "big"), ("nope", "1")])
def test_what_cannot_be_read_is_refused_and_changes_nothing(key: str, text: str) -> None:
    draft = drawn()
    with pytest.raises(UsageError):
        draft.change("board", key, text)
    assert draft.topology.servers == (BOARD,)
    assert draft.history.undoable is None


def test_a_memory_s_device_has_no_vectors_to_change() -> None:
    assert [each["key"] for each in properties(Link(memory="frame"))] == ["master"]
    assert [each["key"] for each in properties(Link(server="board"))] == ["vectors", "master", "ioeventfd"]


def test_what_the_lab_does_meanwhile_is_no_change_of_the_draft_not_even_after_undo() -> None:
    draft = drawn()
    draft.add("memory")
    plugged = replace(ALICE, devices=(*ALICE.devices, Link(memory="frame")))
    current = replace(draft.base, vms=(plugged, Vm("bob")))
    draft.follow(current)
    assert draft.topology.vms == (plugged, Vm("bob"))
    assert [memory.name for memory in draft.topology.memories] == ["frame", "frame2"]
    draft.history.undo()
    assert draft.topology == current
    draft.remove(["alice"])
    draft.follow(replace(current, vms=(ALICE, Vm("bob"))))
    assert [vm.name for vm in draft.topology.vms] == ["bob"], "what was drawn wins"


topologies = st.builds(
    lambda sizes, names: Topology(tuple(Server(name, size) for name, size in zip(names, sizes, strict=False))),
    st.lists(st.sampled_from([1 << 12, 1 << 13]), max_size=3),
    st.lists(st.sampled_from("abcd"), max_size=3, unique=True),
)


@given(topologies, topologies, topologies)
def test_two_changes_are_put_together_by_name(base: Topology, theirs: Topology, ours: Topology) -> None:
    assert set(merged(base, theirs, base).servers) == set(theirs.servers)
    assert set(merged(base, base, ours).servers) == set(ours.servers)
    both = {server.name: server for server in merged(base, theirs, ours).servers}
    for name in "abcd":
        was, is_, drew = (next((s for s in each.servers if s.name == name), None) for each in (base, theirs, ours))
        assert both.get(name) == (is_ if drew == was else drew)


def test_a_view_is_json_and_tells_what_is_new() -> None:
    draft = drawn()
    draft.add("unicorn")
    draft.connect("vm", "frame")
    draft.connect("alice", "board")
    standing = {"alice": Standing("running", "", (("board", 0),)), "board": Standing("running")}
    seen = json.loads(json.dumps(view(draft.topology, draft.base, draft.places, standing)))
    nodes = {node["name"]: node for node in seen["nodes"]}
    assert {name: node["draft"] for name, node in nodes.items()} == {
        "board": "",
        "frame": "",
        "alice": "changed",
        "vm": "draft",
        "me": "",
    }
    assert [device["new"] for device in nodes["alice"]["devices"]] == [False, True]
    assert nodes["vm"]["label"] == "vm, unicorn, draft, not applied"
    assert seen["words"]["alice-0"] == "peer 0"


def test_a_paste_in_any_format_is_drawn_and_what_is_lost_is_told() -> None:
    draft = drawn()
    form, lost = draft.load("qemu-system-x86_64 -name old -vnc :1 -device ivshmem,size=4,shm=scratch")
    assert form == "legacy"
    assert [each.what for each in lost] == ["-vnc :1"]
    assert draft.topology.memories == (Memory("scratch", 4 << 20),)
    assert draft.export("yaml").text.startswith("version: 1\n")
    with pytest.raises(UsageError):
        draft.load("{")
    draft.discard()
    assert draft.topology == draft.base
