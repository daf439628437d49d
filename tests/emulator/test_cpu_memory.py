"""What a running guest sees at its addresses: nothing, registers, shared memory that moves."""

from __future__ import annotations

import logging
import mmap
from typing import TYPE_CHECKING

import bare
import pytest
from bare import DATA, RAM_BYTES, SLEEP, TELL, Guest

from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.emulator.link import MemoryLink
from ivshmem_lab.emulator.runner import RunState
from ivshmem_lab.pc import uart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ivshmem_lab.pc.machine import Machine

SLOT = 4
MEMORY_BYTES = 1 << 20
NOTHING = 0x90000000
REGISTERS, SHARED, ELSEWHERE = 0xE0000000, 0xE0100000, 0xE8000000

HOOKS = pytest.mark.parametrize("native_hook", [True, False], ids=["native", "python"])


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    shared = mmap.mmap(-1, MEMORY_BYTES)
    shared[:8] = b"\x11\x11\x11\x11\x22\x22\x22\x22"
    yield shared
    shared.close()


def plugged(memory: mmap.mmap, vectors: int = 0) -> Callable[[Machine], None]:
    def plug(machine: Machine) -> None:
        machine.add_device("d", Ivshmem(MEMORY_BYTES, vectors=vectors), MemoryLink(memory), SLOT, hotplugged=False)

    return plug


def pae_with_nx(machine: Machine) -> None:
    """Map 4 GiB one to one in pages of 2 MiB that may not be executed, but for the first three."""
    for gigabyte in range(4):
        directory = 0x201000 + 0x1000 * gigabyte
        machine.ram[0x200000 + 8 * gigabyte : 0x200008 + 8 * gigabyte] = (directory | 1).to_bytes(8, "little")
        for index in range(512):
            page = gigabyte << 30 | index << 21
            entry = page | 0xE3 | (0 if page < 3 << 21 else 1 << 63)
            machine.ram[directory + 8 * index : directory + 8 * index + 8] = entry.to_bytes(8, "little")


PAE_ON = (
    b"\xb9\x80\x00\x00\xc0\x0f\x32\x0d\x00\x08\x00\x00\x0f\x30"  # ecx = EFER; rdmsr; or eax, 0x800 (NXE); wrmsr
    b"\x0f\x20\xe0\x83\xc8\x20\x0f\x22\xe0"  # or cr4, 0x20 (PAE)
    b"\xb8\x00\x00\x20\x00\x0f\x22\xd8"  # cr3 = 0x200000
    b"\x0f\x20\xc0\x0d\x00\x00\x00\x80\x0f\x22\xc0"  # or cr0, 0x80000000 (PG)
)


def tell(address: int) -> bytes:
    return bare.load_eax(address) + bare.out_eax(TELL)


# -- nothing there -----------------------------------------------------------------------------------------------------


@HOOKS
def test_nothing_reads_zeros_at_every_width_and_takes_writes(native_hook: bool) -> None:
    byte = b"\x31\xc0\xa0" + bare.word(NOTHING + 3) + bare.out_eax(TELL)  # xor eax, eax; mov al, [...]
    half = b"\x31\xc0\x66\xa1" + bare.word(NOTHING + 0x1FFF) + bare.out_eax(TELL)  # across two pages
    exchange = b"\xb8\x05\0\0\0\x87\x05" + bare.word(NOTHING) + bare.out_eax(TELL)  # mov eax, 5; xchg [...], eax
    body = bare.store(NOTHING, 0) + tell(NOTHING) + byte + half + exchange + bare.out(TELL, 7) + SLEEP
    with Guest(body, native_hook=native_hook) as guest:
        assert [guest.tells() for _ in range(5)] == [0, 0, 0, 0, 7]
        assert set(guest.machine.guest_errors) == {"unanswered memory access"}


@HOOKS
def test_10000_pages_of_nothing_are_counted_and_logged_once(
    native_hook: bool, caplog: pytest.LogCaptureFixture
) -> None:
    # ebx walks over the pages; each is read once and written once.
    turn = b"\x8b\x03\x89\x03\x09\xc6\x81\xc3\x00\x10\x00\x00"  # eax = [ebx]; [ebx] = eax; or esi, eax; add ebx, 4096
    body = b"\xbb" + bare.word(NOTHING) + b"\xbe\0\0\0\0" + bare.repeat(10_000, turn)
    body += b"\x89\xf0" + bare.out_eax(TELL) + SLEEP
    with caplog.at_level(logging.WARNING), Guest(body, native_hook=native_hook) as guest:
        assert guest.tells() == 0
        assert guest.machine.guest_errors == {"unanswered memory access": 20_000}
        assert guest.runner.state is RunState.RUNNING
    assert [record.args[0] for record in caplog.records] == ["unanswered memory access"]


