"""Machines that move, with the same calls and the same outcomes on both emulators."""

from __future__ import annotations

import contextlib
import re
import threading

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.errors import MigrationError, UsageError, VmError
from ivshmem_lab.topology.model import Link
from ivshmem_lab.vm.text import VmTimeoutError

QEMU = pytest.param("qemu", marks=pytest.mark.qemu)
ROUND = re.compile(r"migrant: round=(\d+) ")
BLOCKER = "Migration is disabled when using feature 'peer mode' in device 'ivshmem'"


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture(params=["unicorn", QEMU])
def emulator(request):
    return request.param


def migrant(lab, emulator, source=None, **properties):
    """Start a guest that checks private and shared memory in each round, with a device when there is a source."""
    vm = lab.vm("alice", "migrant", {"watch": 1}, emulator=emulator)
    vm.start()
    vm.wait_text("migrant: ready\n", 30.0)
    if source is not None:
        vm.plug(source, **properties)
        vm.wait_text("migrant: opened\n", 30.0)
    return vm


def rounds(vm):
    """Ask the guest how far it is; it ends when it finds anything else than it wrote."""
    news = threading.Event()
    stop = vm.console.subscribe(lambda _: news.set())
    try:
        asked = len(ROUND.findall(vm.console.text()))
        vm.console.write("c")
        while len(found := ROUND.findall(vm.console.text())) <= asked:
            assert news.wait(30.0), vm.console.text()
            news.clear()
    finally:
        stop()
    return int(found[-1])


def goes_on(vm):
    first = rounds(vm)
    while rounds(vm) < first + 2:
        pass
    assert vm.state == "running"
    return first


def test_a_master_takes_its_memory_along(lab, emulator):
    here, there = lab.memory("here", "1M"), lab.memory("there", "1M")
    alice = migrant(lab, emulator, here, master="on", bus=6)
    before = goes_on(alice)
    moved = alice.migrate("bob", sources={here: there})
    bob = moved.vm
    paused = [step.what for step in moved.steps if step.what.startswith("paused")]
    assert paused == ([] if emulator == "unicorn" else ["paused: QEMU's TCG loses stores while it copies"])
    assert rounds(bob) > before
    goes_on(bob)
    assert (alice.state, list(lab), bob.name) == ("stopped", ["here", "there", "bob"], "bob")
    assert lab.topology().vms[0].devices == (Link(memory="there", master="on"),)
    assert bob.devices[0].where == 6
    assert moved.sent_bytes > 1 << 20
    assert 0 <= moved.downtime_s <= moved.total_s
    if paused:
        assert moved.downtime_s == moved.total_s
    assert "execute" in repr(moved)
    assert repr(moved).startswith("alice has moved to bob in ")
    # What it has brought along can be let go like any other.
    bob.devices[0].unplug()
    goes_on(bob)


def test_both_sides_may_show_the_same_memory(lab, emulator):
    frame = lab.memory("frame", "1M")
    alice = migrant(lab, emulator, frame, master="on")
    goes_on(alice)
    moved = alice.migrate("bob")
    assert "paused: both sides have the same memory" in [step.what for step in moved.steps]
    goes_on(moved.vm)


def test_a_peer_is_refused_in_qemu_s_words_and_nothing_is_touched(lab, emulator):
    board = lab.server("board", "1M", 1)
    alice = migrant(lab, emulator, board)
    with pytest.raises(MigrationError) as refused:
        alice.migrate("bob")
    assert (refused.value.side, refused.value.desc) == ("source", BLOCKER)
    assert 'peers="replug"' in refused.value.hint
    assert list(lab) == ["board", "alice"]
    assert [device.device_id for device in alice.devices] == ["hot0"]
    goes_on(alice)


