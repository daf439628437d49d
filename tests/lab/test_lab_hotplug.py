"""Devices plugged into running machines and out again, through the lab, on both emulators.

The guest ``probe`` with ``watch`` lets go of what it is asked for; without, it halts and answers nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import threading

import pytest
from bad_servers import INTRODUCTION, BadServer

from ivshmem_lab import Lab
from ivshmem_lab.errors import GuestSilentError, IvshmemLabError, LabError, QmpCommandError, UsageError, VmError
from ivshmem_lab.vm.text import VmTimeoutError

QEMU = pytest.param("qemu", marks=pytest.mark.qemu)


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.fixture(params=["unicorn", QEMU])
def emulator(request):
    return request.param


def start(lab, emulator, *, answers=True, name="alice", **parts):
    vm = lab.vm(name, "probe", {"watch": 1} if answers else None, emulator=emulator, **parts)
    vm.start()
    vm.wait_text("probe: watching" if answers else "probe: done", 30.0)
    return vm


def sources(lab):
    return {"doorbell": lab.server("board", size="1M", vectors=2), "plain": lab.memory("frame", "1M")}


def wait_absent(device):
    """Wait for what nobody asked for, or had given up waiting for."""
    gone = threading.Event()
    for _ in range(1000):
        if device.state == "absent":
            return
        gone.wait(0.01)
    pytest.fail(f"still there: {device!r}")


def alive_and_pluggable(vm, source):
    """The machine answers, and the next device comes and goes."""
    device = vm.plug(source)
    device.wait_seen()
    device.unplug()
    assert (vm.state, vm.devices, device.state) == ("running", [], "absent")


@pytest.mark.parametrize("kind", ["doorbell", "plain"])
def test_a_device_is_plugged_seen_and_let_go(lab, emulator, kind):
    source = sources(lab)[kind]
    vm = start(lab, emulator)
    told = []
    device = vm.plug(source, on_step=told.append)
    assert (device.state, device.place, vm.devices) == ("plugged", "pci.0 slot 0x02", [device])
    device.wait_seen()
    assert device.state == "seen"
    vm.wait_text("ivshmem 00:02.0")
    vm.wait_text("memory size 1048576")
    device.unplug()
    vm.wait_text("leave slot 02")
    assert (device.state, vm.devices, vm.state) == ("absent", [], "running")
    assert told == device.steps
    assert "DEVICE_DELETED" in [event.name for event in vm.events]
    if kind == "doorbell":
        assert source.peers == {}
    device.unplug()  # nothing happens
    assert len(device.steps) == len(told)


def test_every_step_has_the_qmp_that_was_said(lab, emulator):
    both = sources(lab)
    vm = start(lab, emulator)
    device = vm.plug(both["plain"], device_id="card", bus=7)
    device.unplug()
    path = both["plain"].path
    memory = {"qom-type": "memory-backend-file", "id": "card-memory", "mem-path": path, "size": 1 << 20, "share": True}
    place = {"bus": "pci.0", "addr": "0x07"}
    assert [step.command for step in device.steps if step.command] == [
        {"execute": "object-add", "arguments": memory},
        {
            "execute": "device_add",
            "arguments": {"driver": "ivshmem-plain", "memdev": "card-memory", "id": "card", **place},
        },
        {"execute": "device_del", "arguments": {"id": "card"}},
        {"execute": "object-del", "arguments": {"id": "card-memory"}},
    ]
    assert all(step.answer == {"return": {}} for step in device.steps if step.command)
    (deleted,) = [step for step in device.steps if step.state == "deleted" and not step.command]
    assert deleted.answer["event"] == "DEVICE_DELETED"
    assert deleted.answer["data"]["device"] == "card"

    device = vm.plug(both["doorbell"], device_id="bell", vectors=1)
    device.unplug()
    address = {"type": "unix", "data": {"path": both["doorbell"].path}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    commands = [step.command for step in device.steps if step.command]
    assert commands[0] == {"execute": "chardev-add", "arguments": {"id": "bell-chardev", "backend": backend}}
    assert commands[1]["arguments"]["driver"] == "ivshmem-doorbell"
    assert (commands[1]["arguments"]["chardev"], commands[1]["arguments"]["vectors"]) == ("bell-chardev", 1)
    assert commands[-1] == {"execute": "chardev-remove", "arguments": {"id": "bell-chardev"}}
    for command in commands:
        assert json.dumps(command) in repr(device)
    assert all(step.took_s >= 0 for step in device.steps)


def test_several_devices_come_and_go_in_any_order_and_know_their_peer_ids(lab, emulator):
    both = sources(lab)
    me = lab.peer("me", connect=both["doorbell"])
    vm = start(lab, emulator)
    devices = [vm.plug(both[kind]) for kind in ("doorbell", "plain", "doorbell")]
    assert [device.peer_id for device in devices] == [1, None, 2]
    assert [device.device_id for device in devices] == ["hot0", "hot1", "hot2"]
    assert [device.place for device in devices] == [f"pci.0 slot 0x0{slot}" for slot in (2, 3, 4)]
    for device in devices:
        device.wait_seen()
    devices[0].unplug()
    assert sorted(both["doorbell"].peers) == [me.peer_id, 2]
    again = vm.plug(both["doorbell"])
    assert (again.device_id, again.place, again.peer_id) == ("hot0", "pci.0 slot 0x02", 3)
    for device in (devices[2], devices[1], again):
        device.unplug()
    assert vm.devices == []
    assert list(both["doorbell"].peers) == [me.peer_id]


@pytest.mark.parametrize("kind", ["doorbell", "plain"])
def test_a_silent_guest_is_told_and_a_reset_takes_the_device(lab, emulator, kind):
    source = sources(lab)[kind]
    vm = start(lab, emulator, answers=False)
    device = vm.plug(source)
    with pytest.raises(GuestSilentError, match=r"has given hot0 no address in 0.05 s"):
        device.wait_seen(0.05)
    with pytest.raises(VmError, match=r"hot0 of alice is plugged; unplug\(\) it first"):
        device.force()
    with pytest.raises(GuestSilentError, match=r"alice \(running\) has not let hot0 go in 0.05 s; wait with unplug"):
        device.unplug(0.05)
    assert (device.state, vm.devices) == ("unplugging", [device])
    with pytest.raises(GuestSilentError):
        device.unplug(0.05)
    device.force()
    assert (device.state, vm.devices, vm.state) == ("absent", [], "running")
    assert [step.command["execute"] for step in device.steps if step.command].count("device_del") == 1


@pytest.mark.parametrize("kind", ["doorbell", "plain"])
def test_a_device_given_up_goes_when_the_guest_lets_it_go_later(lab, emulator, kind):
    source = sources(lab)[kind]
    vm = start(lab, emulator)
    device = vm.plug(source)
    device.wait_seen()
    vm.execute("stop")
    with pytest.raises(GuestSilentError, match=r"alice \(paused\)"):
        device.unplug(0.05)
    device.give_up()
    assert device.state == "seen"
    if kind == "doorbell":  # whom it hears of while nobody waits costs it eventfds, too
        lab.peer("late", connect=source)
    vm.execute("cont")
    wait_absent(device)
    assert device.steps[-1].error == ""
    alive_and_pluggable(vm, source)


@contextlib.contextmanager
def probed(vm, slot):
    """Wait at the end of the block until the guest leaves the newcomer alone.

    It has addresses before that, and QEMU 7.2 dies when its slot is powered off while the guest writes its MSI-X table:
    "msix_table_mmio_write: Assertion `addr + size <= dev->msix_entries_nr * PCI_MSIX_ENTRY_SIZE' failed".
    """
    said, done = [], threading.Event()

    def hear(piece):
        said.append(piece)
        if "probe: done" in "".join(said).partition(f"came slot {slot:02x}")[2]:
            done.set()

    stop = vm.console.subscribe(hear)
    yield
    assert done.wait(20.0), "".join(said)
    stop()


@pytest.mark.qemu
def test_a_guest_that_powers_its_slot_off_is_followed_and_guarded(lab):
    """The guest's store to the eject port (QEMU, docs/specs/acpi_pci_hotplug) is made by the monitor here."""
    both = sources(lab)
    lab.peer("me", connect=both["doorbell"])
    vm = start(lab, "qemu")
    for kind, slot, guards in (("doorbell", 9, 4), ("plain", 10, 0)):
        with probed(vm, slot):
            device = vm.plug(both[kind], bus=slot)
            device.wait_seen()
        before = vm.guards
        vm.execute("human-monitor-command", **{"command-line": f"o /4 0xae08 {1 << slot:#x}"})
        wait_absent(device)
        assert "device_del" not in [step.command["execute"] for step in device.steps if step.command]
        assert device.steps[-1].error == ""
        assert vm.guards - before >= guards
    assert len(both["doorbell"].peers) == 1
    alive_and_pluggable(vm, both["doorbell"])


