"""The topology builder on a running lab, by what its front end asks for."""

from __future__ import annotations

import threading

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.errors import ApplyError, UsageError
from ivshmem_lab.topology.model import Server, Topology, Vm
from ivshmem_lab.widgets import TopologyBuilder


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture
def builder(lab):
    builder = TopologyBuilder(lab)
    builder.send = lambda content, buffers=None: None
    yield builder
    builder.close()


def asked(builder, op, **words):
    return builder.answer({"op": op, "req": 1, **words})


def done(builder, op, **words):
    answer = asked(builder, op, **words)
    assert answer["ok"], answer
    return answer["result"]


def test_a_lab_is_drawn_applied_changed_and_drawn_again(lab, builder):
    done(builder, "add", kind="unicorn")
    done(builder, "add", kind="server")
    assert done(builder, "targets", source="vm") == {"board": {"reason": "", "what": "vm joins board: 4M, 2 vectors"}}
    done(builder, "connect", source="vm", target="board")
    assert done(builder, "change", name="vm", key="name", value="alice") == "alice"
    assert builder.changes == [
        "create server board (4M, 2 vectors)",
        "define vm alice (unicorn, pc, guest probe)",
        "start vm alice (unicorn, pc, guest probe)",
    ]
    assert [str(action) for action in builder.plan] == builder.changes
    assert list(lab) == []
    done(builder, "apply")
    assert (lab.topology(), builder.changes, builder.status) == (builder.draft, [], "3 changes applied")
    assert builder.python.splitlines() == [
        'board = lab.server("board", size="4M", vectors=2)',
        'alice = lab.vm("alice", guest="probe", args="watch=1", connect=board)',
        "alice.start()",
    ]
    marks = {node["name"]: (node["mark"], node["draft"]) for node in builder.drawing["nodes"]}
    assert marks == {"board": ("running", ""), "alice": ("running", "")}
    lab["alice"].wait_text("probe: watching", 30.0)
    done(builder, "disconnect", name="alice", device=0)
    assert builder.changes == ["unplug alice: server board"]
    done(builder, "apply")
    assert lab["alice"].attached == []
    done(builder, "toggle", name="alice")
    assert (lab["alice"].state, builder.python) == ("paused", "alice.pause()")
    done(builder, "toggle", name="alice")
    assert lab["alice"].state == "running"


def test_problems_of_the_draft_are_told_with_their_node_and_keep_apply_off(builder):
    done(builder, "add", kind="peer")
    assert [each["name"] for each in builder.problems] == ["me"]
    assert builder.changes == []
    answer = asked(builder, "apply")
    assert not answer["ok"]
    assert "peers.me" in answer["error"]
    with pytest.raises(UsageError, match=r"peers\.me"):
        builder.apply()


def test_what_makes_no_sense_is_refused_with_the_reason(builder):
    done(builder, "add", kind="memory")
    done(builder, "add", kind="memory")
    reason = "frame and frame2 are both shared; connect a machine or a host peer with each"
    assert done(builder, "targets", source="frame") == {"frame2": {"reason": reason, "what": ""}}
    assert asked(builder, "connect", source="frame", target="frame2")["error"] == reason
    assert builder.problem == reason
    assert "there is no 'x'" in asked(builder, "remove", names=["x"])["error"]
    assert "is no machine of the lab yet" in asked(builder, "toggle", name="frame")["error"]


def test_a_step_that_fails_is_told_and_the_rest_stays_to_be_done(lab, builder):
    builder.draft = Topology((Server("board"),), (), (Vm("alice", guest=None), Vm("bob", "qemu", "nowhere.elf")))
    assert "bob" in builder.problems[0]["text"]
    builder.draft = Topology((Server("board"),), (), (Vm("alice", guest="probe", args="nonsense=1"),))
    done(builder, "apply")
    lab["board"].close()
    lab["alice"].close()
    builder.refresh_safely()
    assert builder.draft == lab.topology() == Topology()


def test_what_the_lab_does_by_itself_is_followed(lab, builder):
    board = lab.server("board")
    builder.refresh_safely()
    assert [node["name"] for node in builder.drawing["nodes"]] == ["board"]
    assert builder.changes == []
    done(builder, "add", kind="unicorn")
    lab.peer("me", connect=board)
    builder.refresh_safely()
    assert [node["name"] for node in builder.drawing["nodes"]] == ["board", "vm", "me"]
    assert all("vm vm" in change for change in builder.changes)


def test_the_log_of_a_failed_machine_can_be_read(lab, builder):
    builder.draft = Topology(vms=(Vm("alice", guest="migrant"),))  # it needs a device
    done(builder, "apply")
    assert lab["alice"].wait_end(30.0)
    said = done(builder, "log", name="alice")
    assert said.startswith("alice is stopped: exit status 3")
    assert "its command: " in said


def test_a_builder_without_a_lab_makes_one():
    builder = TopologyBuilder()
    try:
        builder.load("version: 1\nservers: {board: {size: 1M}}\n")
        builder.apply()
        assert list(builder.lab) == ["board"]
        builder.undo()
        assert builder.changes == ["remove server board (1M, 2 vectors)"]
        builder.redo()
        assert builder.changes == []
        builder.discard()
        assert "board" in repr(builder)
        assert "board" in builder.to_svg()
    finally:
        builder.lab.close()
        builder.close()


def test_two_applies_at_once_are_one(builder, monkeypatch):
    inner = []

    def apply(wanted, on_step=None):
        inner.append(asked(builder, "apply")["error"])

    monkeypatch.setattr(builder.lab, "apply", apply)
    done(builder, "add", kind="server")
    done(builder, "apply")
    assert inner == ["it is being applied; wait for the end of it"]


def test_apply_errors_keep_what_was_done(lab, builder, monkeypatch):
    def fail(*args, **words):
        raise UsageError("no room")

    builder.draft = Topology((Server("board"),), (), (Vm("alice", guest="probe", args="watch=1"),))
    monkeypatch.setattr(lab, "vm", fail)
    with pytest.raises(ApplyError, match="no room"):
        builder.apply()
    assert list(lab) == ["board"]
    assert builder.changes[0].startswith("define vm alice")
    assert "not applied" in builder.status


def test_interrupts_that_go_over_a_link_are_counted_and_told(lab, builder):
    board = lab.server("board", vectors=2)
    alice, bob = (lab.vm(name, "pingpong", connect=board) for name in ("alice", "bob"))
    me = lab.peer("me", connect=board)
    lab.start()
    alice.wait_text("ready")
    builder.refresh_safely()
    assert alice.doorbells() == {"ivshmem0": (0, 0)}
    for _ in range(20):
        me.ring(alice.peer_id, 1)
    looks = threading.Event()
    while alice.doorbells()["ivshmem0"][1] < 20:
        looks.wait(0.001)
    while "alice-0" not in builder.rates:
        me.ring(alice.peer_id, 1)
        looks.wait(0.01)
        builder.refresh_safely()
    assert builder.rates["alice-0"]["come"] > 0
    assert builder.rates["alice-0"]["words"].endswith(" irq/s")
    assert "bob-0" not in builder.rates
    assert bob.doorbells() == {"ivshmem0": (0, 0)}
