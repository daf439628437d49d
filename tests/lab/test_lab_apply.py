"""A running lab as a value, and made what is wanted."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ivshmem_lab import Lab
from ivshmem_lab.errors import ApplyError, RemoteProtocolError, UsageError, VmError
from ivshmem_lab.guests import guest_path
from ivshmem_lab.lab.members import LabVm
from ivshmem_lab.topology.model import HostPeer, Link, Memory, Server, Topology, Vm
from ivshmem_lab.topology.plan import Standing, Verb, plan
from ivshmem_lab.topology.python_line import python_line
from ivshmem_lab.vm.accel import probe

QEMU = pytest.param("qemu", marks=pytest.mark.qemu)
BOARD, FRAME = Server("board", 1 << 16, 2), Memory("frame", 1 << 16)
AT_BOARD, AT_FRAME = Link(server="board"), Link(memory="frame")
EXAMPLES = int(os.environ.get("IVSHMEM_LAB_APPLY_EXAMPLES", "6"))


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture(params=["unicorn", QEMU])
def emulator(request):
    return request.param


def watcher(name: str, *devices: Link, emulator: str = "unicorn", args: str = "watch=1") -> Vm:
    """A machine whose guest lets go of what it is asked for."""
    return Vm(name, emulator, "probe", args, devices=devices)


def unordered(topology: Topology) -> Topology:
    """What the order of members and devices does not change."""
    vms = [replace(vm, devices=tuple(sorted(vm.devices, key=repr))) for vm in topology.vms]
    return Topology(
        *(tuple(sorted(each, key=repr)) for each in (topology.servers, topology.memories, vms, topology.peers))
    )


def wait_watching(lab: Lab) -> None:
    """Wait until the guests are beyond the place where they cannot let anything go."""
    for member in lab.members.values():
        if isinstance(member, LabVm):
            member.wait_text("probe: watching", 30.0)


def actual(lab: Lab) -> Topology:
    """Read the lab's state from the other end: from the processes, by QMP and from the servers."""
    vms = []
    for vm in [member for member in lab.members.values() if isinstance(member, LabVm)]:
        assert vm.state == "running"
        found = [device for bus in vm.execute("query-pci") for device in bus["devices"]]
        drivers = sorted(device["id"]["device"] for device in found if device["qdev_id"])
        assert len(drivers) == len(vm.attached)
        peers = sorted((each.source.name, each.peer_id) for each in vm.attached if each.peer_id is not None)
        joined = [
            (name, peer_id)
            for name, member in lab.members.items()
            if name in [server.name for server in lab.topology().servers]
            for peer_id, peer in member.peers.items()
            if peer.pid == vm.pid
        ]
        assert peers == sorted(joined)
        vms.append(vm)
    return lab.topology()


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    servers = [Server(n, 1 << 16, draw(st.integers(1, 2))) for n in ("s", "t") if draw(st.booleans())]
    memories = [Memory("m", draw(st.sampled_from([1 << 16, 1 << 17])))] if draw(st.booleans()) else []
    ends = [Link(server=x.name, vectors=v) for x in servers for v in (None, 1)]
    ends += [Link(memory=x.name) for x in memories]
    links = st.lists(st.sampled_from(ends), max_size=2) if ends else st.just([])
    args = st.sampled_from(["watch=1", "watch=2"])
    vms = [watcher(n, *draw(links), args=draw(args)) for n in ("a", "b") if draw(st.booleans())]
    peers = [HostPeer("p", draw(st.sampled_from(servers)).name)] if servers and draw(st.booleans()) else []
    return Topology(tuple(servers), tuple(memories), tuple(vms), tuple(peers))


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(topologies(), topologies())
def test_after_applying_the_labs_state_is_the_wanted_one(first: Topology, second: Topology) -> None:
    with Lab() as lab:
        for wanted in (first, second):
            steps = lab.plan(wanted)
            told = []
            lab.apply(wanted, lambda action, phase, error, told=told: told.append((action, phase, error)))
            assert [action for action, phase, _ in told if phase == "done"] == list(steps)
            wait_watching(lab)
            assert unordered(actual(lab)) == unordered(wanted)
            assert lab.plan(wanted) == ()