def test_the_end_of_ram_and_the_end_of_addresses_are_only_that() -> None:
    body = tell(RAM_BYTES - 4) + tell(RAM_BYTES - 2) + tell(0xFFFFFFFC) + bare.out(TELL, 7) + SLEEP
    with Guest(body) as guest:
        assert [guest.tells() for _ in range(4)] == [0, 0, 0, 7]


@pytest.mark.parametrize("jump", [0x90000000, 0xE0000000, 0xFEE00000], ids=["nothing", "bar", "apic"])
def test_a_guest_that_jumps_into_nowhere_costs_only_itself(jump: int, memory: mmap.mmap) -> None:
    body = b"\xb8" + bare.word(jump) + b"\xff\xe0"  # mov eax, ...; jmp eax
    with Guest(body, before=plugged(memory)) as guest:
        guest.ends()
        assert guest.resets == 1 or guest.broken is not None
        assert guest.told.empty()


@pytest.mark.parametrize(("width", "instruction"), [(1, b"\xec"), (2, b"\x66\xed"), (4, b"\xed")])
def test_unanswered_ports_read_ones(width: int, instruction: bytes) -> None:
    body = b"\x31\xc0\x66\xba\x34\x12" + instruction + bare.out_eax(TELL) + bare.out(0x1234, 1) + bare.out(TELL, 7)
    with Guest(body + SLEEP) as guest:
        assert (guest.tells(), guest.tells()) == ((1 << 8 * width) - 1, 7)
        assert guest.machine.guest_errors == {"unanswered port": 2}


# -- BARs --------------------------------------------------------------------------------------------------------------

PLACE = (
    bare.config(SLOT, 0x10, REGISTERS)
    + bare.config(SLOT, 0x18, SHARED)
    + bare.config(SLOT, 0x1C, 0)
    + bare.config(SLOT, 0x04, 2)
)


@HOOKS
@pytest.mark.parametrize("paging", [b"", PAE_ON], ids=["flat", "pae-nx"])
def test_a_running_guest_moves_hides_and_shows_its_memory(native_hook: bool, paging: bytes, memory: mmap.mmap) -> None:
    body = paging + PLACE + tell(SHARED)
    body += bare.config(SLOT, 0x18, ELSEWHERE) + tell(SHARED) + tell(ELSEWHERE + 4)
    body += bare.config(SLOT, 0x04, 0) + tell(ELSEWHERE)
    body += bare.config(SLOT, 0x04, 2) + bare.store(ELSEWHERE + 8, 0x33333333) + tell(ELSEWHERE + 8)
    # Asking for the size while it is shown.
    body += bare.config(SLOT, 0x18, 0xFFFFFFFF) + tell(ELSEWHERE) + bare.config(SLOT, 0x18, SHARED) + tell(SHARED)
    # Registers move, too.
    body += bare.store(REGISTERS, 0x5A5A) + bare.config(SLOT, 0x10, ELSEWHERE) + tell(REGISTERS) + tell(ELSEWHERE)

    def before(machine: Machine) -> None:
        plugged(memory)(machine)
        pae_with_nx(machine)

    expected = [0x11111111, 0, 0x22222222, 0, 0x33333333, 0, 0x11111111, 0, 0x5A5A]
    with Guest(body + SLEEP, native_hook=native_hook, before=before) as guest:
        assert [hex(guest.tells()) for _ in expected] == [hex(value) for value in expected]
        assert memory[8:12] == b"\x33" * 4
        assert guest.broken is None


def test_a_bar_that_moves_two_thousand_times_is_always_where_it_is(memory: mmap.mmap) -> None:
    turn = bare.config(SLOT, 0x18, ELSEWHERE) + bare.increment(ELSEWHERE + 16)
    turn += bare.config(SLOT, 0x18, SHARED) + bare.increment(SHARED + 16)
    with Guest(PLACE + bare.repeat(1000, turn) + bare.out(TELL, 7) + SLEEP, before=plugged(memory)) as guest:
        assert guest.tells() == 7
        assert int.from_bytes(memory[16:20], "little") == 2000
        assert guest.machine.guest_errors == {}


