"""A device that is plugged into a running machine, as the user sees it."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..peer.peer import Peer
from ..units import check_memory_size
from ..vm.backing import Backing, MemoryBacking, ServerBacking
from ..vm.device import GUEST_TIME_LIMIT_S
from .servers import LabMemory, LabServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..topology.model import Link
    from ..vm.device import DeviceState, HotplugDevice, Step
    from .home import Home

Source = LabServer | LabMemory | str | os.PathLike[str]
"""What a device can show: a server or a memory of the lab, or the path of any server's socket."""

MOST_VECTORS = 2048


def make_backing(home: Home, source: Source, vectors: int | None) -> Backing:
    """Return what stands behind a device.

    Raises
    ------
    UsageError
        The source is none, or the vectors do not fit it.
    """
    if isinstance(source, LabServer | LabMemory) and not source.belongs_to(home):
        raise UsageError(f"{source!r} belongs to another lab; give the path of its socket, or one of this lab")
    if isinstance(source, LabMemory):
        if source.closed:
            raise UsageError(f"the memory {source.name!r} is closed; make a new one with lab.memory()")
        if vectors is not None:
            raise UsageError(f"vectors={vectors}: a memory has no interrupts; plug a server, or leave vectors out")
        return MemoryBacking(source.path, source.size_bytes)
    if isinstance(source, LabServer):
        wanted = max(1, source.vectors) if vectors is None else vectors
        backing = ServerBacking(source.path, wanted, source.check, source.settle)
    elif isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        wanted = 1 if vectors is None else vectors
        backing = ServerBacking(path, wanted, lambda: _check_foreign(path), _settle_foreign)
    else:
        raise UsageError(
            f"{source!r} cannot be plugged; give a server or a memory of the lab, or a server's socket path"
        )
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= MOST_VECTORS:
        raise UsageError(f"vectors {wanted!r} is not allowed: 1 to {MOST_VECTORS}")
    return backing


async def _check_foreign(path: str) -> None:
    """Join a server that is not ours once, to see that it finishes the handshake; its peers see us come and go."""

    def join() -> int:
        with Peer.connect(path) as peer:
            return peer.size_bytes

    check_memory_size(await asyncio.to_thread(join), f"the memory of the server on {path!r}")


async def _settle_foreign(pid: int) -> None:
    """Nothing tells what a foreign server has under way."""


class LabDevice:
    """A device of a running machine; made by `LabVm.plug`.

    Attributes
    ----------
    device_id : str
        Its id in the machine.
    source : LabServer, LabMemory or str
        What it shows.
    peer_id : int or None
        The machine's peer id on a server of the lab; None where there is none or it is not known.
    link : ivshmem_lab.topology.model.Link or None
        What it is in a topology; None for a server outside of the lab.
    """

    def __init__(
        self,
        home: Home,
        vm_name: str,
        device: HotplugDevice,
        source: Source,
        peer_id: int | None,
        link: Link | None,
    ) -> None:
        self._home = home
        self._vm_name = vm_name
        self._device = device
        self.device_id = device.device_id
        self.source = source
        self.peer_id = peer_id
        self.link = link

    @property
    def state(self) -> DeviceState:
        """Where it is in its life; compares equal to its text, such as ``"plugged"``."""
        return self._device.state

    @property
    def gone(self) -> bool:
        """Whether the guest has let it go; not so when its machine has ended with it."""
        return self._device.gone.is_set()

    @property
    def place(self) -> str:
        """Where it sits, such as ``"pci.0 slot 0x04"``."""
        return str(self._device.place)

    @property
    def backing_id(self) -> str:
        """From which the ids of its chardev or memory are made; see `LabVm.plug`."""
        return self._device.backing_id

    @property
    def where(self) -> str | int:
        """The same as `LabVm.plug` takes it (``bus=``): a slot's number, or a root port's name."""
        place = self._device.place
        return place.slot if place.bus == "pci.0" else place.bus

    @property
    def steps(self) -> list[Step]:
        """What has happened to it, with times and QMP messages."""
        return list(self._device.steps)

    def listen(self, on_step: Callable[[Step], None] | None) -> None:
        """Have every further step told as it is done, on the lab's thread, to this one alone; None ends it."""
        self._device.on_step = on_step

    def wait_seen(self, timeout_s: float = GUEST_TIME_LIMIT_S) -> None:
        """Wait until the guest has given it addresses.

        Raises
        ------
        GuestSilentError
            It has not in time.
        """
        self._home.require_open(f"{self.device_id}.wait_seen()")
        self._home.loop.call(self._device.wait_seen(timeout_s))

    def unplug(self, timeout_s: float = GUEST_TIME_LIMIT_S) -> None:
        """Ask the guest to let it go, and give everything back. Nothing happens when it is gone.

        Raises
        ------
        GuestSilentError
            The guest has not answered in time: wait again with `unplug`, or `force`, or `give_up`.
        VmError
            The machine ended, or refused.
        """
        self._home.require_open(f"{self.device_id}.unplug()")
        self._home.loop.call(self._device.unplug(timeout_s))

    def force(self, timeout_s: float = GUEST_TIME_LIMIT_S) -> None:
        """Take it out of a guest that does not answer, by resetting the machine: the guest starts anew."""
        self._home.require_open(f"{self.device_id}.force()")
        self._home.loop.call(self._device.force(timeout_s))

    def give_up(self) -> None:
        """Stop waiting for the guest; when it lets the device go later, that is followed through."""

        async def leave() -> None:
            self._device.give_up()

        self._home.require_open(f"{self.device_id}.give_up()")
        self._home.loop.call(leave())

    def __repr__(self) -> str:
        """Show what has happened, step by step, with the QMP commands: the device's life as a lesson."""
        peer = "" if self.peer_id is None else f", peer {self.peer_id}"
        lines = [f"{self.device_id} in {self._vm_name}, {self.place}: {self.state}{peer}"]
        for step in self.steps:
            lines.append(f"  {1e3 * step.took_s:8.1f} ms  {step.state:<10} {step.what}")
            if step.command is not None:
                lines.append(f"               {json.dumps(step.command)}")
            if step.error:
                lines.append(f"               {step.error}")
        return "\n".join(lines)
