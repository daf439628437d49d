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
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError
from . import engine as uc
from .blockhook import BlockHook, HookFunction

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..pc.board import Board

PAGE_BYTES = 4096
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


class UnicornCpu:
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

    def __init__(
        self,
        user_uc: Any = None,
        *,
        native_hook: bool | None = None,
        on_kick: Callable[[], None] | None = None,
    ) -> None:
        self.engine = uc.Engine(user_uc)
        self._handle = self.engine.handle
        self.failure: BaseException | None = None
        """The first exception of a callback: a fault of ours, never of the guest's."""
        self.exception: int | None = None
        """Vector of the exception or software interrupt that ended the last run."""
        self._board: Board | None = None
        self._running = False
        self._shown: dict[int, tuple[int, object]] = {}
        """What is mapped: address to (size, what keeps the memory alive; None for registers)."""
        self._leaving: list[tuple[int, int]] = []
        """(address, size) of what is to be unmapped at the next block."""
        self._coming: list[tuple[int, Callable[[], None]]] = []
        """(address, map) of what waits for those."""
        self._holes: list[int] = []
        """Pages of nothing that a guest touched, mapped as registers that nobody answers."""
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
        self._kicked = HookFunction(lambda *_: on_kick()) if on_kick else None
        self._hook = BlockHook(
            uc.address_of(self._kicked) if self._kicked else uc.emu_stop_address,
            (lambda _: on_kick()) if on_kick else uc.emu_stop,
            native=native_hook,
        )
        self.flag = self._hook.flag
        self.engine.hook(uc.HOOK_BLOCK, self._hook.address, ctypes.addressof(self.flag))
        # The engine holds only addresses: these must live as long as it calls them.
        self._read_callback = uc.MmioRead(self._read)
        self._write_callback = uc.MmioWrite(self._write)
        self._callbacks = (
            uc.PortIn(self._in),
            uc.PortOut(self._out),
            uc.Interrupt(self._interrupted),
            uc.Unmapped(self._unmapped),
        )
        self._read_address = uc.address_of(self._read_callback)
        self._write_address = uc.address_of(self._write_callback)

    @property
    def native_hook(self) -> bool:
        """Tell whether the block hook is machine code."""
        return self._hook.native

    @property
    def user_uc(self) -> Any:
        """The ``unicorn.Uc``."""
        return self.engine.uc

    def is_ours(self, address: int) -> bool:
        """Tell whether a mapping that starts here was made by us."""
        return address in self._shown

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
        self._board = board
        self._running = not whole_machine
        port_in, port_out, interrupt, _ = self._callbacks
        self.engine.hook(uc.HOOK_INSTRUCTION, port_in, instruction=uc.INSTRUCTION_IN)
        self.engine.hook(uc.HOOK_INSTRUCTION, port_out, instruction=uc.INSTRUCTION_OUT)
        if whole_machine:
            self.engine.hook(uc.HOOK_INTERRUPT, interrupt)

    def close(self) -> None:
        """Take our hooks and mappings out of the engine; a user's engine goes on without us."""
        self.engine.unhook_all()
        self._leaving = [(address, size_bytes) for address, (size_bytes, _) in self._shown.items()]
        self._coming.clear()
        self.settle()
        self._board = None

    # -- physical memory (pc.cpu.Cpu) ----------------------------------------------------------------

    def map_memory(self, address: int, memory: object, size_bytes: int) -> None:
        """Show a buffer; only memory at address 0, the machine's own, may hold code."""
        for hole in [hole for hole in self._holes if address <= hole < address + size_bytes]:
            self._holes.remove(hole)
            self.unmap(hole, PAGE_BYTES)
        if self._waits(address, size_bytes, lambda: self.map_memory(address, memory, size_bytes)):
            return
        # The ctypes object keeps the buffer alive, and unmappable, while the engine points into it.
        anchor = (ctypes.c_char * size_bytes).from_buffer(memory)  # type: ignore[arg-type]
        rights = uc.READ | uc.WRITE | (0 if address else uc.EXECUTE)
        self.engine.map_memory(address, size_bytes, rights, ctypes.addressof(anchor))
        self._shown[address] = (size_bytes, anchor)

    def map_mmio_page(self, address: int) -> None:
        """Send a page's accesses to the board."""
        if address in self._holes:
            self._holes.remove(address)
        elif (address, PAGE_BYTES) in self._leaving and self._shown[address][1] is None:
            self._leaving.remove((address, PAGE_BYTES))
        elif not self._waits(address, PAGE_BYTES, lambda: self.map_mmio_page(address)):
            self.engine.map_mmio(address, PAGE_BYTES, self._read_address, self._write_address)
            self._shown[address] = (PAGE_BYTES, None)

    def _waits(self, address: int, size_bytes: int, later: Callable[[], None]) -> bool:
        """Put a map off until what lies in its place has gone."""
        if any(address < start + size and start < address + size_bytes for start, size in self._leaving):
            self._coming.append((address, later))
            return True
        return False

    def unmap(self, address: int, size_bytes: int) -> None:
        """Hide what was shown; while the guest runs, at the next block."""
        for waiting in self._coming:
            if waiting[0] == address:
                self._coming.remove(waiting)  # it has never come
                return
        self._leaving.append((address, size_bytes))
        if self._running:
            self.stop_soon()
        else:
            self.settle()

    def settle(self) -> None:
        """Carry out what waited for the guest to be between two blocks."""
        if not self._leaving:
            return
        control = self._control.read(self._handle)[0]
        self._control.write(self._handle, control & ~PAGING)
        for address, size_bytes in self._leaving:
            self.engine.unmap(address, size_bytes)
            del self._shown[address]
        self._leaving.clear()
        self._control.write(self._handle, control)
        coming, self._coming = self._coming, []
        for _, arrive in coming:
            arrive()

    def stop_soon(self) -> None:
        """Have the run end at the next block; from callbacks of this CPU."""
        self.flag.skip = 0
        self.flag.kick = 1

    # -- callbacks from the engine -------------------------------------------------------------------

    def _failed(self, error: BaseException) -> None:
        self.failure = self.failure or error
        self.stop_soon()

    def _read(self, engine: int, offset: int, size: int, base: int | None) -> int:
        try:
            return self._board.read_mmio((base or 0) + offset, size)  # type: ignore[union-attr]
        except BaseException as error:  # noqa: BLE001 - must not travel through the engine (rule 3)
            self._failed(error)
            return (1 << 8 * size) - 1

    def _write(self, engine: int, offset: int, size: int, value: int, base: int | None) -> None:
        try:
            board: Board = self._board  # type: ignore[assignment]
            board.write_mmio((base or 0) + offset, size, value)
            if board.lapic.requested:
                # The write may have let an interrupt through (EOI, priority, unmasking).
                self.stop_soon()
        except BaseException as error:  # noqa: BLE001
            self._failed(error)

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

    @property
    def pc(self) -> int:
        """The instruction pointer between runs."""
        return self._instruction.read(self._handle)[0]  # type: ignore[no-any-return]

    def set_pc(self, pc: int) -> None:
        """Move the instruction pointer: inside a block hook, execution goes on there."""
        self.engine.jump(pc)

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

    def _bytes_around(self, eip: int) -> tuple[int, int]:
        both = self.read_virtual(eip - 1, 2)
        return (both[0], both[1]) if both else (0, 0)

    def read_virtual(self, address: int, size: int) -> bytes | None:
        """Read up to 16 bytes at a virtual address, or None where nothing is mapped."""
        if uc.vmem_read(self._handle, address & 0xFFFFFFFF, uc.READ, self._scratch_address, size):
            return None
        return self._scratch.raw[:size]
