"""``-device ivshmem``: the legacy device's properties, and the server that may take its time.

Ref: QEMU 2.9 ``hw/misc/ivshmem.c`` (properties, refusals); QEMU 2.5 for what a guest sees before the memory comes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ..device.ivshmem import QUIRKS
from ..device.legacy import DEPRECATED, LegacyIvshmem
from ..device.msix import MAX_VECTORS
from ..errors import IvshmemLabError, SharedMemoryError
from ..keyval import parse_switch
from ..units import PAGE_BYTES, is_power_of_two, parse_size
from .backends import MemoryBackend, open_backend
from .link import MemoryLink, ServerLink, shake_hands
from .properties import number
from .qmp import QmpError

if TYPE_CHECKING:
    import socket

    from ..pc.hostbridge import PciBus
    from .chardev import Chardev
    from .emulator import Emulator

    Place = tuple[int | None, PciBus]
    """Slot, None for the first free one, and bus."""

log = logging.getLogger("ivshmem_lab.emulator")

PATIENCE_S = 86400.0
"""A guest can live without its memory: the server has a day to send it."""
GRACE_S = 0.5
"""A server that answers so soon is waited for, so that the guest never sees -1 (QEMU 2.6 and later always wait)."""
MASTER_OF_ROLE = {"peer": "off", "master": "on"}


def legacy_size(text: str) -> int:
    """Read ``size``: as ``-m`` has it, a bare number means MiB."""
    size_bytes = parse_size(text, "size", default_suffix="m")
    if not is_power_of_two(size_bytes) or size_bytes < PAGE_BYTES:
        raise QmpError(f"Invalid size {text}; a power of two from 4K on is needed, such as 4M")
    return size_bytes


def quirks(pairs: dict[str, str], driver: str) -> str:
    """Take ``x-quirks`` out of a device's properties."""
    value = pairs.pop("x-quirks", "none")
    if value not in QUIRKS:
        raise QmpError(f"Property '{driver}.x-quirks' doesn't take value '{value}'; there are {', '.join(QUIRKS)}")
    return value


def server_chardev(chardevs: dict[str, Chardev], driver: str, name: str) -> tuple[Chardev, socket.socket]:
    """Find the connection to an ivshmem server; the texts are QEMU's where it has some."""
    chardev = chardevs.get(name)
    if chardev is None:
        raise QmpError(f"Property '{driver}.chardev' can't find value '{name}'")
    if chardev.used_by is not None:
        raise QmpError(f"Property '{driver}.chardev' can't take value '{name}': Device '{name}' is in use")
    if chardev.sock is None or chardev.listening:
        raise QmpError(f"chardev '{name}' is no connection to an ivshmem server: use socket,path=SERVER")
    return chardev, chardev.sock


