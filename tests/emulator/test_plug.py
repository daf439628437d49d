"""`ivshmem_lab.plug`: the device on an engine whose owner keeps ``emu_start``."""

from __future__ import annotations

import contextlib
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from unicorn import UC_ARCH_X86, UC_HOOK_INSN, UC_MODE_16, UC_MODE_32, Uc
from unicorn.x86_const import UC_X86_INS_OUT, UC_X86_REG_EAX, UC_X86_REG_EBX, UC_X86_REG_EIP, UC_X86_REG_ESP

import ivshmem_lab
from ivshmem_lab.errors import DeviceError, ServerError, UsageError
from ivshmem_lab.guests import guest_path
from ivshmem_lab.pc import multiboot
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from ivshmem_lab.emulator.plug import PluggedDevice

RAM_BYTES = 32 << 20
CODE = 0x100000
VECTOR = 0x40
COUNT, WORK = 0x200000, 0x200010


@pytest.fixture
def uc():
    engine = Uc(UC_ARCH_X86, UC_MODE_32)
    engine.mem_map(0, RAM_BYTES)
    engine.reg_write(UC_X86_REG_ESP, 0x90000)
    return engine


def store(address: int, value: int) -> bytes:
    """``mov dword [address], value``."""
    return b"\xc7\x05" + struct.pack("<II", address, value)


