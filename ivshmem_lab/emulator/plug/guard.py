"""What the owner of an engine must not do while a device is plugged: checked, and named.

The engine's own methods are covered, on this one object, by ones that look first. Each rule was measured on
Unicorn 2.1.4 (the facts are in docs/plug.md); `Guard.remove` takes them away again.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from ...errors import DeviceError, UsageError
from .. import engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from .host import Host

MAPS = ("mem_map", "mem_map_ptr", "mmio_map", "mem_unmap", "mem_protect")
OWNER_ONLY = ("reg_write", "context_restore", "hook_add", "hook_del")


class Guard:
    """The checks on one engine.

    Parameters
    ----------
    host
        Whose engine it is.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._uc = host.cpu.user_uc
        self._runner: int | None = None
        """The thread that is inside ``emu_start``."""
        self._covered = ("emu_start", "emu_stop", *MAPS, *OWNER_ONLY)
        covers: dict[str, Callable[..., Any]] = {"emu_start": self._emu_start, "emu_stop": self._emu_stop}
        for name in self._covered:
            original = getattr(self._uc, name)
            cover = functools.partial(covers.get(name, functools.partial(self._call, name)), original)
            setattr(self._uc, name, cover)

    def remove(self) -> None:
        """Give the engine its own methods back."""
        for name in self._covered:
            delattr(self._uc, name)

    def _elsewhere(self) -> bool:
        """Tell whether the guest runs in another thread than this one."""
        return self._runner is not None and self._runner != threading.get_ident()

    def _emu_start(
        self, original: Callable[..., None], begin: int, until: int, timeout: int = 0, count: int = 0
    ) -> None:
        if timeout:
            raise UsageError(
                f"emu_start(timeout={timeout}) would stop the guest inside an instruction and run that twice; "
                "use threading.Timer(seconds, device.stop) instead"
            )
        if self._elsewhere():
            raise DeviceError(
                "another thread's emu_start runs this engine; one engine runs in one thread (device.stop() ends its run)"
            )
        outer, self._runner = self._runner, threading.get_ident()
        try:
            original(begin, until, 0, count)
        finally:
            self._runner = outer
        self._host.raise_failure()

    def _emu_stop(self, original: Callable[[], None]) -> None:
        if self._elsewhere() or self._host.board.in_users_handler:
            raise DeviceError(
                "emu_stop() from another thread or a port's handler makes the guest run an instruction twice; "
                "device.stop() ends the run at the next block"
            )
        original()

    def _call(self, name: str, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        if self._elsewhere():
            raise DeviceError(
                f"{name}() while another thread's emu_start runs this engine would crash or corrupt the guest; "
                "call it after device.stop() has ended the run"
            )
        if name in MAPS:
            self._check_map(name, *arguments, **named)
        elif name == "hook_add":
            self._check_hook(*arguments, **named)
        return original(*arguments, **named)

    def _check_map(self, name: str, address: int, size: int, *_: Any, **__: Any) -> None:
        for start, length in self._host.cpu.ours():
            if address < start + length and start < address + size:
                raise DeviceError(
                    f"{name}({address:#x}, {size:#x}) touches {start:#x} to {start + length:#x}, where an ivshmem device "
                    "is plugged; device.unplug() gives the addresses back"
                )

    def _check_hook(
        self,
        htype: int,
        callback: Any,
        user_data: Any = None,
        begin: int = 1,
        end: int = 0,
        aux1: int = 0,
        aux2: int = 0,
    ) -> None:
        del callback, user_data, begin, end, aux2
        is_x86 = self._host.cpu.engine.kind.registers == "x86"
        if is_x86 and htype == engine.HOOK_INSTRUCTION and aux1 == engine.INSTRUCTION_IN:
            raise DeviceError(
                "a hook on IN that is added now would answer the device's ports 0xCF8 to 0xCFF, too (the latest hook's "
                "answer counts); give your handler to plug(port_in=...), or add the hook before plug()"
            )
