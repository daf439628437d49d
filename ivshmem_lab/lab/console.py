"""The serial port of a machine of a lab, from any thread."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..vm.vm import COMMAND_TIME_LIMIT_S

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from ..vm.vm import Vm
    from .home import Home


class Console:
    """What a guest writes to its serial port, and what is typed to it; made with its machine."""

    def __init__(self, home: Home, vm: Vm) -> None:
        self._home = home
        self._vm = vm

    def text(self) -> str:
        """Return everything so far; the last 256 KiB are kept."""
        return self._vm.console.text

    def write(self, text: str, timeout_s: float = COMMAND_TIME_LIMIT_S) -> None:
        r"""Type a text (UTF-8); end it with ``"\n"`` where the guest waits for a line.

        Raises
        ------
        VmTimeoutError
            The guest does not read its serial port, and what is under way to it is full.
        VmError
            There is no machine that runs.
        """
        self._home.require_open(f"{self._vm.name}.console.write()")
        self._home.loop.call(self._vm.console.write(text.encode(), timeout_s))

    def subscribe(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Have everything told that the guest has written and writes, on the lab's thread, in pieces cut anywhere.

        Parameters
        ----------
        callback
            Called with what is kept so far, then with every further piece. It must not wait.

        Returns
        -------
        callable
            Ends it; may be repeated, and called from any thread.
        """

        async def begin() -> Callable[[], None]:
            return self._vm.console.listen(callback)

        self._home.require_open(f"{self._vm.name}.console.subscribe()")
        return self._home.loop.call(begin())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `text` to a file (UTF-8), and return its path.

        Raises
        ------
        OSError
            It cannot be written.
        """
        where = Path(path)
        where.write_text(self.text(), encoding="utf-8")
        return where

    def __repr__(self) -> str:
        return self.text() or f"<console of {self._vm.name}: nothing yet>"
