"""The Unicorn engine through ctypes: raw calls with arrays made once. The only module that imports unicorn.

The binding's own register calls cost five times more than the engine's (measured on Unicorn 2.1.4), and its
callbacks raise through the engine; ours must not.
"""

from __future__ import annotations

import ctypes
import functools
from importlib import import_module
from typing import Any, NamedTuple

from unicorn import unicorn_const, x86_const
from unicorn.unicorn_py3.unicorn import Uc, UcError, uclib

from ..errors import DeviceError

READ, WRITE, EXECUTE = unicorn_const.UC_PROT_READ, unicorn_const.UC_PROT_WRITE, unicorn_const.UC_PROT_EXEC
HOOK_BLOCK = unicorn_const.UC_HOOK_BLOCK
HOOK_INTERRUPT = unicorn_const.UC_HOOK_INTR
HOOK_UNMAPPED = unicorn_const.UC_HOOK_MEM_READ_UNMAPPED | unicorn_const.UC_HOOK_MEM_WRITE_UNMAPPED
HOOK_INSTRUCTION = unicorn_const.UC_HOOK_INSN
INSTRUCTION_IN, INSTRUCTION_OUT = x86_const.UC_X86_INS_IN, x86_const.UC_X86_INS_OUT
INVALID_INSTRUCTION = unicorn_const.UC_ERR_INSN_INVALID
UNMAPPED = (unicorn_const.UC_ERR_READ_UNMAPPED, unicorn_const.UC_ERR_WRITE_UNMAPPED)
"""Errors of an access to nothing; the instruction has not been carried out."""
NEVER = 0xFFFFFFFFFFFFFFFF
"""An ``until`` that no 32-bit guest reaches."""

_pointer, _int, _size, _u64, _u32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint32

MmioRead = ctypes.CFUNCTYPE(_u64, _pointer, _u64, ctypes.c_uint, _pointer)
MmioWrite = ctypes.CFUNCTYPE(None, _pointer, _u64, ctypes.c_uint, _u64, _pointer)
PortIn = ctypes.CFUNCTYPE(_u32, _pointer, _u32, _int, _pointer)
PortOut = ctypes.CFUNCTYPE(None, _pointer, _u32, _int, _u32, _pointer)
Interrupt = ctypes.CFUNCTYPE(None, _pointer, _u32, _pointer)
Unmapped = ctypes.CFUNCTYPE(ctypes.c_bool, _pointer, _int, _u64, _int, ctypes.c_int64, _pointer)

_path = str(getattr(uclib, "_name"))  # noqa: B009 - ctypes tells the path of a loaded library nowhere else
_waiting = ctypes.CDLL(_path)
_quick = ctypes.PyDLL(_path)
"""Without releasing Python's lock: short calls that never wait."""


def _function(library: ctypes.CDLL, name: str, *argtypes: Any) -> Any:
    function = library[name]
    function.argtypes = argtypes
    function.restype = _int
    return function


emu_start = _function(_waiting, "uc_emu_start", _pointer, _u64, _u64, _u64, _size)
emu_stop = _function(_quick, "uc_emu_stop", _pointer)
vmem_read = _function(_quick, "uc_vmem_read", _pointer, _u64, _u32, _pointer, _size)
vmem_write = _function(_quick, "uc_vmem_write", _pointer, _u64, _u32, _pointer, _size)
_reg_read_batch = _function(_quick, "uc_reg_read_batch", _pointer, _pointer, _pointer, _int)
_reg_write_batch = _function(_quick, "uc_reg_write_batch", _pointer, _pointer, _pointer, _int)
_reg_write = _function(_quick, "uc_reg_write", _pointer, _int, _pointer)
_mem_map_ptr = _function(_quick, "uc_mem_map_ptr", _pointer, _u64, _u64, _u32, _pointer)
_mem_unmap = _function(_quick, "uc_mem_unmap", _pointer, _u64, _u64)
_mmio_map = _function(_quick, "uc_mmio_map", _pointer, _u64, _u64, _pointer, _pointer, _pointer, _pointer)
_hook_del = _function(_quick, "uc_hook_del", _pointer, _size)
_hook_add = _quick["uc_hook_add"]  # takes a variable number of arguments
_hook_add.restype = _int

emu_stop_address: int = ctypes.cast(_quick["uc_emu_stop"], _pointer).value or 0


class Kind(NamedTuple):
    """What an engine emulates."""

    name: str
    """``x86-32``, ``x86-64``, ``arm64``, ``riscv64``, or what else there is."""
    registers: str
    """Prefix of its registers' names in the binding: module, then constant."""

    def register(self, name: str) -> int:
        """Return the engine's number of a register."""
        module = import_module(f"unicorn.{self.registers}_const")
        number: int = getattr(module, f"UC_{self.registers.upper()}_REG_{name}")
        return number

    @property
    def pc(self) -> str:
        """Name of the instruction pointer."""
        return {"x86-16": "EIP", "x86-32": "EIP", "x86-64": "RIP"}.get(self.name, "PC")


