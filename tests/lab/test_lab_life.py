from __future__ import annotations

import asyncio
import os
import select
import signal
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from ivshmem_lab import Lab, Peer
from ivshmem_lab.errors import LabError, VmError, VmStartError
from ivshmem_lab.guests import guest_path


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture(params=["unicorn", pytest.param("qemu", marks=pytest.mark.qemu)])
def emulator(request):
    return request.param


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_peer_ids_follow_the_order_of_definition_and_are_known_after_start(lab, emulator):
    board = lab.server("board", vectors=2)
    machines = [lab.vm(name, connect=board, emulator=emulator) for name in ("alice", "bob", "carol")]
    lab.start()
    assert [machine.peer_id for machine in machines] == [0, 1, 2]
    assert {peer.pid for peer in board.peers.values()} == {machine.pid for machine in machines}
    for machine in machines:
        machine.wait_text("ready", 30.0)
        assert f"peer_id={machine.peer_id} vectors=2" in machine.console.text()
        assert machine.state == "running"
    lab.start()
    assert [machine.state for machine in machines] == ["running"] * 3


def test_a_machine_started_later_joins_the_others(lab, emulator):
    board = lab.server("board")
    lab.vm("alice", connect=board, emulator=emulator).start()
    bob = lab.vm("bob", connect=board, emulator=emulator, args={"role": "pong"})
    bob.start()
    bob.start()
    assert (bob.peer_id, bob.state) == (1, "running")
    assert bob.argv[bob.argv.index("-append") + 1] == "role=pong"


def test_one_machine_on_two_servers_has_a_peer_id_of_each(lab, emulator):
    left, right = lab.server("left", size="1M"), lab.server("right", size="2M", vectors=1)
    me = lab.peer("me", connect=right)
    bridge = lab.vm("bridge", guest="probe", connect=[left, right, right], emulator=emulator)
    bridge.start()
    assert (me.peer_id, bridge.peer_id) == (0, [0, 1, 2])
    assert repr(bridge).endswith("running, peer 0 of left, peer 1 of right, peer 2 of right>")


def test_a_peer_and_the_server_see_the_same_memory(lab):
    board = lab.server("board", size="64K")
    me = lab.peer("me", connect=board)
    assert isinstance(me, Peer)
    me.memory[:4] = [1, 2, 3, 4]
    assert board.memory[:4].tolist() == [1, 2, 3, 4]
    assert (board.memory.dtype, board.memory.shape) == (np.uint8, (65536,))


def test_the_table_says_who_is_who(lab, emulator):
    board = lab.server("board", vectors=2)
    lab.peer("me", connect=board)
    lab.vm("alice", connect=board, emulator=emulator)
    lab.start()
    lab.vm("idle", guest="probe", emulator=emulator)
    with Peer.connect(board.path):
        lines = repr(lab).splitlines()
    assert [line.split() for line in lines] == [
        ["name", "what", "state", "peer", "id", "vectors", "memory", "server"],
        ["board", "server", "3", "peers", "2", "4M"],
        ["(pid", f"{os.getpid()})", "foreign", "peer", "connected", "2", "2", "4M", "board"],
        ["me", "host", "peer", "connected", "0", "2", "4M", "board"],
        ["alice", emulator, "VM", "running", "1", "2", "4M", "board"],
        ["idle", emulator, "VM", "defined"],
    ]


def test_an_empty_lab_says_what_to_put_into_it(lab):
    assert "lab.server('board')" in repr(lab)


def test_it_works_under_a_running_event_loop(emulator):
    async def notebook_cell():
        with Lab() as lab:
            alice = lab.vm("alice", connect=lab.server("board"), emulator=emulator)
            lab.start()
            alice.wait_text("ready", 30.0)
            return alice.peer_id

    assert asyncio.run(notebook_cell()) == 0


def test_a_pinned_machine_runs_on_its_cpu_with_all_its_threads(lab, emulator):
    cpu = max(os.sched_getaffinity(0))
    alice = lab.vm("alice", connect=lab.server("board"), emulator=emulator, cpu=cpu)
    lab.start()
    alice.wait_text("ready", 30.0)
    threads = [int(task.name) for task in Path(f"/proc/{alice.pid}/task").iterdir()]
    assert {frozenset(os.sched_getaffinity(thread)) for thread in threads} == {frozenset({cpu})}


def test_a_machine_killed_from_outside_is_failed_and_its_name_is_free_after_close(lab, emulator):
    board = lab.server("board")
    alice = lab.vm("alice", connect=board, emulator=emulator)
    lab.start()
    os.kill(alice.pid, signal.SIGKILL)
    assert alice.wait_end(20.0)
    assert (alice.state, alice.exit_status) == ("failed", -signal.SIGKILL)
    assert alice.reason.startswith("killed by SIGKILL")
    assert "failed: killed by SIGKILL" in repr(lab)
    with pytest.raises(VmError, match="cont: alice does not answer; it is failed: killed by SIGKILL"):
        alice.execute("cont")
    alice.close()
    again = lab.vm("alice", connect=board, emulator=emulator)
    lab.start()
    assert again.state == "running"