def test_a_device_asked_for_behind_our_back_is_followed_through(lab, emulator):
    both = sources(lab)
    vm = start(lab, emulator, answers=False)
    devices = [vm.plug(both["doorbell"]), vm.plug(both["plain"])]
    for device in devices:  # the lab learns of it by the event alone
        vm.execute("device_del", id=device.device_id)
    vm.execute("system_reset")
    for device in devices:
        wait_absent(device)
        assert device.steps[-1].error == ""
    assert (vm.devices, both["doorbell"].peers) == ([], {})
    assert vm.plug(both["doorbell"]).place == "pci.0 slot 0x02"


REFUSED = {
    "a property that there is not": ({"nonsense": "1"}, "not found", ""),
    "another slot than the chosen one": ({"addr": "0x01"}, "slot 1 function 0 not available", ""),
    "no such slot": ({"addr": "0x40"}, "doesn't take value '0x40'", ""),
    "the legacy driver": ({"driver": "ivshmem"}, "'ivshmem' is not a valid device model name", "ivshmem-plain"),
}


@pytest.mark.parametrize("kind", ["doorbell", "plain"])
def test_what_the_machine_refuses_is_taken_back_and_the_next_plug_works(lab, emulator, kind):
    source = sources(lab)[kind]
    vm = start(lab, emulator)
    cases = dict(REFUSED)
    if emulator == "unicorn":
        del cases["the legacy driver"]  # ours has it
    if kind == "doorbell":
        lab.peer("first", connect=source)
        cases["a master that came late"] = ({"master": True}, "master must connect to the server before", "id 0")
        cases["a chardev of nobody"] = ({"chardev": "nope"}, "can't find value 'nope'", "")
    else:
        cases["a memory of nobody"] = ({"memdev": "nope"}, "Device 'nope' not found", "")
    for case, (properties, words, hint) in cases.items():
        with pytest.raises(QmpCommandError) as caught:
            vm.plug(source, **properties)
        assert words in caught.value.desc, case
        assert hint in caught.value.hint, case
        assert vm.devices == [], case
    # Their names are free: what had been made for the refused ones is gone.
    vm.execute("object-add", **{"qom-type": "memory-backend-ram", "id": "hot0-memory", "size": 1 << 20})
    vm.execute("object-del", id="hot0-memory")
    if kind == "doorbell":
        assert len(source.peers) == 1
    alive_and_pluggable(vm, source)


