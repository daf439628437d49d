"""Migrations that cannot be: both sides say why, the source's guest runs on, the destination ends with status 1."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest
from machines import LIMIT_S, Machine, memfd_backend, served
from migrations import BLOCKER, MIGRANT, ended, goes_on, migrate, negotiated, pair, status

from ivshmem_lab.emulator.migration.stream import CHUNK_BYTES, MAGIC, VERSION, Kind, encode
from ivshmem_lab.ipc.memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
KIND = "unicorn"


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix:{tmp_path / 'm'}"


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory.create_memfd(MIB) as memory:
        yield memory


@pytest.fixture
def larger() -> Iterator[SharedMemory]:
    with SharedMemory.create_memfd(2 * MIB) as memory:
        yield memory


def plain(memory: SharedMemory, *, addr: int = 6, master: str = "on", name: str = "m") -> list[str]:
    return [*memfd_backend(memory, name), "-device", f"ivshmem-plain,id=iv,memdev={name},addr={addr},master={master}"]


def doorbell(path: Path, vectors: int = 2, addr: int = 6) -> list[str]:
    device = f"ivshmem-doorbell,id=iv,chardev=c,vectors={vectors},addr={addr},master=on"
    return ["-chardev", f"socket,path={path},id=c", "-device", device]


def refused(here: list[str], there: list[str], uri: str, reason: str) -> None:
    """Let a migration be refused, and see that both sides say so and the guest runs on."""
    with pair(KIND, [*MIGRANT, *here], [*MIGRANT, *there], incoming=uri) as (source, destination):
        source.says("migrant: ready\n")
        told = migrate(source, uri)
        assert (told["status"], told["error-desc"]) == ("failed", f"the destination refused: {reason}")
        assert destination.wait() == 1
        assert destination.errors == f"unicorn-system-x86_64: load of migration failed: {reason}\n"
        assert status(source) == "running"
        goes_on(source)
        assert [event for event in source.qmp.events if event["event"] == "STOP"] == []


def test_a_missing_device_is_named(memory: SharedMemory, uri: str) -> None:
    reason = "ivshmem-plain 'iv' at 0000:00:06.0 is missing at the destination: add it there, with addr=06"
    refused(plain(memory), [], uri, reason)


def test_a_device_too_many_is_named(memory: SharedMemory, larger: SharedMemory, uri: str) -> None:
    more = [*plain(memory), *memfd_backend(larger, "n"), "-device", "ivshmem-plain,id=more,memdev=n,addr=7,master=on"]
    refused(
        plain(memory), more, uri, "ivshmem-plain 'more' at 0000:00:07.0 is at the destination only: take it away there"
    )


def test_another_slot_is_named(memory: SharedMemory, uri: str) -> None:
    reason = "ivshmem-plain 'iv' at 0000:00:06.0 is missing at the destination: add it there, with addr=06"
    refused(plain(memory), plain(memory, addr=7), uri, reason)


def test_another_size_is_named(memory: SharedMemory, larger: SharedMemory, uri: str) -> None:
    reason = "memory of ivshmem-plain 'iv' at 0000:00:06.0: 1M at the source, 2M at the destination"
    refused(plain(memory), plain(larger), uri, reason)


def test_another_model_is_named(memory: SharedMemory, tmp_path: Path, uri: str) -> None:
    with served(tmp_path / "s", size_bytes=MIB):
        reason = "model of the device at 0000:00:06.0: ivshmem-plain at the source, ivshmem-doorbell at the destination"
        refused(plain(memory), doorbell(tmp_path / "s"), uri, reason)


def test_other_vectors_are_named(tmp_path: Path, uri: str) -> None:
    with served(tmp_path / "a", vectors=2), served(tmp_path / "b", vectors=1):
        reason = "vectors of ivshmem-doorbell 'iv' at 0000:00:06.0: 2 at the source, 1 at the destination"
        refused(doorbell(tmp_path / "a", 2), doorbell(tmp_path / "b", 1), uri, reason)


def test_a_peer_at_the_destination_is_named(memory: SharedMemory, uri: str) -> None:
    reason = "'peer' devices are not migratable: ivshmem-plain 'iv' at 0000:00:06.0; give master=on at the destination"
    refused(plain(memory), plain(memory, master="off"), uri, reason)


def test_other_memory_and_other_ports_are_named(memory: SharedMemory, uri: str) -> None:
    device = plain(memory)
    refused(device, [*device, "-m", "64"], uri, "memory (-m): 32M at the source, 64M at the destination")


@pytest.mark.parametrize(
    ("here", "there", "allowed"),
    [("-only-migratable", "off", False), ("-only-migratable", "on", True), ("-S", "off", True)],
)
def test_only_migratable_refuses_peers(here: str, there: str, allowed: bool, memory: SharedMemory) -> None:
    text = f"disallowing migration blocker (--only-migratable) for: {BLOCKER}"
    with Machine(KIND, here, *plain(memory, master=there)) as machine:
        if not allowed:
            assert machine.wait() != 0
            assert text in machine.errors
    with Machine(KIND, here, *memfd_backend(memory)) as machine:
        machine.qmp.negotiate()
        answer = machine.qmp.execute("device_add", driver="ivshmem-plain", memdev="m", master=there)
        assert answer == ({"return": {}} if allowed else {"error": {"class": "GenericError", "desc": text}})


# -- the other side -----------------------------------------------------------------------------------------------


class Other:
    """The other end of a migration, byte by byte."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(LIMIT_S)
        self.sock = sock

    @classmethod
    def connect(cls, path: Path) -> Other:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(LIMIT_S)
        sock.connect(str(path))
        return cls(sock)

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, f"ended after {data!r}"
            data += piece
        return data

    def frame(self) -> tuple[int, bytes]:
        kind, size = struct.unpack(">BI", self.exactly(5))
        return kind, self.exactly(size)

    def until(self, kind: Kind) -> bytes:
        while (got := self.frame())[0] != kind:
            pass
        return got[1]

    def send(self, kind: int, payload: bytes = b"", size: int | None = None) -> None:
        self.sock.sendall(struct.pack(">BI", kind, len(payload) if size is None else size) + payload)


