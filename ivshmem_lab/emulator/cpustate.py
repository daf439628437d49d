"""The CPU as named values, to be carried to another process, and back into an engine.

Ref: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, section 3.4 and chapters 8 and 10, volume
3, section 2.5 (control registers), volume 4 (model-specific registers).
A segment register is its selector: what it means is read from the descriptor table in memory, as a CPU does when the
register is loaded. So memory comes first. A table that was changed since then counts as it is now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import DeviceError

if TYPE_CHECKING:
    from .cpu import UnicornCpu

GENERAL = ("EAX", "EBX", "ECX", "EDX", "ESI", "EDI", "EBP", "ESP", "EIP", "EFLAGS")
CONTROL = ("CR3", "CR4", "CR0", "CR2")
"""In the order in which they are written: paging begins with CR0."""
TABLES = ("GDTR", "IDTR", "LDTR", "TR")
SEGMENTS = ("CS", "SS", "DS", "ES", "FS", "GS")
DEBUG = ("DR0", "DR1", "DR2", "DR3", "DR6", "DR7")
X87 = ("FPCW", "FPSW", "FPTAG")
WIDE = tuple(f"XMM{number}" for number in range(8))
FLOATS = tuple(f"FP{number}" for number in range(8))
MSRS = {
    "EFER": 0xC0000080,
    "SYSENTER_CS": 0x174,
    "SYSENTER_ESP": 0x175,
    "SYSENTER_EIP": 0x176,
    "PAT": 0x277,
}
ENTRY_BYTES = 8

CpuState = dict[str, Any]


def save(cpu: UnicornCpu) -> CpuState:
    """Return the registers: name to number; tables and x87 registers are lists of numbers."""
    engine = cpu.engine
    state: CpuState = {}
    for name in (*GENERAL, *CONTROL, *TABLES, *SEGMENTS, *DEBUG, *X87, "MXCSR", *WIDE, *FLOATS):
        value = engine.read_register(name)
        state[name] = list(value) if isinstance(value, tuple) else value
    state |= {name: engine.read_msr(number) for name, number in MSRS.items()}
    return state


def load(cpu: UnicornCpu, state: CpuState) -> None:
    """Write registers into an engine that has not run yet and has its memory already.

    Raises
    ------
    DeviceError
        When a register is missing, is no number, or names a segment that the table in memory does not have.
    """
    engine = cpu.engine
    values = {name: _checked(name, state) for name in save(cpu)}
    for name, number in MSRS.items():
        engine.write_msr(number, values[name])
    for name in (*TABLES[:2], *CONTROL, *TABLES[2:], *SEGMENTS, *GENERAL, *DEBUG, *X87, "MXCSR", *WIDE, *FLOATS):
        before = engine.read_register(name)
        # An engine that has never run computes with 80 bits although FPCW reads 0: writing that 0 would change it.
        if values[name] != before:
            if name in SEGMENTS:
                _check_segment(cpu, name, values)
            engine.write_register(name, values[name])


def _checked(name: str, state: CpuState) -> Any:
    value = state.get(name)
    parts = {**dict.fromkeys(TABLES, 4), **dict.fromkeys(FLOATS, 2)}.get(name)
    numbers = [value] if parts is None else value
    bits = 128 if name in WIDE else 64
    if not isinstance(numbers, list) or (parts is not None and len(numbers) != parts):
        raise DeviceError(f"CPU register {name} is {value!r}; it has to be {parts} numbers")
    for number in numbers:
        if type(number) is not int or not 0 <= number < 1 << bits:
            raise DeviceError(f"CPU register {name} is {value!r}; it has to be a number of {bits} bits")
    return value if parts is None else tuple(numbers)


def _check_segment(cpu: UnicornCpu, name: str, values: dict[str, Any]) -> None:
    """Refuse a selector whose descriptor cannot be read: loading it would be a fault of the engine's own."""
    selector = values[name]
    _, base, limit, _ = values["LDTR" if selector & 4 else "GDTR"]
    offset = selector & ~7
    if offset + ENTRY_BYTES - 1 > limit or cpu.read_virtual(base + offset, ENTRY_BYTES) is None:
        raise DeviceError(f"CPU register {name} is {selector:#x}, and the descriptor table has no such segment")