def test_what_can_be_known_before_is_refused_before_the_machine_hears_of_it(lab, emulator, tmp_path):
    both = sources(lab)
    vm = start(lab, emulator)
    kept = vm.plug(both["plain"], device_id="card")
    shut, forgotten = lab.server("shut", size="1M"), lab.memory("forgotten", "1M")
    shut.close()
    forgotten.close()
    with Lab() as other:
        foreign = other.server("foreign", size="1M")
        cases = [
            (both["doorbell"], {"vectors": 0}, UsageError, "vectors 0 is not allowed: 1 to 2048"),
            (both["doorbell"], {"vectors": 2049}, UsageError, "vectors 2049 is not allowed"),
            (both["plain"], {"vectors": 1}, UsageError, "a memory has no interrupts"),
            (both["plain"], {"device_id": "card"}, UsageError, "alice has a device 'card' already"),
            (both["plain"], {"bus": 2}, UsageError, "pci.0 slot 0x02 of alice is taken"),
            (both["plain"], {"bus": "nobus"}, UsageError, "alice has no place 'nobus' for a device"),
            (shut, {}, LabError, "server shut does not listen; make a new one"),
            (forgotten, {}, UsageError, "the memory 'forgotten' is closed"),
            (foreign, {}, UsageError, "belongs to another lab"),
            (42, {}, UsageError, "42 cannot be plugged"),
            (str(tmp_path / "none.sock"), {}, IvshmemLabError, "none.sock"),
        ]
        for source, how, kind, words in cases:
            with pytest.raises(kind, match=words):
                vm.plug(source, **how)
            assert vm.devices == [kept]
        device = vm.plug(foreign.path)  # as any program's server
        assert (device.peer_id, len(foreign.peers)) == (None, 1)
        device.unplug()
        assert foreign.peers == {}
    kept.unplug()
    alive_and_pluggable(vm, both["doorbell"])


