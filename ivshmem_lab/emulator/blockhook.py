"""The hook at the start of every translated block: it tests a flag, and stops or calls when the flag is set.

A block's start is the one place where a Unicorn guest can be stopped without running an instruction twice
(measured on Unicorn 2.1.4: ``emu_stop`` from another thread repeats the instruction in 8 of 10 stops; issues
1355 and 823 of unicorn-engine/unicorn). So whoever wants the guest's attention stores 1 into ``kick``.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

from ..errors import DeviceError

HookFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
"""C type of a block hook: (engine, address, size in bytes, user data)."""

# System V x86-64: rdi engine, rsi address, edx size, rcx user data (the Flag).
_X86_64 = bytes.fromhex(
    "833900"  # cmp dword [rcx + 0], 0     kick?
    "7501"  # jne 1f
    "c3"  # ret
    "83690401"  # 1: sub dword [rcx + 4], 1     blocks to let pass
    "7906"  # jns 2f
    "ff4108"  # inc dword [rcx + 8]       fired
    "ff6110"  # jmp [rcx + 16]            target, with our arguments
    "c3"  # 2: ret
)


class Flag(ctypes.Structure):
    """What the hook looks at; shared by the thread that runs the guest and those that kick it."""

    _fields_ = (
        ("kick", ctypes.c_uint32),
        ("skip", ctypes.c_int32),
        ("fired", ctypes.c_uint32),
        ("_pad", ctypes.c_uint32),
        ("target", ctypes.c_void_p),
    )


class BlockHook:
    """The hook's code and its flag.

    Parameters
    ----------
    target
        Address of a C function with a block hook's arguments that is called when the flag is set.
    call
        The same as a Python callable, for the hook in Python.
    native
        True insists on machine code, False on Python, None takes what this machine allows.

    Attributes
    ----------
    flag : Flag
        Store 1 into ``flag.kick`` to be called at the next block; ``flag.skip`` blocks pass before.
    native : bool
        Which one it became.
    """

    def __init__(self, target: int, call: Callable[[int], None], *, native: bool | None = None) -> None:
        self.flag = Flag(target=target)
        self._code = _executable(_X86_64) if native is not False else None
        if native and self._code is None:
            raise DeviceError(
                "this machine or its policy allows no native block hook; leave native=None for the one in Python"
            )
        self.native = self._code is not None
        self._call = call
        self._python = None if self.native else HookFunction(self._run)

    @property
    def address(self) -> int:
        """Address of the hook for Unicorn."""
        if self._code is not None:
            return ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        address = ctypes.cast(self._python, ctypes.c_void_p).value  # type: ignore[arg-type]
        assert address is not None
        return address

    def _run(self, engine: int, address: int, size: int, user_data: int) -> None:
        """Do in Python what the machine code does."""
        flag = self.flag
        if not flag.kick:
            return
        flag.skip -= 1
        if flag.skip < 0:
            flag.fired = (flag.fired + 1) & 0xFFFFFFFF
            self._call(engine)


def _executable(code: bytes) -> mmap.mmap | None:
    """Put machine code where it may run, or return None where that is impossible or forbidden."""
    if platform.machine() != "x86_64" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return None
    try:
        area = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    area[: len(code)] = code
    return area
