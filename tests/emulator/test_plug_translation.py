"""BARs move, and devices go, under a 64-bit guest that pages and forbids execution outside its code.

The engine looks for code at the *virtual* address of what is unmapped; a fault of that look-up must not reach the guest.
"""

from __future__ import annotations

import struct

from unicorn import UC_ARCH_X86, UC_MODE_64, Uc
from unicorn.x86_const import (
    UC_X86_REG_CR0,
    UC_X86_REG_CR3,
    UC_X86_REG_CR4,
    UC_X86_REG_MSR,
    UC_X86_REG_R8,
)

import ivshmem_lab

CODE, TABLES = 0x10000, 0x80000
MIB2 = 1 << 21
EFER, LME_NXE = 0xC0000080, 0x900


def long_mode() -> Uc:
    """An engine with 4 GiB mapped one to one, executable only below 2 MiB."""
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0, 1 << 20)
    pointers, directories = TABLES + 0x1000, TABLES + 0x2000
    uc.mem_write(TABLES, struct.pack("<Q", pointers | 7))
    uc.mem_write(pointers, b"".join(struct.pack("<Q", directories + 0x1000 * i | 7) for i in range(4)))
    pages = [page * MIB2 | 0x87 | ((1 << 63) if page else 0) for page in range(4 * 512)]
    uc.mem_write(directories, struct.pack(f"<{len(pages)}Q", *pages))
    uc.reg_write(UC_X86_REG_CR3, TABLES)
    uc.reg_write(UC_X86_REG_CR4, uc.reg_read(UC_X86_REG_CR4) | 0x20)
    uc.reg_write(UC_X86_REG_MSR, (EFER, uc.reg_read(UC_X86_REG_MSR, EFER) | LME_NXE))
    uc.reg_write(UC_X86_REG_CR0, uc.reg_read(UC_X86_REG_CR0) | 0x80000000)
    return uc


def out(port: int, value: int) -> bytes:
    """``mov dx, port; mov eax, value; out dx, eax``."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<I", value) + b"\xef"


def store_and_halt(address: int, value: int) -> bytes:
    """``mov rax, address; mov byte [rax], value; mov r8, rax; hlt``: the last tells that the CPU is in long mode."""
    return b"\x48\xb8" + struct.pack("<Q", address) + b"\xc6\x00" + bytes([value]) + b"\x49\x89\xc0\xf4"


def test_bar_moves_and_device_goes_under_a_paging_64_bit_x86():
    uc = long_mode()
    before = list(uc.mem_regions())
    with ivshmem_lab.plug(uc, "64K") as device, ivshmem_lab.plug(uc, "64K", slot=5) as leaving:
        select, target = 0x80000000 | 4 << 11, 0xC0000000
        uc.mem_write(CODE, store_and_halt(device.bars[2], 5))
        uc.emu_start(CODE, -1)
        assert device.memory[0] == 5
        leaving.unplug()
        uc.mem_write(
            CODE + 0x1000,
            out(0xCF8, select | 0x18) + out(0xCFC, target) + b"\xeb\x00" + store_and_halt(target, 7),
        )
        uc.emu_start(CODE + 0x1000, -1)
        assert uc.reg_read(UC_X86_REG_R8) == target
        assert (device.bars[2], device.memory[0]) == (target, 7)
    assert list(uc.mem_regions()) == before
