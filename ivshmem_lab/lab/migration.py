"""Moving a machine of a lab into another process, with its devices: what `LabVm.migrate` does.

Who may move: `ivshmem_lab.emulator.migration.state` and docs/migration.md ("Who may move: roles").
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import GuestSilentError, IvshmemLabError, MigrationError, QmpCommandError, UsageError, VmError
from ..units import format_size
from ..vm import migration as qmp
from ..vm.state import VmState

if TYPE_CHECKING:
    from ..vm.device import Step
    from .attached import Attached
    from .home import Home
    from .members import LabVm
    from .plugged import LabDevice, Source

OnProgress = Callable[[int, int], None]
"""Called on the lab's thread with the bytes that are sent and those that there are."""
PEERS = ("refuse", "replug")
_SCHEMES = ("unix:", "tcp:")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class MigrationStep:
    """One step of a migration.

    Attributes
    ----------
    side
        ``"source"`` or ``"destination"``.
    what
        One line for people.
    took_s
        How long it took, in seconds.
    command
        The QMP command as it was sent; None for a step without one.
    """

    side: str
    what: str
    took_s: float
    command: dict[str, Any] | None = None


@dataclass(slots=True)
class Migration:
    """A machine that has moved; its repr tells how, step by step.

    Attributes
    ----------
    vm : LabVm or None
        The machine where it is now; None when it went to an address.
    steps : list of MigrationStep
    total_s, downtime_s : float
        How long the emulator took, and for how long of that the guest stood still (``query-migrate``); from pause to go on, both, where
        the guest was paused for it.
    sent_bytes : int
        What went over the wire.
    peer_ids : dict of str to int
        For each device that was plugged in again: its id, and the machine's new peer id there.
    left : list of str
        Ids of the devices that were unplugged and are not plugged in again: at an address that is not of this lab, or because that
        failed; `steps` tells why.
    """

    source: str
    target: str
    vm: LabVm | None = None
    steps: list[MigrationStep] = field(default_factory=list)
    total_s: float = 0.0
    downtime_s: float = 0.0
    sent_bytes: int = 0
    peer_ids: dict[str, int | None] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        went = f"in {1e3 * self.total_s:.0f} ms, stood still for {1e3 * self.downtime_s:.0f} ms"
        lines = [
            f"{self.source} has moved to {self.target} {went}, {format_size(self.sent_bytes)} sent",
        ]
        for step in self.steps:
            lines.append(f"  {1e3 * step.took_s:8.1f} ms  {step.side:<11} {step.what}")
            if step.command is not None:
                lines.append(f"               {json.dumps(step.command)}")
        lines += [f"  {name} is peer {peer_id} now" for name, peer_id in self.peer_ids.items()]
        lines += [f"  {name} was unplugged; plug it in at the destination" for name in self.left]
        return "\n".join(lines)