class LegacyDevices:
    """The legacy devices of one emulator, and those whose server has not sent the memory yet."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._waiting: dict[str, asyncio.Task[None]] = {}
        self._memory: dict[str, MemoryBackend] = {}

    async def add(self, device_id: str, pairs: dict[str, str], place: Place) -> None:
        """Plug one; a server that is not prompt is not waited for.

        Raises
        ------
        QmpError
            When a property is wrong, or the id of a prompt server does not go with ``role`` or ``-only-migratable``
            (with a server that takes its time, the device stays without memory then); the texts are QEMU's where it had some.
        """
        size_bytes = legacy_size(pairs.pop("size", "4M"))
        shm, chardev = pairs.pop("shm", None), pairs.pop("chardev", None)
        if (shm is None) == (chardev is None):
            raise QmpError("You must specify either 'shm' or 'chardev'")
        role = pairs.pop("role", None)
        if role is not None and role not in MASTER_OF_ROLE:
            raise QmpError("'role' must be 'peer' or 'master'")
        msi = parse_switch(pairs.pop("msi", "on"), "msi")
        ioeventfd = parse_switch(pairs.pop("ioeventfd", "off"), "ioeventfd")
        vectors = number(pairs.pop("vectors", "1"), "vectors")
        if ioeventfd and not msi:
            raise QmpError("ioeventfd/irqfd requires MSI")
        if msi and chardev is not None and not 1 <= vectors <= MAX_VECTORS:
            raise QmpError(
                f"Failed to initialize interrupts: The number of MSI-X vectors is invalid (1 to {MAX_VECTORS})"
            )
        device = LegacyIvshmem(
            size_bytes,
            server=chardev is not None,
            msi=msi,
            vectors=vectors,
            ioeventfd=ioeventfd,
            use64=pairs.pop("use64", "1") in ("1", "on"),
            quirks=quirks(pairs, "ivshmem"),
        )
        self._emulator.migration.check_migratable(MASTER_OF_ROLE.get(role or "", "auto"), 0)
        log.warning("%s", DEPRECATED)
        if chardev is not None:
            await self._add_server(device_id, device, chardev, place, role)
        else:
            assert shm is not None
            await self._add_memory(device_id, device, shm, place)

    async def _add_memory(self, device_id: str, device: LegacyIvshmem, shm: str, place: Place) -> None:
        backend = open_backend(
            {
                "qom-type": "memory-backend-file",
                "id": "internal-shm-backend",
                "mem-path": f"/dev/shm/{shm}",
                "size": str(device.memory_bytes),
                "share": "on",
            }
        )
        try:
            await self._emulator.plug(device_id, device, MemoryLink(backend.map), *place)
        except BaseException:
            backend.close()
            raise
        self._memory[device_id] = backend

    async def _add_server(
        self, device_id: str, device: LegacyIvshmem, name: str, place: Place, role: str | None
    ) -> None:
        emulator = self._emulator
        chardev, sock = server_chardev(emulator.chardevs, "ivshmem", name)
        link = ServerLink(sock, device.msix.vectors if device.msix else MAX_VECTORS)
        handshake = asyncio.create_task(shake_hands(link, sock, PATIENCE_S))
        chardev.used_by = device_id
        try:
            # What a prompt server says is known before the guest sees a device: one that may not be is refused, as
            # QEMU refuses it.
            await asyncio.wait({handshake}, timeout=GRACE_S)
            if handshake.done() and handshake.exception() is None:
                self._check_id(role, link.peer_id)
            await emulator.plug(device_id, device, link, *place)
        except BaseException:
            handshake.cancel()
            await asyncio.gather(handshake, return_exceptions=True)
            link.close()
            chardev.used_by = None
            raise
        task = asyncio.create_task(self._attach(device_id, device, link, handshake, role))
        self._waiting[device_id] = task
        if handshake.done():
            await asyncio.wait({task})

    def _check_id(self, role: str | None, peer_id: int) -> None:
        """Refuse a role that does not go with the id from the server (QEMU 2.9 ``ivshmem_common_realize``)."""
        if role == "master" and peer_id:
            raise QmpError("master must connect to the server before any peers")
        self._emulator.migration.check_migratable(MASTER_OF_ROLE.get(role or "", "auto"), peer_id)

    async def _attach(
        self, device_id: str, device: LegacyIvshmem, link: ServerLink, handshake: asyncio.Task[None], role: str | None
    ) -> None:
        """Wait for the server, then give the guest its memory and its id."""
        emulator = self._emulator
        try:
            await handshake
            self._check_id(role, link.peer_id)
            if link.memory_bytes < device.memory_bytes:
                raise SharedMemoryError(
                    f"server sent only {link.memory_bytes} bytes of shared memory; size={device.memory_bytes} needs more"
                )

            def attach() -> None:
                if emulator.links.get(device_id) is not link:
                    return  # unplugged in the meantime
                emulator.machine.act(device, device.attach(link.peer_id))
                link.attach(device, emulator.runner.events, lambda vector: emulator.machine.event(device, vector))

            await emulator.on_vcpu(attach)
        except IvshmemLabError as error:
            link.close()
            # The device stays, and its IVPosition reads -1 for ever (QEMU 2.5).
            log.error("device %s gets no memory: %s", device_id, error)  # noqa: TRY400 - the message says it all
        finally:
            self._waiting.pop(device_id, None)

    async def close(self) -> None:
        """Stop waiting for all servers."""
        tasks = list(self._waiting.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def release(self, device_id: str | None = None) -> None:
        """Give memory back, of one device or of all, and stop waiting for its server."""
        if device_id in self._waiting:
            self._waiting[device_id].cancel()
        for name in list(self._memory) if device_id is None else [device_id]:
            backend = self._memory.pop(name, None)
            if backend is not None:
                backend.close()
