"""The vCPU thread: run, halt, take interrupts, and do everything that touches the machine between runs."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import VmError
from . import cpustate
from .cpu import INVALID_OPCODE, TripleFaultError, UnicornCpu
from .engine import INVALID_INSTRUCTION, error_text
from .events import Events

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..pc.lapic import Lapic
    from ..pc.machine import Machine

log = logging.getLogger("ivshmem_lab.emulator")

T = TypeVar("T")

UNWATCHED_BLOCKS = 4096
"""Blocks that a guest runs after it was woken before the watcher is armed: most go back to sleep before."""
RETRY_BLOCKS = 16
LOOKS_AFTER_EXCEPTION = 64
RETRY_LIMIT = 1024
"""Blocks to let pass before asking again whether a waiting interrupt can be taken: doubled each time, up to here."""


class RunState(Enum):
    """QMP's ``RunState``, as far as this machine has them."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INTERNAL_ERROR = "internal-error"
    INMIGRATE = "inmigrate"
    """Waits for what another process sends."""
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    """Runs elsewhere now; ``cont`` would make two of it."""


class Runner:
    """Owns the CPU's thread.

    Parameters
    ----------
    cpu
        The CPU.
    on_guest_reset
        Called on the vCPU thread when the guest reset itself (triple fault).
    on_error
        Called on the vCPU thread when the guest cannot go on, with the reason.
    boots_late
        Firmware and kernel begin when the guest first runs, and find what was done to the machine before.
    has_guest
        False: nothing ever runs (``-accel qtest``).

    Notes
    -----
    The machine, its devices and the engine are touched on this thread only. Others use `call`.
    """

    def __init__(
        self,
        cpu: UnicornCpu,
        on_guest_reset: Callable[[], None] = lambda: None,
        on_error: Callable[[str], None] = lambda reason: None,
        *,
        boots_late: bool = False,
        has_guest: bool = True,
    ) -> None:
        self.cpu = cpu
        self.state = RunState.PRELAUNCH
        self.events = Events(self._kick)
        self.interrupts_taken = 0
        self._on_guest_reset = on_guest_reset
        self._on_error = on_error
        self._machine: Machine | None = None
        self._boots_late = boots_late
        self._booted = False
        self._has_guest = has_guest
        self._fresh = cpu.save()
        self._pc = 0
        self._halted = False
        self._watched = False
        self._after_exception = 0
        self._quit = False
        self._thread = threading.Thread(target=self._main, name="vcpu", daemon=True)

    def start(self, machine: Machine, *, incoming: bool = False) -> None:
        """Begin the thread, paused at the machine's first instruction, or with nothing to run until `load`."""
        self._machine = machine
        if incoming:
            self.state = RunState.INMIGRATE
        elif not self._boots_late:
            self._boot()
        self._thread.start()

    def _kick(self) -> None:
        self.cpu.flag.kick = 1

    # -- from any thread -----------------------------------------------------------------------------

    def call(self, function: Callable[[], T]) -> concurrent.futures.Future[T]:
        """Have something done on the vCPU thread, between two guest instructions.

        Returns
        -------
        concurrent.futures.Future
            Its result or its exception.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                future.set_exception(error)

        if self._quit:
            future.set_exception(VmError("the machine has ended"))
        else:
            self.events.post(run)
        return future

    def end(self) -> None:
        """End the thread; the guest stops where it is. Devices can then be taken apart."""

        def leave() -> None:
            self._quit = True

        if self._thread.is_alive():
            self.events.post(leave)
            self._thread.join()
        self._quit = True

    def close(self) -> None:
        """Give everything back, after `end`."""
        self.end()
        self.events.close()
        self.cpu.close()

    # -- on the vCPU thread --------------------------------------------------------------------------

    def resume(self) -> None:
        """Let the guest run."""
        self.state = RunState.RUNNING

    def pause(self) -> None:
        """Hold the guest."""
        self.state = RunState.PAUSED

    def reset(self) -> None:
        """Reset machine and CPU; the kernel starts again."""
        assert self._machine is not None
        self._machine.reset()
        self.cpu.restore(self._fresh)
        self._booted = False
        if not self._boots_late:
            self._boot()

    def save(self) -> dict[str, Any]:
        """Return the CPU as plain values, between two instructions."""
        if not self._booted and self._has_guest:
            self._boot()
        registers = cpustate.save(self.cpu)
        if not self._halted:
            # Where it goes on; the engine may still stand where it was interrupted.
            registers["EIP"] = self._pc
        return {"registers": registers, "halted": self._halted, "put_off_at": self.cpu.put_off_at}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `save` returned, when memory is there.

        Raises
        ------
        DeviceError
            When the registers are damaged.
        """
        cpustate.load(self.cpu, state["registers"])
        self._halted = bool(state["halted"])
        self.cpu.put_off_at = state["put_off_at"]
        self._pc = self.cpu.pc
        self._booted = True

    def _boot(self) -> None:
        assert self._machine is not None
        start = self._machine.start()
        self.cpu.start_at(start.eip, start.eax, start.ebx)
        self._pc = start.eip
        self._halted = False
        self._booted = True

    def _main(self) -> None:
        assert self._machine is not None
        while not self._quit:
            try:
                self._serve(self._machine.lapic)
            except BaseException as error:  # noqa: BLE001 - whoever waits for this thread must get an answer
                self._broken(f"a device failed: {error!r}", error)

    def _serve(self, lapic: Lapic) -> None:
        """Run and rest, until the end or an error of ours."""
        events = self.events
        retry = RETRY_BLOCKS
        while not self._quit:
            if self.state is not RunState.RUNNING or not self._has_guest:
                events.dispatch(None)
                continue
            if not self._booted:
                self._boot()
            waiting = lapic.requested and self._interrupt(lapic.pending())
            if self._halted:
                events.dispatch(None)
            elif waiting:
                self._run(1 if self._after_exception or self.cpu.put_off_at is not None else retry)
                self._after_exception = max(0, self._after_exception - 1)
                retry = min(2 * retry, RETRY_LIMIT)
            else:
                self._run(0 if self._watched else UNWATCHED_BLOCKS)
                retry = RETRY_BLOCKS

    def _interrupt(self, vector: int | None) -> bool:
        """Deliver a pending vector; True when it has to wait for the guest."""
        if vector is None:
            return False
        try:
            target = self.cpu.deliver(vector, halted=self._halted)
        except TripleFaultError as fault:
            self._triple_fault(fault)
            return False
        if target is None:
            return True
        assert self._machine is not None
        self._machine.lapic.acknowledge(vector)
        self.interrupts_taken += 1
        self._pc, self._halted = target, False
        return False

    def _run(self, blocks: int) -> None:
        """Run for so many blocks, or, watched, without end (0)."""
        cpu, flag = self.cpu, self.cpu.flag
        fired = flag.fired
        flag.skip = blocks
        flag.kick = 1 if blocks else 0
        if self.events.posted:
            # Whoever posts after this look sets the flag after us.
            self.events.dispatch(0)
            return
        if blocks:
            code = cpu.run(self._pc)
        else:
            self.events.arm()
            code = cpu.run(self._pc)
            self.events.disarm()
        if not code and flag.fired == fired and cpu.exception is None and cpu.failure is None:
            # Only an interrupt goes on from here, and that reads where the CPU stands.
            self._halted, self._watched = True, False
            return
        self._pc = cpu.pc
        if cpu.failure is not None:
            self._broken(f"a device failed: {cpu.failure!r}", cpu.failure)
        elif cpu.exception is not None:
            self._exception(cpu.exception)
        elif code == INVALID_INSTRUCTION:
            self._exception(INVALID_OPCODE)
        elif code:
            self._broken(f"the guest cannot go on at {self._pc:#x}: {error_text(code)}", None)
        else:
            self._watched = True
            self.events.dispatch(0)

    def _exception(self, vector: int) -> None:
        try:
            target = self.cpu.deliver(vector, halted=False, external=False)
        except TripleFaultError as fault:
            self._triple_fault(fault)
        else:
            assert target is not None
            self._pc = target
            # A guest that only takes exceptions has its interrupts off whenever a run ends: look at each block.
            self._after_exception = LOOKS_AFTER_EXCEPTION
        self.events.dispatch(0)

    def _triple_fault(self, fault: TripleFaultError) -> None:
        assert self._machine is not None
        self._machine.guest_error("triple fault", f"at {self._pc:#x}: {fault}")
        self._on_guest_reset()

    def _broken(self, reason: str, cause: BaseException | None) -> None:
        log.error("%s", reason, exc_info=cause)
        self.cpu.failure = None
        self.state = RunState.INTERNAL_ERROR
        self._on_error(reason)
