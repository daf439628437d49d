"""A virtual machine of a lab as the user sees it, from any thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import LabError, VmError, VmStartError
from ..units import format_size
from ..vm.migration import MIGRATION_TIME_LIMIT_S, arrived, receive
from ..vm.state import VmState
from ..vm.vm import COMMAND_TIME_LIMIT_S
from .console import Console
from .home import Row
from .migration import Mover
from .pluggable import PluggableVm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ..topology.model import Vm as Definition
    from ..vm.events import QmpEvent
    from ..vm.vm import Vm
    from .home import Home
    from .migration import Migration, MigrationStep, OnProgress
    from .plugged import Source
    from .servers import LabServer


class LabVm(PluggableVm):
    """A virtual machine of a lab; made by `Lab.vm`.

    Attributes
    ----------
    name : str
    definition : ivshmem_lab.topology.model.Vm
        How it was defined, without devices.
    guest : object
        Its guest, as `Lab.vm` was given it.
    console : Console
        Its serial port.
    """

    def __init__(self, home: Home, vm: Vm, servers: Sequence[LabServer], definition: Definition, guest: object) -> None:
        super().__init__(home, vm, servers)
        self._begun = False
        self.definition = definition
        self.guest = guest
        self.console = Console(home, vm)

    @property
    def process(self) -> Vm:
        """The machine itself; its coroutines belong to the lab's loop."""
        return self._vm

    @property
    def emulator(self) -> str:
        """``"unicorn"`` or ``"qemu"``."""
        return self._vm.emulator.kind

    @property
    def state(self) -> VmState:
        """Where it is in its life; compares equal to its text, such as ``"running"``."""
        return self._vm.state

    @property
    def reason(self) -> str:
        """Why it is stopped or failed, in a few words."""
        return self._vm.reason

    @property
    def pid(self) -> int | None:
        """Process id, while there is a process."""
        return self._vm.pid

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line it was started with."""
        return self._vm.argv

    @property
    def exit_status(self) -> int | None:
        """Exit status of the process; a guest's debug exit with value V gives ``(V << 1) | 1``."""
        return self._vm.exit_status

    @property
    def log(self) -> str:
        """What the emulator has written to its standard output and error; the last 64 KiB are kept."""
        return self._vm.log_text

    @property
    def peer_id(self) -> int | list[int]:
        """Its peer id (IVPosition), or a list in the order of `servers` when there are several.

        Raises
        ------
        LabError
            It has none: not started yet, or not connected.
        """
        if not self.servers:
            raise LabError(f"{self.name} is not connected to a server, so it has no peer id")
        if not self._peer_ids:
            raise LabError(f"{self.name} has no peer id before it is started; call lab.start() or {self.name}.start()")
        return self._peer_ids[0] if len(self._peer_ids) == 1 else list(self._peer_ids)

    def doorbells(self) -> dict[str, tuple[int, int]]:
        """Count the interrupts of each device at a server: those that its guest has sent, and those that have come to it.

        Only our own emulator counts them; for real QEMU the dict is empty.

        Raises
        ------
        VmError
            There is no machine, or no answer in time.
        """
        if self.emulator != "unicorn":
            return {}
        return {each["id"]: (each["sent"], each["heard"]) for each in self.execute("x-query-ivshmem")}

    def start(self) -> None:
        """Start the process and let the guest run. Nothing happens when it runs already.

        Raises
        ------
        VmStartError
            It could not be started; nothing is left of it, and its name is free again.
        """
        self._home.require_open(f"{self.name}.start()")
        self._home.loop.call(self.begin(run=True))

    @property
    def events(self) -> list[QmpEvent]:
        """What the machine told over QMP, oldest first; the last 1000 are kept."""
        return list(self._vm.events)

    def stop(self) -> None:
        """End the process; the machine stays in the lab as stopped, with its console, until `close`. May be repeated."""
        self._home.require_open(f"{self.name}.stop()")
        self._home.loop.call(self._vm.close(), finish=True)

    def pause(self) -> None:
        """Pause the guest (QMP ``stop``); `resume` lets it go on.

        Raises
        ------
        VmError
            There is no machine that runs.
        """
        self._home.require_open(f"{self.name}.pause()")
        self._home.loop.call(self._vm.stop())

    def resume(self) -> None:
        """Let a paused guest go on (QMP ``cont``).

        Raises
        ------
        VmError
            There is no machine.
        """
        self._home.require_open(f"{self.name}.resume()")
        self._home.loop.call(self._vm.cont())

    def migrate(
        self,
        to: LabVm | str,
        *,
        sources: Mapping[Source, Source | None] | None = None,
        peers: str = "refuse",
        timeout_s: float = MIGRATION_TIME_LIMIT_S,
        on_step: Callable[[MigrationStep], None] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Migration:
        """Move it into another process; this one ends when the guest is there.

        A guest of real QEMU under TCG, or one whose shared memory is the same on both sides, is paused meanwhile (docs/migration.md).

        Parameters
        ----------
        to
            A name for the destination, which is then defined like this machine; a machine of a lab that is defined like
            it and not started, or waits (`start_waiting`); or the address where one waits elsewhere, such as
            ``"tcp:192.0.2.7:4444"``.
        sources
            What a device shows at the destination, where that is another server or memory: ``{board: fresh_board}``.
            None leaves the device out there.
        peers
            What becomes of devices with ``master=off``, which do not move: ``"refuse"`` with QEMU's words, or ``"replug"``: they are
            unplugged before and plugged in again after, with new peer ids.
        timeout_s
            How long the way may take, in seconds.
        on_step
            Called with each step as it is done.
        on_progress
            Called with the bytes that are sent and those that there are, on the lab's thread.

        Returns
        -------
        Migration
            With the machine where it is now, and each step.

        Raises
        ------
        MigrationError
            One side refused; its `side`, its own words, and a hint. The guest runs on here, with the devices it had, and nothing
            is left of the destination.
        UsageError
            A value is not allowed.
        VmError
            The machine does not run, or took too long.
        """
        self._home.require_open(f"{self.name}.migrate()")
        return Mover(self, to, sources or {}, peers, timeout_s, on_step, on_progress).move()

    def start_waiting(self) -> None:
        """Start the process without its guest: what it computes comes by `migrate` or `receive`.

        Raises
        ------
        VmStartError
            It could not be started; nothing is left of it.
        """
        self._home.require_open(f"{self.name}.start_waiting()")
        self._home.loop.call(self.begin(run=False, incoming=True))

    def receive(self, uri: str, timeout_s: float = MIGRATION_TIME_LIMIT_S) -> None:
        """Wait at an address, such as ``"tcp:0.0.0.0:4444"``, until a machine has come from elsewhere.

        Plug what moves along in before, after `start_waiting`: with the same ids, in the same places.

        Raises
        ------
        MigrationError
            It cannot wait there, or what came does not fit; then it has ended.
        VmTimeoutError
            Nobody came.
        """
        if self.state is VmState.DEFINED:
            self.start_waiting()
        self._home.require_open(f"{self.name}.receive()")
        self._home.loop.call(receive(self._vm, uri))
        self._home.loop.call(arrived(self._vm, timeout_s))

    def close(self) -> None:
        """End the machine; the name is free again. May be repeated."""
        if not self._home.closed:
            self._home.loop.call(self.end(), finish=True)

    def wait_text(self, text: str, timeout_s: float = COMMAND_TIME_LIMIT_S) -> str:
        """Wait until the guest has written a text to its serial port; return all it has written so far.

        Raises
        ------
        VmTimeoutError
            It did not in time.
        VmError
            It ended without.
        """
        self._home.require_open(f"{self.name}.wait_text()")
        return self._home.loop.call(self._vm.wait_text(text, timeout_s))

    def wait_end(self, timeout_s: float = COMMAND_TIME_LIMIT_S) -> bool:
        """Wait until the process has ended; tell whether it has."""
        self._home.require_open(f"{self.name}.wait_end()")
        return self._home.loop.call(self._vm.wait_end(timeout_s))

    def execute(self, command: str, /, *, timeout_s: float = COMMAND_TIME_LIMIT_S, **arguments: Any) -> Any:
        """Execute a QMP command and return its answer; see `Vm.execute`.

        Raises
        ------
        QmpCommandError
            The machine refused it.
        VmError
            There is no machine, or no answer in time.
        """
        self._home.require_open(f"{self.name}.execute({command!r})")
        return self._home.loop.call(self._vm.execute(command, timeout_s=timeout_s, **arguments))

    def __repr__(self) -> str:
        parts = [f"{self._vm.emulator}, {self.state}"]
        if self.reason:
            parts.append(self.reason)
        for server, peer_id in zip(self.servers, self._peer_ids, strict=False):
            parts.append(f"peer {peer_id} of {server.name}")
        return f"<LabVm {self.name}: {', '.join(parts)}>"

    async def begin(self, *, run: bool, incoming: bool = False) -> None:
        """Launch what is defined, let run what has not run yet; on the lab's loop."""
        try:
            if self._vm.state is VmState.DEFINED:
                await self._vm.launch(incoming=incoming)
                self._begun = incoming  # it is not ours to start
                for boot, peer_id in zip(self._boot, self._find_peer_ids(), strict=True):
                    boot.peer_id = peer_id
            if run and not self._begun and self._vm.state is VmState.PAUSED:
                await self._vm.cont()
                self._begun = True
        except BaseException as error:  # also when we are cancelled: nothing is to be left
            await self.end()
            if isinstance(error, VmError) and not isinstance(error, VmStartError):
                raise VmStartError(f"{self.name} ended while it was being started: {error}") from error
            raise

    async def take_over(self, source: LabVm) -> None:
        """Go on with a guest that has moved here from another machine, which has not ended yet; on the lab's loop."""

    async def end(self) -> None:
        """Close; on the lab's loop."""
        try:
            await self._vm.close()
        finally:
            self._home.forget(self.name, self)

    def rows(self) -> list[Row]:
        """Return its lines of the table: one for each connection, one when there is none."""
        state = f"{self.state}: {self.reason}" if self.reason else str(self.state)
        if not self.servers:
            return [Row(self.name, f"{self.emulator} VM", state)]
        ids = [str(peer_id) for peer_id in self._peer_ids] or ["-"] * len(self.servers)
        return [
            Row(
                self.name,
                f"{self.emulator} VM",
                state,
                peer_id,
                str(server.vectors),
                format_size(server.size_bytes),
                server.name,
            )
            for server, peer_id in zip(self.servers, ids, strict=True)
        ]

    def identities(self) -> set[tuple[str, int]]:
        """Return (server name, peer id) of each connection."""
        return {(server.name, peer_id) for server, peer_id in zip(self.servers, self._peer_ids, strict=False)}

    def _find_peer_ids(self) -> list[int]:
        """Match the servers' peers with the process: each device joined its server before QMP answered."""
        left = {server.name: server.ids_of(self._vm.pid) for server in self.servers}
        try:
            return [left[server.name].pop(0) for server in self.servers]
        except IndexError:
            raise VmStartError(
                f"{self.name} ({self._vm.emulator}) runs, but did not join every server it was connected to; "
                f"its peer ids: { ({server.name: server.ids_of(self._vm.pid) for server in self.servers}) }"
            ) from None
