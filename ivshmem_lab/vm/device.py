"""The life of one device on a running machine.

::

    absent → ready → connected → adding → plugged → seen → unplugging → deleted → guarded → absent

Measured with QEMU 7.2: a peer lives as long as its *chardev*; what the guest has not let go of stays; an unplugged
doorbell device leaves handlers behind (`guards`). Our emulator needs no guards and goes the same way.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..errors import GuestSilentError, IvshmemLabError, QmpCommandError, VmError
from .slots import pci_devices
from .state import VmState
from .text import VmTimeoutError
from .vm import COMMAND_TIME_LIMIT_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from .backing import Backing
    from .events import QmpEvent
    from .guards import Guards
    from .slots import Place
    from .vm import Vm

GUEST_TIME_LIMIT_S = 10.0
_LOOK_EVERY_S = 0.01
LIVE = frozenset({VmState.PAUSED, VmState.RUNNING})
ENDED = frozenset({VmState.STOPPED, VmState.FAILED})
_BARE_METAL = " The bundled bare-metal guests do on machine='pc' only, Linux guests on every machine"


class DeviceState(StrEnum):
    """Where a device is in its life."""

    ABSENT = "absent"
    READY = "ready"
    CONNECTED = "connected"
    ADDING = "adding"
    PLUGGED = "plugged"
    SEEN = "seen"
    UNPLUGGING = "unplugging"
    DELETED = "deleted"
    GUARDED = "guarded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a device's life, with what was said over QMP.

    Attributes
    ----------
    state
        Where the device is after it.
    what
        One line for people.
    took_s
        How long it took, in seconds.
    command
        The QMP command as it was sent; None for a step without one.
    answer
        What came back: a QMP answer or event; None when there was none.
    error
        Why it failed; empty when it did not.
    done_s
        When it was done, `time.monotonic`.
    """

    state: DeviceState
    what: str
    took_s: float
    command: dict[str, Any] | None = None
    answer: Any = None
    error: str = ""
    done_s: float = 0.0