_FAMILIES = ("arm", "arm64", "mips", "x86", "ppc", "sparc", "m68k", "riscv", "s390x", "tricore")
X86_32 = Kind("x86-32", "x86")


def kind_of(uc: Any) -> Kind:
    """Tell what an engine emulates."""
    arch, mode = uc.query(unicorn_const.UC_QUERY_ARCH), uc.query(unicorn_const.UC_QUERY_MODE)
    family = next(name for name in _FAMILIES if getattr(unicorn_const, f"UC_ARCH_{name.upper()}") == arch)
    if family == "x86":
        bits = {unicorn_const.UC_MODE_16: 16, unicorn_const.UC_MODE_32: 32}.get(mode, 64)
        return Kind(f"x86-{bits}", family)
    if family == "riscv":
        return Kind("riscv64" if mode & unicorn_const.UC_MODE_RISCV64 else "riscv32", family)
    return Kind(family, family)


class TableRegister(ctypes.Structure):
    """``uc_x86_mmr``: IDTR as the engine returns it."""

    _fields_ = (("selector", ctypes.c_uint16), ("base", _u64), ("limit", _u32), ("flags", _u32))


class Registers:
    """A fixed set of registers, read or written in one call.

    Parameters
    ----------
    names
        Names as in the manuals; IDTR lands in `idtr`, the others in `values`.
    kind
        What has these registers.
    """

    def __init__(self, *names: str, kind: Kind = X86_32) -> None:
        count = len(names)
        self.values = (_u64 * count)()
        self.idtr = TableRegister()
        self._ids = (_int * count)(*(kind.register(name) for name in names))
        self._pointers = (_pointer * count)(*(ctypes.addressof(self.values) + 8 * i for i in range(count)))
        if "IDTR" in names:
            self._pointers[names.index("IDTR")] = ctypes.addressof(self.idtr)
        self._arguments = (ctypes.addressof(self._ids), ctypes.addressof(self._pointers), count)

    def read(self, handle: int) -> Any:
        """Read them all; returns `values`."""
        _reg_read_batch(handle, *self._arguments)
        return self.values

    def write(self, handle: int, *values: int) -> None:
        """Write them all."""
        self.values[:] = list(values)
        _reg_write_batch(handle, *self._arguments)


