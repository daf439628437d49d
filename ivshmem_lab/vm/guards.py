"""Keeping the descriptor numbers occupied that QEMU goes on watching after an unplug.

QEMU 7.2 under TCG closes a doorbell device's eventfds at its unplug and leaves their handlers in its main loop:
it then burns a CPU, and dies when one of the numbers comes back as something else. A silent
eventfd under each of the numbers keeps both from happening. They stay as long as the process does.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import VmError

if TYPE_CHECKING:
    from .vm import Vm

FDSET = 0x1F5
"""The set (QMP ``add-fd``) that holds all of a machine's guards."""

WARN_AT = 0.8
"""Share of a machine's open-file limit beyond which a warning is due."""

_ROUNDS = 8
_LOOK_EVERY_S = 0.25
_LOOKS = 4
_LIMIT = re.compile(r"^Max open files\s+(\d+)", re.MULTILINE)


def open_fds(pid: int) -> frozenset[int]:
    """Return the descriptor numbers that a process of this user has open; empty when it is gone."""
    try:
        return frozenset(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()


def open_file_limit(pid: int) -> int:
    """Return a process's limit of open files (getrlimit(2), RLIMIT_NOFILE); 0 when it is gone."""
    try:
        found = _LIMIT.search(Path(f"/proc/{pid}/limits").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(found[1]) if found else 0


class Guards:
    """The guards of one machine.

    Attributes
    ----------
    count : int
        How many there are.
    """

    def __init__(self, vm: Vm) -> None:
        self.count = 0
        self._vm = vm
        self._looks: deque[frozenset[int]] = deque(maxlen=_LOOKS)
        self._watchers = 0
        self._watch_task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Look at the machine's descriptors from time to time: a guest may let a device go that nobody asked for.

        `unwatch` ends it, once for each `watch`; so does the machine's end.
        """
        self._watchers += 1
        self.look()
        if self._watch_task is None or self._watch_task.done():
            self._watch_task = asyncio.create_task(self._watch(), name=f"look at the files of {self._vm.name}")

    def unwatch(self) -> None:
        """End one `watch`."""
        self._watchers -= 1
        if not self._watchers and self._watch_task is not None:
            self._watch_task.cancel()

    def look(self) -> None:
        """Take down which numbers are open now."""
        if (pid := self._vm.pid) is not None:
            self._looks.append(open_fds(pid))

    async def _watch(self) -> None:
        while not await self._vm.wait_end(_LOOK_EVERY_S):
            self.look()

    async def occupy_closed(self) -> int:
        """Guard every number that was open in the last looks and is free now; see `occupy`."""
        return await self.occupy(frozenset().union(*self._looks))

    async def occupy(self, numbers: frozenset[int]) -> int:
        """Put a silent eventfd under each of these numbers that is free; return how many that took.

        Lower numbers that happen to be free are filled too: the kernel gives the lowest first.

        Raises
        ------
        VmError
            The machine is gone, or some number stays free.
        """
        before = self.count
        for _ in range(_ROUNDS):
            pid = self._vm.pid
            if pid is None or not (missing := numbers - open_fds(pid)):
                return self.count - before
            for _ in missing:
                guard = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                try:
                    await self._vm.pass_fd(guard, FDSET)
                finally:
                    os.close(guard)
                self.count += 1
        raise VmError(
            f"{self._vm.name}: descriptors {sorted(missing)} could not be guarded; restart it before plugging"
        )

    def room(self) -> tuple[int, int]:
        """Return how many descriptors the machine has open, and how many it may have."""
        pid = self._vm.pid
        return (0, 0) if pid is None else (len(open_fds(pid)), open_file_limit(pid))
