"""An ivshmem server behind a device: good ones, bad ones, dying ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import bare
import pytest
from bare import COUNTS, Guest
from machines import served

from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.emulator.link import ServerLink
from ivshmem_lab.errors import IvshmemLabError, RemoteProtocolError, SharedMemoryError, UsageError, VmError
from ivshmem_lab.ipc.fdpass import send_message
from ivshmem_lab.peer.peer import Peer
from ivshmem_lab.wire.messages import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ivshmem_lab.pc.machine import Machine

MEMORY_BYTES = 1 << 16
SLOT = 4
REGISTERS, TABLE, SHARED = 0xE0000000, 0xE0001000, 0xE0100000
VECTOR = 0x40
SHORT_S = 0.1


class Script:
    """The server's end of a connection, and what it can send."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self._fds: list[int] = []

    def memory(self, size_bytes: int = MEMORY_BYTES) -> int:
        fd = os.memfd_create("memory", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        self._fds.append(fd)
        return fd

    def read_only_memory(self) -> int:
        fd = os.open(f"/proc/self/fd/{self.memory()}", os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def eventfd(self) -> int:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._fds.append(fd)
        return fd

    def say(self, value: int, *fds: int) -> None:
        send_message(self.near, encode(value), fds)

    def introduce(self, peer_id: int = 0) -> None:
        self.say(0)
        self.say(peer_id)
        self.say(-1, self.memory())

    def close(self) -> None:
        self.near.close()
        self.far.close()
        for fd in self._fds:
            os.close(fd)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


# -- the introduction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("say", "error", "words"),
    [
        (lambda script: script.near.sendall(b"HTTP/1.1 400 Bad Request\r\n"), RemoteProtocolError, "version"),
        (lambda script: script.say(1), RemoteProtocolError, "version"),
        (lambda script: script.say(0, script.eventfd()), RemoteProtocolError, "version"),
        (lambda script: (script.say(0), script.say(70000)), RemoteProtocolError, "70000"),
        (lambda script: (script.say(0), script.say(-2)), RemoteProtocolError, "-2"),
        (lambda script: (script.say(0), script.say(0), script.say(-1)), RemoteProtocolError, "shared memory"),
        (lambda script: (script.say(0), script.say(0), script.say(-5)), RemoteProtocolError, "-5"),
        (lambda script: (script.say(0), script.say(0), script.say(0)), RemoteProtocolError, "departure"),
        (lambda script: (script.say(0), script.say(0), script.say(-1, script.memory(0))), SharedMemoryError, "empty|0"),
        (lambda script: (script.say(0), script.say(0), script.say(-1, script.memory(3000))), UsageError, "3000"),
        (
            lambda script: (script.say(0), script.say(0), script.say(-1, script.memory(3 << 20))),
            UsageError,
            "2M and 4M",
        ),
        (lambda script: (script.say(0), script.say(0), script.say(-1, script.eventfd())), IvshmemLabError, "."),
        (
            lambda script: (script.say(0), script.say(0), script.say(-1, script.read_only_memory())),
            SharedMemoryError,
            "reading and writing",
        ),
        (lambda script: script.near.close(), RemoteProtocolError, "closed before"),
        (
            lambda script: (script.say(0), script.near.sendall(b"\0\0\0"), script.near.close()),
            RemoteProtocolError,
            "3 of",
        ),
        (
            lambda script: (script.say(0), script.say(3), script.say(1, script.eventfd()), script.near.close()),
            RemoteProtocolError,
            "closed before",
        ),
        (lambda script: None, VmError, "did not send the protocol version.*0.1 s"),
        (lambda script: script.say(0), VmError, "did not send the peer id"),
        (lambda script: (script.say(0), script.say(0)), VmError, "did not send the shared memory"),
        (lambda script: (script.say(0), script.say(0), script.near.sendall(b"\xff")), VmError, "the shared memory"),
    ],
)
def test_a_server_that_introduces_itself_wrongly_is_refused_with_the_reason(
    script: Script, say: Callable[[Script], object], error: type[Exception], words: str
) -> None:
    say(script)
    started = time.monotonic()
    with pytest.raises(error, match=words):
        ServerLink(script.far, 1).handshake(SHORT_S)
    assert time.monotonic() - started < 5


def test_a_message_in_pieces_and_a_peer_before_the_memory_are_fine(script: Script) -> None:
    for byte in encode(0) + encode(9):
        script.near.sendall(bytes([byte]))
    script.say(4, script.eventfd())
    script.say(-1, script.memory())
    link = ServerLink(script.far, 1)
    link.handshake()
    assert (link.peer_id, link.memory_bytes) == (9, MEMORY_BYTES)
    link.close()


# -- behind a running guest --------------------------------------------------------------------------------------------

RUN = (
    bare.config(SLOT, 0x10, REGISTERS)
    + bare.config(SLOT, 0x14, TABLE)
    + bare.config(SLOT, 0x18, SHARED)
    + bare.config(SLOT, 0x1C, 0)
    + bare.config(SLOT, 0x04, 6)
    + bare.store(TABLE, 0xFEE00000)
    + bare.store(TABLE + 8, VECTOR)
    + bare.store(TABLE + 12, 0)
    + bare.config(SLOT, 0x40, 0x80000011)
    + bare.out(bare.TELL, 1)
)
IDLE = bare.STI + bare.for_ever(bare.HLT)


@contextlib.contextmanager
def linked(
    sock: socket.socket, handlers: dict[int, bytes] | None = None, vectors: int = 1
) -> Iterator[tuple[Guest, ServerLink]]:
    """A guest that sleeps, with MSI-X vector 0 of its device going to interrupt 0x40."""
    link = ServerLink(sock, vectors)
    link.handshake()
    device = Ivshmem(link.memory_bytes, vectors=vectors, peer_id=link.peer_id)

    def before(machine: Machine) -> None:
        machine.add_device("d", device, link, SLOT, hotplugged=False)

    with Guest(RUN + IDLE, handlers, before=before) as guest:
        assert guest.tells() == 1
        guest.do(lambda: link.attach(device, guest.runner.events, lambda vector: guest.machine.event(device, vector)))
        try:
            yield guest, link
        finally:
            guest.do(link.close)


def ringing_back(peer_id: int) -> dict[int, bytes]:
    """An interrupt handler that counts and rings vector 0 of a peer."""
    return {
        VECTOR: bare.increment(COUNTS + 4 * VECTOR) + bare.store(REGISTERS + 12, peer_id << 16) + bare.EOI + bare.IRET
    }


def test_a_guest_and_a_host_peer_interrupt_each_other(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(path), Peer.connect(path) as peer, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        with linked(sock, ringing_back(peer.peer_id)) as (guest, link):
            peer.wait_for_peer(link.peer_id, 10)
            answers = 0
            for _ in range(500):
                peer.ring(link.peer_id)
                answers += peer.wait(timeout_s=10)
            assert (answers, guest.count(VECTOR)) == (500, 500)
            peer.memory[:4] = [1, 2, 3, 4]
            assert guest.do(lambda: bytes(memoryview(link.memory)[:4])) == b"\1\2\3\4"  # type: ignore[arg-type]


def test_when_the_server_dies_known_peers_can_still_be_rung(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s"
    with served(path) as end, Peer.connect(path) as peer, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        with linked(sock, ringing_back(peer.peer_id)) as (guest, link):
            peer.wait_for_peer(link.peer_id, 10)
            end()
            guest.until(lambda: "closed the connection" in caplog.text)
            for _ in range(100):
                peer.ring(link.peer_id)
                assert peer.wait(timeout_s=10) == 1
            assert guest.count(VECTOR) == 100
    assert caplog.text.count("closed the connection") == 1


@pytest.mark.parametrize(
    "say",
    [
        lambda script: script.say(0),  # our own departure
        lambda script: script.say(70000),
        lambda script: script.say(-1, script.memory()),
        lambda script: script.near.sendall(b"\xff" * 100),
        lambda script: (script.near.sendall(b"\0\0\0"), script.near.close()),
        lambda script: [script.say(3, script.eventfd()) for _ in range(3)] and script.say(-9, script.eventfd()),
    ],
    ids=["own departure", "id", "second memory", "noise", "half a message", "after good ones"],
)
def test_a_server_that_goes_mad_later_is_heard_no_more_and_the_guest_goes_on(
    script: Script, say: Callable[[Script], object], caplog: pytest.LogCaptureFixture
) -> None:
    script.introduce()
    own = script.eventfd()
    script.say(0, own)
    with linked(script.far) as (guest, _):
        os.eventfd_write(own, 1)
        guest.until(lambda: guest.count(VECTOR) == 1)
        say(script)
        guest.until(lambda: "known peers can still be rung" in caplog.text)
        os.eventfd_write(own, 1)
        guest.until(lambda: guest.count(VECTOR) == 2)
        assert guest.broken is None
    assert "Traceback" not in caplog.text


def test_vectors_beyond_the_devices_are_let_go_with_one_warning(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.introduce()
    own = [script.eventfd() for _ in range(4)]
    for fd in own:
        script.say(0, fd)
    with linked(script.far) as (guest, _):
        for fd in reversed(own):
            os.eventfd_write(fd, 1)
        guest.until(lambda: guest.count(VECTOR) == 1)
        assert os.eventfd_read(own[3]) == 1, "nobody listens to it"
    assert caplog.text.count("Too many eventfd received, device has 1 vectors") == 1


def test_peers_come_and_go_while_the_guest_runs(script: Script) -> None:
    script.introduce(5)
    script.say(5, script.eventfd())
    other = script.eventfd()
    with linked(script.far) as (guest, _):
        device = guest.machine.peripherals["d"].device

        def ring() -> None:
            guest.machine.write_mmio(REGISTERS + 12, 4, 7 << 16)

        guest.do(ring)
        script.say(7, other)
        guest.until(lambda: 7 in device.peers)
        guest.do(ring)
        assert os.eventfd_read(other) == 1
        script.say(7)
        guest.until(lambda: 7 not in device.peers)
        guest.do(ring)
        assert not select.select([other], [], [], 0)[0]


def test_a_peer_whose_counter_is_full_does_not_hold_the_guest(script: Script) -> None:
    script.introduce(5)
    script.say(5, script.eventfd())
    full = script.eventfd()
    os.eventfd_write(full, 2**64 - 2)
    script.say(7, full)
    with linked(script.far) as (guest, _):
        device = guest.machine.peripherals["d"].device
        guest.until(lambda: 7 in device.peers)
        guest.do(lambda: guest.machine.write_mmio(REGISTERS + 12, 4, 7 << 16))
        assert os.eventfd_read(full) == 2**64 - 2


def test_something_else_in_place_of_an_eventfd_costs_only_its_peer(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.introduce(5)
    own = script.eventfd()
    script.say(5, own)
    near, far = os.pipe2(os.O_CLOEXEC)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        with linked(script.far) as (guest, _):
            device = guest.machine.peripherals["d"].device
            for peer_id, fd in ((7, null), (8, near), (9, script.memory())):
                script.say(peer_id, fd)
                guest.until(lambda: "known peers" in caplog.text or peer_id in device.peers)  # noqa: B023
                guest.do(lambda: guest.machine.write_mmio(REGISTERS + 12, 4, peer_id << 16))  # noqa: B023
            os.eventfd_write(own, 1)
            guest.until(lambda: guest.count(VECTOR) == 1)
            assert guest.broken is None
    finally:
        for fd in (near, far, null):
            os.close(fd)


def test_own_vectors_that_are_no_eventfds_cost_only_themselves(
    script: Script, caplog: pytest.LogCaptureFixture
) -> None:
    script.introduce(5)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    near, far = os.pipe2(os.O_CLOEXEC)
    os.write(far, b"abc")
    other = script.eventfd()
    try:
        with linked(script.far, vectors=4) as (guest, _):
            for fd in (null, near):
                script.say(5, fd)
            script.say(7, other)
            device = guest.machine.peripherals["d"].device
            guest.until(lambda: "known peers" in caplog.text or 7 in device.peers)
            assert guest.broken is None
            assert guest.do(lambda: 1) == 1
    finally:
        for fd in (null, near, far):
            os.close(fd)


def test_descriptors_are_not_inherited_by_programs_that_are_started(script: Script) -> None:
    script.introduce()
    before = set(Path("/proc/self/fd").iterdir())
    link = ServerLink(script.far, 1)
    link.handshake()
    fresh = set(Path("/proc/self/fd").iterdir()) - before
    for entry in fresh:
        with contextlib.suppress(OSError):  # the listing's own
            assert fcntl.fcntl(int(entry.name), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    link.close()
