"""Interrupts and exceptions of a running guest: none is lost, none comes twice, none comes too early."""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time

import bare
import pytest
from bare import CLI, COUNTS, DATA, HLT, INT3, IRET, NOP, SLEEP, STI, TELL, UD2, Guest

from ivshmem_lab.emulator.runner import RunState
from ivshmem_lab.pc import lapic

KICKS = 5000
VECTOR = 0x40

HOOKS = pytest.mark.parametrize("native_hook", [True, False], ids=["native", "python"])

SKIP_TWO_BYTES = b"\x83\x04\x24\x02"  # add dword [esp], 2
DROP_ERROR_CODE = b"\x83\xc4\x04"  # add esp, 4


# -- kicks -------------------------------------------------------------------------------------------------------------


@HOOKS
def test_5000_kicks_of_a_busy_guest_repeat_and_lose_no_instruction(native_hook: bool) -> None:
    body = bare.for_ever(bare.increment(DATA) + b"\x40")  # inc dword [DATA]; inc eax
    with Guest(b"\x31\xc0" + body, native_hook=native_hook) as guest:
        guest.until(lambda: guest.word(DATA) > 0)
        for _ in range(KICKS):
            guest.do(lambda: None)
        guest.pause()
        counted = guest.word(DATA)
        assert counted == guest.register("EAX")
        assert counted > 0
        assert guest.cpu.native_hook is native_hook


