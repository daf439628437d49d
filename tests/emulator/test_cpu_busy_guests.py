"""Guests that keep the CPU from the places where it usually looks up."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import bare
from bare import CLI, IRET, NOP, STI, TELL, Guest

from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.emulator.link import MemoryLink
from ivshmem_lab.pc import lapic

if TYPE_CHECKING:
    from ivshmem_lab.pc.machine import Machine

VECTOR = 0x40
SLOT = 4
SHARED = 0xE0000000


def test_interrupts_reach_a_guest_that_only_takes_software_interrupts() -> None:
    body = STI + bare.out(TELL, 1) + bare.for_ever(b"\xcd\x80")  # int 0x80
    line = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    with Guest(body, {0x80: NOP + IRET}) as guest:

        def rung() -> None:
            os.eventfd_read(line)
            guest.machine.message(lapic.BASE, VECTOR)

        guest.do(lambda: guest.runner.events.add(line, rung))
        assert guest.tells() == 1
        for number in range(1, 51):
            os.eventfd_write(line, 1)
            guest.until(lambda: guest.count(VECTOR) == number)  # noqa: B023 - used at once
        guest.do(lambda: guest.runner.events.remove(line))
    os.close(line)


def test_decoding_switched_off_on_and_off_again_in_one_block_hides_the_memory() -> None:
    memory = mmap.mmap(-1, 1 << 16)

    def plug(machine: Machine) -> None:
        machine.add_device("iv", Ivshmem(1 << 16), MemoryLink(memory), SLOT, hotplugged=False)

    place = (
        bare.config(SLOT, 0x18, SHARED) + bare.config(SLOT, 0x1C, 0) + bare.config(SLOT, 4, 2) + bare.store(SHARED, 7)
    )
    toggle = bare.out(0xCF8, 0x80000000 | SLOT << 11 | 4) + b"".join(bare.out(0xCFC, value) for value in (0, 2, 0))
    body = CLI + place + toggle + bare.NEXT_BLOCK + bare.load_eax(SHARED) + bare.out_eax(TELL) + bare.SLEEP
    with Guest(body, before=plug) as guest:
        assert guest.tells() == 0
        assert guest.broken is None
    assert memory[0] == 7
    memory.close()