def test_a_peer_is_unplugged_and_plugged_in_again_and_its_new_id_is_told(lab, emulator):
    board = lab.server("board", "1M", 1)
    me = lab.peer("me", connect=board)
    alice = migrant(lab, emulator, board)
    old = alice.devices[0].peer_id
    seen = []
    moved = alice.migrate("bob", peers="replug", on_step=seen.append)
    bob = moved.vm
    (new,) = moved.peer_ids.values()
    assert new not in {old, me.peer_id}
    assert list(moved.peer_ids) == [bob.devices[0].device_id] == ["hot0"]
    assert seen == moved.steps
    bob.wait_text("migrant: opened\n", 30.0)
    goes_on(bob)
    assert set(board.peers) == {me.peer_id, new}
    me.ring(new, 0)
    bob.wait_text("migrant: rung 0\n", 30.0)


def test_a_device_of_the_start_is_plugged_in_again_too(lab, emulator):
    board = lab.server("board", "1M", 1)
    alice = lab.vm("alice", "migrant", {"watch": 1}, emulator=emulator, connect=board)
    alice.start()
    alice.wait_text("migrant: ready\n", 30.0)
    moved = alice.migrate("bob", peers="replug")
    moved.vm.wait_text("migrant: opened\n", 30.0)
    assert list(board.peers) == list(moved.peer_ids.values())


def test_a_master_at_a_server_needs_a_fresh_one_at_the_destination(lab, emulator):
    board, fresh = lab.server("board", "1M", 1), lab.server("fresh", "1M", 1)
    alice = migrant(lab, emulator, board, master="on")
    with pytest.raises(MigrationError) as refused:
        alice.migrate("bob")
    assert (refused.value.side, refused.value.desc) == (
        "destination",
        "master must connect to the server before any peers",
    )
    assert "sources=" in refused.value.hint
    goes_on(alice)
    assert "bob" not in lab
    bob = alice.migrate("bob", sources={board: fresh}).vm
    goes_on(bob)
    me = lab.peer("me", connect=fresh)
    assert bob.devices[0].peer_id == 0
    me.ring(0, 0)
    bob.wait_text("migrant: rung 0\n", 30.0)


@pytest.mark.parametrize("difference", ["no device", "size", "slot", "vectors"])
def test_a_destination_that_does_not_match_is_named_and_the_source_runs_on(lab, emulator, difference):
    if difference == "vectors":
        here, there = lab.server("here", "1M", 1), lab.server("there", "1M", 2)
        properties = {"vectors": None}
    else:
        here = lab.memory("here", "1M")
        there = None if difference == "no device" else lab.memory("there", "2M" if difference == "size" else "1M")
        properties = {}
    alice = migrant(lab, emulator, here, master="on", bus=6, **properties)
    to = "bob"
    if difference == "slot":
        to = lab.vm("bob", "migrant", {"watch": 1}, emulator=emulator)
        to.start_waiting()
        to.plug(there, master="on", bus=7, device_id="hot0")
    with pytest.raises(MigrationError) as refused:
        alice.migrate(to, sources={here: there})
    assert refused.value.side == "destination"
    assert "load of migration failed" in refused.value.desc
    assert refused.value.hint
    assert "bob" not in lab
    goes_on(alice)
    assert [device.device_id for device in alice.devices] == ["hot0"]


def test_after_a_refusal_the_peers_are_back_at_the_source(lab, emulator):
    board, here, there = lab.server("board", "1M", 1), lab.memory("here", "1M"), lab.memory("there", "2M")
    alice = migrant(lab, emulator, board)
    alice.plug(here, master="on")
    with pytest.raises(MigrationError):
        alice.migrate("bob", sources={here: there}, peers="replug")
    assert sorted(device.device_id for device in alice.devices) == ["hot0", "hot1"]
    assert len(board.peers) == 1


def test_a_paused_machine_arrives_paused(lab, emulator):
    alice = migrant(lab, emulator)
    alice.pause()
    bob = alice.migrate("bob").vm
    assert bob.state == "paused"
    bob.resume()
    goes_on(bob)


def test_a_machine_goes_to_an_address_and_is_received_there(lab, emulator):
    alice = migrant(lab, emulator, lab.memory("here", "1M"), master="on", bus=6)
    other = Lab()
    try:
        bob = other.vm("bob", "migrant", {"watch": 1}, emulator=emulator)
        bob.start_waiting()
        bob.plug(other.memory("theirs", "1M"), master="on", bus=6, device_id="hot0")
        uri = f"unix:{other.directory}/in.sock"
        receiver = threading.Thread(target=bob.receive, args=(uri,))
        receiver.start()
        if emulator == "qemu":  # its TCG loses stores of a guest that runs while it is copied
            alice.pause()
        moved = send_when_it_waits(alice, uri)
        receiver.join(30.0)
        assert moved.vm is None
        if emulator == "qemu":
            bob.resume()
        goes_on(bob)
    finally:
        other.close()