class Engine:
    """One Unicorn engine.

    Parameters
    ----------
    uc
        A user's ``unicorn.Uc``, or None to make one for 32-bit x86.

    Raises
    ------
    DeviceError
        When it is no engine.
    """

    def __init__(self, uc: Any = None) -> None:
        if uc is None:
            uc = Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_32)
            # With an `until` the engine looks up its address at every start: under NX that is a page fault, which
            # overwrites CR2. An empty list of exits has nothing to look up.
            uc.ctl_exits_enabled(True)
            uc.ctl_set_exits([])
        elif not isinstance(uc, Uc):
            raise DeviceError(f"{uc!r} is not a unicorn.Uc; make one with Uc(UC_ARCH_X86, UC_MODE_32)")
        self.uc = uc
        self.kind = kind_of(uc)
        self._pc = self.kind.register(self.kind.pc)
        self.handle: int = uc._uch.value  # noqa: SLF001 - raw calls need it
        self._hooks: list[int] = []

    def hook(self, kind: int, function: Any, user_data: int = 0, instruction: int | None = None) -> int:
        """Add a hook: `function` is a ctypes callback or an address. Returns what `unhook` takes."""
        handle = _size()
        address = function if isinstance(function, int) else address_of(function)
        extra = () if instruction is None else (_int(instruction),)
        code = _hook_add(
            _pointer(self.handle),
            ctypes.byref(handle),
            _int(kind),
            _pointer(address),
            _pointer(user_data),
            _u64(1),
            _u64(0),
            *extra,
        )
        check(code, "uc_hook_add")
        self._hooks.append(handle.value)
        return handle.value

    def unhook(self, handle: int) -> None:
        """Remove a hook."""
        self._hooks.remove(handle)
        _hook_del(self.handle, handle)

    def unhook_all(self) -> None:
        """Remove all hooks that were added here."""
        while self._hooks:
            self.unhook(self._hooks[-1])

    def map_memory(self, address: int, size_bytes: int, rights: int, pointer: int) -> None:
        """Show host memory at a physical address."""
        check(_mem_map_ptr(self.handle, address, size_bytes, rights, pointer), f"map memory at {address:#x}")

    def map_mmio(self, address: int, size_bytes: int, read: int, write: int) -> None:
        """Send accesses to callbacks, with the address as their user data."""
        check(
            _mmio_map(self.handle, address, size_bytes, read, address, write, address), f"map registers at {address:#x}"
        )

    def unmap(self, address: int, size_bytes: int) -> None:
        """Hide what was mapped."""
        check(_mem_unmap(self.handle, address, size_bytes), f"unmap {address:#x}")

    def forget_exception(self) -> None:
        """Clear the engine's memory of the last exception, as delivering it does on hardware.

        The engine clears it only when it delivers an exception itself; one that a hook took stays, and the next
        becomes a double fault.
        """
        offset = _old_exception_offset()
        if offset is not None:
            context = self.uc.context_save()
            ctypes.c_int32.from_address(address_of(context.context) + offset).value = -1
            self.uc.context_restore(context)

    def stop(self) -> None:
        """End the run; at a block's start only."""
        emu_stop(self.handle)

    def jump(self, pc: int) -> None:
        """Go on at `pc`, from inside a block hook too (where the call for several registers is not heeded)."""
        check(_reg_write(self.handle, self._pc, ctypes.byref(_u64(pc))), f"jump to {pc:#x}")

    @property
    def pc(self) -> int:
        """Where it stands, as ``emu_start`` takes it: an odd address for the Thumb instructions of a 32-bit Arm."""
        pc: int = self.uc.reg_read(self._pc)
        if self.kind.name == "arm" and self.uc.reg_read(self.kind.register("CPSR")) & 0x20:
            return pc | 1
        return pc

    def write_system(self, register: tuple[int, int, int, int, int], value: int) -> None:
        """Write a system register of a 64-bit Arm: (CRn, CRm, op0, op1, op2)."""
        self.uc.reg_write(self.kind.register("CP_REG"), (*register, value))

    @property
    def task_base(self) -> int:
        """Where the x86's present TSS lies."""
        base: int = self.uc.reg_read(self.kind.register("TR"))[1]
        return base

    def return_to(self, state: Any) -> None:
        """Return an x86 to a saved state whose memory is still the same; virtual addresses are looked up again."""
        self.uc.context_restore(state)
        root = self.kind.register("CR3")
        self.uc.reg_write(root, self.uc.reg_read(root))

    def save(self) -> Any:
        """Return the CPU's state, for `restore`."""
        return self.uc.context_save()

    def read_register(self, name: str) -> Any:
        """Read any register: a number, or the tuple that the binding makes of a table's or an x87 register."""
        return self.uc.reg_read(getattr(x86_const, f"UC_X86_REG_{name}"))

    def write_register(self, name: str, value: Any) -> None:
        """Write what `read_register` read."""
        self._checked(name, self.uc.reg_write, getattr(x86_const, f"UC_X86_REG_{name}"), value)

    def read_msr(self, number: int) -> int:
        """Read a model-specific register."""
        return self.uc.msr_read(number)  # type: ignore[no-any-return]

    def write_msr(self, number: int, value: int) -> None:
        """Write a model-specific register."""
        self._checked(f"model-specific register {number:#x}", self.uc.msr_write, number, value)

    def _checked(self, name: str, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except UcError as error:
            raise DeviceError(f"Unicorn: write {name}: {error}") from error

    def restore(self, state: Any) -> None:
        """Return to a saved state; translated code is forgotten, since memory changed behind the engine's back."""
        self.uc.context_restore(state)
        self.uc.ctl_flush_tb()


def address_of(callback: Any) -> int:
    """Return the address of a ctypes callback."""
    address = ctypes.cast(callback, _pointer).value
    assert address is not None
    return address


@functools.cache
def _old_exception_offset() -> int | None:
    """Find by experiment where a saved context keeps the last exception; None when that is not clear.

    It is the one word that is -1 before a division by zero and 0, that exception's number, after it.
    """
    uc = Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_32)
    uc.mem_map(0x1000, 0x1000)
    uc.mem_write(0x1000, b"\x31\xc9\xf7\xf1")  # xor ecx, ecx; div ecx
    uc.hook_add(HOOK_INTERRUPT, lambda engine, number, data: engine.emu_stop())
    before = _context_bytes(uc)
    uc.emu_start(0x1000, 0x2000)
    after = _context_bytes(uc)
    found = [
        at
        for at in range(0, len(before) - 3, 4)
        if before[at : at + 4] == b"\xff" * 4 and after[at : at + 4] == bytes(4)
    ]
    return found[0] if len(found) == 1 else None


def _context_bytes(uc: Any) -> bytes:
    context = uc.context_save()
    return ctypes.string_at(context.context, context.size)


def error_text(code: int) -> str:
    """Return the engine's words for an error code."""
    return str(UcError(code))


def check(code: int, what: str) -> None:
    """Raise `DeviceError` unless the engine was content."""
    if code:
        raise DeviceError(f"Unicorn: {what}: {error_text(code)}")