@contextlib.contextmanager
def sending(tmp_path: Path, memory: SharedMemory) -> Iterator[tuple[Machine, Other]]:
    """Start a source that sends to us."""
    with (
        socket.socket(socket.AF_UNIX) as listener,
        negotiated(Machine(KIND, *MIGRANT, *plain(memory))) as source,
    ):
        listener.bind(str(tmp_path / "m"))
        listener.listen()
        listener.settimeout(LIMIT_S)
        source.says("migrant: ready\n")
        source.qmp.ok("migrate", uri=f"unix:{tmp_path / 'm'}")
        other = Other(listener.accept()[0])
        with other.sock:
            yield source, other


@pytest.mark.parametrize("when", ["at once", "after the description", "in the memory", "before the end is answered"])
def test_the_source_runs_on_when_the_destination_dies(when: str, tmp_path: Path, memory: SharedMemory) -> None:
    with sending(tmp_path, memory) as (source, other):
        if when != "at once":
            assert other.exactly(12) == MAGIC + struct.pack(">I", VERSION)
            assert json.loads(other.until(Kind.DESCRIPTION))["memory_bytes"] == 32 * MIB
        if when in ("in the memory", "before the end is answered"):
            other.send(Kind.ANSWER)
            other.until(Kind.MEMORY if when == "in the memory" else Kind.END)
            source.qmp.hears("STOP")
        other.sock.close()
        told = ended(source.qmp)
        assert told["status"] == "failed"
        assert re.search("the destination is gone|closed the connection in the middle", told["error-desc"])
        if when in ("in the memory", "before the end is answered"):
            source.qmp.event("RESUME")
        assert status(source) == "running"
        goes_on(source)
        assert source.qmp.execute("device_del", id="iv") == {"return": {}}  # it may be changed again


