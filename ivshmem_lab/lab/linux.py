"""A Linux guest in a lab: a machine in which commands can be run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..errors import UsageError, VmError
from ..guests.linux import tool_path
from ..vm.agent import BOOT_TIME_LIMIT_S, PORT_NAME, RUN_TIME_LIMIT_S, GuestAgent
from ..vm.completed import GuestCommandError
from ..vm.linux.guest import LinuxGuest, linux_machine
from ..vm.linux.image import build_image
from ..vm.text import VmTimeoutError
from .members import LabVm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..vm.agent import GuestCommand
    from ..vm.command import Connection
    from ..vm.completed import Completed
    from ..vm.linux.guest import LinuxMachine
    from ..vm.linux.image import LinuxImage
    from .home import Home


_DYING_TIME_LIMIT_S = 1.0


def read_linux_guest(guest: object, emulator: str) -> LinuxGuest | None:
    """Return the Linux guest that is meant; None when it is another kind.

    Raises
    ------
    UsageError
        The emulator cannot run Linux.
    """
    if isinstance(guest, str) and guest == "linux":
        guest = LinuxGuest()
    if not isinstance(guest, LinuxGuest):
        return None
    if emulator != "qemu":
        raise UsageError(f'emulator={emulator!r} runs no Linux; write emulator="qemu" for a Linux guest')
    return guest


def build_linux_image(*, refresh: bool = False, quiet: bool = False) -> LinuxImage:
    """Return the image of this distribution, built if need be, with progress on standard error where that is a terminal.

    Raises
    ------
    LinuxImageError
        As `ivshmem_lab.vm.linux.image.build_image`.
    """
    on_terminal = sys.stderr.isatty() and not quiet

    def say(text: str) -> None:
        if on_terminal:
            print(f"linux image: {text} ...", file=sys.stderr, flush=True)

    return build_image(tool_path(), refresh=refresh, say=say)


def make_machine(
    name: str, guest: LinuxGuest, memory_bytes: int, connections: tuple[Connection, ...], append: str, root_ports: int
) -> LinuxMachine:
    """Return the machine of a Linux guest; the image is built first if need be.

    Raises
    ------
    UsageError
        A value is not allowed.
    LinuxImageError
        There is no image and it cannot be built.
    """
    own = guest.files()
    if own is None:
        image = build_linux_image()
        own = image.kernel, image.initrd
    return linux_machine(
        name, guest, *own, memory_bytes=memory_bytes, connections=connections, append=append, root_ports=root_ports
    )


class LabCommand:
    """A command that runs in a Linux guest of a lab; made by `LinuxVm.begin_command`."""

    def __init__(self, home: Home, command: GuestCommand) -> None:
        self._home = home
        self._command = command

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._command.ended

    def wait(self, timeout_s: float | None = RUN_TIME_LIMIT_S) -> Completed:
        """Wait for its end; see `GuestCommand.wait`."""
        return self._home.loop.call(self._command.wait(timeout_s))

    def wait_text(self, text: str, timeout_s: float = RUN_TIME_LIMIT_S) -> None:
        """Wait until it has written a text to its standard output or error; see `GuestCommand.wait_text`."""
        self._home.loop.call(self._command.wait_text(text, timeout_s))

    def kill(self) -> bool:
        """End it and its process group with SIGKILL; tell whether it has ended."""
        return self._home.loop.call(self._command.kill())


class LinuxVm(LabVm):
    """A Linux guest of a lab; made by ``lab.vm(…, guest="linux", emulator="qemu")``."""

    agent: GuestAgent | None = None
    """Who runs commands in the guest, once one was asked for."""

    def wait_ready(self, timeout_s: float = BOOT_TIME_LIMIT_S) -> None:
        """Wait until the guest has booted and takes commands.

        Raises
        ------
        VmTimeoutError
            It does not, in time.
        VmError
            It ended.
        """
        self._home.require_open(f"{self.name}.wait_ready()")
        self._home.loop.call(self._ready(timeout_s))

    def run(
        self,
        args: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = RUN_TIME_LIMIT_S,
        check: bool = False,
    ) -> Completed:
        """Run a command in the guest and wait for its end; the first call also waits for the boot.

        Parameters
        ----------
        args
            Its words, such as ``["ls", "/"]`` or ``["sh", "-c", "ls | wc"]``. Every word is a text.
        stdin
            Its standard input.
        timeout_s
            How long it may take; then it is killed in the guest. None for no limit.
        check
            Raise when it ends with another status than 0.

        Returns
        -------
        Completed
            Exit code, standard output, standard error.

        Raises
        ------
        VmTimeoutError
            It did not end in time.
        GuestCommandError
            With `check`, its status was not 0.
        VmError
            It could not be run, or the machine is gone.
        UsageError
            The words are not allowed.
        """
        self._home.require_open(f"{self.name}.run()")
        completed = self._home.loop.call(self._run(args, stdin, timeout_s))
        if check and completed.exit_code:
            raise GuestCommandError(self.name, completed)
        return completed

    def begin_command(self, args: Sequence[str], *, stdin: bytes = b"") -> LabCommand:
        """Start a command in the guest without waiting for its end; arguments and errors as `run`'s."""
        self._home.require_open(f"{self.name}.begin_command()")
        return LabCommand(self._home, self._home.loop.call(self._start_command(args, stdin)))

    async def end(self) -> None:
        """Close; on the lab's loop."""
        try:
            await super().end()
        finally:
            if self.agent is not None:
                self.agent.close()

    async def take_over(self, source: LabVm) -> None:
        """Reach the agent of a guest that has moved here; what ran for the source's callers is theirs no more."""
        if isinstance(source, LinuxVm) and source.agent is not None:
            self.agent = GuestAgent(self.name, self._vm.take_port(PORT_NAME))
            self.agent.take_over(source.agent)

    async def _ready(self, timeout_s: float = BOOT_TIME_LIMIT_S) -> GuestAgent:
        if self.agent is None:
            self.agent = GuestAgent(self.name, self._vm.take_port(PORT_NAME))
        await self.agent.wait_ready(timeout_s)
        return self.agent

    async def _run(self, args: Sequence[str], stdin: bytes, timeout_s: float | None) -> Completed:
        try:
            agent = await self._ready()
            return await agent.run(args, stdin=stdin, timeout_s=timeout_s)
        except VmError as error:
            if not isinstance(error, VmTimeoutError) and await self._vm.wait_end(_DYING_TIME_LIMIT_S):
                raise VmError(f"{self.name} ended while it ran {args[0]!r}: {self.reason}") from error
            raise

    async def _start_command(self, args: Sequence[str], stdin: bytes) -> GuestCommand:
        agent = await self._ready()
        return await agent.start(args, stdin=stdin)
