"""One class for a virtual machine process, whichever emulator runs it.

The process takes QEMU's command line and is controlled over QMP. Its console and its monitor are
inherited socket pairs, so there is no socket file, no race and nothing to clean up.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import socket
from typing import TYPE_CHECKING, Any

from ..errors import VmError, VmStartError
from .console import SerialConsole
from .events import EventLog
from .monitor import Monitor, MonitorLostError
from .process import Process, describe_exit, to_the_end
from .state import VmState
from .text import TextStream, VmTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .command import Machine
    from .qemu import Emulator

START_TIME_LIMIT_S = 20.0
COMMAND_TIME_LIMIT_S = 10.0

_QUIT_TIME_LIMIT_S = 2.0
_TERM_TIME_LIMIT_S = 1.0
_KILL_TIME_LIMIT_S = 5.0
_DYING_TIME_LIMIT_S = 1.0
_HARMLESS_STOPS = frozenset({"running", "paused", "prelaunch", "inmigrate", "finish-migrate", "postmigrate", "save-vm"})


class Vm:
    """A virtual machine process.

    The coroutines belong to the running event loop's thread; the properties may be read from any.

    Parameters
    ----------
    machine
        What it is made of.
    emulator
        The program, from `find_emulator`.
    cpu
        The one host CPU to run on, or None.
    environment
        Variables to set for the process.
    on_spawn, on_reaped
        Called with the process id when the process exists, and when it is gone.
    """

    def __init__(
        self,
        machine: Machine,
        emulator: Emulator,
        *,
        cpu: int | None = None,
        environment: Mapping[str, str] | None = None,
        on_spawn: Callable[[int], None] | None = None,
        on_reaped: Callable[[int], None] | None = None,
    ) -> None:
        self.machine = machine
        self.name = machine.name
        self.emulator = emulator
        self.cpu = cpu
        self.events = EventLog()
        """What it told over QMP."""
        self.console = SerialConsole(machine.name)
        """Its serial port."""
        self._environment = {**emulator.environment, **(environment or {})}
        self._on_spawn = on_spawn
        self._on_reaped = on_reaped
        self._state = VmState.DEFINED
        self._reason = self._shutdown_reason = ""
        self._process: Process | None = None
        self._ports: dict[str, socket.socket] = {}
        self._monitor = Monitor(self.name, self._note_event)
        self._connect_done = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._asker: asyncio.Task[None] | None = None
        self._stop_wanted = False
        self._closer: asyncio.Task[None] | None = None

    # -- what one may ask -----------------------------------------------------------------------------

    @property
    def state(self) -> VmState:
        """Where it is in its life."""
        return self._state

    @property
    def reason(self) -> str:
        """Why it is stopped or failed, or paused unasked (QMP ``query-status``), in a few words; else empty."""
        return self._reason

    @property
    def pid(self) -> int | None:
        """Process id, while the process exists."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def exit_status(self) -> int | None:
        """Exit status of the process, negative for a signal; None before its end."""
        return self._process.returncode if self._process else None

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line it was started with; empty before."""
        return self._process.argv if self._process else ()

    @property
    def console_text(self) -> str:
        """What the guest has written to its serial port; the last 256 KiB are kept."""
        return self.console.text

    @property
    def log_text(self) -> str:
        """What the emulator has written to its standard output and error; the last 64 KiB are kept."""
        return self._process.log.text if self._process else ""

    def __repr__(self) -> str:
        return f"<Vm {self.name}: {self.emulator}, {self._state}{f' ({self._reason})' if self._reason else ''}>"

    # -- life -----------------------------------------------------------------------------------------

    async def launch(self, timeout_s: float = START_TIME_LIMIT_S, *, incoming: bool = False) -> None:
        """Start the process and wait until its monitor answers and all its devices are there.

        The machine is paused afterwards, and `cont` lets it run; or it waits for a migration (`incoming`).

        Raises
        ------
        VmStartError
            It ended, or said nothing in time. Nothing is left of it.
        VmError
            It has been started before.
        """
        if self._state is not VmState.DEFINED:
            raise VmError(f"{self.name} is {self._state} and cannot be started again; define a new one")
        self._state = VmState.STARTING
        try:
            process, monitor_socket = self._spawn(incoming)
        except OSError as error:
            self._state, self._reason = VmState.FAILED, str(error)
            raise VmStartError(f"{self.name} could not be started: {error}") from error
        failure: VmError | None = None
        try:
            await self._monitor.connect(monitor_socket, timeout_s)
            self._become(VmState.PAUSED, before=VmState.STARTING)
        except VmTimeoutError as error:
            failure = error
        except MonitorLostError as error:
            failure = error
            await process.wait(_DYING_TIME_LIMIT_S)  # for its exit status and last words
        finally:
            self._connect_done.set()
            if self.state is not VmState.PAUSED:  # it failed, ended meanwhile, or we were cancelled
                await to_the_end(self._kill(process))
        if self.state is not VmState.PAUSED:
            raise VmStartError(self._start_failure(process, timeout_s, failure)) from failure

    async def cont(self) -> None:
        """Let the guest run (QMP ``cont``). A guest may be so quick that the machine has ended by then: no error."""
        ready, before = self._state is VmState.PAUSED, self.events.count
        try:
            await self.execute("cont")
        except VmError:
            ran = self.events.came("RESUME", after=before) or (ready and self.state is VmState.STOPPED)
            if self._closer or not ran:
                raise
        if not self.events.came("STOP", after=before):  # before the answer
            self._become(VmState.RUNNING, before=VmState.PAUSED)

    async def stop(self) -> None:
        """Pause the guest (QMP ``stop``)."""
        await self.execute("stop")
        self._become(VmState.PAUSED, before=VmState.RUNNING)

    async def execute(self, command: str, /, *, timeout_s: float = COMMAND_TIME_LIMIT_S, **arguments: Any) -> Any:
        """Execute a QMP command.

        Parameters
        ----------
        command
            Its name, for example ``"query-pci"``.
        timeout_s
            How long to wait for the answer, in seconds.
        **arguments
            Its arguments; write ``**{"qom-type": …}`` for names with a dash.

        Returns
        -------
        object
            The answer as QMP gave it.

        Raises
        ------
        QmpCommandError
            The machine refused the command.
        VmTimeoutError
            No answer came in time.
        VmError
            There is no machine to answer.
        UsageError
            An argument cannot be written as JSON.
        """
        try:
            self._stop_wanted = self._stop_wanted or command == "stop"
            return await self._monitor.execute(command, arguments, timeout_s)
        except MonitorLostError as error:
            if self._process and self._connect_done.is_set():
                await self._process.wait(_DYING_TIME_LIMIT_S)  # for the reason
            raise VmError(f"{command}: {self._absence()}") from error
        finally:
            if command == "stop":  # its event, if there was one, came before the answer
                self._stop_wanted = False

    async def pass_fd(self, fd: int, fdset: int) -> None:
        """Give the process a duplicate of a descriptor, kept in a set until the set is removed (QMP ``add-fd``).

        Raises
        ------
        VmError
            There is no machine to take it.
        """
        try:
            self._monitor.send_fd(fd)
        except MonitorLostError as error:
            raise VmError(f"add-fd: {self._absence()}") from error
        await self.execute("add-fd", **{"fdset-id": fdset})

    async def wait_text(self, text: str, timeout_s: float = COMMAND_TIME_LIMIT_S) -> str:
        """Wait until the guest has written a text to its serial port; see `TextStream.wait_text`."""
        if self._process is None:
            raise VmError(f"{self.name} has written nothing: it is {self._state}")
        return await self.console.wait_text(text, timeout_s)

    async def wait_end(self, timeout_s: float | None = None) -> bool:
        """Wait until the process has ended and everything of it has been given back; tell whether it has."""
        if self._watcher is None:
            return self._state in {VmState.STOPPED, VmState.FAILED}
        done, _ = await asyncio.wait({self._watcher}, timeout=timeout_s)
        for task in done:
            task.result()
        return bool(done)

    async def close(self) -> None:
        """End the machine: QMP ``quit``, then SIGTERM, then SIGKILL, each with a time limit. May be repeated.

        Raises
        ------
        VmError
            Not even SIGKILL ended the process.
        """
        if self._closer is None:
            self._closer = asyncio.create_task(self._close(), name=f"close {self.name}")
        await asyncio.shield(self._closer)

    def take_port(self, name: str) -> socket.socket:
        """Return our end of a virtio-serial port (`Machine.ports`); it is the caller's from here on.

        Raises
        ------
        VmError
            There is no such port, or it was taken, or the machine has not been started or has ended.
        """
        if name not in self._ports or self._state in {VmState.STOPPED, VmState.FAILED}:
            raise VmError(f"{self.name} has no port {name!r} to take; it is {self._state}")
        return self._ports.pop(name)

    # -- inside ---------------------------------------------------------------------------------------

    def _spawn(self, incoming: bool) -> tuple[Process, socket.socket]:
        """Start the process; return it and our end of its monitor."""
        with contextlib.ExitStack() as inherited, contextlib.ExitStack() as ours:
            console, console_theirs = socket.socketpair()
            ours.callback(console.close)
            inherited.callback(console_theirs.close)
            monitor, monitor_theirs = socket.socketpair()
            ours.callback(monitor.close)
            inherited.callback(monitor_theirs.close)
            monitor.setblocking(False)
            fds = [console_theirs.fileno(), monitor_theirs.fileno()]
            for port in self.machine.ports:
                self._ports[port], theirs = socket.socketpair()
                ours.callback(self._ports[port].close)
                inherited.callback(theirs.close)
                fds.append(theirs.fileno())
            process = Process.spawn(
                self.name,
                [*self.emulator.argv, *self.machine.options(*fds, incoming=incoming)],
                pass_fds=(*fds, *self.machine.inherited_fds()),
                environment=self._environment,
                cpu=self.cpu,
            )
            ours.pop_all()
        self._process = process
        stream = self.console.open(console.detach())
        self._watcher = asyncio.create_task(self._watch(process, stream), name=f"watch {self.name}")
        if self._on_spawn:
            self._on_spawn(process.pid)
        return process, monitor

    async def _watch(self, process: Process, console: TextStream) -> None:
        """See the process off: however it ends, this gives everything back."""
        await process.wait()
        self._note_end(process)
        await self._connect_done.wait()
        await self._monitor.disconnect()
        if self._asker is not None:
            await self._asker
        console.drain()
        console.close()
        for port in self._ports.values():  # those that nobody has taken
            port.close()
        if self._on_reaped:
            self._on_reaped(process.pid)

    async def _close(self) -> None:
        process = self._process
        if process is None:
            self._become(VmState.STOPPED, before=VmState.DEFINED)
            return
        if self._state is not VmState.STARTING:  # in the middle of its setup it has nothing to save and may not listen
            if self._monitor.connected:
                with contextlib.suppress(VmError):
                    await self.execute("quit", timeout_s=_QUIT_TIME_LIMIT_S)
                    await process.wait(_QUIT_TIME_LIMIT_S)
            process.send_signal(signal.SIGTERM)
            await process.wait(_TERM_TIME_LIMIT_S)
        await self._kill(process)

    async def _kill(self, process: Process) -> None:
        process.send_signal(signal.SIGKILL)
        if not await process.wait(_KILL_TIME_LIMIT_S):
            raise VmError(f"process {process.pid} of {self.name} did not end in {_KILL_TIME_LIMIT_S:g} s of SIGKILL")
        await self.wait_end()

    def _become(self, state: VmState, *, before: VmState) -> None:
        """Change the state, unless something else has happened meanwhile."""
        if self._state is before:
            self._state = state

    def _note_event(self, name: str, data: Mapping[str, object]) -> None:
        self.events.note(name, data)
        if name == "STOP":
            self._become(VmState.PAUSED, before=VmState.RUNNING)
            if not self._stop_wanted and (self._asker is None or self._asker.done()):
                self._asker = asyncio.get_running_loop().create_task(self._ask_why(), name=f"ask {self.name}")
            self._stop_wanted = False
        elif name == "RESUME":
            self._become(VmState.RUNNING, before=VmState.PAUSED)
            self._reason = ""
        elif name == "SHUTDOWN":
            self._shutdown_reason = str(data.get("reason", ""))

    async def _ask_why(self) -> None:
        """Find out why the machine stopped unasked: such as ``guest-panicked``, ``internal-error``, ``io-error``."""
        with contextlib.suppress(VmError):
            status = await self.execute("query-status")
            if self._state is VmState.PAUSED and status.get("status") not in _HARMLESS_STOPS:
                self._reason = str(status.get("status"))

    def _note_end(self, process: Process) -> None:
        status = process.returncode or 0
        started = self._state in {VmState.PAUSED, VmState.RUNNING}
        wanted = self._closer is not None and started
        # Odd statuses are the guest's debug exit; a Python program that broke down has 1, too.
        broke = status > 0 and (status % 2 == 0 or "Traceback (most recent call last)" in process.log.text)
        from_outside = not wanted and (status < 0 or self._shutdown_reason == "host-signal")
        self._reason = describe_exit(status, started and not broke)
        if from_outside and status >= 0:
            self._reason = f"ended by a signal from outside, {self._reason}"
        elif self._shutdown_reason == "guest-panic":
            self._reason = f"the guest panicked, {self._reason}"
        elif (broke or not wanted) and (said := process.log.last_lines(1)):
            self._reason += f"; it said: {said}"
        self._state = VmState.FAILED if broke or from_outside or not started else VmState.STOPPED

    def _absence(self) -> str:
        if self._state is VmState.DEFINED:
            return f"{self.name} has not been started"
        return f"{self.name} does not answer; it is {self._state}{f': {self._reason}' if self._reason else ''}"

    def _start_failure(self, process: Process, timeout_s: float, failure: VmError | None) -> str:
        if self._closer is not None:
            what = "was closed before it was ready"
        elif isinstance(failure, VmTimeoutError):
            what = f"gave no answer in {timeout_s:g} s and was killed"
        else:
            what = f"ended before it was ready: {describe_exit(process.returncode or 0, False)}"
        said = process.log.last_lines(5) or "nothing"
        return f"{self.name} ({self.emulator}) {what}\nit said: {said}\nits command: {shlex.join(process.argv)}"