def send_when_it_waits(vm, uri):
    """Migrate as soon as somebody listens; before that it is refused, and the machine is as it was."""
    before = vm.state
    while True:
        with contextlib.suppress(MigrationError):
            return vm.migrate(uri)
        assert vm.state == before


def test_what_cannot_be_is_refused_before_anything_is_done(lab, emulator):
    alice = lab.vm("alice", "migrant", {"watch": 1}, emulator=emulator)
    with pytest.raises(VmError, match="alice is defined; only a machine that runs"):
        alice.migrate("bob")
    alice.start()
    with pytest.raises(UsageError, match="peers='x' is not allowed"):
        alice.migrate("bob", peers="x")
    with pytest.raises(UsageError, match="the machine itself"):
        alice.migrate(alice)
    with pytest.raises(UsageError, match="the name 'alice' is taken"):
        alice.migrate("alice")
    with pytest.raises(MigrationError) as refused:
        alice.migrate("tcp:nowhere")
    assert refused.value.side == "source"
    assert alice.state == "running"


def test_a_migration_that_takes_too_long_is_called_back(lab, emulator):
    here, there = lab.memory("here", "1M"), lab.memory("there", "1M")
    alice = migrant(lab, emulator, here, master="on")
    with pytest.raises(VmTimeoutError, match="has not arrived in 0 s and was called back"):
        alice.migrate("bob", sources={here: there}, timeout_s=0.0)
    assert list(lab) == ["here", "there", "alice"]
    goes_on(alice)
    goes_on(alice.migrate("bob", sources={here: there}).vm)


def test_ctrl_c_leaves_the_guest_where_it_was_with_its_devices(lab, emulator):
    board = lab.server("board", "1M", 1)
    alice = migrant(lab, emulator, board)

    def interrupt(step):
        if "chardev-remove" in step.what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alice.migrate("bob", peers="replug", on_step=interrupt)
    assert list(lab) == ["board", "alice"]
    goes_on(alice)
    assert [device.device_id for device in alice.devices] == ["hot0"]
    assert len(board.peers) == 1


def test_a_device_that_cannot_be_plugged_in_again_does_not_hide_that_the_machine_has_moved(lab, emulator):
    board, gone = lab.server("board", "1M", 1), lab.server("gone", "1M", 1)
    alice = migrant(lab, emulator, board)
    gone.close()
    moved = alice.migrate("bob", peers="replug", sources={board: gone})
    assert (moved.left, moved.peer_ids) == (["hot0"], {})
    assert "hot0 is not plugged in again: server gone does not listen" in repr(moved)
    goes_on(moved.vm)


@pytest.mark.qemu
def test_a_linux_guest_moves_with_its_device_and_goes_on_to_run_commands(lab):
    here, there = lab.memory("here", "1M"), lab.memory("there", "1M")
    alice = lab.vm("alice", "linux", emulator="qemu")
    alice.start()
    alice.run(["sh", "-c", "echo written before > /tmp/note"])
    alice.plug(here, master="on").wait_seen()
    alice.run(["ivshmem-tool", "write", "0", "--text", "hello"], check=True)
    progress = []
    bob = alice.migrate("bob", sources={here: there}, on_progress=lambda sent, all_: progress.append((sent, all_))).vm
    assert bytes(there.memory[:5]) == b"hello"
    assert bob.run(["cat", "/tmp/note"], check=True).stdout == "written before\n"
    bob.run(["ivshmem-tool", "write", "0", "--text", "there"], check=True)
    assert bytes(there.memory[:5]) == b"there"
    assert bytes(here.memory[:5]) == b"hello"
    assert all(0 <= sent <= all_ for sent, all_ in progress)
    bob.devices[0].unplug()
