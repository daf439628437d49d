from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import pytest

from ivshmem_lab.errors import QmpCommandError, UsageError, VmError, VmStartError
from ivshmem_lab.guests import guest_path
from ivshmem_lab.vm.command import Connection, Machine
from ivshmem_lab.vm.qemu import Emulator, find_emulator
from ivshmem_lab.vm.state import VmState
from ivshmem_lab.vm.text import VmTimeoutError
from ivshmem_lab.vm.vm import Vm

PROBE = str(guest_path("probe"))


@pytest.fixture(params=["unicorn", pytest.param("qemu", marks=pytest.mark.qemu)])
def emulator(request):
    return find_emulator(request.param)


def with_vm(emulator, test, *, launch=True, **parts):
    async def run():
        asyncio.get_running_loop().set_exception_handler(complain)
        vm = Vm(Machine("x", **{"kernel": PROBE, **parts}), emulator)
        try:
            if launch:
                await vm.launch()
            return await test(vm)
        finally:
            await vm.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    def complain(_loop, context):
        complaints.append(context)

    complaints = []
    result = asyncio.run(run())
    assert complaints == []
    return result


GREET = r"""
monitor.send(b'{"QMP": {"version": {}, "capabilities": []}}\n')
monitor.recv(4096)
monitor.send(b'{"return": {}}\n')
monitor.send(json.dumps({"return": {}, "id": json.loads(monitor.recv(4096))["id"]}).encode() + b"\n")
"""


def fake(tmp_path, script):
    """Make an emulator that has the monitor's socket as `monitor`, out of a Python script."""
    find = "next(int(word.rpartition('=')[2]) for word in sys.argv if word.startswith('socket,id=qmp,fd='))"
    prelude = f"import json, os, signal, socket, sys\nmonitor = socket.socket(fileno={find})\n"
    (tmp_path / "fake.py").write_text(prelude + script)
    return Emulator("fake", (sys.executable, "-I", "-S", str(tmp_path / "fake.py")), "1.0")


def test_it_starts_paused_runs_stops_and_ends(emulator):
    async def test(vm):
        assert vm.state == "paused"
        assert vm.console_text == ""
        assert (await vm.execute("query-status"))["running"] is False
        await vm.cont()
        assert vm.state is VmState.RUNNING
        await vm.wait_text("\n", 30.0)
        await vm.stop()
        assert vm.state is VmState.PAUSED
        pid = vm.pid
        assert os.getsid(pid) == pid
        await vm.close()
        assert (vm.state, vm.pid, vm.exit_status) == ("stopped", None, 0)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    with_vm(emulator, test)


def test_the_state_follows_a_cont_and_stop_sent_as_plain_commands(emulator):
    async def test(vm):
        await vm.execute("cont")
        assert vm.state is VmState.RUNNING
        await vm.execute("stop")
        assert vm.state is VmState.PAUSED

    with_vm(emulator, test)


def test_close_may_be_called_twice_at_once_and_again(emulator):
    async def test(vm):
        await asyncio.gather(vm.close(), vm.close())
        await vm.close()
        assert vm.state is VmState.STOPPED
        with pytest.raises(VmError, match=r"query-status: x does not answer; it is stopped: exit status 0"):
            await vm.execute("query-status")
        with pytest.raises(VmError, match="x is stopped and cannot be started again"):
            await vm.launch()

    with_vm(emulator, test)


def test_a_refused_command_names_the_class_and_the_words_of_the_machine(emulator):
    async def test(vm):
        with pytest.raises(QmpCommandError) as caught:
            await vm.execute("device_del", id="nosuch")
        assert (caught.value.command, caught.value.qmp_class) == ("device_del", "DeviceNotFound")
        assert "nosuch" in caught.value.desc
        with pytest.raises(QmpCommandError) as caught:
            await vm.execute("make-coffee")
        assert caught.value.qmp_class == "CommandNotFound"

    with_vm(emulator, test)


def test_an_argument_that_is_no_json_costs_nothing(emulator):
    async def test(vm):
        with pytest.raises(UsageError, match="device_add: an argument cannot be written as JSON"):
            await vm.execute("device_add", driver=object())
        await vm.execute("query-status")

    with_vm(emulator, test)


def test_a_machine_killed_from_outside_is_failed_and_says_why(emulator):
    async def test(vm):
        await vm.cont()
        os.kill(vm.pid, signal.SIGKILL)
        with pytest.raises(VmError, match="query-status: x does not answer; it is failed: killed by SIGKILL"):
            await vm.execute("query-status")
        assert await vm.wait_end(20.0)
        assert (vm.state, vm.exit_status) == ("failed", -signal.SIGKILL)
        assert vm.reason.startswith("killed by SIGKILL")

    with_vm(emulator, test)


@pytest.mark.parametrize("value", [0, 3])
def test_a_guest_that_writes_to_the_debug_exit_port_stops_the_machine(emulator, tmp_path, value):
    async def test(vm):
        await vm.cont()
        assert await vm.wait_end(30.0)
        assert (vm.state, vm.exit_status) == ("stopped", value << 1 | 1)
        assert f"the guest wrote {value} to the debug exit port" in vm.reason

    guest = tmp_path / "exit.elf"
    guest.write_bytes(
        multiboot_elf(bytes([0xB8, value, 0, 0, 0, 0xE7, 0xF4, 0xFA, 0xF4]))
    )  # mov eax; out 0xf4; cli; hlt
    with_vm(emulator, test, kernel=str(guest))