@HOOKS
def test_a_guest_of_atomic_instructions_and_a_stack_survives_kicks(native_hook: bool) -> None:
    # lock inc dword [DATA]; push eax; pop ebx; inc eax; push-pop pairs that would drift if one ran twice.
    body = b"\xf0" + bare.increment(DATA) + b"\x50\x5b\x40"
    with Guest(b"\x31\xc0" + bare.for_ever(body), native_hook=native_hook) as guest:
        for _ in range(KICKS // 5):
            guest.do(lambda: None)
        guest.pause()
        assert guest.word(DATA) == guest.register("EAX")
        assert guest.register("ESP") == bare.STACK


@HOOKS
def test_interrupts_of_a_busy_guest_are_counted_and_change_nothing_else(native_hook: bool) -> None:
    body = STI + b"\x31\xc0" + bare.for_ever(bare.increment(DATA) + b"\x40")
    with Guest(body, native_hook=native_hook) as guest:
        for number in range(1, 501):
            guest.interrupt(VECTOR)
            guest.until(lambda: guest.count(VECTOR) == number)  # noqa: B023 - used at once
        # In the middle of its loop, not in a handler.
        guest.until(lambda: guest.do(lambda: guest.machine.lapic.read(lapic.PPR, 4)) == 0)
        guest.pause()
        assert guest.word(DATA) == guest.register("EAX")
        assert guest.runner.interrupts_taken == 500


@HOOKS
def test_eventfds_that_become_readable_reach_a_busy_guest_and_change_nothing_else(native_hook: bool) -> None:
    body = b"\x31\xc0" + bare.for_ever(bare.increment(DATA) + b"\x40")
    kicks = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    taken: queue.SimpleQueue[int] = queue.SimpleQueue()
    try:
        with Guest(body, native_hook=native_hook) as guest:
            guest.do(lambda: guest.runner.events.add(kicks, lambda: taken.put(os.eventfd_read(kicks))))
            for _ in range(KICKS // 5):
                os.eventfd_write(kicks, 1)
                assert taken.get(timeout=bare.LIMIT_S) == 1
            guest.do(lambda: guest.runner.events.remove(kicks))
            guest.pause()
            assert guest.word(DATA) == guest.register("EAX")
    finally:
        os.close(kicks)


def test_calls_from_many_threads_are_all_carried_out() -> None:
    done: list[int] = []
    with Guest(bare.for_ever(bare.increment(DATA))) as guest:

        def call() -> None:
            for number in range(200):
                guest.do(lambda: done.append(number))  # noqa: B023 - used at once

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(done) == sorted([*range(200)] * 4)


def test_a_paused_guest_stands_still_and_goes_on_where_it_was() -> None:
    with Guest(b"\x31\xc0" + bare.for_ever(bare.increment(DATA) + b"\x40")) as guest:
        guest.until(lambda: guest.word(DATA) > 0)
        guest.pause()
        stood = guest.word(DATA)
        guest.interrupt(VECTOR)
        assert (guest.word(DATA), guest.register("EAX")) == (stood, stood)
        guest.do(guest.runner.resume)
        guest.until(lambda: guest.word(DATA) > stood)
        assert guest.count(VECTOR) == 0, "interrupts are off"


# -- sti and hlt -------------------------------------------------------------------------------------------------------


@HOOKS
def test_no_wake_up_is_lost_between_sti_and_hlt(native_hook: bool) -> None:
    # Tells each count that it sees; sleeps only when it has seen them all: cli; eax = count; if eax == ebx { sti; hlt }
    # else { ebx = eax; tell } for ever.
    awake = b"\x89\xc3" + bare.out_eax(TELL)
    look = CLI + bare.load_eax(COUNTS + 4 * VECTOR) + b"\x39\xd8"
    asleep = STI + HLT + b"\xeb" + bytes([len(awake)])  # and jump over the other branch
    body = look + b"\x75" + bytes([len(asleep)]) + asleep + awake
    chance = random.Random(1)
    rings = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with Guest(b"\x31\xdb" + bare.for_ever(body), native_hook=native_hook) as guest:

            def rung() -> None:
                os.eventfd_read(rings)
                guest.machine.message(lapic.BASE, VECTOR)

            guest.do(lambda: guest.runner.events.add(rings, rung))
            for number in range(1, 2001):
                # Some moment on the guest's way from this answer back to sleep.
                ready = time.perf_counter() + chance.random() * 60e-6
                while time.perf_counter() < ready:
                    pass
                os.eventfd_write(rings, 1)
                assert guest.tells() == number
            guest.do(lambda: guest.runner.events.remove(rings))
            assert guest.runner.interrupts_taken == 2000
    finally:
        os.close(rings)


def test_an_interrupt_that_waits_wakes_the_very_next_hlt() -> None:
    turn = CLI + bare.send_to_self(VECTOR) + STI + HLT
    body = bare.repeat(3000, turn) + bare.copy(COUNTS + 4 * VECTOR, DATA) + bare.out_eax(TELL) + SLEEP
    with Guest(body) as guest:
        assert guest.tells() == 3000


def test_an_interrupt_waits_while_the_flag_is_off_and_comes_after_sti() -> None:
    busy = bare.repeat(20_000, NOP)
    body = CLI + bare.send_to_self(VECTOR) + busy + bare.copy(COUNTS + 4 * VECTOR, DATA)
    body += STI + bare.until_eax_is(1, bare.load_eax(COUNTS + 4 * VECTOR)) + bare.out_eax(TELL) + SLEEP
    with Guest(body) as guest:
        assert guest.tells() == 1
        assert guest.word(DATA) == 0, "it came while interrupts were off"


@HOOKS
def test_no_interrupt_comes_between_sti_and_the_instruction_behind_it(native_hook: bool) -> None:
    early = DATA + 8
    # cmp dword [DATA], 0; jne over; inc dword [early]
    handler = b"\x83\x3d" + bare.word(DATA) + b"\x00\x75\x06" + bare.increment(early) + bare.counting(VECTOR)
    turn = CLI + bare.store(DATA, 0) + bare.send_to_self(VECTOR) + STI + bare.store(DATA, 1) + NOP
    body = bare.repeat(5000, turn) + CLI + bare.copy(early, DATA + 12) + bare.out_eax(TELL) + SLEEP
    with Guest(body, {VECTOR: handler}, native_hook=native_hook) as guest:
        assert guest.tells() == 0
        assert guest.count(VECTOR) > 0


def test_a_guest_that_sleeps_with_interrupts_off_never_wakes() -> None:
    with Guest(CLI + bare.out(TELL, 1) + HLT + bare.out(TELL, 2) + SLEEP) as guest:
        assert guest.tells() == 1
        guest.interrupt(VECTOR)
        assert (guest.count(VECTOR), guest.told.empty()) == (0, True)
        assert guest.do(guest.machine.lapic.pending) == VECTOR


def test_higher_vectors_interrupt_handlers_and_all_return() -> None:
    # The handler of 0x30 opens interrupts, sends 0x40 to itself, and waits for that to have been served.
    nested = STI + bare.send_to_self(0x40) + bare.until_eax_is(1, bare.load_eax(COUNTS + 4 * 0x40))
    nested += bare.increment(COUNTS + 4 * 0x30) + bare.EOI + IRET
    body = bare.send_to_self(0x30) + STI + HLT
    body += bare.copy(COUNTS + 4 * 0x30, DATA) + bare.out_eax(TELL) + SLEEP
    with Guest(body, {0x30: nested}) as guest:
        assert guest.tells() == 1
        assert guest.count(0x40) == 1
        assert guest.register("ESP") == bare.STACK


# -- exceptions and software interrupts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "instruction", "handler"),
    [
        (0, b"\x31\xc9\xf7\xf1", SKIP_TWO_BYTES + bare.increment(COUNTS) + IRET),  # xor ecx, ecx; div ecx
        (3, INT3, bare.increment(COUNTS + 12) + IRET),
        (6, UD2, SKIP_TWO_BYTES + bare.increment(COUNTS + 24) + IRET),
        (0x30, b"\xcd\x30", bare.increment(COUNTS + 4 * 0x30) + IRET),  # int 0x30
        # mov eax, 0x1230; mov ds, ax: a selector behind the table
        (13, b"\xb8\x30\x12\0\0\x8e\xd8", DROP_ERROR_CODE + SKIP_TWO_BYTES + bare.increment(COUNTS + 52) + IRET),
    ],
    ids=["divide", "breakpoint", "opcode", "int", "protection"],
)
def test_an_exception_goes_through_the_interrupt_table_and_returns(
    vector: int, instruction: bytes, handler: bytes
) -> None:
    with Guest(instruction * 3 + bare.out(TELL, 7) + SLEEP, {vector: handler}) as guest:
        assert guest.tells() == 7
        assert (guest.count(vector), guest.register("ESP")) == (3, bare.STACK)


def page_directory(machine: object, *, missing: int) -> None:
    """Map 4 GiB one to one in pages of 4 MiB, but for one address."""
    ram = machine.ram  # type: ignore[attr-defined]
    for index in range(1024):
        entry = 0 if index == missing >> 22 else index << 22 | 0x83
        ram[0x200000 + 4 * index : 0x200004 + 4 * index] = entry.to_bytes(4, "little")


PAGING_ON = (
    b"\x0f\x20\xe0\x83\xc8\x10\x0f\x22\xe0"  # mov eax, cr4; or eax, 0x10 (PSE); mov cr4, eax
    b"\xb8\x00\x00\x20\x00\x0f\x22\xd8"  # mov eax, 0x200000; mov cr3, eax
    b"\x0f\x20\xc0\x0d\x00\x00\x00\x80\x0f\x22\xc0"  # mov eax, cr0; or eax, 0x80000000; mov cr0, eax
)


def test_page_faults_tell_their_address_and_can_be_mended() -> None:
    # The handler reads CR2, tells it, and skips the instruction of six bytes.
    handler = b"\x50\x52\x0f\x20\xd0" + bare.out_eax(TELL) + b"\x5a\x58"
    handler += DROP_ERROR_CODE + b"\x83\x04\x24\x0a" + IRET
    faults = [0x80123458, 0x80000000, 0x803FFFFC]
    body = PAGING_ON + b"".join(bare.store(address, 1) for address in faults) + bare.out(TELL, 7) + SLEEP
    with Guest(body, {14: handler}, before=lambda machine: page_directory(machine, missing=0x80000000)) as guest:
        assert [guest.tells() for _ in range(4)] == [*faults, 7]


NO_TABLE = b"\x0f\x01\x1d" + bare.word(DATA)  # lidt [DATA]: limit 0


@pytest.mark.parametrize(
    "fatal",
    [
        NO_TABLE + INT3,
        NO_TABLE + bare.send_to_self(VECTOR) + STI + HLT,
        INT3,  # no gate there
        b"\xbc\0\0\0\x90" + b"\xcd\x30",  # mov esp, 0x90000000; int 0x30: no memory for the frame
        b"\xcd\xff",
    ],
    ids=["exception", "interrupt", "gate", "stack", "last vector"],
)
def test_a_guest_without_a_handler_resets_itself(fatal: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Guest(fatal + bare.out(TELL, 1) + SLEEP) as guest:
        guest.ends()
        assert (guest.resets, guest.broken, guest.told.empty()) == (1, None, True)
    assert "triple fault" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_reset_guest_starts_again_from_the_beginning() -> None:
    with Guest(bare.increment(DATA) + bare.out(TELL, 1) + INT3 + SLEEP) as guest:
        assert guest.tells() == 1
        guest.ends()
        guest.do(guest.runner.reset)
        guest.do(guest.runner.resume)
        assert guest.tells() == 1


def test_a_reset_forgets_pending_interrupts_paging_and_registers() -> None:
    body = bare.copy(COUNTS + 4 * VECTOR, DATA) + b"\x0f\x20\xc0" + bare.out_eax(TELL)  # tell CR0
    body += bare.send_to_self(VECTOR) + PAGING_ON + bare.out(TELL, 1) + SLEEP
    with Guest(body, before=lambda machine: page_directory(machine, missing=0x80000000)) as guest:
        first = guest.tells()
        assert guest.tells() == 1
        guest.pause()
        guest.do(guest.runner.reset)
        assert guest.do(lambda: guest.machine.lapic.requested) == 0
        guest.do(guest.runner.resume)
        assert (guest.tells(), guest.tells()) == (first, 1)
        assert guest.word(DATA) == 0


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_fault_of_ours_stops_the_guest_and_not_the_process(caplog: pytest.LogCaptureFixture) -> None:
    def fail(offset: int, size: int) -> int:
        raise RuntimeError("a broken device")

    def add(machine: object) -> None:
        from ivshmem_lab.pc.bus import Range

        machine.ports.add(Range(0x300, 4, fail, lambda offset, size, value: None))  # type: ignore[attr-defined]

    body = b"\x66\xba\x00\x03\xed" + bare.out(TELL, 1) + SLEEP  # mov dx, 0x300; in eax, dx
    with caplog.at_level(logging.ERROR), Guest(body, before=add) as guest:
        guest.ends()
        assert guest.runner.state is RunState.INTERNAL_ERROR
        assert guest.broken is not None
        assert "a broken device" in guest.broken
        guest.do(guest.runner.reset)
        assert guest.do(lambda: guest.machine.lapic.requested) == 0


def test_calls_after_the_end_are_refused() -> None:
    guest = Guest(SLEEP)
    guest.close()
    with pytest.raises(Exception, match="the machine has ended"):
        guest.do(lambda: None)