class Mover:
    """Carries one migration out, on the caller's thread.

    Parameters
    ----------
    vm
        The machine that moves.
    to, sources, peers, timeout_s, on_step, on_progress
        As for `LabVm.migrate`.
    """

    def __init__(
        self,
        vm: LabVm,
        to: LabVm | str,
        sources: Mapping[Source, Source | None],
        peers: str,
        timeout_s: float,
        on_step: Callable[[MigrationStep], None] | None,
        on_progress: OnProgress | None,
    ) -> None:
        if peers not in PEERS:
            raise UsageError(f"peers={peers!r} is not allowed; there are {' and '.join(map(repr, PEERS))}")
        self._home: Home = vm.home
        self._vm = vm
        self._to = to
        self._sources = dict(sources)
        self._peers = peers
        self._timeout_s = timeout_s
        self._on_step = on_step
        self._on_progress = on_progress
        self._ran = vm.state is VmState.RUNNING
        self._paused_at: float | None = None
        self.record = Migration(vm.name, to if isinstance(to, str) else to.name)

    def move(self) -> Migration:
        """Do it; on failure the source is as it was, and nothing is left of a destination that was made for it."""
        vm = self._vm
        if vm.state not in {VmState.RUNNING, VmState.PAUSED}:
            raise VmError(f"{vm.name} is {vm.state}; only a machine that runs, or is paused, can be migrated")
        staying = [each for each in vm.attached if self._ask(each) == "off"]
        moving = [each for each in vm.attached if each not in staying]
        self._look(staying)
        uri, destination = self._destination()
        unplugged: list[Attached] = []
        try:
            if destination is not None:
                self._furnish(destination, moving)
                self._do(
                    "destination", "waits for it", qmp.receive(destination.process, uri), "migrate-incoming", uri=uri
                )
            for each in staying:
                self._unplug(each, unplugged)
            if self._ran and destination is not None and (why := self._why_paused(moving)):
                self._paused_at = time.monotonic()
                self._do("source", f"paused: {why}", vm.process.stop(), "stop")
            self._transfer(uri, destination)
            if destination is not None:
                # QEMU 7.2 finds some differences only when the source has sent all and believes itself moved.
                arriving = qmp.arrived(destination.process, self._timeout_s)
                self._do("destination", "has arrived", arriving)
        except BaseException:  # also Ctrl-C
            self._go_back(destination, unplugged)
            raise
        self._settle(destination, unplugged)
        return self.record

    # -- before ----------------------------------------------------------------------------------------

    def _ask(self, device: Attached) -> str:
        """Ask for a device's role, as the emulator decided it: ``auto`` is on or off by then."""
        path = f"/machine/peripheral/{device.device_id}"
        return str(self._vm.execute("qom-get", path=path, property="master"))

    def _look(self, staying: list[Attached]) -> None:
        """Refuse what cannot be, before anything is touched."""
        if self._peers == "refuse":
            reasons = self._home.loop.call(qmp.blocked_reasons(self._vm.process))
            if reasons:
                raise MigrationError("source", reasons[0], qmp.hint_for_migration(reasons[0]))
        for each in staying:
            if each.fixed:
                raise MigrationError(
                    "source",
                    f"{each.device_id} was there at the start, and a q35 cannot let it go",
                    "plug it into a root port with plug() instead of connect=",
                )

    def _destination(self) -> tuple[str, LabVm | None]:
        to = self._to
        if isinstance(to, str) and to.startswith(_SCHEMES):
            return to, None
        path = self._home.directory / f"move-{next(_numbers)}.sock"
        destination = self._home.define_like(self._vm, to) if isinstance(to, str) else to
        if destination is self._vm:
            raise UsageError(f"{to!r} is the machine itself; give a name for the destination")
        return f"unix:{path}", destination

    def _furnish(self, destination: LabVm, moving: list[Attached]) -> None:
        """Start the destination, and give it what moves along: the same ids, in the same places."""
        begun = time.monotonic()
        if destination.state is VmState.DEFINED:
            destination.start_waiting()
            self._note("destination", f"{destination.name} started, with -incoming defer", begun)
        there = {each.device_id for each in destination.attached}
        for each in moving:
            source = self._source(each)
            if each.device_id in there or source is None:
                continue
            try:
                self._plug(destination, each, source, "destination", master="on")
            except QmpCommandError as error:
                raise qmp.refused("destination", error) from error

    def _source(self, each: Attached) -> Source | None:
        return self._sources.get(each.source, each.source)

    def _why_paused(self, moving: list[Attached]) -> str:
        """Tell why a guest that runs while it is copied would lose what it stores; empty where it does not."""
        if any(self._source(each) is each.source for each in moving):
            return "both sides have the same memory"  # it is read here and written there
        if self._vm.emulator == "qemu" and self._vm.process.machine.accelerator != "kvm":
            # 7.2, on a busy machine: 4 of 100, seen by the guest migrant.
            return "QEMU's TCG loses stores while it copies"
        return ""

    def _unplug(self, each: Attached, unplugged: list[Attached]) -> None:
        device = self._vm.device(device_id=each.device_id)
        done = len(device.steps)
        try:
            device.unplug()
        except GuestSilentError as error:
            device.give_up()
            raise MigrationError(
                "source",
                f"the guest has not let {each.device_id} go: {error}",
                'its guest has to answer; or plug the device with master="on", so that it moves along',
            ) from error
        unplugged.append(each)
        for step in device.steps[done:]:
            self._take("source", each, step)

    # -- the move --------------------------------------------------------------------------------------

    def _transfer(self, uri: str, destination: LabVm | None) -> None:
        begun = time.monotonic()
        call = self._home.loop.call
        sending = qmp.send(self._vm.process, uri, timeout_s=self._timeout_s, on_progress=self._on_progress)
        try:
            told = call(sending)
        except MigrationError as error:
            if destination is None:
                raise
            raise call(qmp.blame(destination.process, error)) from error
        self.record.total_s = told.get("total-time", 0) / 1e3
        self.record.downtime_s = told.get("downtime", 0) / 1e3
        self.record.sent_bytes = int(told.get("ram", {}).get("transferred", 0))
        self._note("source", "migrate: sent, all of it", begun, "migrate", uri=uri)

    def _settle(self, destination: LabVm | None, unplugged: list[Attached]) -> None:
        """Let the guest run where it is, end what it has left, plug in again what stayed."""
        if destination is not None:
            if self._ran and destination.state is not VmState.RUNNING:
                self._do("destination", "runs", destination.process.cont(), "cont")
            if self._paused_at is not None:  # the emulator counts from where it would have stopped the guest itself
                self.record.total_s = self.record.downtime_s = time.monotonic() - self._paused_at
            self._home.loop.call(destination.take_over(self._vm))
            self.record.vm = destination
        begun = time.monotonic()
        self._vm.close()
        self._note("source", f"{self._vm.name} ended", begun)
        for each in unplugged:
            source = self._source(each)
            if destination is None or source is None:
                self.record.left.append(each.device_id)
                continue
            master = each.link.master if each.link else None
            try:
                device = self._plug(destination, each, source, "destination", master)
            except IvshmemLabError as error:  # it has moved all the same
                self.record.left.append(each.device_id)
                self._note("destination", f"{each.device_id} is not plugged in again: {error}", time.monotonic())
            else:
                self.record.peer_ids[each.device_id] = device.peer_id

    # -- back ------------------------------------------------------------------------------------------

    def _go_back(self, destination: LabVm | None, unplugged: list[Attached]) -> None:
        """End the destination, and only then let the guest run here, with the devices that it had."""
        if destination is not None:
            with contextlib.suppress(IvshmemLabError):
                destination.close()
        if self._ran and self._vm.state is VmState.PAUSED:
            with contextlib.suppress(IvshmemLabError):
                self._vm.resume()
        for each in unplugged:
            with contextlib.suppress(IvshmemLabError):
                self._plug(self._vm, each, each.source, "source", each.link.master if each.link else None)

    def _plug(self, vm: LabVm, each: Attached, source: Source, side: str, master: str | None) -> LabDevice:
        link = each.link
        given = {"master": master, "ioeventfd": link.ioeventfd if link else None}
        properties: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return vm.plug(
            source,
            vectors=link.vectors if link else None,
            device_id=each.device_id,
            bus=None if each.device is None else each.device.where,
            on_step=lambda step: self._take(side, each, step),
            # Elsewhere a memory is known by it; a device that was unplugged here gets a new one.
            backing_id=each.device.backing_id if each.device and vm is not self._vm else None,
            **properties,
        )

    # -- telling ---------------------------------------------------------------------------------------

    def _do(self, side: str, what: str, work: Any, command: str | None = None, **arguments: Any) -> None:
        begun = time.monotonic()
        self._home.loop.call(work)
        self._note(side, what, begun, command, **arguments)

    def _note(self, side: str, what: str, begun: float, command: str | None = None, **arguments: Any) -> None:
        said = None
        if command is not None:
            said = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._add(MigrationStep(side, what, time.monotonic() - begun, said))

    def _take(self, side: str, each: Attached, step: Step) -> None:
        self._add(MigrationStep(side, f"{each.device_id}: {step.what}", step.took_s, step.command))

    def _add(self, step: MigrationStep) -> None:
        self.record.steps.append(step)
        if self._on_step is not None:
            self._on_step(step)
