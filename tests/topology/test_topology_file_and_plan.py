"""Topology files, their problems, and plans between topologies."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.topology.formats.yaml_file import parse, write_json, write_yaml
from ivshmem_lab.topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ivshmem_lab.topology.plan import Action, Standing, Verb, is_plugged, plan
from ivshmem_lab.topology.validate import validate

SIZES = st.sampled_from([4096, 1 << 20, 4 << 20, 1 << 30])
TEXTS = st.none() | st.text(max_size=8)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Make up a valid topology of few names, so that two of them have much in common."""
    policies = [draw(st.sampled_from([None, 1, 70])) for _ in range(2)]
    servers = [Server(n, draw(SIZES), draw(st.integers(0, 3)), *policies) for n in ("s", "no") if draw(st.booleans())]
    memories = [Memory(n, draw(SIZES)) for n in ("m", "1") if draw(st.booleans())]
    ends = (
        [Link(server=x.name, vectors=v) for x in servers for v in (None, 1)]
        + [Link(server=x.name, master="auto", ioeventfd=False) for x in servers]
        + [Link(memory=x.name) for x in memories]
    )
    links = st.lists(st.sampled_from(ends), max_size=3) if ends else st.just([])
    vms = [
        Vm(
            n,
            draw(st.sampled_from(["unicorn", "qemu"])),
            draw(TEXTS),
            draw(TEXTS),
            machine="q35",
            root_ports=draw(st.sampled_from([None, 3, 24])),
            accel=draw(st.sampled_from(["tcg", "auto"])),
            devices=tuple(draw(links)),
        )
        for n in ("a", "b")
        if draw(st.booleans())
    ]
    peers = [HostPeer(n, draw(st.sampled_from(servers)).name) for n in ("p",) if servers and draw(st.booleans())]
    return Topology(tuple(servers), tuple(memories), tuple(vms), tuple(peers))


@example(Topology((), (), (Vm("a", args="\x85\u2028\ufeff"),), ()))  # what YAML takes for blanks where it stands raw
@given(topologies())
def test_what_is_written_is_read_back(topology: Topology) -> None:
    assert validate(topology) == []
    assert parse(write_yaml(topology)).topology == topology
    assert parse(write_json(topology)).topology == topology


@given(topologies(), st.integers(), st.integers())
def test_positions_are_kept_beside_the_topology(topology: Topology, x: int, y: int) -> None:
    names = [item.name for item in (*topology.servers, *topology.memories, *topology.vms, *topology.peers)]
    places = dict.fromkeys(names, (x, y))
    for write in (write_yaml, write_json):
        file = parse(write(topology, {**places, "gone": (0, 0)}))
        assert (file.topology, file.positions) == (topology, places)


def test_json_of_other_programs_is_read() -> None:
    vm = '{"version": 1, "vms": {"a": {"args": "%s"}}}'
    assert parse(vm % r"\ud83d\ude00").topology.vms[0].args == "\U0001f600"
    with pytest.raises(UsageError, match=r"1:38: vms\.a\.args has half a character"):
        parse(vm % r"\ud83d")


class Bench:
    """Carry a plan out on paper, and insist on its order."""

    def __init__(self, topology: Topology) -> None:
        self.stores: dict[str, object] = {x.name: x for x in (*topology.servers, *topology.memories)}
        self.peers: dict[str, HostPeer] = {x.name: x for x in topology.peers}
        self.vms: dict[str, Vm] = {x.name: x for x in topology.vms}
        self.devices = {x.name: list(x.devices) for x in topology.vms}
        self.running = set(self.vms)
        self.fixed: list[tuple[str, Link]] = []

    def users(self) -> set[str]:
        return {p.server for p in self.peers.values()} | {x.target for name in self.devices for x in self.devices[name]}

    def do(self, action: Action) -> None:
        match action.verb, action.item:
            case Verb.LEAVE, HostPeer():
                del self.peers[action.name]
            case Verb.JOIN, HostPeer() as peer:
                assert peer.server in self.stores
                assert peer.name not in self.peers
                self.peers[peer.name] = peer
            case Verb.UNPLUG, Link() as link:
                assert action.name in self.running
                self.devices[action.name].remove(link)
                assert self.devices[action.name].count(link) >= self.fixed.count((action.name, link))
            case Verb.PLUG, Link() as link:
                assert action.name in self.running
                assert link.target in self.stores
                self.devices[action.name].append(link)
            case Verb.STOP, Vm():
                self.running.remove(action.name)
            case Verb.START, Vm():
                self.running.add(action.name)
            case Verb.REMOVE, Vm():
                assert action.name not in self.running
                del self.vms[action.name], self.devices[action.name]
                self.fixed = [pair for pair in self.fixed if pair[0] != action.name]
            case Verb.DEFINE, Vm() as vm:
                assert vm.name not in self.vms
                self.vms[vm.name], self.devices[vm.name] = vm, [x for x in vm.devices if not is_plugged(x, vm)]
                assert {x.target for x in self.devices[vm.name]} <= set(self.stores)
            case Verb.REMOVE, _:
                assert action.name not in self.users()
                del self.stores[action.name]
            case Verb.CREATE, item:
                assert action.name not in self.stores
                self.stores[action.name] = item
            case other:
                raise AssertionError(other)