def test_a_lab_made_by_calls_is_a_value(lab, emulator):
    board = lab.server("board", size="64K", vectors=2)
    frame = lab.memory("frame", size="64K")
    lab.peer("me", connect=board)
    alice = lab.vm("alice", "probe", {"watch": 1}, emulator=emulator, connect=board, memory="16M")
    defined = Vm("alice", emulator, "probe", "watch=1", 16 << 20, devices=(AT_BOARD,))
    assert lab.topology() == Topology((BOARD,), (FRAME,), (defined,), (HostPeer("me", "board"),))
    assert lab.plan(lab.topology()) == plan(lab.topology(), lab.topology(), Standing(idle=frozenset({"alice"})))
    lab.start()
    assert lab.plan(lab.topology()) == ()
    alice.wait_text("probe: watching", 30.0)
    alice.plug(frame)
    alice.plug(board, vectors=1, ioeventfd=False, master="off")
    own = Link(server="board", vectors=1, ioeventfd=False, master="off")
    assert lab.topology().vms[0].devices == (AT_BOARD, AT_FRAME, own)
    alice.unplug(board, vectors=1, ioeventfd=False, master="off")
    alice.unplug(frame)
    assert lab.topology().vms[0].devices == (AT_BOARD,)
    with pytest.raises(UsageError, match=r"alice has no such device of .*frame"):
        alice.unplug(frame)
    assert (lab["alice"], "bob" in lab, list(lab)) == (alice, False, ["board", "frame", "me", "alice"])
    with pytest.raises(UsageError, match="there is no 'bob' in this lab; there is board, frame, me, alice"):
        lab["bob"]


def test_a_device_of_the_machines_start_can_be_unplugged_and_others_plugged_while_it_runs(lab, emulator):
    lab.apply(Topology((BOARD,), (FRAME,), (watcher("alice", AT_BOARD, AT_BOARD, emulator=emulator),)))
    alice, board = lab["alice"], lab["board"]
    alice.wait_text("probe: watching", 30.0)
    pid = alice.pid
    for devices in ((AT_BOARD,), (), (AT_BOARD, AT_FRAME), (AT_FRAME,)):
        wanted = Topology((BOARD,), (FRAME,), (watcher("alice", *devices, emulator=emulator),))
        lab.apply(wanted)
        assert lab.topology() == wanted
        assert len(board.peers) == devices.count(AT_BOARD)
        assert (alice.pid, alice.state) == (pid, "running")
    assert alice.servers == ()
    assert (alice.guards > 0) == (emulator == "qemu")


def test_what_was_there_at_the_start_of_a_q35_cannot_go_so_the_machine_is_defined_anew(lab):
    q35 = replace(watcher("alice", AT_BOARD), machine="q35")
    lab.apply(Topology((BOARD,), (), (q35,)))
    lab["alice"].plug(lab["board"])
    (kept,) = lab.plan(Topology((BOARD,), (), (q35,)))
    assert (kept.verb, kept.item) == (Verb.UNPLUG, AT_BOARD)
    steps = lab.plan(Topology((BOARD,), (), (replace(q35, devices=()),)))
    assert [step.verb for step in steps] == [Verb.STOP, Verb.REMOVE, Verb.DEFINE, Verb.START]
    with pytest.raises(VmError, match="a q35 lets go only of what was plugged into a root port"):
        lab["alice"]._home.loop.call(lab["alice"]._adopt(lab["alice"]._boot[0]))


def test_a_machine_that_has_ended_by_itself_is_defined_anew(lab):
    bob = replace(watcher("bob", AT_BOARD), guest="pingpong", args="role=ping peer=0 rounds=3 exit=1")
    wanted = Topology((BOARD,), (), (Vm("alice", devices=(AT_BOARD,)), bob))
    lab.apply(wanted)
    first = lab["bob"]
    assert first.wait_end(30.0)
    assert lab.topology() == wanted
    steps = lab.plan(wanted)
    assert [(step.verb, step.name) for step in steps] == [
        (verb, "bob") for verb in (Verb.REMOVE, Verb.DEFINE, Verb.START)
    ]
    lab.apply(wanted)
    assert lab["bob"] is not first
    lab["bob"].wait_text("rounds=3", 30.0)
    lab.apply(Topology((BOARD,), (), wanted.vms[:1]))
    assert "bob" not in lab


