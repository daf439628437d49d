"""Interrupts of a 64-bit RISC-V on a user's engine: the machine external interrupt.

Ref: The RISC-V Instruction Set Manual, volume II (privileged architecture), 3.1.6 (mstatus), 3.1.7 (mtvec),
3.1.9 (mip and mie), 3.3.3 (WFI). Measured on Unicorn 2.1.4: entering the handler inside the block hook doubles and
loses nothing (40 001 interrupts; tests/emulator/test_plug_interrupts.py). Writing ``mip`` does nothing there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import DeviceError
from ..enginecpu import EngineCpu

if TYPE_CHECKING:
    from collections.abc import Callable

MACHINE_EXTERNAL = 11
CAUSE = 1 << 63 | MACHINE_EXTERNAL
MIE, MPIE, MPP = 0x8, 0x80, 0x1800
MACHINE_MODE = 3


class RiscV64Cpu(EngineCpu):
    """A 64-bit RISC-V that takes machine external interrupts in machine mode."""

    def __init__(
        self, user_uc: Any, *, native_hook: bool | None = None, on_kick: Callable[[], None] | None = None
    ) -> None:
        super().__init__(user_uc, native_hook=native_hook, on_kick=on_kick)
        names = ("MSTATUS", "MIE", "MTVEC", "MEPC", "MCAUSE", "PRIV")
        self._status, self._enable, self._vector, self._back, self._cause, self._mode = map(
            self.engine.kind.register, names
        )

    def deliver(self, number: int, *, halted: bool) -> int | None:
        """Take the interrupt: mepc, mcause and mstatus as hardware sets them; execution goes on at mtvec.

        Returns
        -------
        int or None
            The handler's address; None while mstatus.MIE or mie.MEIE is off. After WFI the run goes on at the
            present address when mie.MEIE alone is on (3.3.3: WFI heeds mie and not mstatus).

        Raises
        ------
        DeviceError
            When the guest runs in supervisor or user mode.
        """
        del number
        uc = self.engine.uc
        status, pc = uc.reg_read(self._status), self.engine.pc
        if not uc.reg_read(self._enable) >> MACHINE_EXTERNAL & 1:
            return None
        if not status & MIE:
            return pc if halted else None
        if uc.reg_read(self._mode) != MACHINE_MODE:
            raise DeviceError("the guest runs below machine mode; interrupts are delivered in machine mode only")
        uc.reg_write(self._back, pc)
        uc.reg_write(self._cause, CAUSE)
        uc.reg_write(self._status, status & ~MIE | MPIE | MPP)
        vector = uc.reg_read(self._vector)
        return int((vector & ~3) + (4 * MACHINE_EXTERNAL if vector & 3 == 1 else 0))
