"""Interrupts of a 64-bit x86 on a user's engine.

Ref: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 3, 6.14 (interrupt handling in 64-bit mode).
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, ClassVar

from .. import engine as uc
from ..cpu import INTERRUPT_FLAG as IF
from ..cpu import NESTED_FLAG, PAGING, TRAP_FLAG, TripleFaultError, UnicornCpu

TSS_STACKS = 0x24
"""Where a 64-bit TSS has the first of its seven interrupt stacks."""


class X86_64Cpu(UnicornCpu):  # noqa: N801 - the architecture's name
    """A 64-bit x86: 16-byte gates, an aligned stack, five words for every interrupt."""

    kinds: ClassVar = ("x86-64",)
    _virtual_mask = (1 << 64) - 1

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        kind = self.engine.kind
        self._state = uc.Registers("RIP", "RSP", "RFLAGS", "CS", "IDTR", "SS", kind=kind)
        self._taken = uc.Registers("RSP", "RFLAGS", kind=kind)
        self._instruction = uc.Registers("RIP", kind=kind)
        self._words = ctypes.create_string_buffer(40)

    def deliver(self, vector: int, *, halted: bool, external: bool = True) -> int | None:
        """Enter an interrupt handler: push SS, RSP, RFLAGS, CS and RIP, go to the gate; see `UnicornCpu.deliver`."""
        del external
        rip, rsp, rflags, cs, _, ss = self._state.read(self._handle)
        if cs & 3:
            raise TripleFaultError("the guest runs in ring 3; this CPU enters handlers from ring 0 only")
        taken_at = self._taken_at(rip, rflags, halted=halted)
        if taken_at is None:
            return None
        idtr = self._state.idtr
        if vector * 16 + 15 > idtr.limit:
            raise TripleFaultError(f"vector {vector} lies behind the interrupt table (limit {idtr.limit:#x})")
        gate = self.read_virtual(idtr.base + 16 * vector, 16)
        if gate is None or not gate[5] & 0x80 or gate[5] & 0x0E != 0x0E:
            raise TripleFaultError(f"vector {vector} has no gate in the interrupt table at {idtr.base:#x}")
        stack = (self._interrupt_stack(gate[4] & 7) if gate[4] & 7 else rsp) & -16
        self._words.raw = struct.pack("<5Q", taken_at, cs, rflags, rsp, ss)
        if uc.vmem_write(self._handle, stack - 40, uc.WRITE, ctypes.addressof(self._words), 40):
            raise TripleFaultError(f"the stack at {stack - 40:#x} cannot take the frame of vector {vector}")
        is_interrupt_gate = gate[5] & 1 == 0
        self._taken.write(
            self._handle, stack - 40, rflags & ~(TRAP_FLAG | NESTED_FLAG | (IF if is_interrupt_gate else 0))
        )
        selector = gate[2] | gate[3] << 8
        if selector != cs:
            self._segment.write(self._handle, selector)
        low, _, middle, high = struct.unpack_from("<HIHI", gate)
        return int(low | middle << 16 | high << 32)

    def _interrupt_stack(self, number: int) -> int:
        base = self.engine.task_base
        words = self.read_virtual(base + TSS_STACKS + 8 * (number - 1), 8)
        if words is None:
            raise TripleFaultError(f"interrupt stack {number} cannot be read from the TSS at {base:#x}")
        return int.from_bytes(words, "little")

    def _paging_off(self) -> Any:
        """Switch translation off; leaving long mode is undone by returning to the whole state, not by CR0 alone."""
        control: int = self._control.read(self._handle)[0]
        if not control & PAGING:
            return None
        before = self.save()
        self._control.write(self._handle, control & ~PAGING)
        return before

    def _paging_on(self, before: Any) -> None:
        if before is not None:
            self.engine.return_to(before)
