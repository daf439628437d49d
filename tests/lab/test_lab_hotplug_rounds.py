"""Many rounds of hot-plug and unplug on one machine: real QEMU lives, idles and leaks nothing but the guards.

``make rounds`` is the long run, 200 rounds of each; the slowest steps are printed.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import threading
from pathlib import Path

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.errors import GuestSilentError
from ivshmem_lab.vm.linux.guest import LinuxGuest

ROUNDS = int(os.environ.get("IVSHMEM_LAB_ROUNDS", "8"))
PATIENCE = 5000
ASLEEP_LOOKS = 50
_pause = threading.Event()


def looks(condition):
    """Look again and again, a millisecond apart; tell whether it came true."""
    return any(condition() or _pause.wait(0.001) for _ in range(PATIENCE))


def open_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def falls_asleep(pid):
    """Find every thread of a process sleeping, many times in a row: one that goes round in its main loop never is.

    The guest has to be paused. Ref: proc(5), the state in /proc/PID/task/TID/stat.
    """
    in_a_row = 0

    def asleep():
        nonlocal in_a_row
        states = [each.joinpath("stat").read_text().rpartition(")")[2].split()[0] for each in tasks.iterdir()]
        in_a_row = in_a_row + 1 if set(states) == {"S"} else 0
        return in_a_row == ASLEEP_LOOKS

    tasks = Path(f"/proc/{pid}/task")
    return looks(asleep)


def go_round(vm, source, *, guest_answers):
    device = vm.plug(source)
    if guest_answers:
        device.wait_seen(30.0)
        device.unplug(30.0)
    else:  # nobody runs who could answer: a reset performs what was asked
        with contextlib.suppress(GuestSilentError):
            device.unplug(0.001)
        device.force()
    assert device.state == "absent"
    return device.steps


def rounds(lab, vm, kind, *, guest_answers):
    """Go many times round, and hold what is left against what may be."""
    board = lab.server("board", size="1M", vectors=2)
    source = board if kind == "doorbell" else lab.memory("frame", "1M")
    lab.peer("me", connect=board)
    files = open_files(vm.pid)
    steps = list(go_round(vm, source, guest_answers=guest_answers))  # what is made once is made now
    ours = open_files("self"), threading.active_count(), sorted(Path("/dev/shm").iterdir())
    for _ in range(ROUNDS):
        steps += go_round(vm, source, guest_answers=guest_answers)
    # QEMU closes some descriptors a moment after the unplug (RCU).
    assert looks(lambda: open_files(vm.pid) == files + vm.guards), (open_files(vm.pid), files, vm.guards)
    assert (open_files("self"), threading.active_count(), sorted(Path("/dev/shm").iterdir())) == ours
    assert bool(vm.guards) == (vm.emulator == "qemu" and kind == "doorbell")
    assert vm.devices == []
    assert len(board.peers) == 1
    if guest_answers:
        vm.execute("stop")
    assert falls_asleep(vm.pid)
    what = f"{vm.emulator} {vm.process.machine.machine}, {vm.definition.guest} guest, {kind}"
    print(f"\n{ROUNDS} rounds, {what}: {files} files and {vm.guards} guards; the slowest steps:")
    for step in heapq.nlargest(3, steps, key=lambda step: step.took_s):
        print(f"  {1e3 * step.took_s:8.1f} ms  {step.state}: {re.sub(r'[0-9]+', 'N', step.what)}")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["doorbell", "plain"])
@pytest.mark.parametrize(
    ("emulator", "machine"),
    [
        ("unicorn", "pc"),
        ("unicorn", "q35"),
        pytest.param("qemu", "pc", marks=pytest.mark.qemu),
        pytest.param("qemu", "q35", marks=pytest.mark.qemu),
    ],
)
def test_rounds_leave_nothing_but_the_guards(emulator, machine, kind):
    with Lab() as lab:
        vm = lab.vm("alice", "probe", {"watch": 1}, emulator=emulator, machine=machine)
        vm.start()
        vm.wait_text("probe: watching", 30.0)
        if machine == "q35":  # the guest answers on a pc only
            vm.execute("stop")
        rounds(lab, vm, kind, guest_answers=machine == "pc")


@pytest.mark.timeout(1800)
@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["doorbell", "plain"])
@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_rounds_with_a_linux_guest_that_runs(machine, kind):
    with Lab() as lab:
        vm = lab.vm("alice", LinuxGuest(machine=machine), emulator="qemu")
        vm.start()
        assert vm.run(["ivshmem-tool", "info"], check=True).stdout == '{"devices": []}\n'
        rounds(lab, vm, kind, guest_answers=True)
        vm.resume()
        assert vm.run(["ivshmem-tool", "info"], check=True).stdout == '{"devices": []}\n'
        device = vm.plug(lab["board"])
        device.wait_seen(30.0)
        assert '"kind": "ivshmem-doorbell", "vectors": 2' in vm.run(["ivshmem-tool", "info"], check=True).stdout