def test_a_machine_that_does_not_run_takes_nothing(lab, emulator):
    frame = lab.memory("frame", "1M")
    vm = lab.vm("alice", "probe", emulator=emulator)
    with pytest.raises(VmError, match="alice is defined; start it before plugging devices in"):
        vm.plug(frame)
    vm.start()
    device = vm.plug(frame)
    vm.execute("quit")
    vm.wait_end()
    assert (device.state, vm.devices) == ("absent", [])
    device.unplug()
    with pytest.raises(VmError, match="alice is stopped"):
        vm.plug(frame)


def test_a_server_that_hangs_up_in_the_handshake_is_refused_before_the_machine_joins(lab, emulator, tmp_path):
    frame = lab.memory("frame", "1M")
    vm = start(lab, emulator)
    for messages in (0, 1, 2):
        server = BadServer(tmp_path / f"s{messages}", messages=INTRODUCTION[:messages])
        with server, pytest.raises(IvshmemLabError):
            vm.plug(server.path)
        assert vm.devices == []
    alive_and_pluggable(vm, frame)


def test_a_server_whose_memory_would_kill_the_machine_is_refused(lab, emulator, tmp_path):
    vm = start(lab, emulator)
    with BadServer(tmp_path / "s", 3 << 20, good=1) as server, pytest.raises(IvshmemLabError, match="power of two"):
        vm.plug(server.path)
    alive_and_pluggable(vm, lab.memory("frame", "1M"))


@pytest.mark.parametrize("state", ["connected", "unplugging"])
@pytest.mark.parametrize("kind", ["doorbell", "plain"])
def test_a_machine_that_dies_meanwhile_is_told_and_leaves_nothing(lab, emulator, kind, state):
    source = sources(lab)[kind]
    vm = start(lab, emulator, answers=False)

    def kill(step):
        if step.state == state and vm.pid:
            os.kill(vm.pid, signal.SIGKILL)

    def come_and_go():
        vm.plug(source, on_step=kill).unplug(2.0)

    with pytest.raises(VmError, match="killed by SIGKILL") as caught:
        come_and_go()
    assert not isinstance(caught.value, GuestSilentError | VmTimeoutError)
    assert (vm.devices, vm.state) == ([], "failed")
    if kind == "doorbell":
        me = lab.peer("me", connect=source)
        me.close()
    alive_and_pluggable(start(lab, emulator, name="bob"), source)


