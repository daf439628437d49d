"""Why a machine stopped that nobody had stopped: real QEMU with a panic device, which the monitor's port access rings."""

from __future__ import annotations

import asyncio

import pytest
from test_vm_life import multiboot_elf

from ivshmem_lab import Lab
from ivshmem_lab.errors import VmError, VmStartError
from ivshmem_lab.vm.command import Machine
from ivshmem_lab.vm.qemu import Emulator, find_emulator
from ivshmem_lab.vm.vm import Vm

PANIC = {"command-line": "o /1 0x505 1"}
"""A store of 1 to pvpanic's port (QEMU, docs/specs/pvpanic)."""


def with_panic_device(test):
    async def run():
        qemu = find_emulator("qemu")
        vm = Vm(Machine("x"), Emulator(qemu.kind, (*qemu.argv, "-device", "pvpanic"), qemu.version))
        try:
            await vm.launch()
            await vm.cont()
            await test(vm)
        finally:
            await vm.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


@pytest.mark.qemu
def test_a_guest_that_panics_ends_the_machine_and_the_reason_says_so():
    async def test(vm):
        await vm.execute("human-monitor-command", **PANIC)
        assert await vm.wait_end(20.0)
        assert (vm.state, vm.reason) == ("stopped", "the guest panicked, exit status 0")
        assert "GUEST_PANICKED" in [event.name for event in vm.events]

    with_panic_device(test)


@pytest.mark.qemu
def test_a_machine_that_pauses_unasked_says_why_until_it_goes_on():
    async def test(vm):
        await vm.execute("set-action", panic="pause")
        await vm.stop()
        await vm.execute("query-status")
        assert (vm.state, vm.reason) == ("paused", "")
        await vm.cont()
        await vm.execute("human-monitor-command", **PANIC)
        await vm.events.wait("STOP", 20.0, after=2)
        await vm.execute("query-status")  # after the one that asks why
        assert (vm.state, vm.reason) == ("paused", "guest-panicked")
        await vm.execute("system_reset")
        await vm.cont()
        assert (vm.state, vm.reason) == ("running", "")

    with_panic_device(test)


@pytest.mark.qemu
def test_a_linux_guest_that_panics_ends_and_says_so_with_the_kernel_s_words_on_its_console():
    with Lab() as lab:
        alice = lab.vm("alice", guest="linux", emulator="qemu")
        alice.start()
        alice.wait_ready()
        with pytest.raises(VmError, match="the guest panicked"):
            alice.run(["sh", "-c", "echo c > /proc/sysrq-trigger"], timeout_s=30.0)
        assert alice.wait_end(20.0)
        assert (alice.state, alice.reason) == ("stopped", "the guest panicked, exit status 0")
        assert "Kernel panic - not syncing" in alice.console.text()


def test_a_guest_that_ours_cannot_go_on_with_pauses_and_says_why(tmp_path):
    guest = tmp_path / "lost.elf"
    guest.write_bytes(multiboot_elf(bytes([0xB8, 0, 0, 0, 0xF0, 0xFF, 0xE0])))  # a jump to where no memory is

    async def run():
        vm = Vm(Machine("x", kernel=str(guest)), find_emulator("unicorn"))
        try:
            await vm.launch()
            await vm.cont()
            await vm.events.wait("STOP", 20.0)
            while not vm.reason:  # it is being asked for
                await vm.execute("query-status")
            assert (vm.state, vm.reason) == ("paused", "internal-error")
        finally:
            await vm.close()

    asyncio.run(run())


@pytest.mark.parametrize("emulator", ["unicorn", pytest.param("qemu", marks=pytest.mark.qemu)])
def test_an_option_that_is_refused_ends_the_start_with_the_emulator_s_words(emulator):
    async def run():
        found = find_emulator(emulator)
        vm = Vm(
            Machine("x"), Emulator(found.kind, (*found.argv, "-device", "nonsense"), found.version, found.environment)
        )
        with pytest.raises(VmStartError, match="'nonsense' is not a valid device model name"):
            await vm.launch()
        assert vm.state == "failed"

    asyncio.run(run())
