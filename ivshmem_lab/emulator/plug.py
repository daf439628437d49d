"""The ivshmem device on a user's own Unicorn engine.

The user keeps ``emu_start``. Registers and ports are answered by the same board and device as in our machine;
interrupts are delivered at the start of a block, through the guest's own interrupt table, and `PluggedDevice.wait`
waits for one while the guest is halted.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from ..device.ivshmem import Ivshmem
from ..device.msix import MAX_VECTORS
from ..errors import DeviceError, ServerError, UsageError
from ..ipc.runtime_dir import check_socket_path
from ..ipc.sockets import connect_unix
from ..pc import firmware
from ..pc.board import Board
from ..pc.hostbridge import SLOTS
from ..units import check_memory_size, parse_size
from .cpu import UnicornCpu
from .events import Events
from .link import HANDSHAKE_S, MemoryLink, ServerLink

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from ..pc.bus import Read, Write

RETRY_BLOCKS = 16
DEFAULT_SLOT = 4
BAR_WINDOW_START = 0xE0000000


class _PlugBoard(Board):
    """A board on an engine that has memory and ports of its user."""

    def __init__(self, cpu: UnicornCpu, on_message: Callable[[int, int], None] | None) -> None:
        self.unicorn_cpu = cpu
        self.on_message = on_message
        self.port_in: Read | None = None
        self.port_out: Write | None = None
        super().__init__(cpu, has_lapic=on_message is None)

    def _has_memory(self, start: int, end: int) -> bool:
        foreign = (
            (first, last + 1)
            for first, last, _ in self.unicorn_cpu.user_uc.mem_regions()
            if not self.unicorn_cpu.is_ours(first)
        )
        return super()._has_memory(start, end) or any(start < last and first < end for first, last in foreign)

    def message(self, address: int, data: int) -> None:
        """Hand a message to the user's own interrupt controller, or to our local APIC."""
        if self.on_message is not None:
            self.on_message(address, data)
        else:
            super().message(address, data)

    def read_port(self, port: int, size: int) -> int:
        """Carry out IN: ours, else the user's."""
        if self.port_in is not None and not self.ports.answers(port):
            return self.port_in(port, size)
        return super().read_port(port, size)

    def write_port(self, port: int, size: int, value: int) -> None:
        """Carry out OUT: ours, else the user's."""
        if self.port_out is not None and not self.ports.answers(port):
            self.port_out(port, size, value)
        else:
            super().write_port(port, size, value)


class _Host:
    """What all devices on one engine share: CPU, board, events."""

    def __init__(self, uc: Any, on_message: Callable[[int, int], None] | None, *, native_hook: bool | None) -> None:
        self.cpu = UnicornCpu(uc, native_hook=native_hook, on_kick=self._kicked)
        self.devices: list[PluggedDevice] = []
        self.allocator = firmware.Allocator(BAR_WINDOW_START)
        try:
            self.board = _PlugBoard(self.cpu, on_message)
            self.cpu.attach(self.board, whole_machine=False)
            self.events = Events(self._kick)
        except BaseException:
            self.cpu.close()
            raise
        self.events.arm()

    def _kick(self) -> None:
        self.cpu.flag.kick = 1

    def _kicked(self) -> None:
        """At the start of a block: take news, unmap what waits, deliver one interrupt."""
        flag = self.cpu.flag
        flag.kick = 0
        flag.skip = 0
        try:
            self.cpu.settle()
            self.events.dispatch(0)
            if self.deliver(halted=False) is None and self.board.lapic.pending() is not None:
                flag.skip, flag.kick = 1 if self.cpu.put_off_at is not None else RETRY_BLOCKS, 1
            self.events.arm()
        except BaseException as error:  # noqa: BLE001 - must not travel through the engine; `wait` and `close` raise it
            self.cpu.failure = self.cpu.failure or error
        if self.cpu.failure is not None:
            self.cpu.user_uc.emu_stop()

    def deliver(self, *, halted: bool) -> int | None:
        """Enter the handler of a pending interrupt; returns where execution goes on."""
        vector = self.board.lapic.pending()
        if vector is None:
            return None
        target = self.cpu.deliver(vector, halted=halted)
        if target is not None:
            self.board.lapic.acknowledge(vector)
            self.cpu.set_pc(target)
        return target

    def raise_failure(self) -> None:
        failure, self.cpu.failure = self.cpu.failure, None
        if isinstance(failure, KeyboardInterrupt):
            raise failure
        if failure is not None:
            raise DeviceError(f"a device failed while the guest ran: {failure}") from failure

    def close(self) -> None:
        self.events.close()
        self.cpu.close()