def test_a_pc_takes_thirty_devices_and_says_when_it_is_full(lab, emulator):
    frame = lab.memory("frame", "4K")
    vm = start(lab, emulator, answers=False)
    devices = [vm.plug(frame) for _ in range(30)]
    assert [device.place for device in devices] == [f"pci.0 slot {slot:#04x}" for slot in range(2, 32)]
    with pytest.raises(VmError, match=r"alice has no free place for a device \(30 are there, all taken\)"):
        vm.plug(frame)
    assert vm.devices == devices
    with pytest.raises(GuestSilentError):
        devices[4].unplug(0.05)
    devices[4].force()
    assert vm.plug(frame).place == "pci.0 slot 0x06"


def test_a_q35_takes_one_device_for_each_root_port(lab, emulator):
    both = sources(lab)
    vm = start(lab, emulator, answers=False, machine="q35", root_ports=3)
    first = vm.plug(both["plain"], bus="rp1")
    second = vm.plug(both["doorbell"])
    third = vm.plug(both["plain"])
    assert [device.place for device in (first, second, third)] == [f"rp{port} slot 0x00" for port in (1, 0, 2)]
    with pytest.raises(UsageError, match="rp1 slot 0x00 of alice is taken"):
        vm.plug(both["plain"], bus="rp1")
    with pytest.raises(VmError, match=r"\(3 are there, all taken\)"):
        vm.plug(both["plain"])
    vm.execute("stop")
    with pytest.raises(
        GuestSilentError, match="bare-metal guests do on machine='pc' only, Linux guests on every machine"
    ):
        first.wait_seen(0.05)
    for device in (first, second, third):
        with pytest.raises(GuestSilentError):
            device.unplug(0.05)
    second.force()
    for device in (first, third):
        wait_absent(device)
    assert vm.devices == []


def test_a_q35_without_root_ports_says_what_to_define(lab, emulator):
    vm = start(lab, emulator, answers=False, machine="q35", root_ports=0)
    with pytest.raises(VmError, match="define a q35 VM with root_ports=4"):
        vm.plug(lab.memory("frame", "1M"))


def test_unplugging_what_the_guest_is_just_letting_go_waits_for_the_end(lab, emulator):
    vm = start(lab, emulator)
    board = lab.server("board", size="1M", vectors=2)
    met = threading.Event()
    for _ in range(5):
        device = vm.plug(board)
        device.wait_seen()
        vm.pause()
        with pytest.raises(GuestSilentError):
            device.unplug(0.05)
        met.clear()
        device.listen(lambda step: met.set() if step.state == "deleted" else None)
        vm.resume()
        assert met.wait(30.0)
        device.unplug()  # it is deleted, guarded, or gone by now
        assert device.state == "absent"


@pytest.mark.qemu
def test_a_warning_comes_before_the_guards_of_unplugged_devices_use_up_the_machine_s_files(lab, caplog):
    both = sources(lab)
    vm = start(lab, "qemu")
    for _ in range(14):
        vm.plug(both["doorbell"]).unplug()
    assert vm.guards
    used = len(os.listdir(f"/proc/{vm.pid}/fd"))  # noqa: PTH208
    resource.prlimit(vm.pid, resource.RLIMIT_NOFILE, (2 * used, 2 * used))
    vm.plug(both["doorbell"]).unplug()
    assert caplog.records == []
    used = len(os.listdir(f"/proc/{vm.pid}/fd"))  # noqa: PTH208
    resource.prlimit(vm.pid, resource.RLIMIT_NOFILE, (used + 9, used + 9))
    vm.plug(both["doorbell"])
    (record,) = caplog.records
    assert f"alice has {used} of at most {used + 9} files open, {vm.guards} of them guards" in record.getMessage()
    assert "restart it before it runs out" in record.getMessage()