@given(topologies(), topologies())
def test_a_plan_leads_from_one_to_the_other_in_an_order_that_works(current: Topology, wanted: Topology) -> None:
    bench, goal = Bench(current), Bench(wanted)
    for action in plan(current, wanted):
        assert str(action).startswith(action.verb.value)
        bench.do(action)
    assert (bench.stores, bench.peers, bench.running) == (goal.stores, goal.peers, goal.running)
    assert {n: sorted(map(repr, x)) for n, x in bench.devices.items()} == {
        n: sorted(map(repr, x)) for n, x in goal.devices.items()
    }
    assert plan(wanted, wanted) == ()


@given(topologies(), topologies(), st.data())
def test_a_plan_takes_care_of_what_has_not_begun_has_ended_cannot_go_or_is_broken(
    current: Topology, wanted: Topology, data: st.DataObject
) -> None:
    names = [vm.name for vm in current.vms]
    some = st.sets(st.sampled_from(names)) if names else st.just(set())
    ended = frozenset(data.draw(some))
    idle = frozenset(data.draw(some)) - ended
    there = [(vm.name, link) for vm in current.vms for link in vm.devices]
    fixed = tuple(pair for pair in there if data.draw(st.booleans()))
    broken = frozenset(pair for pair in there if data.draw(st.booleans()))
    bench, goal = Bench(current), Bench(wanted)
    bench.running -= idle | ended
    bench.fixed = list(fixed)
    actions = plan(current, wanted, Standing(idle, ended, fixed, broken))
    for action in actions:
        bench.do(action)
    assert (bench.stores, bench.peers, bench.running) == (goal.stores, goal.peers, goal.running)
    renewed = {a.name for a in actions if a.verb is Verb.DEFINE}
    unplugged = {(a.name, a.item) for a in actions if a.verb is Verb.UNPLUG}
    for vm in wanted.vms:
        assert sorted(map(repr, bench.devices[vm.name])) == sorted(map(repr, vm.devices))
        assert vm.name in renewed or {pair for pair in broken if pair[0] == vm.name} <= unplugged


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "f:1:1: the file is empty"),
        ("version: 2", "f:1:10: version is 2; write version: 1"),
        ("servers: {}", "f:1:1: version is None"),
        ("version: 1\nserver: {}", "f:2:1: unknown key 'server'; there are memories, peers, positions, servers"),
        (
            "version: 1\nservers:\n  b: {sise: 4M}",
            "f:3:7: unknown key 'sise'; there are observer_uid, peers_per_uid, size, vectors",
        ),
        ("version: 1\nservers: {b: {size: 4X}}", "f:2:21: servers.b.size: "),
        ("version: 1\nservers: {b: {vectors: null}}", "f:2:24: servers.b.vectors is a number"),
        ("version: 1\nservers: {b: {}, b: {}}", "f:2:18: the key 'b' is there twice"),
        ("version: 1\nvms: {a: {guest: 7}}", "f:2:18: vms.a.guest is a text, not '7'"),
        ("version: 1\nvms: {a: {devices: x}}", "f:2:20: vms.a.devices is a list"),
        ("version: 1\npeers: {me: }", "f:2:"),
        ("version: 1\npositions: {a: [1, 2]}", "f:2:13: unknown key 'a'"),
        ("version: 1\nvms: {a: }\npositions: {a: [1, 2.5]}", "f:3:16: positions.a is two numbers of px: [X, Y]"),
        ("version: 1\nservers: {b: {}}\nvms: {a: {devices: [{server: b, ioeventfd: 1}]}}", "f:3:44: vms.a.devices[0]"),
        ("version: [", "f:1:11: "),
        ("[" * 5000, "f: no YAML: "),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_column(text: str, error: str) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(error)):
        parse(text, "f")


def test_every_problem_has_code_path_and_remedy() -> None:
    links = (Link(server="nope"), Link(), Link(memory="m", vectors=2), Link(server="s", vectors=0))
    links += (Link(memory="m", ioeventfd=True), Link(server="s", master="yes"))
    wrong = Topology(
        (Server("s", 5000, -1, 0),),
        (Memory("m"),),
        (Vm("a b", "bochs", "linux", devices=links, root_ports=25), Vm("pc", root_ports=1)),
        (HostPeer("s", "m"),),
    )
    problems = validate(wrong)
    assert {(p.code, p.path) for p in problems} == {
        ("name", "vms.a b"),
        ("name-taken", "peers.s"),
        ("size", "servers.s.size"),
        ("vectors", "servers.s.vectors"),
        ("choice", "vms.a b.emulator"),
        ("choice", "servers.s.peers_per_uid"),
        ("choice", "vms.a b.root_ports"),
        ("choice", "vms.pc.root_ports"),
        ("choice", "vms.a b.devices[4].ioeventfd"),
        ("choice", "vms.a b.devices[5].master"),
        ("unknown", "vms.a b.devices[0].server"),
        ("link", "vms.a b.devices[1]"),
        ("vectors", "vms.a b.devices[2].vectors"),
        ("vectors", "vms.a b.devices[3].vectors"),
        ("unknown", "peers.s.server"),
    }
    assert all(p.hint and p.allowed for p in problems)
