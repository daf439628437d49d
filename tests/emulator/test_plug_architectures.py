"""`ivshmem_lab.plug` on every architecture, with the guests and scripts of docs/plug."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from unicorn import (
    UC_ARCH_ARM,
    UC_ARCH_ARM64,
    UC_ARCH_MIPS,
    UC_ARCH_RISCV,
    UC_ARCH_X86,
    UC_MODE_32,
    UC_MODE_64,
    UC_MODE_ARM,
    UC_MODE_LITTLE_ENDIAN,
    UC_MODE_MIPS32,
    UC_MODE_RISCV64,
    UC_MODE_THUMB,
    Uc,
)
from unicorn.arm64_const import UC_ARM64_REG_PC, UC_ARM64_REG_PSTATE, UC_ARM64_REG_X1
from unicorn.arm_const import UC_ARM_REG_R0, UC_ARM_REG_R1, UC_ARM_REG_R3
from unicorn.mips_const import UC_MIPS_REG_T0, UC_MIPS_REG_T1, UC_MIPS_REG_T2

import ivshmem_lab
from ivshmem_lab.errors import DeviceError, UsageError
from ivshmem_lab.peer.peer import Peer

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "plug"
GUESTS = {
    "x86_32": (UC_ARCH_X86, UC_MODE_32, {}),
    "x86_64": (UC_ARCH_X86, UC_MODE_64, {}),
    "arm64": (UC_ARCH_ARM64, UC_MODE_ARM, {"ecam": 0x3F000000}),
    "riscv64": (UC_ARCH_RISCV, UC_MODE_RISCV64, {"ecam": 0x30000000}),
}
ENTRY = 0x10000
COUNT, LAST, ANSWER, ROUNDS, WORK, CHECK = 0, 1, 2, 3, 4, 6
"""Words of the shared memory; docs/plug/layout.inc."""

WFI_ARM64 = 0xD503207F


def engine(name: str) -> Uc:
    arch, mode, _ = GUESTS[name]
    uc = Uc(arch, mode)
    uc.mem_map(0, 1 << 20)
    uc.mem_write(ENTRY, (EXAMPLES / f"{name}.bin").read_bytes())
    return uc


def plug(uc: Uc, name: str, **arguments):
    return ivshmem_lab.plug(uc, **{**GUESTS[name][2], **arguments})


def arm64(*instructions: int) -> Uc:
    uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
    uc.mem_map(0, 1 << 20)
    uc.mem_write(ENTRY, struct.pack(f"<{len(instructions)}I", *instructions))
    return uc


# -- the examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GUESTS)
def test_example_script_runs(name):
    run = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ,
    )
    assert run.returncode == 0, run.stderr
    number = 64 if name.startswith("x86") else 33
    assert f"100 interrupts taken and answered, the last one with number {number}" in run.stdout


def test_prebuilt_guests_of_the_examples_belong_to_their_sources():
    spec = importlib.util.spec_from_file_location("plug_build", EXAMPLES / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert set(build.TOOLS) == set(GUESTS)
    assert build.differences() == []


# -- interrupts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("native", "rounds"), [(None, 5000), (False, 500)])
@pytest.mark.parametrize("name", GUESTS)
def test_every_interrupt_of_a_working_guest_is_taken_and_no_instruction_doubled(name, native, rounds, server):
    with Peer.connect(server) as me:
        words = me.memory.view("<u4")
        words[ANSWER], words[ROUNDS] = me.peer_id, rounds
        uc = engine(name)
        with plug(uc, name, server=server, native_hook=native) as device:
            me.wait_for_peer(device.peer_id, 5)
            answers = []

            def ring() -> None:
                me.wait(0, 10)
                for _ in range(rounds):
                    me.ring(device.peer_id, 0)
                    answers.append(me.wait(0, 10))

            ringer = threading.Thread(target=ring)
            ringer.start()
            uc.emu_start(ENTRY, -1)
            ringer.join()
            assert answers == [1] * rounds
            assert words[COUNT] == rounds
            counts = me.memory[:32].view("<u8")
            assert counts[WORK // 2] == counts[CHECK // 2] > 0


@pytest.mark.parametrize("name", ["arm64", "riscv64"])
def test_masked_interrupt_wakes_a_guest_that_waits_and_stays_pending(name, server):
    # A guest that only waits: interrupts are masked after reset; RISC-V enables its line in mie.
    wait_here = {"arm64": [WFI_ARM64], "riscv64": [0x000010B7, 0x8000809B, 0x30409073, 0x10500073]}[name]
    with Peer.connect(server) as me:
        uc = engine(name)
        uc.mem_write(ENTRY, struct.pack(f"<{len(wait_here)}I", *wait_here))
        properties = {"x-bus-address-iomem": 0x50000000, "x-bus-address-shmem": 0x51000000}
        with ivshmem_lab.plug(uc, server=server, flat=properties, irq=5) as device:
            me.wait_for_peer(device.peer_id, 5)
            if name == "arm64":
                uc.reg_write(UC_ARM64_REG_PSTATE, 0x3C5)
            uc.emu_start(ENTRY, -1)
            assert device.wait(0) is None
            me.ring(device.peer_id, 1)
            assert device.wait(5) == ENTRY + 4 * len(wait_here)
            assert device._open().board.page.read(4, 4) == 5
            assert device._open().board.page.read(4, 4) == 1023


def test_handler_that_claims_nothing_is_entered_again(server):
    # vectors: read nothing, count in x1, eret; main: enable IRQs, then loop until x1 is 3, wfi
    main = [0xD50342FF, 0xF1000C3F, 0x54FFFFE3, WFI_ARM64]  # msr daifclr,#2; cmp x1,#3; b.lo -4; wfi
    handler = [0x91000421, 0xD69F03E0]  # add x1,x1,#1; eret
    with Peer.connect(server) as me:
        uc = arm64(*main)
        uc.mem_write(0x280, struct.pack("<2I", *handler))  # VBAR_EL1 is 0 after reset
        uc.reg_write(UC_ARM64_REG_X1, 0)
        with ivshmem_lab.plug(uc, server=server, flat={}) as device:
            me.wait_for_peer(device.peer_id, 5)
            me.ring(device.peer_id, 0)
            uc.emu_start(ENTRY, -1)
            assert uc.reg_read(UC_ARM64_REG_X1) >= 3


# -- flat, and other architectures -------------------------------------------------------------------------------------


def test_flat_device_of_a_thumb_guest_tells_of_its_interrupts(server):
    registers, memory = 0x40001000, 0x60000000
    taken = []
    with Peer.connect(server) as me:
        uc = Uc(UC_ARCH_ARM, UC_MODE_THUMB)
        uc.mem_map(0, 1 << 20)
        # ldr r2,[r0,#8]; str r2,[r1]; str r3,[r0,#12]; wfi
        uc.mem_write(ENTRY, struct.pack("<4H", 0x6882, 0x600A, 0x60C3, 0xBF30))
        properties = {"x-bus-address-iomem": hex(registers), "x-bus-address-shmem": memory}
        with ivshmem_lab.plug(uc, server=server, flat=properties, irq=17, on_interrupt=taken.append) as device:
            assert device.addresses == {"registers": registers, "memory": memory}
            assert "flat" in repr(device)
            me.wait_for_peer(device.peer_id, 5)
            uc.reg_write(UC_ARM_REG_R0, registers)
            uc.reg_write(UC_ARM_REG_R1, memory)
            uc.reg_write(UC_ARM_REG_R3, me.peer_id << 16 | 1)
            uc.emu_start(ENTRY | 1, -1)
            assert me.memory[0] == device.peer_id
            assert me.wait(1, 5) == 1
            assert device.wait(0) is None
            for vector in (0, 1, 1):
                me.ring(device.peer_id, vector)
                assert device.wait(5) == ENTRY + 8 | 1
            assert taken == [17, 17, 17]


def test_guest_of_any_architecture_reaches_a_device_behind_ecam(server):
    uc = Uc(UC_ARCH_MIPS, UC_MODE_MIPS32 | UC_MODE_LITTLE_ENDIAN)
    uc.mem_map(0, 1 << 20)
    uc.mem_write(ENTRY, struct.pack("<4I", 0x8D090000, 0x8D0A0018, 0, 0))  # lw t1,0(t0); lw t2,0x18(t0)
    with ivshmem_lab.plug(uc, server=server, ecam=0x1F000000, slot=3, on_interrupt=print) as device:
        uc.reg_write(UC_MIPS_REG_T0, device.addresses["ecam"])
        uc.emu_start(ENTRY, ENTRY + 12)
        assert uc.reg_read(UC_MIPS_REG_T1) & 0xFFFFFFFF == 0x11101AF4
        assert uc.reg_read(UC_MIPS_REG_T2) & 0xFFFFFFF0 == device.bars[2]


def test_flat_and_pci_devices_share_an_engine_and_give_everything_back(server_beside):
    uc = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
    uc.mem_map(0, 1 << 20)
    before = list(uc.mem_regions())
    flat = {"x-bus-address-iomem": 0x50000000, "x-bus-address-shmem": 0x51000000}
    with (
        ivshmem_lab.plug(uc, "64K", flat=flat) as first,
        ivshmem_lab.plug(uc, server=server_beside, ecam=0x3F000000) as second,
        ivshmem_lab.plug(uc, "64K", slot=5) as third,
    ):
        regions = [second.addresses, third.addresses, first.addresses]
        assert len({address for found in regions for name, address in found.items() if name != "messages"}) == 9
        with pytest.raises(DeviceError, match="x-bus-address-iomem=0x50000000"):
            ivshmem_lab.plug(uc, "64K", flat={**flat, "x-bus-address-shmem": 0x52000000})
        with pytest.raises(DeviceError, match="x-bus-address-shmem=0x51000000"):
            ivshmem_lab.plug(uc, "64K", flat={**flat, "x-bus-address-iomem": 0x50001000})
    assert list(uc.mem_regions()) == before
    uc.mem_map(0x50000000, 0x1000)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, UsageError, "ecam="),
        ({"ecam": 0x3F000800}, DeviceError, "no multiple of 1 MiB"),
        ({"ecam": 0}, DeviceError, "memory at ecam=0x0"),
        ({"flat": {"x-bus": 1}}, UsageError, r"Property 'ivshmem-flat.x-bus' not found"),
        ({"flat": {"shmem-size": "1M"}}, DeviceError, "shmem size different from device size!.*shmem-size=4194304"),
        ({"flat": {"x-bus-address-shmem": 0}}, DeviceError, "x-bus-address-shmem=0x0"),
        ({"flat": {}, "message_page": 0x100}, DeviceError, "message_page="),
        ({"flat": {}, "message_page": 0x1000}, DeviceError, "message_page="),
        ({"flat": {}, "on_interrupt": print, "on_message": print}, UsageError, "either on_interrupt="),
    ],
)
def test_wrong_argument_on_arm_is_named_and_leaves_nothing(arguments, error, words, server):
    uc = arm64(WFI_ARM64)
    before = list(uc.mem_regions())
    with pytest.raises(error, match=words):
        ivshmem_lab.plug(uc, server=server, **arguments)
    assert list(uc.mem_regions()) == before
    assert "emu_start" not in vars(uc)


def test_engine_whose_interrupts_cannot_be_delivered_asks_for_a_callback():
    with pytest.raises(UsageError, match=r"interrupts of a mips engine .* give on_interrupt="):
        ivshmem_lab.plug(Uc(UC_ARCH_MIPS, UC_MODE_MIPS32 | UC_MODE_LITTLE_ENDIAN), "64K", flat={})


def test_callback_may_move_the_guest(server):
    uc = arm64(WFI_ARM64)
    with Peer.connect(server) as me:
        move = lambda _: uc.reg_write(UC_ARM64_REG_PC, 0x20000)  # noqa: E731
        with ivshmem_lab.plug(uc, server=server, flat={}, on_interrupt=move) as device:
            me.wait_for_peer(device.peer_id, 5)
            uc.emu_start(ENTRY, -1)
            me.ring(device.peer_id, 0)
            assert device.wait(5) == 0x20000