def test_a_machine_that_cannot_start_leaves_nothing_and_the_others_can_go_on(lab, emulator, tmp_path):
    nonsense = tmp_path / "nonsense.elf"
    nonsense.write_bytes(b"nonsense")
    board = lab.server("board")
    alice = lab.vm("alice", connect=board, emulator=emulator)
    mallory = lab.vm("mallory", guest=nonsense, connect=board, emulator=emulator)
    with pytest.raises(VmStartError, match=r"mallory .* ended before it was ready: exit status \d"):
        lab.start()
    assert (mallory.state, mallory.pid) == ("failed", None)
    assert "mallory" not in repr(lab)
    assert alice.state == "paused"
    mallory = lab.vm("mallory", connect=board, emulator=emulator)
    lab.start()
    assert (alice.state, mallory.state) == ("running", "running")


def test_a_guest_that_ends_by_itself_is_stopped_with_its_status(lab, emulator):
    board = lab.server("board")
    lab.vm("alice", connect=board, emulator=emulator)
    bob = lab.vm("bob", connect=board, emulator=emulator, args="role=ping peer=0 rounds=10 exit=1")
    lab.start()
    assert bob.wait_end(30.0)
    assert (bob.state, bob.exit_status) == ("stopped", 1)
    assert "rounds=10" in bob.console.text()


def test_ctrl_c_in_the_middle_of_the_start_ends_what_was_starting(lab, emulator):
    board = lab.server("board")
    alice = lab.vm("alice", connect=board, emulator=emulator)
    bob = lab.vm("bob", connect=board, emulator=emulator)
    spawned = []

    def spawn(pid, spawn=lab.guard.add_process):
        spawned.append(pid)
        spawn(pid)
        os.kill(os.getpid(), signal.SIGINT)

    alice._vm._on_spawn = spawn
    with pytest.raises(KeyboardInterrupt):
        lab.start()
    assert len(spawned) == 1
    assert gone(spawned[0])
    assert (alice.state, bob.state) == ("failed", "defined")
    lab.start()
    assert bob.state == "running"


def test_the_lab_may_be_closed_from_another_thread_while_a_machine_starts(emulator):
    lab = Lab()
    alice = lab.vm("alice", connect=lab.server("board"), emulator=emulator)
    spawned = threading.Event()

    def spawn(pid, spawn=lab.guard.add_process):
        spawn(pid)
        spawned.set()

    alice._vm._on_spawn = spawn
    outcome = []

    def start():
        try:
            lab.start()
        except (VmStartError, LabError) as error:
            outcome.append(str(error))

    starter = threading.Thread(target=start)
    starter.start()
    assert spawned.wait(20.0)
    lab.close()
    starter.join(20.0)
    assert len(outcome) == 1
    assert "closed before it was ready" in outcome[0] or "the lab was closed" in outcome[0]
    assert alice.pid is None


def test_close_gives_everything_back_and_may_be_repeated_from_many_threads(emulator):
    lab = Lab()
    board = lab.server("board")
    alice = lab.vm("alice", connect=board, emulator=emulator)
    me = lab.peer("me", connect=board)
    lab.start()
    held = board.memory
    directory, pids = lab.directory, [alice.pid, lab.guard.pid]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    threads = [threading.Thread(target=lab.close) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lab.close()
    assert all(map(gone, pids))
    assert not directory.exists()
    assert me.closed
    assert held[:4].sum() >= 0  # an array that was handed out stays usable


def test_a_killed_reaper_costs_nothing_but_a_warning(caplog):
    lab = Lab()
    reaper = os.pidfd_open(lab.guard.pid)
    signal.pidfd_send_signal(reaper, signal.SIGKILL)
    select.select([reaper], [], [], 20.0)
    os.close(reaper)
    lab.server("board")
    lab.close()
    assert not lab.directory.exists()
    assert "the reaper of this lab is gone" in caplog.text


def test_a_forked_child_does_not_close_its_parents_lab(lab):
    board = lab.server("board")
    child = os.fork()
    if not child:
        lab.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert lab.peer("me", connect=board).peer_id == 0


def test_the_firmware_alone_is_no_guest_for_ours_but_a_path_is(lab):
    probe = lab.vm("probe", guest=guest_path("probe"), connect=lab.server("board"))
    lab.start()
    assert "1af4:1110" in probe.wait_text("1af4:1110", 30.0).lower()
