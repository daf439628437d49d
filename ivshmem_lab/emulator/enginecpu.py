"""A Unicorn engine of any architecture: its physical memory, and the hook that reaches it at a block's start.

What a processor does with interrupts and ports is in the classes on top: `cpu` for 32-bit x86, the modules of
`plug` for the others. The rules of `cpu` hold for all of them.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from . import engine as uc
from .blockhook import BlockHook, HookFunction

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..pc.board import Board

PAGE_BYTES = 4096


class EngineCpu:
    """Memory, registers in memory, and the block hook of one engine.

    Parameters
    ----------
    user_uc
        A user's ``unicorn.Uc``, or None to make a 32-bit x86.
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

    def ours(self) -> list[tuple[int, int]]:
        """Return (address, size in bytes) of everything that is mapped by us."""
        return [(address, size_bytes) for address, (size_bytes, _) in self._shown.items()]

    def attach(self, board: Board, *, whole_machine: bool) -> None:
        """Let a board answer memory-mapped registers; see `UnicornCpu.attach`."""
        self._board = board
        self._running = not whole_machine

    def close(self) -> None:
        """Take our hooks and mappings out of the engine; a user's engine goes on without us."""
        self.engine.unhook_all()
        self._leaving = self.ours()
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
        else:
            self.map_mmio(address, PAGE_BYTES)

    def map_mmio(self, address: int, size_bytes: int) -> None:
        """Send the accesses of many pages to the board, as one region of the engine."""
        if not self._waits(address, size_bytes, lambda: self.map_mmio(address, size_bytes)):
            self.engine.map_mmio(address, size_bytes, self._read_address, self._write_address)
            self._shown[address] = (size_bytes, None)

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
        before = self._paging_off()
        for address, size_bytes in self._leaving:
            self.engine.unmap(address, size_bytes)
            del self._shown[address]
        self._leaving.clear()
        self._paging_on(before)
        coming, self._coming = self._coming, []
        for _, arrive in coming:
            arrive()

    def _paging_off(self) -> Any:
        """Switch address translation off for `settle`, where the engine may have it; returns what `_paging_on` takes."""
        return None

    def _paging_on(self, before: Any) -> None:
        """Return to what `_paging_off` found."""

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

    # -- where it stands -----------------------------------------------------------------------------

    @property
    def pc(self) -> int:
        """The instruction pointer between runs."""
        return self.engine.pc

    def set_pc(self, pc: int) -> None:
        """Move the instruction pointer: inside a block hook, execution goes on there."""
        self.engine.jump(pc)
