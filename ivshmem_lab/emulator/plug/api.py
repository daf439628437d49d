"""`plug`: one call puts an ivshmem device on an engine."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from ...device.flat import MOST_VECTORS, NO_SERVER, FlatIvshmem, FlatProperties
from ...device.ivshmem import Ivshmem
from ...device.msix import MAX_VECTORS
from ...errors import DeviceError, ServerError, UsageError
from ...ipc.runtime_dir import check_socket_path
from ...ipc.sockets import connect_unix
from ...pc import firmware
from ...pc.hostbridge import SLOTS
from ...units import check_memory_size, parse_size
from ..link import HANDSHAKE_S, MemoryLink, ServerLink
from .device import PluggedDevice
from .host import Host, hosts

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from ...pc.bus import Read, Write

    class ServerLike(Protocol):
        """A server in this process: `ivshmem_lab.Server`, or a lab's."""

        path: str


DEFAULT_SLOT = 4
PEERS_S = 1.0
"""How long a server may take to tell of its peers; one without vectors never does."""
DEFAULT_IRQ = 0x40
MESSAGE_PAGES = {"arm64": 0x08020000, "riscv64": 0x24000000}
"""Where QEMU's ``virt`` boards have their GICv2m frame and their machine-level IMSIC."""


def plug(
    uc: Any,
    memory: Any = None,
    *,
    server: str | os.PathLike[str] | ServerLike | None = None,
    vectors: int = 1,
    slot: int = DEFAULT_SLOT,
    assign: bool = True,
    ecam: int | None = None,
    window: tuple[int, int] | None = None,
    flat: Mapping[str, int | str] | None = None,
    irq: int = DEFAULT_IRQ,
    message_page: int | None = None,
    on_interrupt: Callable[[int], None] | None = None,
    on_message: Callable[[int, int], None] | None = None,
    port_in: Read | None = None,
    port_out: Write | None = None,
    native_hook: bool | None = None,
) -> PluggedDevice:
    """Plug an ivshmem device into a Unicorn engine of any architecture.

    Parameters
    ----------
    uc
        A ``unicorn.Uc``. An x86 gets a PCI host bridge at ports 0xCF8 to 0xCFF, a local APIC at 0xFEE00000, and
        the device's BARs; every other architecture an ECAM window (`ecam`) and BARs; any of them a `flat` device.
    memory
        For ``ivshmem-plain``: a size (``"1M"``) or a writable buffer (``mmap``, ``bytearray``, array) whose size is a
        power of two of at least 4096 bytes.
    server
        For ``ivshmem-doorbell``: path of an ivshmem server's socket, or a `Server` whose loop runs in another
        thread. Memory and peer id come from there.
    vectors
        MSI-X vectors of the doorbell, 1 to 2048.
    slot
        PCI slot, 0 to 31.
    assign
        Give the BARs addresses and switch decoding on, as firmware does; False leaves it to the guest.
    ecam
        Address of the 1 MiB window with the configuration spaces of bus 0. Needed for PCI unless the engine is
        an x86, and the same for all devices of an engine.
    window
        (start, end) of the addresses that BARs get; the first device of an engine decides. By default those of
        a PC, and of QEMU's ``virt`` boards: 0x40000000 to 0x80000000 on RISC-V, else 0x10000000 to 0x3eff0000.
    flat
        Makes it an ``ivshmem-flat``, without PCI: QEMU's properties ``x-bus-address-iomem``,
        ``x-bus-address-shmem`` and ``shmem-size`` (with a server, 4 MiB unless said; `memory` says it itself).
    irq
        Number of a flat device's interrupt: the vector of an x86, an id of the message page, or what
        `on_interrupt` gets.
    message_page
        On Arm64 and RISC-V64, where the guest learns which interrupt came: see `ivshmem_lab.emulator.plug.messages`.
        By default 0x08020000 and 0x24000000.
    on_interrupt
        Called with each interrupt's number instead of delivering it: the MSI-X data that the guest's driver
        chose, `irq` for a flat device. It runs between two blocks of the guest or in `PluggedDevice.wait`, and
        may read and write registers, PC too. Needed on all architectures but x86, Arm64 and RISC-V64.
    on_message
        The same with (address, data) of every interrupt message: for engines that have an interrupt controller
        of their own.
    port_in, port_out
        Your own handlers for all other ports of an x86, ``(port, size)`` and ``(port, size, value)``. Give them
        here: of two hooks on IN, Unicorn takes the answer of the later one.
    native_hook
        How a running guest is reached: machine code where that is allowed (None), or insist (True, False).

    Returns
    -------
    PluggedDevice
        Unplug it, or use it in ``with``.

    Raises
    ------
    UsageError
        A value is not allowed.
    DeviceError
        The slot is in use, or the engine has memory where a part of the device belongs.
    ServerError
        The server cannot be reached.
    ProtocolError, VmError
        What answers is no ivshmem server.

    Notes
    -----
    Interrupts enter the guest as on hardware. An x86 needs an interrupt table, a code segment of its own (a fresh
    engine has selector 0, to which ``iret`` cannot return), a 32-bit stack segment, and runs in ring 0; an Arm64 runs
    at EL1 with its own stack pointer; a RISC-V64 in machine mode. Delivery inside the block hook was measured on all
    four with ``memory += 1; register += 1`` loops: over 20 000 interrupts each, nothing doubled, nothing lost. What
    must not be done while a device is plugged raises, see docs/plug.md. `PluggedDevice.memory` can be used from
    any thread.

    Examples
    --------
    ::

        with ivshmem_lab.plug(uc, server="/tmp/ivshmem_socket", vectors=2) as device:
            pc = entry
            while True:
                uc.emu_start(pc, -1)      # until the guest executes HLT or WFI
                pc = device.wait()        # until somebody rings; goes on in the guest's handler
    """
    if (memory is None) == (server is None):
        hint = f" ({NO_SERVER})" if flat is not None else ""
        raise UsageError(f"plug() takes either memory= (ivshmem-plain) or server= (ivshmem-doorbell){hint}")
    if not 0 <= slot < SLOTS:
        raise UsageError(f"slot {slot} does not exist: a PCI bus has slots 0 to {SLOTS - 1}")
    if not 1 <= vectors <= MAX_VECTORS:
        raise UsageError(f"vectors={vectors} is out of range: MSI-X has 1 to {MAX_VECTORS}")
    if on_interrupt is not None:
        if on_message is not None:
            raise UsageError("plug() takes either on_interrupt= or on_message=")
        tell = on_interrupt
        on_message = lambda _, number: tell(number)  # noqa: E731
    where = None if flat is None else FlatProperties.parse(flat)
    link, sock = _world(memory, server, vectors if where is None else MOST_VECTORS)
    shared: Host | None = hosts.get(id(uc))
    fresh = shared is None
    device: Ivshmem | FlatIvshmem
    try:
        if shared is None:
            shared = Host(uc, on_message, native_hook=native_hook, window=window)
        if where is None:
            _prepare_pci(shared, ecam)
            device = Ivshmem(link.memory_bytes, vectors=0 if server is None else vectors, peer_id=link.peer_id)
        else:
            if server is None and "shmem-size" not in (flat or {}):
                where = FlatProperties.parse({**(flat or {}), "shmem-size": link.memory_bytes})
            where.check_memory(link.memory_bytes)
            device = FlatIvshmem(link.memory_bytes, peer_id=link.peer_id)
        page = message_page or MESSAGE_PAGES.get(shared.cpu.engine.kind.name)
        if server is not None and shared.board.on_message is None and page is not None:
            shared.board.add_page(page)
        if isinstance(device, Ivshmem):
            shared.board.plug_ivshmem(device, link, slot)
        elif where is not None:
            shared.board.plug_flat(device, link, where, irq)
    except BaseException:
        if fresh and shared is not None:
            shared.close()
        if isinstance(link, ServerLink):
            link.close()
        if sock is not None:
            sock.close()
        raise
    hosts[id(uc)] = shared
    shared.board.port_in, shared.board.port_out = port_in or shared.board.port_in, port_out or shared.board.port_out
    plugged = PluggedDevice(shared, device, link, slot if where is None else where, sock)
    shared.devices.append(plugged)
    try:
        if isinstance(link, ServerLink):
            link.attach(device, shared.events, _event(shared, device))
            _hear_the_peers(shared, device)
        if assign and isinstance(device, Ivshmem):
            firmware.assign(shared.board, [device], shared.allocator)
    except BaseException:
        plugged.unplug()
        raise
    return plugged


