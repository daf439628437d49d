"""The Unicorn engine as a 32-bit x86 CPU: memory, ports, interrupt frames.

Rules that were measured on Unicorn 2.1.4 and hold everything together:

1. The guest is stopped only in a block hook or an interrupt hook; never by ``timeout`` or from another thread.
2. One thread makes all engine calls. Inside a port access memory may be mapped; unmapping waits for the next
   block, with paging off: the engine looks for code at the *virtual* address of what goes, and under NX that
   look-up raises a page fault in the guest.
3. Callbacks never raise: a failure is kept, the guest reads ones, and the next block stops it.
4. A hook for unmapped memory makes every store of the guest ten times slower while it is there: it is added for
   the one instruction that needs it.
5. HLT ends ``emu_start``; a run that ended without the hook having fired has halted.
6. An interrupt is not taken between ``sti`` and the instruction behind it (Intel SDM volume 2, STI).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import DeviceError
from . import engine as uc
from .enginecpu import PAGE_BYTES, EngineCpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..pc.board import Board

INTERRUPT_FLAG, TRAP_FLAG, NESTED_FLAG = 0x200, 0x100, 0x4000
PAGING = 0x80000000
HLT, STI = 0xF4, 0xFB
INVALID_OPCODE = 6
WITH_ERROR_CODE = frozenset({8, 10, 11, 12, 13, 14, 17})
BOOT_STACK = 0x7000
HOLE_LIMIT = 64
"""Pages of nothing that stay mapped for a guest that touches them."""


class TripleFaultError(DeviceError):
    """The CPU could enter no handler: a PC resets itself."""


class UnicornCpu(EngineCpu):
    """One 32-bit x86 CPU.

    Parameters
    ----------
    user_uc
        A user's ``unicorn.Uc``, or None to make one.
    native_hook
        See `BlockHook`.
    on_kick
        What the block hook calls when the flag is set; None stops the run.
    """

    kinds: ClassVar = ("x86-32",)
    """Kinds of engines that it runs on."""
    _virtual_mask = 0xFFFFFFFF

    def __init__(
        self,
        user_uc: Any = None,
        *,
        native_hook: bool | None = None,
        on_kick: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(user_uc, native_hook=native_hook, on_kick=on_kick)
        if self.engine.kind.name not in self.kinds:
            raise DeviceError("the engine is not a 32-bit x86; make it with Uc(UC_ARCH_X86, UC_MODE_32)")
        self.exception: int | None = None
        """Vector of the exception or software interrupt that ended the last run."""
        self.put_off_at: int | None = None
        """Where an interrupt was just put off because of a ``sti`` (rule 6); it can be taken one block later."""
        self._state = uc.Registers("EIP", "ESP", "EFLAGS", "CS", "IDTR")
        self._taken = uc.Registers("ESP", "EFLAGS")
        self._segment = uc.Registers("CS")
        self._control = uc.Registers("CR0")
        self._instruction = uc.Registers("EIP")
        self._entry = uc.Registers("EAX", "EBX", "ESP", "EFLAGS", "EIP")
        self._frame = (ctypes.c_uint32 * 4)()
        self._frame_end = ctypes.addressof(self._frame) + 16
        self._scratch = ctypes.create_string_buffer(16)
        self._scratch_address = ctypes.addressof(self._scratch)
        self._callbacks = (
            uc.PortIn(self._in),
            uc.PortOut(self._out),
            uc.Interrupt(self._interrupted),
            uc.Unmapped(self._unmapped),
        )

    def attach(self, board: Board, *, whole_machine: bool) -> None:
        """Let a board answer memory-mapped registers and ports.

        Parameters
        ----------
        board
            The board.
        whole_machine
            True when exceptions and unmapped memory are ours, too: false on a user's engine, who calls
            ``emu_start`` at any time, so that unmapping always waits for a block's start.
        """
        super().attach(board, whole_machine=whole_machine)
        port_in, port_out, interrupt, _ = self._callbacks
        self.engine.hook(uc.HOOK_INSTRUCTION, port_in, instruction=uc.INSTRUCTION_IN)
        self.engine.hook(uc.HOOK_INSTRUCTION, port_out, instruction=uc.INSTRUCTION_OUT)
        if whole_machine:
            self.engine.hook(uc.HOOK_INTERRUPT, interrupt)

    # -- callbacks from the engine -------------------------------------------------------------------

    def _in(self, engine: int, port: int, size: int, user_data: int | None) -> int:
        try:
            return self._board.read_port(port, size)  # type: ignore[union-attr]
        except BaseException as error:  # noqa: BLE001
            self._failed(error)
            return (1 << 8 * size) - 1

    def _out(self, engine: int, port: int, size: int, value: int, user_data: int | None) -> None:
        try:
            board: Board = self._board  # type: ignore[assignment]
            board.write_port(port, size, value)
            if board.lapic.requested:
                self.stop_soon()
        except BaseException as error:  # noqa: BLE001
            self._failed(error)

    def _interrupted(self, engine: int, number: int, user_data: int | None) -> None:
        self.exception = number
        uc.emu_stop(engine)

    def _unmapped(self, engine: int, kind: int, address: int, size: int, value: int, user_data: int | None) -> bool:
        """Answer an access to nothing as a bus does: the page becomes registers that nobody answers."""
        self.stop_soon()
        try:
            for page in sorted({address & -PAGE_BYTES, (address + size - 1) & -PAGE_BYTES}):
                if page in self._shown:
                    continue
                if len(self._holes) >= HOLE_LIMIT:
                    self.unmap(self._holes.pop(0), PAGE_BYTES)
                self.engine.map_mmio(page, PAGE_BYTES, self._read_address, self._write_address)
                self._shown[page] = (PAGE_BYTES, None)
                self._holes.append(page)
        except BaseException as error:  # noqa: BLE001
            self._failed(error)
            return False
        return True

    # -- running -------------------------------------------------------------------------------------

    def run(self, pc: int) -> int:
        """Run from `pc` until HLT, the flag, an exception or an error.

        Returns
        -------
        int
            The engine's error code, 0 for none.
        """
        self.exception = None
        self._running = True
        code: int = uc.emu_start(self._handle, pc, uc.NEVER, 0, 0)
        if code in uc.UNMAPPED:
            # The same instruction again, now with somebody to answer; the next block stops the run.
            hook = self.engine.hook(uc.HOOK_UNMAPPED, self._callbacks[-1])
            code = uc.emu_start(self._handle, self.pc, uc.NEVER, 0, 0)
            self.engine.unhook(hook)
        self._running = False
        self._stopped()
        return code

    def _stopped(self) -> None:
        if self.exception is not None:
            self.engine.forget_exception()
        if self._leaving:
            self.settle()

    def _paging_off(self) -> int:
        """Switch address translation off; returns what `_paging_on` takes."""
        control: int = self._control.read(self._handle)[0]
        self._control.write(self._handle, control & ~PAGING)
        return control

    def _paging_on(self, before: Any) -> None:
        self._control.write(self._handle, before)

    @property
    def pc(self) -> int:
        """The instruction pointer between runs."""
        return self._instruction.read(self._handle)[0]  # type: ignore[no-any-return]

    def start_at(self, eip: int, eax: int, ebx: int) -> None:
        """Put the CPU into the state in which a boot loader leaves it."""
        self._entry.write(self._handle, eax, ebx, BOOT_STACK, 2, eip)

    def save(self) -> Any:
        """Return the CPU's state, for `restore`."""
        return self.engine.save()

    def restore(self, state: Any) -> None:
        """Return to a saved CPU state, after memory has changed."""
        self.engine.restore(state)

    # -- interrupts ----------------------------------------------------------------------------------

    def deliver(self, vector: int, *, halted: bool, external: bool = True) -> int | None:
        """Enter an interrupt handler through the IDT: push EFLAGS, CS and EIP, go to the gate.

        Parameters
        ----------
        vector
            0 to 255.
        halted
            The CPU stands behind a HLT.
        external
            False for exceptions and software interrupts: they ask no interrupt flag.

        Returns
        -------
        int or None
            Where to go on, or None when the CPU does not take it now (interrupts off, or just after ``sti``).

        Raises
        ------
        TripleFaultError
            When the gate or the stack cannot be used.
        """
        eip, esp, eflags, cs, _ = self._state.read(self._handle)
        if cs & 3:
            raise TripleFaultError("the guest runs in ring 3; this CPU enters handlers from ring 0 only")
        if external:
            taken_at = self._taken_at(eip, eflags, halted=halted)
            if taken_at is None:
                return None
            eip = taken_at
        idtr = self._state.idtr
        if vector * 8 + 7 > idtr.limit:
            raise TripleFaultError(f"vector {vector} lies behind the interrupt table (limit {idtr.limit:#x})")
        gate = self.read_virtual(idtr.base + 8 * vector, 8)
        if gate is None or not gate[5] & 0x80 or gate[5] & 0x0E != 0x0E:
            raise TripleFaultError(f"vector {vector} has no gate in the interrupt table at {idtr.base:#x}")
        # An error code (always 0: the engine does not tell it), EIP, CS, EFLAGS.
        frame = self._frame
        frame[1], frame[2], frame[3] = eip & 0xFFFFFFFF, cs, eflags & 0xFFFFFFFF
        size = 16 if not external and vector in WITH_ERROR_CODE else 12
        esp = esp - size & 0xFFFFFFFF
        if uc.vmem_write(self._handle, esp, uc.WRITE, self._frame_end - size, size):
            raise TripleFaultError(f"the stack at {esp:#x} cannot take the frame of vector {vector}")
        is_interrupt_gate = gate[5] & 1 == 0
        eflags &= ~(TRAP_FLAG | NESTED_FLAG | (INTERRUPT_FLAG if is_interrupt_gate else 0))
        self._taken.write(self._handle, esp, eflags)
        selector = gate[2] | gate[3] << 8
        if selector != cs:
            self._segment.write(self._handle, selector)
        return gate[0] | gate[1] << 8 | gate[6] << 16 | gate[7] << 24

    def _taken_at(self, eip: int, eflags: int, *, halted: bool) -> int | None:
        """Return where the CPU goes on after an interrupt that it takes now, None when it does not take it."""
        put_off_at, self.put_off_at = self.put_off_at, None
        if not eflags & INTERRUPT_FLAG:
            return None
        if not halted:
            before, here = self._bytes_around(eip)
            if before == STI and here != HLT and put_off_at != eip:
                # For one block: a loop may begin right behind its sti, and then always stands there.
                self.put_off_at = eip
                return None
            if here == HLT:
                eip += 1
        return eip

    def _bytes_around(self, eip: int) -> tuple[int, int]:
        both = self.read_virtual(eip - 1, 2)
        return (both[0], both[1]) if both else (0, 0)

    def read_virtual(self, address: int, size: int) -> bytes | None:
        """Read up to 16 bytes at a virtual address, or None where nothing is mapped."""
        if uc.vmem_read(self._handle, address & self._virtual_mask, uc.READ, self._scratch_address, size):
            return None
        return self._scratch.raw[:size]
