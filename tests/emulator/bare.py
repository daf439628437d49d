"""Guests of a few instructions, put together byte by byte, on a CPU and a machine in this process.

Every function here returns machine code (Intel SDM volume 2); the registers that it changes are named.
"""

from __future__ import annotations

import mmap
import queue
import struct
import threading
import time
from typing import TYPE_CHECKING, Any, Self

from ivshmem_lab.emulator.cpu import UnicornCpu
from ivshmem_lab.emulator.runner import Runner, RunState
from ivshmem_lab.pc import lapic, multiboot
from ivshmem_lab.pc.bus import Range
from ivshmem_lab.pc.machine import Hooks, Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LIMIT_S = 10.0
MIB = 1 << 20
RAM_BYTES = 4 * MIB

CODE, TABLES, HANDLERS, COUNTS, DATA, STACK = 0x100000, 0x180000, 0x182000, 0x186000, 0x188000, 0x1A0000
"""Where code lies, descriptor tables, interrupt handlers (64 bytes each), their counts, free data, the stack's end."""

TELL = 0xE0
"""A port: what is written arrives in `Guest.told`."""

CODE_SELECTOR, DATA_SELECTOR = 0x08, 0x10
GATE = 0x8E00


def word(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


# -- instructions ------------------------------------------------------------------------------------------------------

CLI, STI, HLT, NOP, IRET, INT3, PAUSE, UD2 = (
    b"\xfa",
    b"\xfb",
    b"\xf4",
    b"\x90",
    b"\xcf",
    b"\xcc",
    b"\xf3\x90",
    b"\x0f\x0b",
)
NEXT_BLOCK = b"\xeb\x00"  # jmp to the next instruction
EOI = b"\xc7\x05" + word(lapic.BASE + lapic.EOI) + word(0)
LAPIC_ON = b"\xc7\x05" + word(lapic.BASE + lapic.SVR) + word(0x1FF)


def store(address: int, value: int) -> bytes:
    return b"\xc7\x05" + word(address) + word(value)


def load_eax(address: int) -> bytes:
    """EAX."""
    return b"\xa1" + word(address)


def store_eax(address: int) -> bytes:
    return b"\xa3" + word(address)


def copy(source: int, target: int) -> bytes:
    """EAX."""
    return load_eax(source) + store_eax(target)


def increment(address: int) -> bytes:
    return b"\xff\x05" + word(address)


def out(port: int, value: int) -> bytes:
    """EAX, EDX."""
    return b"\xb8" + word(value) + out_eax(port)


def out_eax(port: int) -> bytes:
    """EDX."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xef"


def config(slot: int, offset: int, value: int) -> bytes:
    """Write configuration space, and end the block: what goes away is gone from the next one on. EAX, EDX."""
    return out(0xCF8, 0x80000000 | slot << 11 | offset) + out(0xCFC, value) + NEXT_BLOCK


def send_to_self(vector: int) -> bytes:
    """Have the local APIC request an interrupt."""
    return store(lapic.BASE + lapic.ICR_LOW, 1 << 18 | vector)


def repeat(count: int, body: bytes) -> bytes:
    """ECX counts down."""
    turn = body + b"\x49"
    return b"\xb9" + word(count) + turn + b"\x0f\x85" + word(-len(turn) - 6)


def for_ever(body: bytes) -> bytes:
    return body + b"\xe9" + word(-len(body) - 5)


def until_eax_is(value: int, body: bytes) -> bytes:
    """Repeat what loads EAX until it is this."""
    turn = body + b"\x3d" + word(value)
    return turn + b"\x0f\x85" + word(-len(turn) - 6)


SLEEP = for_ever(CLI + HLT)


def counting(vector: int) -> bytes:
    """Handle an interrupt: count it, tell the local APIC, return."""
    return increment(COUNTS + 4 * vector) + EOI + IRET


# -- a whole guest -----------------------------------------------------------------------------------------------------


def kernel(body: bytes, handlers: Mapping[int, bytes] | None = None) -> multiboot.Kernel:
    """Put a program behind what sets up segments, the interrupt table, a stack and the local APIC.

    Vectors without a handler of their own in 0x20 to 0x4f count.
    """
    handlers = {**{vector: counting(vector) for vector in range(0x20, 0x50)}, **(handlers or {})}
    gdt = TABLES
    idt = TABLES + 0x1000
    descriptors = struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    descriptors += struct.pack("<HI", 23, gdt) + struct.pack("<HI", 0x7FF, idt)
    gates = bytearray(0x800)
    code = bytearray(0x4000)
    for vector, handler in handlers.items():
        address = HANDLERS + 64 * vector
        assert len(handler) <= 64
        code[64 * vector : 64 * vector + len(handler)] = handler
        struct.pack_into("<HHHH", gates, 8 * vector, address & 0xFFFF, CODE_SELECTOR, GATE, address >> 16)
    start = b"\x0f\x01\x15" + word(gdt + 24) + b"\x0f\x01\x1d" + word(gdt + 30)
    start += b"\xea" + word(CODE + len(start) + 7) + struct.pack("<H", CODE_SELECTOR)
    start += b"\x66\xb8\x10\x00\x8e\xd8\x8e\xc0\x8e\xd0"  # mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax
    start += b"\xbc" + word(STACK) + LAPIC_ON
    segments = (
        multiboot.Segment(CODE, start + body, len(start + body)),
        multiboot.Segment(TABLES, descriptors, len(descriptors)),
        multiboot.Segment(idt, bytes(gates), len(gates)),
        multiboot.Segment(HANDLERS, bytes(code), len(code)),
        multiboot.Segment(COUNTS, b"", 0x2000),
    )
    return multiboot.Kernel(CODE, segments, "bare")


def elf(what: multiboot.Kernel) -> bytes:
    """Write a kernel as the multiboot ELF that QEMU reads."""
    table, header = 52, struct.pack("<III", multiboot.HEADER_MAGIC, 0, -multiboot.HEADER_MAGIC & 0xFFFFFFFF)
    at = table + 32 * len(what.segments)
    image = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    image += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, what.entry, table, 0, 0, 52, 32, len(what.segments), 0, 0, 0)
    data = header
    for segment in what.segments:
        length = len(segment.data)
        image += struct.pack("<8I", 1, at + len(data), segment.address, segment.address, length, segment.size, 7, 4)
        data += segment.data
    return image + data


class Guest:
    """A machine in this process that runs a program.

    Attributes
    ----------
    told
        What the guest wrote to the port `TELL`.
    resets
        How many times it reset itself.
    broken
        Why it could not go on, None while all is well.
    """

    def __init__(
        self,
        body: bytes,
        handlers: Mapping[int, bytes] | None = None,
        *,
        native_hook: bool | None = None,
        before: Callable[[Machine], object] = lambda machine: None,
        **hooks: Any,
    ) -> None:
        self.told: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.resets = 0
        self.broken: str | None = None
        self._end = threading.Event()
        self._ram = mmap.mmap(-1, RAM_BYTES)
        self._view = memoryview(self._ram)
        self.cpu = UnicornCpu(native_hook=native_hook)
        self.machine = Machine(self.cpu, self._view, kernel(body, handlers), Hooks(**hooks))
        self.machine.ports.add(Range(TELL, 4, lambda offset, size: 0, lambda offset, size, value: self.told.put(value)))
        before(self.machine)
        self.cpu.attach(self.machine, whole_machine=True)
        self.runner = Runner(self.cpu, self._was_reset, self._broke)
        self.runner.start(self.machine)
        self.do(self.runner.resume)

    def _was_reset(self) -> None:
        self.resets += 1
        self.runner.pause()
        self._end.set()

    def _broke(self, reason: str) -> None:
        self.broken = reason
        self._end.set()

    def do(self, function: Callable[[], Any]) -> Any:
        """Do something on the vCPU's thread."""
        return self.runner.call(function).result(LIMIT_S)

    def tells(self) -> int:
        """Wait for the next word at the port."""
        try:
            return self.told.get(timeout=LIMIT_S)
        except queue.Empty:
            raise AssertionError(f"the guest said nothing; {self.runner.state}, {self.broken}") from None

    def ends(self) -> None:
        """Wait until it reset itself or could not go on."""
        assert self._end.wait(LIMIT_S)

    def word(self, address: int) -> int:
        value: int = struct.unpack_from("<I", self._ram, address)[0]
        return value

    def count(self, vector: int) -> int:
        return self.word(COUNTS + 4 * vector)

    def until(self, condition: Callable[[], bool]) -> None:
        """Look again and again, giving way to the guest."""
        deadline = time.monotonic() + LIMIT_S
        never = threading.Event()
        while not condition():
            assert time.monotonic() < deadline, f"not in time; {self.runner.state}, {self.broken}"
            never.wait(0.001)

    def register(self, name: str) -> int:
        """Read a register between two blocks."""
        from unicorn import x86_const

        number = getattr(x86_const, f"UC_X86_REG_{name}")
        return int(self.do(lambda: self.cpu.user_uc.reg_read(number)))

    def pause(self) -> None:
        self.do(self.runner.pause)
        assert self.runner.state is RunState.PAUSED

    def interrupt(self, vector: int) -> None:
        """Send a message, from outside."""
        self.do(lambda: self.machine.message(lapic.BASE, vector))

    def close(self) -> None:
        self.runner.close()
        self._view.release()
        self.machine.ram.release()
        self._ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