def _hear_the_peers(shared: Host, device: Ivshmem | FlatIvshmem) -> None:
    """Let a guest that rings at once find the peers that are there: a server tells of them before our own vectors."""
    deadline = time.monotonic() + PEERS_S
    while device.peer_id not in device.peers and (left_s := deadline - time.monotonic()) > 0:
        shared.events.dispatch(left_s)


def _event(shared: Host, device: Ivshmem | FlatIvshmem) -> Callable[[int], None]:
    board = shared.board
    if isinstance(device, FlatIvshmem):
        return lambda vector: board.flat_event(device, vector)
    return lambda vector: board.event(device, vector)


def _prepare_pci(shared: Host, ecam: int | None) -> None:
    """See that the guest can reach bus 0."""
    if ecam is None:
        if not shared.is_x86 and shared.ecam is None:
            raise UsageError(
                f"a {shared.cpu.engine.kind.name} engine has no ports to reach PCI by; give ecam= the address of a free "
                "1 MiB window (QEMU's virt boards: 0x3f000000 on Arm, 0x30000000 on RISC-V), or flat={}"
            )
    elif shared.ecam is None:
        shared.board.add_ecam(ecam)
        shared.ecam = ecam
    elif shared.ecam != ecam:
        raise UsageError(f"ecam={ecam:#x}: this engine's devices are behind the window at {shared.ecam:#x} already")


