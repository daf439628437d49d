"""What stands behind a device: an ivshmem server, or a piece of shared memory; and how QMP is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..units import check_memory_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Command = tuple[str, dict[str, Any]]
"""A QMP command and its arguments."""


class Backing(Protocol):
    """What `hotplug` asks of either kind."""

    @property
    def has_peers(self) -> bool:
        """Whether a server stands behind it: then the device holds eventfds."""

    async def check(self) -> None:
        """Raise an IvshmemLabError when plugging could hang or kill the machine."""

    async def settle(self, pid: int) -> None:
        """Wait until the process has read all that was sent to it."""

    def open(self, device_id: str) -> Command:
        """Return what makes it ready in the machine."""

    def close(self, device_id: str) -> Command:
        """Return what undoes `open`."""

    def device(self, device_id: str) -> dict[str, Any]:
        """Return the driver and the properties of the device."""


@dataclass(frozen=True, slots=True)
class ServerBacking:
    """An ivshmem server that the machine joins through a chardev: an ``ivshmem-doorbell``.

    Parameters
    ----------
    path
        The server's socket.
    vectors
        MSI-X vectors of the device, 1 to 2048.
    check_server
        Raises when the server is not there, or its memory is of no use: QEMU 7.2 hangs for ever in the
        handshake with a server that does not finish it, and aborts on a size that is not a power of two.
    settle_server
        Waits until a process has read everything that the server sent to it.
    """

    path: str
    vectors: int
    check_server: Callable[[], Awaitable[None]]
    settle_server: Callable[[int], Awaitable[None]]

    has_peers = True

    async def check(self) -> None:
        """See `Backing`."""
        await self.check_server()

    async def settle(self, pid: int) -> None:
        """See `Backing`."""
        await self.settle_server(pid)

    def open(self, device_id: str) -> Command:
        """See `Backing`; a new chardev each time, since a server introduces a connection once."""
        address = {"type": "unix", "data": {"path": self.path}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        return "chardev-add", {"id": f"{device_id}-chardev", "backend": backend}

    def close(self, device_id: str) -> Command:
        """See `Backing`; the peer leaves here, and not with the device."""
        return "chardev-remove", {"id": f"{device_id}-chardev"}

    def device(self, device_id: str) -> dict[str, Any]:
        """See `Backing`."""
        return {"driver": "ivshmem-doorbell", "chardev": f"{device_id}-chardev", "vectors": self.vectors}


@dataclass(frozen=True, slots=True)
class MemoryBacking:
    """Shared memory without a server: an ``ivshmem-plain``.

    Parameters
    ----------
    path
        A file that the machine can open, such as ``/dev/shm/NAME``.
    size_bytes
        Its size: a power of two, at least 4096 (QEMU 7.2 aborts otherwise).
    """

    path: str
    size_bytes: int

    has_peers = False

    async def check(self) -> None:
        """See `Backing`."""
        check_memory_size(self.size_bytes, "memory")

    async def settle(self, pid: int) -> None:
        """See `Backing`: there is nobody to send anything."""

    def open(self, device_id: str) -> Command:
        """See `Backing`."""
        return "object-add", {
            "qom-type": "memory-backend-file",
            "id": f"{device_id}-memory",
            "mem-path": self.path,
            "size": self.size_bytes,
            "share": True,
        }

    def close(self, device_id: str) -> Command:
        """See `Backing`."""
        return "object-del", {"id": f"{device_id}-memory"}

    def device(self, device_id: str) -> dict[str, Any]:
        """See `Backing`."""
        return {"driver": "ivshmem-plain", "memdev": f"{device_id}-memory"}