@pytest.mark.parametrize("when", ["before it agreed", "after it was stopped"])
def test_a_silent_destination_is_given_up_by_migrate_cancel(when: str, tmp_path: Path, memory: SharedMemory) -> None:
    with sending(tmp_path, memory) as (source, other):
        if when == "after it was stopped":
            other.exactly(12)
            other.until(Kind.DESCRIPTION)
            other.send(Kind.ANSWER)
            other.until(Kind.END)
            assert status(source) == "finish-migrate"
            answer = source.qmp.execute("cont")
            assert answer["error"]["desc"] == "Migration is not finalized yet"
        for command in ("migrate", "device_add", "device_del", "system_reset"):
            arguments = {"migrate": {"uri": "unix:/x"}, "device_add": {"driver": "x"}, "device_del": {"id": "iv"}}
            answer = source.qmp.execute(command, **arguments.get(command, {}))
            assert answer["error"]["desc"] in (
                "There's a migration process in progress",
                f"{command} not allowed while migrating",
            )
        assert source.qmp.ok("query-migrate")["status"] == "active"
        source.qmp.ok("migrate_cancel")
        assert ended(source.qmp) == {"status": "cancelled"}
        assert status(source) == "running"
        goes_on(source)


def test_a_machine_that_ends_in_the_middle_takes_its_migration_with_it(tmp_path: Path, memory: SharedMemory) -> None:
    with sending(tmp_path, memory) as (source, other):
        other.exactly(12)
        source.qmp.ok("quit")
        assert (source.wait(), source.errors) == (0, "")


@contextlib.contextmanager
def waiting(tmp_path: Path, memory: SharedMemory) -> Iterator[tuple[Machine, Other]]:
    """Start a destination, with us as the source."""
    incoming = ("-incoming", f"unix:{tmp_path / 'm'}")
    with negotiated(Machine(KIND, *MIGRANT, *plain(memory), *incoming)) as destination:
        other = Other.connect(tmp_path / "m")
        with other.sock:
            yield destination, other


TRAITS = ["BAR 0 of 256 in 32 bits", "BAR 2 of 1M in 64 bits", "interrupt pin 0"]


def description(traits: list[str] = TRAITS, **changes: Any) -> bytes:
    device = {"address": "0000:00:06.0", "driver": "ivshmem-plain", "device_id": "x", "memory_bytes": MIB, "vectors": 0}
    machine = {"machine": "pc", "memory_bytes": 32 * MIB, "debug_exit": [0xF4, 4], "run_state": "running"}
    return encode({**machine, "devices": [{**device, "traits": traits}], **changes})


HEADER = MAGIC + struct.pack(">I", VERSION)


def frame(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">BI", kind, len(payload)) + payload


AGREED = HEADER + frame(Kind.DESCRIPTION, description())


def place(block: int, offset: int, data: bytes) -> bytes:
    return frame(Kind.MEMORY, struct.pack(">HQ", block, offset) + data)


PAGE = b"x" * 4096


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "closed the connection in the middle"),
        (b"garbage" * 100, "not a migration stream: it begins with b'garbageg'"),
        (b"QEVM\0\0\0\3" + bytes(100), "this is QEMU's migration stream"),
        (MAGIC + struct.pack(">I", 99), "the migration stream has version 99, and version 1 is known here"),
        (HEADER + frame(Kind.GO), "a frame of kind 5 where DESCRIPTION was expected"),
        (HEADER + frame(77), "a frame of kind 77 where DESCRIPTION was expected"),
        (HEADER + struct.pack(">BI", Kind.DESCRIPTION, 0xFFFFFFFF), "DESCRIPTION of 4294967295 bytes"),
        (HEADER + frame(Kind.DESCRIPTION, b"[" * 100000), "a section of the migration stream is damaged"),
        (HEADER + frame(Kind.DESCRIPTION, b"{}"), "the description of the source's machine is damaged"),
        (
            HEADER + frame(Kind.DESCRIPTION, description(devices=[{}])),
            "the description of the source's machine is damaged",
        ),
        (
            HEADER + frame(Kind.DESCRIPTION, description(machine=7)),
            "the description of the source's machine is damaged",
        ),
        (HEADER + frame(Kind.DESCRIPTION, description(machine="q35")), "machine type: q35 at the source, pc at the"),
        (
            HEADER + frame(Kind.DESCRIPTION, description(traits=["BAR 9"])),
            "properties of ivshmem-plain 'x' at 0000:00:06.0:",
        ),
        (AGREED, "closed the connection in the middle"),
        (AGREED + frame(Kind.END), "the migration stream lacks the state of machine, cpu"),
        (AGREED + frame(Kind.STATE, encode(["machine", {}])) * 2, "without a name, unknown, or twice"),
        (AGREED + frame(Kind.STATE, encode(["disk", {}])), "without a name, unknown, or twice"),
        (AGREED + frame(Kind.STATE, encode(7)), "without a name, unknown, or twice"),
        (AGREED + place(0, 4096, PAGE) * 2, "4096 bytes at 0x1000 of memory block 0 come too late"),
        (AGREED + place(1, 0, PAGE) + place(0, 0, PAGE), "4096 bytes at 0x0 of memory block 0 come too late"),
        (AGREED + place(2, 0, PAGE), "4096 bytes at 0x0 of memory block 2, and there are 2"),
        (AGREED + place(1, MIB, PAGE), "do not fit into 1048576 bytes"),
        (AGREED + place(0, 2**64 - 4096, PAGE), "do not fit into"),
        (AGREED + place(0, 1, PAGE), "do not fit into"),
        (AGREED + place(0, 0, b"x"), "do not fit into"),
        (AGREED + place(0, 0, b""), "memory without data"),
        (AGREED + place(0, 0, bytes(CHUNK_BYTES + 4096)), "MEMORY of"),
    ],
)
def test_a_damaged_stream_is_refused_in_one_line(
    sent: bytes, reason: str, tmp_path: Path, memory: SharedMemory
) -> None:
    with waiting(tmp_path, memory) as (destination, other):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            other.sock.sendall(sent)
            other.sock.shutdown(socket.SHUT_WR)
        assert destination.wait() == 1
        (line,) = destination.errors.splitlines()
        assert line.startswith("unicorn-system-x86_64: load of migration failed: ")
        assert reason in line