_hosts: dict[int, _Host] = {}
"""Engines with devices, by id of the ``unicorn.Uc`` (which the host keeps alive)."""


class PluggedDevice:
    """A device on a user's engine; made by `plug`.

    Attributes
    ----------
    device : Ivshmem
        The device model; its repr shows the registers.
    slot : int
        Its PCI slot on bus 0.
    """

    def __init__(
        self, shared: _Host, device: Ivshmem, link: MemoryLink | ServerLink, slot: int, sock: socket.socket | None
    ):
        self.device = device
        self.slot = slot
        self._shared: _Host | None = shared
        self._link = link
        self._sock = sock

    def _open(self) -> _Host:
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
        """Addresses of the BARs that the guest sees, by number: 0 registers, 1 MSI-X, 2 memory."""
        return dict(self.device.mapped)

    @property
    def guest_errors(self) -> dict[str, int]:
        """What the guest did that a PC answers with silence, counted by kind."""
        return dict(self._open().board.guest_errors)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for an interrupt while the guest is halted, and enter its handler.

        Call it after ``emu_start`` has returned at a HLT.

        Parameters
        ----------
        timeout_s
            Seconds, None for as long as it takes.

        Returns
        -------
        int or None
            The address to give to ``emu_start``, None when the time is over.

        Raises
        ------
        DeviceError
            When a device failed while the guest ran, or the guest's interrupt table cannot be used.
        """
        import time

        shared = self._open()
        shared.raise_failure()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        shared.cpu.settle()
        while shared.events.dispatch(0):
            pass  # one event can make room for the next: a new vector's first interrupt
        while (target := shared.deliver(halted=True)) is None:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                return None
            shared.events.dispatch(left_s)
        return target

    def close(self) -> None:
        """Take the device out; the engine and its memory stay the user's. May be called twice.

        Raises
        ------
        DeviceError
            When a device failed while the guest ran and nobody has been told yet.
        """
        shared, self._shared = self._shared, None
        if shared is None:
            return
        shared.board.unplug(self.slot)
        shared.cpu.settle()
        if isinstance(self._link, ServerLink):
            self._link.close()
        if self._sock is not None:
            self._sock.close()
        shared.devices.remove(self)
        if not shared.devices:
            del _hosts[id(shared.cpu.user_uc)]
            shared.close()
        shared.raise_failure()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{self.device!r}\n  slot {self.slot}{'' if self._shared else ', closed'}"


def plug(
    uc: Any,
    memory: Any = None,
    *,
    server: str | os.PathLike[str] | None = None,
    vectors: int = 1,
    slot: int = DEFAULT_SLOT,
    assign: bool = True,
    on_message: Callable[[int, int], None] | None = None,
    port_in: Read | None = None,
    port_out: Write | None = None,
    native_hook: bool | None = None,
) -> PluggedDevice:
    """Plug an ivshmem device into a Unicorn engine (x86, 32 bits).

    Parameters
    ----------
    uc
        A ``unicorn.Uc(UC_ARCH_X86, UC_MODE_32)``. It gets a PCI host bridge at ports 0xCF8 to 0xCFF, a local
        APIC at 0xFEE00000, and the device's BARs.
    memory
        For ``ivshmem-plain``: a size (``"1M"``) or a writable buffer (``mmap``, ``bytearray``, array) whose size is a
        power of two of at least 4096 bytes.
    server
        For ``ivshmem-doorbell``: path of an ivshmem server's socket. Memory and peer id come from there.
    vectors
        MSI-X vectors of the doorbell, 1 to 2048.
    slot
        PCI slot, 0 to 31.
    assign
        Give the BARs addresses and switch decoding on, as firmware does; False leaves it to the guest.
    on_message
        Called with (address, data) of every interrupt message instead of our local APIC: for engines that have
        an interrupt controller of their own.
    port_in, port_out
        Your own handlers for all other ports, ``(port, size)`` and ``(port, size, value)``. Give them here: of
        two hooks on IN, Unicorn takes the answer of the later one.
    native_hook
        How a running guest is reached: machine code where that is allowed (None), or insist (True, False).

    Returns
    -------
    PluggedDevice
        Close it, or use it in ``with``.

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
    Interrupts enter the guest as on hardware: it needs an interrupt table, a code segment of its own (a fresh
    engine has selector 0, to which ``iret`` cannot return) and a 32-bit stack segment. It runs in ring 0. While
    the guest runs, do not touch the engine from other threads; `PluggedDevice.memory` can be used from anywhere.

    Examples
    --------
    ::

        with ivshmem_lab.plug(uc, server="/tmp/ivshmem_socket", vectors=2) as device:
            pc = entry
            while True:
                uc.emu_start(pc, -1)      # until the guest executes HLT
                pc = device.wait()        # until somebody rings; goes on in the guest's handler
    """
    if (memory is None) == (server is None):
        raise UsageError("plug() takes either memory= (ivshmem-plain) or server= (ivshmem-doorbell)")
    if not 0 <= slot < SLOTS:
        raise UsageError(f"slot {slot} does not exist: a PCI bus has slots 0 to {SLOTS - 1}")
    if not 1 <= vectors <= MAX_VECTORS:
        raise UsageError(f"vectors={vectors} is out of range: MSI-X has 1 to {MAX_VECTORS}")
    sock: socket.socket | None = None
    link: MemoryLink | ServerLink
    if server is None:
        link, device = _plain(memory)
    else:
        sock = _connect(os.fspath(server))
        link = ServerLink(sock, vectors)
        try:
            link.handshake()
            device = Ivshmem(link.memory_bytes, vectors=vectors, peer_id=link.peer_id)
        except BaseException:
            link.close()
            sock.close()
            raise
    shared = _hosts.get(id(uc))
    fresh = shared is None
    try:
        if shared is None:
            shared = _Host(uc, on_message, native_hook=native_hook)
        shared.board.plug_ivshmem(device, link, slot)
    except BaseException:
        if fresh and shared is not None:
            shared.close()
        if isinstance(link, ServerLink):
            link.close()
        if sock is not None:
            sock.close()
        raise
    if fresh:
        _hosts[id(uc)] = shared
    shared.board.port_in, shared.board.port_out = port_in or shared.board.port_in, port_out or shared.board.port_out
    plugged = PluggedDevice(shared, device, link, slot, sock)
    shared.devices.append(plugged)
    try:
        if isinstance(link, ServerLink):
            board = shared.board
            link.attach(device, shared.events, lambda vector: board.event(device, vector))
        if assign:
            firmware.assign(shared.board, [device], shared.allocator)
    except BaseException:
        plugged.close()
        raise
    return plugged


def _plain(memory: Any) -> tuple[MemoryLink, Ivshmem]:
    if isinstance(memory, (int, str)):
        memory = bytearray(check_memory_size(parse_size(memory, "memory")))
    try:
        view = memoryview(memory).cast("B")
    except TypeError:
        raise UsageError(
            f"memory={memory!r} is no size and no buffer; give '1M', an mmap, a bytearray or an array"
        ) from None
    if view.readonly:
        raise UsageError("memory= is read-only; the guest must be able to write it")
    return MemoryLink(memory), Ivshmem(check_memory_size(len(view), "memory"))


def _connect(path: str) -> socket.socket:
    try:
        return connect_unix(check_socket_path(path), HANDSHAKE_S)
    except OSError as error:
        raise ServerError(
            f"server={path!r} cannot be reached: {error.strerror}; start one with ivshmem-server -F -S {path}"
        ) from error