def multiboot_elf(code):
    """Make the smallest 32-bit ELF that a multiboot loader takes: one segment at 1 MiB."""

    def words(*values):
        return b"".join(value.to_bytes(4, "little") for value in values)

    header_bytes, load = 52 + 32, 0x100000
    multiboot = words(0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
    image = multiboot + code
    ident = b"\x7fELF\x01\x01\x01" + bytes(9)
    header = ident + b"\x02\x00\x03\x00" + words(1, load + len(multiboot), 52, 0, 0)
    header += b"".join(half.to_bytes(2, "little") for half in (52, 32, 1, 0, 0, 0))
    size = header_bytes + len(image)
    segment = words(1, 0, load - header_bytes, load - header_bytes, size, size, 7, 4)
    return header + segment + image


def test_a_kernel_that_is_not_there_is_told_in_the_machines_words(emulator, tmp_path):
    missing = str(tmp_path / "missing.elf")

    async def test(vm):
        with pytest.raises(
            VmStartError, match=r"x \(\w+ [\d.]+\) ended before it was ready: exit status [12]\n"
        ) as caught:
            await vm.launch()
        it_said = str(caught.value).split("it said: ")[1].split("its command: ")[0]
        assert missing in it_said
        assert "-accel tcg" in str(caught.value).split("its command: ")[1]
        assert (vm.state, vm.pid) == ("failed", None)
        with pytest.raises(VmError, match="cannot be started again"):
            await vm.launch()

    with_vm(emulator, test, launch=False, kernel=missing)


def test_a_server_that_is_not_there_fails_the_start(emulator, tmp_path):
    async def test(vm):
        with pytest.raises(VmStartError, match=r"nobody\.sock"):
            await vm.launch()

    with_vm(emulator, test, launch=False, connections=(Connection(str(tmp_path / "nobody.sock"), 1),))


@pytest.mark.qemu
def test_qemu_that_hangs_in_its_device_because_the_server_says_nothing_is_given_up(tmp_path):
    async def test(vm):
        with pytest.raises(VmStartError, match=r"gave no answer in 0.5 s and was killed"):
            await vm.launch(timeout_s=0.5)
        assert vm.exit_status == -signal.SIGKILL

    path = str(tmp_path / "mute.sock")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(path)
        mute.listen()
        with_vm(find_emulator("qemu"), test, launch=False, connections=(Connection(path, 1),))


def test_a_cancelled_start_leaves_nothing(emulator):
    async def test(vm):
        starting = asyncio.create_task(vm.launch())
        await asyncio.sleep(0)  # the process is made before launch() first waits
        assert vm.pid
        pid = vm.pid
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert vm.state is VmState.FAILED
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    with_vm(emulator, test, launch=False)


def test_closing_in_the_middle_of_the_start_ends_both(emulator):
    async def test(vm):
        starting = asyncio.create_task(vm.launch())
        await asyncio.sleep(0)  # the process is made before launch() first waits
        assert vm.pid
        await vm.close()
        with pytest.raises(VmStartError, match="was closed before it was ready"):
            await starting

    with_vm(emulator, test, launch=False)


def test_closing_what_was_never_started_starts_nothing(emulator):
    async def test(vm):
        with pytest.raises(VmError, match="cont: x has not been started"):
            await vm.cont()
        with pytest.raises(VmError, match="x has written nothing: it is defined"):
            await vm.wait_text("x")
        await vm.close()
        assert (vm.state, vm.argv) == ("stopped", ())

    with_vm(emulator, test, launch=False)


def test_an_emulator_that_is_gone_by_now_fails_the_start(tmp_path):
    async def test(vm):
        with pytest.raises(VmStartError, match="gone"):
            await vm.launch()

    with_vm(Emulator("fake", (str(tmp_path / "gone"),), "1.0"), test, launch=False)


def test_a_guest_that_has_ended_before_cont_is_answered_has_run(tmp_path):
    script = f"{GREET}\nmonitor.recv(4096)\nsys.exit(5)"

    async def test(vm):
        await vm.cont()
        assert (vm.state, vm.exit_status) == ("stopped", 5)
        with pytest.raises(VmError, match="cont: x does not answer; it is stopped"):
            await vm.cont()

    with_vm(fake(tmp_path, script), test)


def test_a_program_that_speaks_no_qmp_fails_the_start(tmp_path):
    async def test(vm):
        with pytest.raises(VmStartError, match="ended before it was ready: killed by SIGKILL"):
            await vm.launch()

    with_vm(fake(tmp_path, "monitor.send(b'hello\\n'); signal.pause()"), test, launch=False)


def test_a_machine_that_answers_nothing_any_more_is_still_closed(tmp_path):
    script = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{GREET}\nsignal.pause()"

    async def test(vm):
        with pytest.raises(VmTimeoutError, match=r"query-pci: x gave no answer in 0.05 s"):
            await vm.execute("query-pci", timeout_s=0.05)
        await vm.close()
        assert (vm.state, vm.exit_status) == ("stopped", -signal.SIGKILL)

    with_vm(fake(tmp_path, script), test)