@pytest.mark.parametrize(
    "change",
    [
        ("cpu", {}),
        ("cpu", 7),
        ("cpu", {"registers": {}, "halted": False, "put_off_at": None}),
        ("machine", {}),
        ("machine", None),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_in_one_line(change: tuple[str, Any], tmp_path: Path, memory: SharedMemory) -> None:
    """The stream of a real source, with one section changed on the way."""
    name, value = change
    with sending(tmp_path, memory) as (source, there), SharedMemory.create_memfd(MIB) as theirs:
        (tmp_path / "m").unlink()
        with waiting(tmp_path, theirs) as (destination, here):
            here.sock.sendall(there.exactly(12))
            here.send(Kind.DESCRIPTION, there.until(Kind.DESCRIPTION))
            assert here.frame() == (Kind.ANSWER, b"")
            there.send(Kind.ANSWER)
            while (got := there.frame())[0] != Kind.END:
                is_it = got[0] == Kind.STATE and json.loads(got[1])[0] == name
                here.send(got[0], encode([name, value]) if is_it else got[1])
            here.send(Kind.END)
            kind, text = here.frame()
            assert kind == Kind.ANSWER
            assert re.match(rf"the state of the {name} (in the migration stream is damaged|cannot be): ", text.decode())
            there.send(Kind.ANSWER, text)
            assert destination.wait() == 1
            assert len(destination.errors.splitlines()) == 1
        assert ended(source.qmp)["error-desc"] == f"the destination refused: {text.decode()}"
        goes_on(source)


def test_a_second_source_is_turned_away(tmp_path: Path, memory: SharedMemory) -> None:
    incoming = ("-incoming", "tcp:127.0.0.1:0")
    with negotiated(Machine(KIND, *MIGRANT, *plain(memory), *incoming)) as destination:
        (address,) = destination.qmp.ok("query-migrate")["socket-address"]
        where = ("127.0.0.1", int(address["port"]))
        with socket.create_connection(where, LIMIT_S) as first:
            first.sendall(HEADER)
            destination.qmp.event("MIGRATION")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(where, LIMIT_S)
        assert destination.wait() == 1


@pytest.mark.parametrize(
    ("incoming", "message"),
    [
        ("bogus:1", "unknown migration protocol: bogus:1; there are unix:PATH and tcp:HOST:PORT"),
        ("unix:/nonexistent/x", "Failed to bind socket to /nonexistent/x: No such file or directory"),
        ("tcp:x", "error parsing address 'x'"),
    ],
)
def test_an_address_that_cannot_be_ends_the_destination(incoming: str, message: str) -> None:
    with Machine(KIND, "-incoming", incoming) as machine:
        assert machine.wait() != 0
        assert machine.errors == f"unicorn-system-x86_64: -incoming {incoming}: {message}\n"
