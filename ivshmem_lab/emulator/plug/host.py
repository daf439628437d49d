"""What all devices on one engine share: CPU, board, events, guard."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ...errors import DeviceError, UsageError
from ...pc import firmware
from ..cpu import UnicornCpu
from ..engine import Engine
from ..enginecpu import EngineCpu
from ..events import Events
from .arm64 import Arm64Cpu
from .board import PlugBoard
from .guard import Guard
from .riscv64 import RiscV64Cpu
from .x86_64 import X86_64Cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from .device import PluggedDevice

RETRY_BLOCKS = 16
"""Blocks between two looks at an interrupt that the guest does not take yet."""

DELIVERING: dict[str, type[UnicornCpu | Arm64Cpu | RiscV64Cpu]] = {
    "x86-32": UnicornCpu,
    "x86-64": X86_64Cpu,
    "arm64": Arm64Cpu,
    "riscv64": RiscV64Cpu,
}
"""Kinds of engines whose interrupts are delivered; on others ``on_interrupt`` tells of them."""

WINDOWS = {"x86": (0xE0000000, firmware.WINDOW_END), "riscv": (0x40000000, 0x80000000)}
OTHER_WINDOW = (0x10000000, 0x3EFF0000)
"""PCI memory by family of registers: a PC's, and those of QEMU's ``virt`` boards (RISC-V; Arm and all others)."""


class Host:
    """One engine with devices.

    Parameters
    ----------
    uc
        The user's engine.
    on_message
        Gets interrupt messages; None has them delivered.
    native_hook
        See `BlockHook`.
    window
        (start, end) of the addresses that BARs get; None for the architecture's.
    """

    def __init__(
        self,
        uc: Any,
        on_message: Callable[[int, int], None] | None,
        *,
        native_hook: bool | None,
        window: tuple[int, int] | None,
    ) -> None:
        kind = Engine(uc).kind
        processor = DELIVERING.get(kind.name)
        if processor is None and on_message is None:
            raise UsageError(
                f"interrupts of a {kind.name} engine are not delivered, only those of {', '.join(DELIVERING)}; "
                "give on_interrupt= to be told of them"
            )
        self.deliverer = processor(uc, native_hook=native_hook, on_kick=self._kicked) if processor else None
        self.cpu: EngineCpu = self.deliverer or EngineCpu(uc, native_hook=native_hook, on_kick=self._kicked)
        self.is_x86 = kind.name in ("x86-32", "x86-64")
        self.devices: list[PluggedDevice] = []
        self.allocator = firmware.Allocator(*(window or WINDOWS.get(kind.registers, OTHER_WINDOW)))
        self.ecam: int | None = None
        self._stop = False
        self._told = 0
        try:
            self.board = PlugBoard(self.cpu, on_message, has_lapic=self.is_x86 and on_message is None)
            self.cpu.attach(self.board, whole_machine=False)
            self.events = Events(self._kick)
        except BaseException:
            self.cpu.close()
            raise
        self.guard = Guard(self)
        self.events.arm()

    def _kick(self) -> None:
        self.cpu.flag.kick = 1

    def _kicked(self) -> None:
        """At the start of a block: take news, unmap what waits, deliver one interrupt."""
        flag = self.cpu.flag
        flag.kick = 0
        flag.skip = 0
        try:
            self.cpu.settle()
            self.events.dispatch(0)
            self._deliver(halted=False)
            if self.board.pending() is not None:
                put_off = getattr(self.deliverer, "put_off_at", None) is not None
                flag.skip, flag.kick = 1 if put_off else RETRY_BLOCKS, 1
            self.events.arm()
        except BaseException as error:  # noqa: BLE001 - must not travel through the engine; emu_start's guard raises it
            self.cpu.failure = self.cpu.failure or error
        if self._stop or self.cpu.failure is not None:
            self._stop = False
            self.cpu.engine.stop()

    def _deliver(self, *, halted: bool) -> int | None:
        """Enter the handler of a pending interrupt; returns where execution goes on."""
        number = self.board.pending()
        if number is None or self.deliverer is None:
            return None
        target = self.deliverer.deliver(number, halted=halted)
        if target is not None:
            self.board.acknowledge(number)
            self.cpu.set_pc(target)
        return target

    def stop(self) -> None:
        """End the run at the next block, or the wait; from any thread."""
        self.events.post(self._ask_to_stop)

    def _ask_to_stop(self) -> None:
        self._stop = True

    def wait(self, timeout_s: float | None) -> int | None:
        """See `PluggedDevice.wait`."""
        self.raise_failure()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.cpu.settle()
        while self.events.dispatch(0):
            pass  # one event can make room for the next: a new vector's first interrupt
        while True:
            if self._stop:
                self._stop = False
                return None
            if self.board.told != self._told:
                self._told = self.board.told
                return self.cpu.pc
            target = self._deliver(halted=True)
            if target is not None:
                return target
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            self.events.dispatch(left_s)

    def raise_failure(self) -> None:
        """Raise what failed in a callback, once."""
        failure, self.cpu.failure = self.cpu.failure, None
        if isinstance(failure, KeyboardInterrupt):
            raise failure
        if failure is not None:
            raise DeviceError(f"a device failed while the guest ran: {failure}") from failure

    def close(self) -> None:
        """Give the engine back as it was."""
        self.guard.remove()
        self.events.close()
        self.cpu.close()


hosts: dict[int, Host] = {}
"""Engines with devices, by id of the ``unicorn.Uc`` (which the host keeps alive)."""
