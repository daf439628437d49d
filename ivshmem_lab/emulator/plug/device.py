"""What `ivshmem_lab.plug` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ...device.flat import FlatIvshmem
from ...device.ivshmem import MEMORY_BAR, MSIX_BAR, REGISTERS_BAR, Ivshmem
from ...errors import DeviceError
from ..link import MemoryLink, ServerLink
from .host import Host, hosts

if TYPE_CHECKING:
    import socket

    import numpy as np
    from numpy.typing import NDArray

    from ...device.flat import FlatProperties


class PluggedDevice:
    """A device on a user's engine; made by `plug`.

    Attributes
    ----------
    device : Ivshmem or FlatIvshmem
        The device model; its repr shows the registers.
    slot : int or None
        Its PCI slot on bus 0; None for a flat device.
    """

    def __init__(
        self,
        shared: Host,
        device: Ivshmem | FlatIvshmem,
        link: MemoryLink | ServerLink,
        place: int | FlatProperties,
        sock: socket.socket | None,
    ) -> None:
        self.device = device
        self.slot = place if isinstance(place, int) else None
        self._flat = None if isinstance(place, int) else place
        self._shared: Host | None = shared
        self._link = link
        self._sock = sock

    def _open(self) -> Host:
        if self._shared is None:
            raise DeviceError("this device has been closed; plug it again with ivshmem_lab.plug()")
        return self._shared

    @property
    def peer_id(self) -> int:
        """The id that the server gave, 0 without a server (IVPosition)."""
        return self.device.peer_id

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The shared memory, zero copy, shape ``(size_bytes,)``."""
        import numpy as np

        self._open()
        return np.frombuffer(self._link.memory, dtype=np.uint8)  # type: ignore[call-overload, no-any-return]

    @property
    def bars(self) -> dict[int, int]:
        """Addresses of the BARs that the guest sees, by number: 0 registers, 1 MSI-X, 2 memory; empty when flat."""
        return dict(self.device.mapped) if isinstance(self.device, Ivshmem) else {}

    @property
    def addresses(self) -> dict[str, int]:
        """Where the guest finds its ``registers``, ``memory``, ``msix``, ``ecam`` (its configuration) and ``messages``."""
        shared = self._open()
        if self._flat is not None:
            found = {"registers": self._flat.x_bus_address_iomem, "memory": self._flat.x_bus_address_shmem}
        else:
            names = {REGISTERS_BAR: "registers", MSIX_BAR: "msix", MEMORY_BAR: "memory"}
            found = {names[bar]: address for bar, address in sorted(self.bars.items())}
            if shared.ecam is not None and self.slot is not None:
                found["ecam"] = shared.ecam + (self.slot << 15)
        if shared.board.page is not None:
            found["messages"] = shared.board.page.address
        return found

    @property
    def guest_errors(self) -> dict[str, int]:
        """What the guest did that hardware answers with silence, counted by kind."""
        return dict(self._open().board.guest_errors)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for an interrupt while the guest is halted, and enter its handler.

        Call it after ``emu_start`` has returned at a HLT or WFI.

        Parameters
        ----------
        timeout_s
            Seconds, None for as long as it takes.

        Returns
        -------
        int or None
            The address to give to ``emu_start``: the handler's, or the present one when a masked interrupt only
            wakes the guest (WFI) or ``on_interrupt`` was told. None when the time is over, or `stop` was called.

        Raises
        ------
        DeviceError
            When a device failed while the guest ran, or the guest's interrupt table cannot be used.
        """
        return self._open().wait(timeout_s)

    def stop(self) -> None:
        """End the guest's run at the next block, or a `wait`; from any thread, and never lost.

        Called while neither goes on, it ends the next one at once.
        """
        self._open().stop()

    def unplug(self) -> None:
        """Take the device out; the engine, its memory and all addresses are the user's again. May be called twice.

        Raises
        ------
        DeviceError
            When a device failed while the guest ran and nobody has been told yet.
        """
        shared, self._shared = self._shared, None
        if shared is None:
            return
        if isinstance(self.device, FlatIvshmem):
            shared.board.unplug_flat(self.device)
        else:
            assert self.slot is not None
            shared.board.unplug(self.slot)
        shared.cpu.settle()
        if isinstance(self._link, ServerLink):
            self._link.close()
        if self._sock is not None:
            self._sock.close()
        shared.devices.remove(self)
        if not shared.devices:
            del hosts[id(shared.cpu.user_uc)]
            shared.close()
        shared.raise_failure()

    close = unplug

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.unplug()

    def __repr__(self) -> str:
        if self._shared is None:
            return f"{self.device!r}\n  unplugged"
        where = ", ".join(f"{name} {address:#x}" for name, address in self.addresses.items())
        return f"{self.device!r}\n  {'flat' if self.slot is None else f'slot {self.slot}'}: {where}"