def out(port: int, value: int) -> bytes:
    """``mov dx, port; mov eax, value; out dx, eax``."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<I", value) + b"\xef"


def load_guest(engine: Uc, name: str, append: str) -> bytearray:
    """Load a bundled guest as a boot loader would; its serial output collects in what is returned."""
    path = str(guest_path(name))
    kernel = multiboot.parse(Path(path).read_bytes(), path, f"{path} {append}")
    ram = bytearray(RAM_BYTES)
    start = multiboot.load(kernel, memoryview(ram))
    engine.mem_write(0, bytes(ram))
    for register, value in ((UC_X86_REG_EAX, start.eax), (UC_X86_REG_EBX, start.ebx), (UC_X86_REG_EIP, start.eip)):
        engine.reg_write(register, value)
    return bytearray()


def run_until_halted(engine: Uc, pc: int) -> None:
    engine.emu_start(pc, 0xFFFFFFFFFFFFFFFF)


def interrupt_program(device: PluggedDevice, main: bytes, answer: int | None = None) -> bytes:
    """Enable MSI-X and the local APIC, then run `main`; an interrupt counts at COUNT and rings the peer `answer`."""
    reply = b"" if answer is None else store(device.bars[0] + 12, answer << 16)
    handler = b"\xff\x05" + struct.pack("<I", COUNT) + reply + store(0xFEE000B0, 0) + b"\xcf"
    address = 0x80000000 | device.slot << 11
    enable = (
        store(0xFEE000F0, 0x1FF)
        + store(device.bars[1], 0xFEE00000)
        + store(device.bars[1] + 4, 0)
        + store(device.bars[1] + 8, VECTOR)
        + store(device.bars[1] + 12, 0)
        + out(0xCF8, address | 0x04)
        + out(0xCFC, 0x0107)
        + out(0xCF8, address | 0x40)
        + out(0xCFC, 0x80000000 | 0x11)
    )
    idt, gdt, table = 0x5000, 0x5800, 0x6000
    gate = struct.pack("<HHBBH", (CODE + 0x1000) & 0xFFFF, 8, 0, 0x8E, (CODE + 0x1000) >> 16)
    engine = device._open().cpu.user_uc
    engine.mem_write(idt + 8 * VECTOR, gate)
    engine.mem_write(gdt, struct.pack("<QQQ", 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF))
    engine.mem_write(table, struct.pack("<HI", 0x7FF, idt) + struct.pack("<HI", 23, gdt))
    engine.mem_write(CODE + 0x1000, handler)
    # lidt, lgdt, ss, and a far jump to the next instruction: iret wants a real code segment and a 32-bit stack
    load = b"\x0f\x01\x1d" + struct.pack("<I", table) + b"\x0f\x01\x15" + struct.pack("<I", table + 6)
    load += b"\xb8\x10\x00\x00\x00\x8e\xd0"
    return load + b"\xea" + struct.pack("<IH", CODE + len(load) + 7, 8) + enable + main


def test_plain_memory_is_shared_without_copies(uc):
    memory = bytearray(4096)
    with ivshmem_lab.plug(uc, memory) as device:
        uc.mem_write(CODE, store(device.bars[2] + 8, 0xC0FFEE) + b"\xf4")
        run_until_halted(uc, CODE)
        assert struct.unpack_from("<I", memory, 8) == (0xC0FFEE,)
        device.memory[12:16] = [1, 0, 0, 0]
        assert memory[12] == 1
        assert "IVPosition" in repr(device)


def test_closed_device_leaves_the_engine_as_it_was(uc):
    before = list(uc.mem_regions())
    device = ivshmem_lab.plug(uc, "1M")
    assert list(uc.mem_regions()) != before
    device.close()
    device.close()
    assert list(uc.mem_regions()) == before
    with pytest.raises(DeviceError, match="closed"):
        device.wait(0)


def test_two_devices_share_one_bus(uc):
    with ivshmem_lab.plug(uc, "1M", slot=4) as first, ivshmem_lab.plug(uc, "64K", slot=5) as second:
        assert not set(first.bars.values()) & set(second.bars.values())
        uc.mem_write(CODE, store(first.bars[2], 1) + store(second.bars[2], 2) + b"\xf4")
        run_until_halted(uc, CODE)
        assert (first.memory[0], second.memory[0]) == (1, 2)
        with pytest.raises(DeviceError, match="slot 4 function 0 is in use"):
            ivshmem_lab.plug(uc, "1M", slot=4)


def test_unassigned_device_waits_for_its_guest_to_place_the_bars(uc):
    with ivshmem_lab.plug(uc, "1M", assign=False, slot=6) as device:
        assert device.bars == {}
        select = 0x80000000 | 6 << 11
        uc.mem_write(
            CODE,
            out(0xCF8, select | 0x18)
            + out(0xCFC, 0xD0000000)
            + out(0xCF8, select | 0x04)
            + out(0xCFC, 2)
            + store(0xD0000000, 7)
            + b"\xf4",
        )
        run_until_halted(uc, CODE)
        assert device.bars == {2: 0xD0000000}
        assert device.memory[0] == 7


def test_bar_over_the_users_memory_stays_hidden_and_is_counted(uc):
    with ivshmem_lab.plug(uc, "1M", assign=False) as device:
        select = 0x80000000 | 4 << 11
        uc.mem_write(
            CODE, out(0xCF8, select | 0x18) + out(0xCFC, 0x1000000) + out(0xCF8, select | 4) + out(0xCFC, 2) + b"\xf4"
        )
        run_until_halted(uc, CODE)
        assert device.guest_errors == {"BAR over other memory": 1}
        assert uc.mem_read(0x1000000, 4) == bytes(4)


def test_other_ports_stay_the_users(uc):
    written = []
    with ivshmem_lab.plug(
        uc, "1M", port_in=lambda port, size: port + size, port_out=lambda *access: written.append(access)
    ):
        uc.mem_write(CODE, out(0x3F8, 0x41) + b"\x66\xba\xf8\x03\xed\xf4")
        run_until_halted(uc, CODE)
        assert written == [(0x3F8, 4, 0x41)]
        assert uc.reg_read(UC_X86_REG_EAX) == 0x3FC


def test_own_interrupt_controller_gets_the_messages(uc, server):
    messages = []
    with (
        Peer.connect(server) as me,
        ivshmem_lab.plug(uc, server=server, on_message=lambda *message: messages.append(message)) as device,
    ):
        me.wait_for_peer(device.peer_id, 5)
        program = interrupt_program(device, b"\xf4")
        uc.mem_map(0xFEE00000, 0x1000)  # the user's own controller
        uc.mem_write(CODE, program)
        run_until_halted(uc, CODE)
        me.ring(device.peer_id, 0)
        assert device.wait(5) == uc.reg_read(UC_X86_REG_EIP)
        assert messages == [(0xFEE00000, VECTOR)]


@pytest.mark.parametrize("native", [None, False])
def test_every_interrupt_of_a_busy_guest_is_delivered_and_no_instruction_doubled(uc, server, native):
    rounds = 500
    with Peer.connect(server) as me, ivshmem_lab.plug(uc, server=server, vectors=2, native_hook=native) as device:
        me.wait_for_peer(device.peer_id, 5)
        # xor eax,eax; sti; again: inc dword [WORK]; inc eax; cmp dword [COUNT], rounds; jb again; cli; hlt
        loop = b"\xff\x05" + struct.pack("<I", WORK) + b"\x40" + b"\x81\x3d" + struct.pack("<II", COUNT, rounds)
        ready = store(device.bars[0] + 12, me.peer_id << 16)
        main = ready + b"\x31\xc0\xfb" + loop + b"\x72" + struct.pack("b", -len(loop) - 2) + b"\xfa\xf4"
        uc.mem_write(CODE, interrupt_program(device, main, answer=me.peer_id))
        answers = []

        def ring() -> None:
            me.wait(0, 10)
            for _ in range(rounds):
                me.ring(device.peer_id, 0)
                answers.append(me.wait(0, 10))

        ringer = threading.Thread(target=ring)
        ringer.start()
        run_until_halted(uc, CODE)
        ringer.join()
        assert answers == [1] * rounds
        assert struct.unpack("<I", uc.mem_read(COUNT, 4)) == (rounds,)
        assert struct.unpack("<I", uc.mem_read(WORK, 4))[0] == uc.reg_read(UC_X86_REG_EAX)


def test_halted_guest_answers_every_doorbell(uc, server):
    with (
        Peer.connect(server) as me,
        ivshmem_lab.plug(uc, server=server, vectors=2, port_out=lambda *_: None, port_in=lambda *_: 0xFF) as device,
    ):
        load_guest(uc, "pingpong", "role=pong")
        run_until_halted(uc, uc.reg_read(UC_X86_REG_EIP))
        assert me.wait_for_peer(device.peer_id, 5)
        line = me.memory[64 * device.peer_id : 64 * device.peer_id + 64].view(np.uint32)
        line[2] = me.peer_id + 1
        answered = 0
        for _ in range(300):
            me.ring(device.peer_id, 0)
            pc = device.wait(5)
            assert pc is not None
            run_until_halted(uc, pc)
            answered += me.wait(0, 5)
        assert answered == 300
        assert line[9] == 300


def test_probe_runs_on_a_users_engine_that_pages_without_execution(uc):
    written = bytearray()

    def on_out(port: int, size: int, value: int) -> None:
        if port == 0x3F8:
            written.append(value & 0xFF)

    with ivshmem_lab.plug(uc, "1M", port_out=on_out, port_in=lambda port, size: 0x60 if port == 0x3FD else 0) as device:
        load_guest(uc, "probe", "")
        run_until_halted(uc, uc.reg_read(UC_X86_REG_EIP))
        text = written.decode()
        assert "bus 00:04.0 1af4:1110" in text
        assert "bar 2 size 0x0000000000100000" in text
        assert text.endswith("probe: done\n")
        assert set(device.bars) == {0, 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either memory="),
        ({"memory": "1M", "server": "/nonexistent"}, "either memory="),
        ({"memory": "3M"}, "2M and 4M"),
        ({"memory": 3.5}, "no size and no buffer"),
        ({"memory": bytes(4096)}, "read-only"),
        ({"memory": "1M", "slot": 32}, "slot 32"),
    ],
)
def test_wrong_argument_is_named_and_leaves_nothing(uc, arguments, words):
    before = list(uc.mem_regions())
    with pytest.raises((UsageError, DeviceError), match=words):
        ivshmem_lab.plug(uc, **arguments)
    assert list(uc.mem_regions()) == before


def test_absent_server_is_named_with_the_remedy(uc, tmp_path):
    with pytest.raises(ServerError, match="ivshmem-server -F -S"):
        ivshmem_lab.plug(uc, server=str(tmp_path / "none"))


def test_engine_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="x86-16 engine are not delivered"):
        ivshmem_lab.plug(Uc(UC_ARCH_X86, UC_MODE_16), "1M")
    with pytest.raises(DeviceError, match=r"not a unicorn\.Uc"):
        ivshmem_lab.plug(object(), "1M")


def test_users_failing_handler_ends_the_run_and_is_told(uc):
    def broken(port: int, size: int) -> int:
        raise RuntimeError("my handler")

    device = ivshmem_lab.plug(uc, "1M", port_in=broken)
    uc.mem_write(CODE, b"\xec\xeb\x00\xeb\xfe")  # in al, dx; jmp +0; jmp to itself
    with contextlib.closing(device), pytest.raises(DeviceError, match="my handler"):
        run_until_halted(uc, CODE)


def test_users_own_hooks_go_on(uc):
    seen = []
    uc.hook_add(UC_HOOK_INSN, lambda *access: seen.append(access[1]), None, 1, 0, UC_X86_INS_OUT)
    with ivshmem_lab.plug(uc, "1M"):
        uc.mem_write(CODE, out(0x80, 1) + b"\xf4")
        run_until_halted(uc, CODE)
    run_until_halted(uc, CODE)
    assert seen == [0x80, 0x80]