class HotplugDevice:
    """A device that was or is plugged into a running machine; made by `Hotplug.plug`.

    Attributes
    ----------
    device_id : str
        Its id in the machine.
    backing_id : str
        From which the ids of its chardev or memory are made.
    place : Place
        Where it sits.
    state : DeviceState
    steps : list of Step
        All that has happened to it.
    """

    def __init__(
        self,
        vm: Vm,
        device_id: str,
        backing: Backing,
        place: Place,
        guards: Guards,
        on_left: Callable[[HotplugDevice], None],
        backing_id: str | None = None,
    ) -> None:
        self.device_id = device_id
        self.backing_id = backing_id or device_id
        self.backing = backing
        self.place = place
        self._state = DeviceState.ABSENT
        self.steps: list[Step] = []
        self.on_step: Callable[[Step], None] | None = None
        self.gone = asyncio.Event()
        self._vm = vm
        self._guards = guards
        self._on_left = on_left
        self._needs_guards = vm.emulator.kind == "qemu" and backing.has_peers
        self._asked = False
        self._asked_s: float | None = None
        self._stood = DeviceState.PLUGGED

    @property
    def state(self) -> DeviceState:
        """Where it is in its life; nothing outlives its machine."""
        return DeviceState.ABSENT if self._vm.state in ENDED else self._state

    # -- in -------------------------------------------------------------------------------------------

    async def plug(self, properties: dict[str, Any], timeout_s: float) -> None:
        """Go from absent to plugged; on failure everything is taken back."""
        begun = time.monotonic()
        await self.backing.check()
        self._note(DeviceState.READY, "what it shows is there", begun)
        command, arguments = self.backing.open(self.backing_id)
        await self._do(DeviceState.CONNECTED, f"{command}", command, arguments, timeout_s)
        self._state = DeviceState.ADDING
        arguments = {
            **self.backing.device(self.backing_id),
            "id": self.device_id,
            **self.place.properties(),
            **properties,
        }
        try:
            await self._do(DeviceState.PLUGGED, "device_add", "device_add", arguments, timeout_s)
        except VmTimeoutError:
            raise  # the machine hangs: nothing can be taken back
        except VmError:
            if self._vm.state in LIVE:
                await self._withdraw(timeout_s)
            raise
        if self._needs_guards:
            self._guards.watch()

    def adopt(self) -> None:
        """Begin where the machine has had it since its start."""
        if self._needs_guards:
            self._guards.watch()
        self._note(DeviceState.PLUGGED, "there since the machine's start", time.monotonic())

    async def wait_seen(self, timeout_s: float) -> None:
        """Wait until the guest has given the registers an address.

        Raises
        ------
        GuestSilentError
            It has not in time.
        VmError
            The machine ended, or the device is not plugged.
        """
        begun = time.monotonic()
        if self.state is DeviceState.SEEN:
            return
        if self.state is not DeviceState.PLUGGED:
            raise VmError(f"{self.device_id} of {self._vm.name} is {self.state}, not plugged")
        while not _has_address(await self._vm.execute("query-pci"), self.device_id):
            if time.monotonic() - begun >= timeout_s:
                raise GuestSilentError(
                    f"the guest of {self._vm.name} has given {self.device_id} no address in {timeout_s:g} s; "
                    f"is it running, and does it support hot-plug?{_BARE_METAL if self._vm.machine.machine != 'pc' else ''}"
                )
            await asyncio.sleep(_LOOK_EVERY_S)
        if self._needs_guards:
            self._guards.look()
        if self.state is DeviceState.PLUGGED:
            self._note(DeviceState.SEEN, "the guest has given it addresses", begun)

    # -- out ------------------------------------------------------------------------------------------

    async def unplug(self, timeout_s: float) -> None:
        """Ask the guest to let it go, wait, and give everything back.

        Raises
        ------
        GuestSilentError
            The guest has not answered in time; the device stays, and goes when the guest lets it go later.
            `force` or `give_up` end the waiting state.
        VmError
            The machine ended, or refused.
        """
        if self.state is DeviceState.ABSENT:
            return
        if self.state in {DeviceState.DELETED, DeviceState.GUARDED}:  # the guest was quicker: it is on its way out
            await self._wait_gone(timeout_s)
            return
        if self.state not in {DeviceState.PLUGGED, DeviceState.SEEN, DeviceState.UNPLUGGING}:
            raise VmError(f"{self.device_id} of {self._vm.name} is {self.state}; only what is plugged can be unplugged")
        if not self._asked:
            self._stood = self.state
            if self.backing.has_peers and (pid := self._vm.pid) is not None:
                begun = time.monotonic()
                await self.backing.settle(pid)
                await self._vm.execute("query-status")  # a round of its main loop: it has read what the socket held
                self._note(self.state, "all that the server sent is read", begun)
                self._guards.look()
            self._state = DeviceState.UNPLUGGING
            self._asked_s = time.monotonic()
            try:
                await self._do(
                    DeviceState.UNPLUGGING, "device_del: the guest is asked", "device_del", {"id": self.device_id}
                )
            except VmError as error:
                # An earlier call was interrupted after it had asked: that is as good.
                if not (isinstance(error, QmpCommandError) and "already in the process of unplug" in error.desc):
                    if self.state is DeviceState.UNPLUGGING:
                        self._state = self._stood
                    raise
            self._asked = True
        else:
            self._state = DeviceState.UNPLUGGING
        await self._wait_gone(timeout_s)

    async def force(self, timeout_s: float = GUEST_TIME_LIMIT_S) -> None:
        """Take the device out of a guest that does not answer, by resetting the machine: **the guest starts anew**.

        A reset performs what a guest was asked for (QEMU 7.2, and ours).

        Raises
        ------
        GuestSilentError
            Not even that helped.
        VmError
            The machine ended.
        """
        if self.state is DeviceState.ABSENT:
            return
        if self.state is not DeviceState.UNPLUGGING:
            raise VmError(
                f"{self.device_id} of {self._vm.name} is {self.state}; unplug() it first, force() is for silent guests"
            )
        await self._do(DeviceState.UNPLUGGING, "system_reset: the guest starts anew", "system_reset", {})
        await self._wait_gone(timeout_s)

    def give_up(self) -> None:
        """Stop waiting for the guest. It was asked, and may still let the device go: that is then followed through."""
        if self.state is DeviceState.UNPLUGGING:
            self._note(self._stood, "given up waiting; the guest may still let it go", time.monotonic())

    async def deleted(self, event: QmpEvent) -> None:
        """Follow through when the machine has let the device go, whether asked or not."""
        begun = event.time_s if self._asked_s is None else self._asked_s
        answer = {"event": event.name, "data": dict(event.data)}
        self._note(DeviceState.DELETED, "the guest has let it go", begun, answer=answer)
        try:
            if self._needs_guards:
                begun = time.monotonic()
                guards = await self._guards.occupy_closed()
                self._note(DeviceState.GUARDED, f"add-fd: {guards} guards under the numbers of its eventfds", begun)
            await self._withdraw(COMMAND_TIME_LIMIT_S)
        except IvshmemLabError as error:
            self._note(DeviceState.FAILED, "giving back", begun, error=str(error))
        finally:
            if self._needs_guards:
                self._guards.unwatch()
            self.gone.set()

    # -- inside ---------------------------------------------------------------------------------------

    async def _withdraw(self, timeout_s: float) -> None:
        command, arguments = self.backing.close(self.backing_id)
        await self._do(DeviceState.ABSENT, command, command, arguments, timeout_s)
        self._on_left(self)

    async def _wait_gone(self, timeout_s: float) -> None:
        gone = asyncio.ensure_future(self.gone.wait())
        ended = asyncio.ensure_future(self._vm.wait_end())
        try:
            await asyncio.wait({gone, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in (gone, ended):
                waiter.cancel()
        if self.gone.is_set():
            if self.state is DeviceState.FAILED:
                raise VmError(f"{self.device_id} left {self._vm.name}, but: {self.steps[-1].error}")
            return
        if self._vm.state not in LIVE:
            raise VmError(f"{self._vm.name} ended while {self.device_id} was being unplugged: {self._vm.reason}")
        raise GuestSilentError(
            f"the guest of {self._vm.name} ({self._vm.state}) has not let {self.device_id} go in {timeout_s:g} s; "
            "wait with unplug(), take it with force() (resets the guest), or leave it with give_up()"
        )

    async def _do(
        self,
        state: DeviceState,
        what: str,
        command: str,
        arguments: dict[str, Any],
        timeout_s: float = COMMAND_TIME_LIMIT_S,
    ) -> None:
        begun = time.monotonic()
        said: dict[str, Any] = {"execute": command, **({"arguments": arguments} if arguments else {})}
        before = self.state
        try:
            answer = await self._vm.execute(command, timeout_s=timeout_s, **arguments)
        except VmError as error:
            hangs = isinstance(error, VmTimeoutError)
            self._note(DeviceState.FAILED if hangs else before, what, begun, command=said, error=str(error))
            raise
        # DEVICE_DELETED may have come before the answer.
        if state is DeviceState.UNPLUGGING and self.state is not before:
            state = self.state
        self._note(state, what, begun, command=said, answer={"return": answer})

    def _note(
        self,
        state: DeviceState,
        what: str,
        begun: float,
        *,
        command: dict[str, Any] | None = None,
        answer: Any = None,
        error: str = "",
    ) -> None:
        self._state = state
        now = time.monotonic()
        step = Step(state, what, now - begun, command, answer, error, now)
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)


def _has_address(pci: list[Any], device_id: str) -> bool:
    """Tell whether BAR 0 of a device has an address (``query-pci``: -1 while it has none)."""
    for device in pci_devices(pci):
        if device.get("qdev_id") == device_id:
            return any(region["bar"] == 0 and region["address"] > 0 for region in device["regions"])
    return False
