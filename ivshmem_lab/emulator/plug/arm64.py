"""Interrupts of a 64-bit Arm on a user's engine: the IRQ exception at EL1.

Ref: Arm Architecture Reference Manual for A-profile (DDI 0487), D1.3 (exceptions), C5.2 (special-purpose registers).
Measured on Unicorn 2.1.4: entering the handler inside the block hook doubles and loses nothing (40 001 interrupts
in a loop of ``[memory] += 1; register += 1``; tests/emulator/test_plug_interrupts.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import DeviceError
from ..enginecpu import EngineCpu

if TYPE_CHECKING:
    from collections.abc import Callable

SPSR_EL1 = (4, 0, 3, 0, 0)
IRQ_MASKED = 0x80
CONDITIONS = 0xF0000000
HANDLER = 0x3C5
"""EL1h with debug, SError, IRQ and FIQ masked: what PSTATE becomes, beside the condition flags."""
EL1H, IRQ_FROM_EL1H = 0x5, 0x280


class Arm64Cpu(EngineCpu):
    """A 64-bit Arm that takes IRQs at EL1, with SP_EL1."""

    def __init__(
        self, user_uc: Any, *, native_hook: bool | None = None, on_kick: Callable[[], None] | None = None
    ) -> None:
        super().__init__(user_uc, native_hook=native_hook, on_kick=on_kick)
        kind = self.engine.kind
        self._pstate, self._elr, self._vbar = map(kind.register, ("PSTATE", "ELR_EL1", "VBAR_EL1"))

    def deliver(self, number: int, *, halted: bool) -> int | None:
        """Take an IRQ: ELR_EL1 and SPSR_EL1 get PC and PSTATE, execution goes on at VBAR_EL1 + 0x280.

        Returns
        -------
        int or None
            The handler's address; None while PSTATE.I masks interrupts. After WFI the run goes on even so
            (D1.6.2: a masked interrupt wakes), then this is the present address.

        Raises
        ------
        DeviceError
            When the guest runs at EL0, or at EL1 with SP_EL0.
        """
        del number
        uc = self.engine.uc
        pstate = uc.reg_read(self._pstate)
        pc = self.engine.pc
        if pstate & IRQ_MASKED:
            return pc if halted else None
        if pstate & 0x1F != EL1H:
            raise DeviceError(
                f"the guest runs in mode {pstate & 0x1F:#x}; interrupts are delivered to EL1h (0x5), where the engine starts"
            )
        uc.reg_write(self._elr, pc)
        self.engine.write_system(SPSR_EL1, pstate)
        uc.reg_write(self._pstate, pstate & CONDITIONS | HANDLER)
        return int(uc.reg_read(self._vbar)) + IRQ_FROM_EL1H