def _world(memory: Any, server: Any, vectors: int) -> tuple[MemoryLink | ServerLink, socket.socket | None]:
    """Reach what is behind the device: its memory, its peers."""
    if server is None:
        return MemoryLink(_buffer(memory)), None
    sock = _connect(server)
    link = ServerLink(sock, vectors)
    try:
        link.handshake()
    except BaseException:
        link.close()
        sock.close()
        raise
    return link, sock


def _buffer(memory: Any) -> Any:
    if isinstance(memory, (int, str)):
        return bytearray(check_memory_size(parse_size(memory, "memory")))
    try:
        view = memoryview(memory).cast("B")
    except TypeError:
        raise UsageError(
            f"memory={memory!r} is no size and no buffer; give '1M', an mmap, a bytearray or an array"
        ) from None
    if view.readonly:
        raise UsageError("memory= is read-only; the guest must be able to write it")
    check_memory_size(len(view), "memory")
    return memory


def _connect(server: Any) -> socket.socket:
    if isinstance(server, (str, os.PathLike)):
        path = os.fspath(server)
    else:
        path = getattr(server, "path", None)
        if not isinstance(path, str):
            raise UsageError(f"server={server!r} is no path of a socket and no Server")
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise DeviceError(
                "plug(server=Server) inside a running event loop would wait for itself; "
                "call it in a thread: await asyncio.to_thread(ivshmem_lab.plug, uc, server=server)"
            )
    try:
        return connect_unix(check_socket_path(path), HANDSHAKE_S)
    except OSError as error:
        raise ServerError(
            f"server={path!r} cannot be reached: {error.strerror}; start one with ivshmem-server -F -S {path}"
        ) from error