def test_users_of_a_server_that_was_closed_are_shown_and_led_to_the_new_one(lab):
    wanted = Topology((BOARD,), (), (watcher("alice", AT_BOARD),), (HostPeer("me", "board"),))
    lab.apply(wanted)
    wait_watching(lab)
    lab["board"].close()
    assert "server gone" in repr(lab)
    assert lab.topology() == replace(wanted, servers=())
    lab.server("board", "64K", 2)
    steps = lab.plan(wanted)
    assert {step.verb for step in steps} == {Verb.LEAVE, Verb.UNPLUG, Verb.JOIN, Verb.PLUG}
    pid = lab["alice"].pid
    lab.apply(wanted)
    assert lab.plan(wanted) == ()
    assert lab["alice"].pid == pid
    assert sorted(peer.pid for peer in lab["board"].peers.values()) == sorted([pid, os.getpid()])


def test_a_failed_step_is_named_and_what_was_done_before_stays(lab, tmp_path):
    nonsense = tmp_path / "nonsense.elf"
    nonsense.write_bytes(b"nonsense")
    bad = replace(watcher("bad"), guest=str(nonsense))
    wanted = Topology((BOARD,), (), (watcher("alice", AT_BOARD), bad, watcher("zoe")), (HostPeer("me", "board"),))
    told = []
    with pytest.raises(ApplyError, match=r"^step 7, start vm bad .*: bad .* ended before it was ready") as caught:
        lab.apply(wanted, lambda action, phase, error: told.append((action.verb, action.name, phase, error)))
    assert caught.value.done[-1].startswith("start vm alice")
    assert caught.value.left == 1
    failed = [event for event in told if event[2] == "failed"]
    assert [event[:2] for event in failed] == [(Verb.START, "bad")]
    assert failed[0][3] is caught.value.reason
    assert lab.topology() == replace(wanted, vms=(wanted.vms[0], wanted.vms[2]))
    assert (lab["alice"].state, lab["zoe"].state) == ("running", "defined")
    lab.apply(replace(wanted, vms=(wanted.vms[0], wanted.vms[2])))
    assert lab["zoe"].state == "running"


def test_a_wrong_topology_changes_nothing(lab):
    lab.server("board")
    with pytest.raises(UsageError, match=r"vms\.alice\.devices\[0\]\.server: there is no server 'nope'"):
        lab.apply(Topology((), (), (Vm("alice", devices=(Link(server="nope"),)),)))
    assert "board" in lab


def test_what_is_not_there_is_a_problem_before_anything_is_done(lab, tmp_path):
    elf = tmp_path / "guest.elf"
    elf.write_bytes(guest_path("probe").read_bytes())
    alice = replace(watcher("alice"), guest=str(elf))
    lab.apply(Topology((), (), (alice,)))
    elf.unlink()
    wrong = Vm("bob", "unicorn", "nope", memory_bytes=5000, cpu=4096)
    tiny = Vm("tiny", "qemu", "linux", memory_bytes=1 << 20)
    wanted = Topology((BOARD,), (), (alice, wrong, tiny))
    assert [(problem.code, problem.path) for problem in lab.problems(wanted)] == [
        ("guest", "vms.bob.guest"),
        ("memory", "vms.bob.memory"),
        ("cpu", "vms.bob.cpu"),
        ("memory", "vms.tiny.memory"),
    ]
    with pytest.raises(UsageError, match=r"vms\.bob\.guest: guest 'nope' is unknown; there are "):
        lab.apply(wanted)
    assert lab.topology() == Topology((), (), (alice,))
    lab.apply(Topology((BOARD,), (), (alice,)))


