"""A page fault reaches the guest's handler with the address in CR2, also where the guest pages with NX."""

from __future__ import annotations

import mmap
import struct
import threading

import pytest

from ivshmem_lab.emulator.cpu import UnicornCpu
from ivshmem_lab.emulator.runner import Runner
from ivshmem_lab.pc.machine import Hooks, Machine
from ivshmem_lab.pc.multiboot import Kernel, Segment

CODE, HANDLER, GDT, IDT, TABLES, RESULT, PDPT = 0x100000, 0x101000, 0x102000, 0x103000, 0x104000, 0x105000, 0x110000
FAULTING = 0x40000010
NX = 1 << 63


def page_tables(last: int) -> bytes:
    """PAE tables at PDPT: 2 MiB pages one to one, NX on all but the first; the page of FAULTING is not there."""
    pointers = b"".join(struct.pack("<Q", PDPT + 0x1000 * (1 + index) | 1) for index in range(4)).ljust(4096, b"\0")
    directories = b""
    for page in range(2048):
        address = page << 21
        present = address != FAULTING & -(2 << 20)
        directories += struct.pack("<Q", (address | 0x83 | (last if page else 0)) if present else 0)
    return pointers + directories


@pytest.mark.parametrize("nx", [0, NX])
def test_handler_finds_the_address_in_cr2_and_the_access_is_repeated(nx):
    main = (
        b"\x0f\x01\x15" + struct.pack("<I", TABLES) + b"\x0f\x01\x1d" + struct.pack("<I", TABLES + 8)  # lgdt, lidt
        + b"\xb8\x10\0\0\0\x8e\xd0\x8e\xd8\xbc\0\x70\0\0"  # ss = ds = 0x10, esp = 0x7000
        + b"\xea" + struct.pack("<IH", CODE + 35, 8)
        + b"\xb8\x30\0\0\0\x0f\x22\xe0" + b"\xb8" + struct.pack("<I", PDPT) + b"\x0f\x22\xd8"  # cr4 = PAE, cr3
        + b"\xb9\x80\0\0\xc0\x0f\x32\x0d\0\x08\0\0\x0f\x30"  # EFER.NXE
        + b"\x0f\x20\xc0\x0d\0\0\0\x80\x0f\x22\xc0"  # cr0.PG
        + b"\xc7\x05" + struct.pack("<II", FAULTING, 77)  # the store that faults
        + b"\xb0\0\xe6\xf4\xf4"
    )  # fmt: skip
    handler = (
        b"\x0f\x20\xd0\xa3" + struct.pack("<I", RESULT)  # RESULT = cr2
        + b"\x8b\x44\x24\x04\xa3" + struct.pack("<I", RESULT + 4)  # RESULT + 4 = EIP of the frame (an error code lies above)
        + b"\xb0\x01\xe6\xf4\xf4"
    )  # fmt: skip
    gate = struct.pack("<HHBBH", HANDLER & 0xFFFF, 8, 0, 0x8E, HANDLER >> 16)
    data = {
        CODE: main,
        HANDLER: handler,
        GDT: struct.pack("<QQQ", 0, 0x00CF9A000000FFFF, 0x00CF92000000FFFF),
        IDT: gate * 32,
        TABLES: struct.pack("<HI", 23, GDT) + b"\0\0" + struct.pack("<HI", 255, IDT),
        RESULT: bytes(8),
        PDPT: page_tables(nx),
    }
    segments = tuple(Segment(address, content, len(content)) for address, content in data.items())
    ended = threading.Event()
    statuses: list[int] = []
    cpu = UnicornCpu()
    ram = mmap.mmap(-1, 16 << 20)

    def on_exit(status: int) -> None:
        statuses.append(status)
        runner.pause()
        cpu.stop_soon()
        ended.set()

    machine = Machine(cpu, memoryview(ram), Kernel(CODE, segments, ""), Hooks(debug_exit=on_exit))
    machine.add_debug_exit(0xF4, 4)
    cpu.attach(machine, whole_machine=True)
    runner = Runner(cpu)
    runner.start(machine)
    runner.call(runner.resume).result()
    try:
        assert ended.wait(10)
    finally:
        runner.close()
    cr2, eip = struct.unpack_from("<II", ram, RESULT)
    assert statuses == [3]
    assert hex(cr2) == hex(FAULTING)
    assert eip == CODE + main.index(b"\xc7\x05" + struct.pack("<I", FAULTING))
