"""Many rounds of hot-plug and unplug on one machine: real QEMU lives, idles and leaks nothing but the guards.

``IVSHMEM_LAB_HOTPLUG_ROUNDS=200 pytest -s tests/lab/test_lab_hotplug_rounds.py`` is the long run; the slowest steps are
printed.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import statistics
import time
from pathlib import Path

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.errors import GuestSilentError

ROUNDS = int(os.environ.get("IVSHMEM_LAB_HOTPLUG_ROUNDS", "10"))
TRIPS = 50
SETTLE_S = 5.0
BATCHES = 4
BUSY_RATIO = 3
"""One that spins took 7 times as much (measured without the guards); a quiet one takes as much as one like it."""


def settled_files(vm, wanted):
    """Count the machine's descriptors; QEMU closes some a moment after the unplug (RCU)."""
    deadline = time.monotonic() + SETTLE_S
    while (count := open_files(vm.pid)) != wanted and time.monotonic() < deadline:
        vm.execute("query-status")
    return count


def open_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def cpu_ns(pid):
    """CPU time of all threads of a process (proc(5), schedstat)."""
    return sum(int(task.joinpath("schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def cpu_per_trip_ns(vm):
    """CPU time that a paused machine takes for a QMP command; one that spins takes all there is between them."""
    before = cpu_ns(vm.pid)
    for _ in range(TRIPS):
        vm.execute("query-status")
    return (cpu_ns(vm.pid) - before) / TRIPS


def go_round(vm, source, *, guest_answers):
    device = vm.plug(source)
    if guest_answers:
        device.wait_seen()
        device.unplug()
    else:  # nobody runs who could answer: a reset performs what was asked
        with contextlib.suppress(GuestSilentError):
            device.unplug(0.001)
        device.force()
    assert device.state == "absent"
    return device.steps


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
        board = lab.server("board", size="1M", vectors=2)
        source = board if kind == "doorbell" else lab.memory("frame", "1M")
        lab.peer("me", connect=board)
        vm = lab.vm("alice", "probe", {"watch": 1}, emulator=emulator, machine=machine)
        vm.start()
        vm.wait_text("probe: watching", 30.0)
        if machine == "q35":  # the guest answers on a pc only
            vm.execute("stop")
        files = open_files(vm.pid)
        steps = list(go_round(vm, source, guest_answers=machine == "pc"))  # what is made once is made now
        ours = open_files("self")
        for _ in range(ROUNDS):
            steps += go_round(vm, source, guest_answers=machine == "pc")
        assert settled_files(vm, files + vm.guards) == files + vm.guards
        assert open_files("self") == ours
        assert bool(vm.guards) == (emulator == "qemu" and kind == "doorbell")
        assert vm.devices == []
        assert len(board.peers) == 1
        if machine == "pc":
            vm.execute("stop")
        unused = lab.vm("unused", "probe", emulator=emulator, machine=machine)
        unused.start()
        unused.wait_text("probe: done", 30.0)
        unused.execute("stop")
        used, normal = zip(*((cpu_per_trip_ns(vm), cpu_per_trip_ns(unused)) for _ in range(BATCHES)), strict=True)
        assert min(used) < BUSY_RATIO * statistics.median(normal)
        print(f"\n{ROUNDS} rounds, {emulator} {machine}, {kind}: {vm.guards} guards; the slowest steps:")
        for step in heapq.nlargest(3, steps, key=lambda step: step.took_s):
            print(f"  {1e3 * step.took_s:8.1f} ms  {step.state}: {re.sub(r'[0-9]+', 'N', step.what)}")