def test_an_emulator_that_is_not_installed_is_a_problem(lab, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = lab.problems(Topology((), (), (watcher("alice", emulator="qemu"),)))
    assert (problem.code, problem.path) == ("emulator", "vms.alice.emulator")
    assert "qemu-system-x86_64 is not on PATH; install it" in problem.what


def test_a_lab_that_is_closed_in_the_middle_ends_the_plan(lab):
    wanted = Topology((BOARD,), (), (watcher("alice", AT_BOARD),))
    with pytest.raises(ApplyError, match=r"^step 2, define vm alice .*: .*this lab is closed") as caught:
        lab.apply(wanted, lambda action, phase, error: lab.close() if phase == "done" else None)
    assert (caught.value.done, caught.value.left) == (("create server board (64K, 2 vectors)",), 1)


def test_threads_take_turns(lab):
    wants = [Topology((Server(name, 1 << 16),), (), (), (HostPeer("me", name),)) for name in "abcd"]
    failures = []

    def work(wanted):
        try:
            for _ in range(5):
                lab.apply(wanted)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(wanted,)) for wanted in wants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert lab.topology() in wants


def test_a_machine_is_paused_goes_on_and_stops(lab, emulator):
    alice = lab.vm("alice", "probe", "watch=1", emulator=emulator)
    alice.start()
    alice.pause()
    assert alice.state == "paused"
    alice.resume()
    assert alice.state == "running"
    alice.wait_text("probe: watching", 30.0)
    alice.stop()
    alice.stop()
    assert (alice.state, "alice" in lab, "watching" in alice.console.text()) == ("stopped", True, True)
    alice.close()
    assert "alice" not in lab


def test_the_python_line_of_each_action_does_the_same(lab):
    awkward = Server("my-board", 1 << 14, 1)
    first = Topology(
        (BOARD, awkward),
        (FRAME,),
        (
            watcher(
                "alice", AT_BOARD, Link(server="my-board"), AT_FRAME, Link(server="board", vectors=1, master="off")
            ),
            Vm("class", "unicorn", "probe", 'watch=1 say="\\', 16 << 20, "q35", min(os.sched_getaffinity(0)), 2),
        ),
        (HostPeer("me", "board"), HostPeer("lab", "my-board")),
    )
    second = Topology((BOARD,), (), (watcher("alice", AT_BOARD),), ())
    names = {"lab": lab}
    for wanted in (first, second, Topology()):
        for action in lab.plan(wanted):
            exec(python_line(action), names)
        for member in lab.members.values():
            if isinstance(member, LabVm) and member.state == "running":
                member.wait_text("probe: watching", 30.0)
        assert unordered(lab.topology()) == unordered(wanted)
        assert lab.plan(wanted) == ()


@pytest.mark.qemu
def test_the_accelerator_that_was_asked_for_is_part_of_the_topology(lab):
    wanted = Topology(vms=(Vm("any", "qemu", "probe", accel="auto"),))
    lab.plan(wanted)
    lab.apply(wanted)
    assert lab.topology() == wanted
    assert list(lab.plan(wanted)) == []


@pytest.mark.qemu
def test_an_accelerator_that_does_not_work_is_told_before_anything_is_changed(lab):
    wanted = Topology(vms=(Vm("any", "qemu", "probe", accel="kvm"),))
    assert [each.path for each in lab.problems(wanted)] == (
        [] if probe("kvm", "bare-metal").works else ["vms.any.accel"]
    )


def test_unicorn_has_no_kvm(lab):
    (problem,) = lab.problems(Topology(vms=(Vm("any", accel="kvm"),)))
    assert problem.path == "vms.any.accel"


def test_the_policy_of_a_server_is_part_of_the_topology_and_holds(lab):
    wanted = Topology(
        (Server("board", 1 << 16, 1, peers_per_uid=1), Server("seen", 1 << 16, 1, observer_uid=os.getuid()))
    )
    lab.apply(wanted)
    assert lab.topology() == wanted
    assert [python_line(action).partition("vectors=1")[2] for action in plan(Topology(), wanted)] == [
        ", peers_per_uid=1)",
        f", observer_uid={os.getuid()})",
    ]
    lab.peer("one", connect=lab["board"])
    with pytest.raises(RemoteProtocolError, match="closed before it sent"):
        lab.peer("two", connect=lab["board"])
    observer = lab.peer("observer", connect=lab["seen"])
    assert not observer.memory.flags.writeable