def test_where_nothing_was_touched_memory_can_appear(memory: mmap.mmap) -> None:
    body = tell(SHARED) + tell(REGISTERS) + PLACE + tell(SHARED) + tell(REGISTERS)
    body = bare.config(SLOT, 0x04, 0) + body + bare.config(SLOT, 0x04, 0) + tell(SHARED) + SLEEP
    with Guest(body, before=plugged(memory)) as guest:
        expected = [0, 0, 0x11111111, 0, 0]
        assert [guest.tells() for _ in expected] == expected


def test_a_bar_above_4_gib_is_memory_that_a_guest_without_paging_does_not_see(memory: mmap.mmap) -> None:
    body = PLACE + bare.config(SLOT, 0x1C, 1) + tell(SHARED) + bare.config(SLOT, 0x1C, 0) + tell(SHARED)
    with Guest(body + SLEEP, before=plugged(memory)) as guest:
        assert (guest.tells(), guest.tells()) == (0, 0x11111111)


@pytest.mark.parametrize("high", [0xFFFFFFFF, 1 << 20, 0x4000])
def test_a_bar_at_an_impossible_address_hurts_nobody(high: int, memory: mmap.mmap) -> None:
    body = PLACE + bare.config(SLOT, 0x1C, high) + tell(SHARED) + bare.config(SLOT, 0x1C, 0) + tell(SHARED)
    with Guest(body + SLEEP, before=plugged(memory)) as guest:
        assert (guest.tells(), guest.tells()) == (0, 0x11111111)
        assert guest.broken is None


def test_a_bar_over_the_guests_own_code_stays_hidden(memory: mmap.mmap) -> None:
    body = PLACE + bare.config(SLOT, 0x18, bare.CODE) + bare.out(TELL, 7) + bare.config(SLOT, 0x18, SHARED)
    with Guest(body + tell(SHARED) + SLEEP, before=plugged(memory)) as guest:
        assert (guest.tells(), guest.tells()) == (7, 0x11111111)
        assert guest.machine.guest_errors["BAR over other memory"] >= 1


def test_registers_answer_eight_bytes_strings_and_unaligned_reads(memory: mmap.mmap) -> None:
    body = PLACE + bare.store(REGISTERS, 0x11223344) + bare.store(REGISTERS + 4, 0x55667788)
    body += b"\x0f\x6f\x05" + bare.word(REGISTERS) + b"\x0f\x7f\x05" + bare.word(DATA)  # movq mm0, [..]; movq [..], mm0
    body += tell(DATA) + tell(DATA + 4) + tell(REGISTERS + 4)
    body += bare.store(REGISTERS + 4, 0x55667788)
    # esi = REGISTERS, edi = DATA, ecx = 4, cld, rep movsd
    body += b"\xbe" + bare.word(REGISTERS) + b"\xbf" + bare.word(DATA + 16) + b"\xb9\x04\0\0\0\xfc\xf3\xa5"
    body += tell(DATA + 16) + tell(DATA + 20) + tell(REGISTERS + 4)
    with Guest(body + SLEEP, before=plugged(memory)) as guest:
        assert [hex(guest.tells()) for _ in range(6)] == ["0x11223344", "0x55667788", "0x0"] * 2


def test_a_guest_ejects_the_device_whose_memory_it_uses(memory: mmap.mmap) -> None:
    gone: list[str] = []
    body = (
        PLACE
        + tell(SHARED)
        + bare.out(0xAE08, 1 << SLOT)
        + bare.NEXT_BLOCK
        + tell(SHARED)
        + bare.out(0xCF8, 0x80000000 | SLOT << 11)
    )
    body += b"\x66\xba\xfc\x0c\xed" + bare.out_eax(TELL) + SLEEP  # in eax, 0xcfc
    before = plugged(memory)
    with Guest(body, before=before, device_deleted=lambda name, device: gone.append(name)) as guest:
        assert [guest.tells() for _ in range(3)] == [0x11111111, 0, 0xFFFFFFFF]
        assert gone == ["d"]


def test_what_is_typed_reaches_the_guest() -> None:
    # Wait for the bit "data ready", read the byte, tell it.
    turn = b"\x66\xba" + (uart.COM1 + uart.LINE_STATUS).to_bytes(2, "little") + b"\x31\xc0\xec\x83\xe0\x01"
    one = (
        bare.until_eax_is(1, turn)
        + b"\x66\xba"
        + uart.COM1.to_bytes(2, "little")
        + b"\x31\xc0\xec"
        + bare.out_eax(TELL)
    )
    with Guest(bare.for_ever(one)) as guest:
        guest.do(lambda: guest.machine.uart.receive(b"hello"))
        assert bytes(guest.tells() for _ in range(5)) == b"hello"
