"""The guest programs on real QEMU: registers, interrupts and streams, over our server and with our peer."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest
from machines import memfd_backend, served

from ivshmem_lab.guests import guest_path, toolchain
from ivshmem_lab.guests.exchange import Mailbox, StreamRing, consume, produce, stream_checksum
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.qemu

LIMIT_S = 40.0
MIB = 1 << 20
EXIT_OK, EXIT_FAILED, EXIT_FAULT = 1, 3, 5  # isa-debug-exit: value << 1 | 1
CONFIG_BYTES = 256


class Guest:
    """One QEMU with a guest program; its serial port is stdout, and what QEMU itself says comes there too."""

    def __init__(self, elf: Path, append: str, *devices: str, pass_fds: tuple[int, ...] = ()) -> None:
        command = ["qemu-system-x86_64", "-machine", "pc", "-nodefaults", "-no-user-config", "-display", "none"]
        command += ["-accel", "tcg", "-m", "32", "-kernel", str(elf), "-append", append, "-serial", "stdio"]
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04", *devices]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=pass_fds
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.text = ""

    def _read_until(self, text: str | None) -> None:
        """Read up to a text, or to the end of the output."""
        deadline = time.monotonic() + LIMIT_S
        while text is None or text not in self.text:
            left_s = max(0.0, deadline - time.monotonic())
            assert select.select([self.output], [], [], left_s)[0], f"no {text!r} in time after:\n{self.text}"
            data = os.read(self.output.fileno(), 65536)
            if not data and text is None:
                return
            assert data, f"ended before {text!r}:\n{self.text}"
            self.text += data.decode()

    def says(self, text: str) -> None:
        self._read_until(text)

    def ends(self) -> tuple[int, list[str]]:
        """Exit status and all lines."""
        self._read_until(None)
        return self.process.wait(LIMIT_S), self.text.splitlines()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()


def guest(name: str, append: str, *devices: str, **options: Any) -> Guest:
    return Guest(guest_path(name), append, *devices, **options)


def plain_options(memory: SharedMemory, slot: int = 4) -> list[str]:
    """The parent's memfd as a memory backend; `share=on` of a file, since QEMU cannot take over a memfd."""
    return [*memfd_backend(memory), "-device", f"ivshmem-plain,memdev=m,addr={slot}"]


def doorbell(path: str, vectors: int = 1, slot: int = 4) -> list[str]:
    chardev = ["-chardev", f"socket,path={path},id=c"]
    return [*chardev, "-device", f"ivshmem-doorbell,chardev=c,vectors={vectors},addr={slot}"]


@contextlib.contextmanager
def serving(size_bytes: int = 4 * MIB, vectors: int = 1) -> Iterator[str]:
    """Our server on a thread of its own; gives the path of its socket."""
    path = Path(os.environ["XDG_RUNTIME_DIR"]) / "guests-on-qemu.sock"
    with served(path, vectors=vectors, size_bytes=size_bytes):
        yield str(path)


def dump(title: str, content: bytes) -> list[str]:
    return [f"{title} {row:02x}: {content[row : row + 16].hex(' ')}" for row in range(0, CONFIG_BYTES, 16)]


def without_addresses(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("addr ")]


def from_device(lines: list[str]) -> list[str]:
    return without_addresses(lines[lines.index("ivshmem 00:04.0") :])


def expected_registers(peer_id: int) -> list[str]:
    """BAR 0 as section 3.2 of the reference has it (measured on QEMU 7.2)."""
    zero = "read8 00 read16 0000 read32 00000000"
    return [
        f"register 00 IntrMask: {zero}",
        f"register 04 IntrStatus: {zero}",
        f"register 08 IVPosition: read8 {peer_id:02x} read16 {peer_id:04x} read32 {peer_id:08x}",
        f"register 0c Doorbell: {zero}",
        f"peer_id {peer_id}",
        "IntrMask write32 a5c3f01e: a5c3f01e f01e 1e bytes 1-3 00 00 00",
        "IntrMask write8 06 at 1: 00000006",
        "IntrMask write16 1234 at 2: 00001234",
        "IntrMask write32 0: 00000000",
        "IntrStatus write32 12345678: 12345678 then 00000000",
        "IntrStatus write32 87654321: read8 at 1 00, at 0 21, then 00000000",
        "IVPosition after write32: unchanged",
        "reserved 10-ff: 00000000 after write32 00000000, IntrMask 00000000 IntrStatus 00000000",
    ]


def expected_config(bar2_bytes: int, msix: tuple[int, int, int] | None = None, bar1_bytes: int = 0) -> list[str]:
    """Header and writable bits as sections 3.1 and 3.3 of the reference have them.

    `msix` is (vectors, offset of the PBA, bytes of BAR 1).
    """
    header, writable = bytearray(CONFIG_BYTES), bytearray(CONFIG_BYTES)
    struct.pack_into("<HHHHI", header, 0, 0x1AF4, 0x1110, 0x0006, 0x0010 if msix else 0, 0x05000001)
    struct.pack_into("<I", header, 0x18, 0xC)
    struct.pack_into("<HH", header, 0x2C, 0x1AF4, 0x1100)
    struct.pack_into("<H", writable, 4, 0x0507)
    writable[0x0C] = writable[0x3C] = 0xFF
    struct.pack_into("<I", writable, 0x10, 0xFFFFFF00)
    struct.pack_into("<Q", writable, 0x18, 2**64 - bar2_bytes)
    writable[0x40:] = b"\xff" * (CONFIG_BYTES - 0x40)
    if msix:
        vectors, pba, bar1_bytes = msix
        header[0x34] = 0x40
        struct.pack_into("<HHII", header, 0x40, 0x11, vectors - 1, 1, pba | 1)
        struct.pack_into("<I", writable, 0x14, 2**32 - bar1_bytes)
        struct.pack_into("<HHII", writable, 0x40, 0, 0xC000, 0, 0)
    return dump("config", bytes(header)) + dump("writable", bytes(writable))


def test_probe_of_a_plain_device_prints_what_the_reference_says() -> None:
    with SharedMemory.create_memfd(MIB) as memory:
        content = np.random.default_rng(1).integers(0, 256, MIB, np.uint8)
        memory.array()[:] = content
        first, last = content[:4].view("<u4")[0], content[-4:].view("<u4")[0]
        with guest("probe", "exit=1", *plain_options(memory)) as probe:
            status, lines = probe.ends()
        assert (memory.array() == content).all(), "the probe changed the memory"
    assert status == EXIT_OK
    assert lines[0] == "bus 00:00.0 8086:1237 rev 02 class 060000 header 00"
    assert "bus 00:04.0 1af4:1110 rev 01 class 050000 header 00" in lines
    assert [line.split()[2] for line in lines if line.startswith("addr ")] == ["0", "2"]
    assert from_device(lines) == [
        "ivshmem 00:04.0",
        *expected_config(MIB),
        "bar 0 size 0x0000000000000100 32-bit",
        "bar 2 size 0x0000000000100000 64-bit prefetchable",
        *expected_registers(0),
        "msix none",
        f"memory size {MIB} first {first:08x} last {last:08x}",
        "probe: done",
    ]


@pytest.mark.parametrize(("vectors", "pba", "bar1_bytes"), [(2, 0x800, 4096), (129, 0x810, 4096), (256, 0x1000, 8192)])
def test_probe_of_a_doorbell_device_prints_what_the_reference_says(vectors: int, pba: int, bar1_bytes: int) -> None:
    with serving(vectors=1) as path, Peer.connect(path) as host:
        with guest("probe", "exit=1", *doorbell(path, vectors)) as probe:
            status, lines = probe.ends()
        assert host.wait(timeout_s=0) == 0, "the probe rang somebody"
    entries = []
    for entry in range(min(vectors, 8)):
        ones, zeros = " ".join(["ffffffff"] * 4), " ".join(["00000000"] * 4)
        entries += [f"entry {entry}: address 00000000 00000000 data 00000000 control 00000001"]
        entries += [f"entry {entry}: ones {ones} zeros {zeros}"]
        if entry == 0:
            entries += ["entry 0: data ffffffff read16 0000 read8 00 after write8 and write16 of 0 ffffffff"]
    pba_words = (vectors + 63) // 64 * 2
    assert status == EXIT_OK
    assert from_device(lines) == [
        "ivshmem 00:04.0",
        *expected_config(4 * MIB, (vectors, pba, bar1_bytes)),
        "bar 0 size 0x0000000000000100 32-bit",
        f"bar 1 size 0x{bar1_bytes:016x} 32-bit",
        "bar 2 size 0x0000000000400000 64-bit prefetchable",
        *expected_registers(1),
        f"msix capability 40 control {vectors - 1:04x} table 00000001 pba {pba | 1:08x}",
        f"msix vectors {vectors} table bar 1 offset 0x00000000 pba bar 1 offset 0x{pba:08x}",
        *entries,
        *(f"pba {word}: 00000000 after write32 00000000" for word in range(pba_words)),
        f"memory size {4 * MIB} first 00000000 last 00000000",
        "probe: done",
    ]


class Monitor:
    """QMP over an inherited socket."""

    def __init__(self) -> None:
        self.sock, self.theirs = socket.socketpair()
        self.sock.settimeout(LIMIT_S)
        self.options = ["-chardev", f"socket,id=q,fd={self.theirs.fileno()}", "-mon", "chardev=q,mode=control"]
        self.lines = self.sock.makefile("rw", encoding="utf-8", newline="\n")

    def execute(self, command: str, **arguments: Any) -> None:
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        answer = self.until("return", "error")
        assert "return" in answer, answer

    def until(self, *keys: str, event: str | None = None) -> dict[str, Any]:
        for line in self.lines:
            message: dict[str, Any] = json.loads(line)
            if message.get("event") == event if event else message.keys() & set(keys):
                return message
        pytest.fail("QEMU closed the monitor")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.lines.close()
        self.sock.close()
        self.theirs.close()


def test_probe_sees_a_device_come_and_lets_it_leave() -> None:
    with (
        Monitor() as monitor,
        guest("probe", "watch=1", *monitor.options, pass_fds=(monitor.theirs.fileno(),)) as probe,
    ):
        monitor.execute("qmp_capabilities")
        probe.says("probe: watching\n")
        for name, slot in (("one", 6), ("two", 7)):
            monitor.execute(
                "object-add", **{"qom-type": "memory-backend-memfd", "id": name, "size": MIB, "share": True}
            )
            monitor.execute("device_add", driver="ivshmem-plain", id=f"d-{name}", memdev=name, addr=f"{slot:#x}")
            probe.says(f"came slot {slot:02x}\nbus 00:{slot:02x}.0 1af4:1110")
            # No firmware has placed it: the guest did, and each BAR answers.
            came = probe.text.index(f"came slot {slot:02x}")
            probe.text = probe.text[came:]
            probe.says(f"memory size {MIB} first 00000000 last 00000000\nprobe: done\n")
        bars = [int(line.split()[-1], 16) for line in probe.text.splitlines() if line.startswith("addr ")]
        assert len(bars) == 2
        assert all(0xE0000000 < bar < 0xFEC00000 and bar % 4096 == 0 for bar in bars)
        monitor.execute("device_del", id="d-one")
        assert monitor.until(event="DEVICE_DELETED")["data"]["device"] == "d-one"
        probe.says("leave slot 06\n")


def test_pingpong_between_two_machines_counts_exactly() -> None:
    with serving(vectors=2) as path, guest("pingpong", "", *doorbell(path, 2)) as pong:
        pong.says(f"pingpong: peer_id=0 vectors=2 memory={4 * MIB}\nready\n")
        with (
            Peer.connect(path) as host,
            guest("pingpong", "role=ping peer=0 rounds=500 warmup=20 log=0x20000 exit=1", *doorbell(path, 2)) as ping,
        ):
            status, lines = ping.ends()
            assert status == EXIT_OK
            assert lines[:2] == [f"pingpong: peer_id=2 vectors=2 memory={4 * MIB}", "ready"]
            cycles = Mailbox(host.memory, 2).log_cycles()
            assert cycles.size == 500
            mean = int(cycles.sum(dtype=np.uint64)) // 500
            assert lines[2] == (
                f"pingpong: rounds=500 sent=520 received=520 min_cycles={cycles.min()} mean_cycles={mean}"
            )
            assert cycles.min() > 0
            assert not host.memory[0x20000 + 2000 : 0x20000 + 2100].any()
            own, other = Mailbox(host.memory, 2), Mailbox(host.memory, 0)
            assert (own.sent, own.received, own.status, own.owner) == (520, 520, 0, 3)
            assert (other.sent, other.received, other.status, other.owner) == (520, 520, 0, 1)
            assert other.reply_to == 0


def run_block(host: Peer, mailbox: Mailbox) -> None:
    """Let a guest run what its mailbox says; it rings when it is done."""
    mailbox.controller = host.peer_id + 1
    mailbox.command += 1
    host.ring(mailbox.peer_id)
    assert host.wait(timeout_s=LIMIT_S) == 1
    assert mailbox.done == mailbox.command


def test_a_host_commands_ping_blocks_and_is_answered_itself() -> None:
    with (
        serving() as path,
        Peer.connect(path) as host,
        guest("pingpong", "", *doorbell(path)) as one,
        guest("pingpong", "", *doorbell(path)) as two,
    ):
        one.says("ready\n")
        two.says("ready\n")
        a, b = Mailbox(host.memory, 1), Mailbox(host.memory, 2)
        assert a.ready
        assert b.ready
        for mailbox, target in ((a, 2), (b, 1), (a, 2)):
            mailbox.target, mailbox.rounds, mailbox.warmup, mailbox.log_offset = target, 100, 5, 65536
            run_block(host, mailbox)
            assert mailbox.status == 0
            assert (mailbox.log_cycles() > 0).all()
        # Each block: 105 rounds, one interrupt that starts it, one doorbell that ends it.
        assert (a.received, a.sent) == (2 * 106 + 105, 2 * 106 + 105)
        assert (b.received, b.sent) == (106 + 2 * 105, 106 + 2 * 105)

        a.reply_to = host.peer_id + 1
        for _ in range(50):
            host.ring(1)
            assert host.wait(timeout_s=LIMIT_S) == 1
        assert (a.received, a.sent) == (2 * 106 + 105 + 50, 2 * 106 + 105 + 50)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ({"target": 1}, 3),
        ({"target": 2}, 1),
        ({"target": 1024}, 1),
        ({"target": 2, "owner": 3, "log_offset": 65538}, 2),
        ({"target": 2, "owner": 3, "log_offset": 64}, 2),
        ({"target": 2, "owner": 3, "log_offset": 4 * MIB - 396}, 2),
        ({"target": 2, "owner": 3, "log_offset": 2**32 - 400}, 2),
    ],
)
def test_a_block_that_cannot_run_says_why_and_the_guest_goes_on(words: dict[str, int], status: int) -> None:
    with serving() as path, Peer.connect(path) as host, guest("pingpong", "", *doorbell(path)) as pong:
        pong.says("ready\n")
        mailbox, other = Mailbox(host.memory, 1), Mailbox(host.memory, 2)
        other.owner, other.state = words.pop("owner", 0), 1
        mailbox.rounds = 100
        for name, value in words.items():
            setattr(mailbox, name, value)
        run_block(host, mailbox)
        assert mailbox.status == status
        mailbox.reply_to = 1
        host.ring(1)
        assert host.wait(timeout_s=LIMIT_S) == 1


def test_each_vector_is_answered_on_itself() -> None:
    with serving(vectors=3) as path, Peer.connect(path) as host, guest("pingpong", "", *doorbell(path, 3)) as pong:
        pong.says("ready\n")
        Mailbox(host.memory, 1).reply_to = 1
        for vector in (2, 0, 1, 2):
            host.ring(1, vector)
            assert host.wait(vector, timeout_s=LIMIT_S) == 1
        assert [host.wait(vector, timeout_s=0) for vector in range(3)] == [0, 0, 0]


def stream_line(role: str, chunks: int, checksum: int) -> str:
    return f"stream: role={role} chunks={chunks} checksum=0x{checksum:08x}"


def test_stream_between_two_machines_has_numpy_s_checksum() -> None:
    options = f"bytes={8 * MIB} session=7 seed=12345 exit=1"
    expected = stream_checksum(12345, 128)
    with (
        serving() as path,
        Peer.connect(path) as host,
        guest("stream", f"role=consumer {options}", *doorbell(path)) as consumer,
        guest("stream", f"role=producer {options}", *doorbell(path)) as producer,
    ):
        for machine, role in ((producer, "producer"), (consumer, "consumer")):
            status, lines = machine.ends()
            assert (status, lines[-1]) == (EXIT_OK, stream_line(role, 128, expected))
        ring = StreamRing(host.memory)
        assert (ring.producer.head, ring.consumer.tail, ring.consumer.finished) == (128, 128, 1)
        assert ring.producer.checksum == ring.consumer.checksum == expected
        assert 0 < ring.producer.write_cycles < ring.producer.total_cycles
        assert 0 < ring.consumer.read_cycles < ring.consumer.total_cycles


@pytest.mark.parametrize(("chunk_bytes", "slots"), [(65536, 16), (4096, 1), (64, 7)])
def test_stream_from_host_to_guest(chunk_bytes: int, slots: int) -> None:
    chunks = min(8 * MIB // chunk_bytes, 500)
    with (
        serving() as path,
        Peer.connect(path) as host,
        guest("stream", "role=consumer exit=1 session=3", *doorbell(path)) as consumer,
    ):
        host.wait_for_peer(1, LIMIT_S)
        size_bytes = chunks * chunk_bytes
        result = produce(host, StreamRing(host.memory), size_bytes, session=3, chunk_bytes=chunk_bytes, slots=slots)
        status, lines = consumer.ends()
    assert result.checksum == stream_checksum(1, chunks, chunk_bytes)
    assert (status, lines[-1]) == (EXIT_OK, stream_line("consumer", chunks, result.checksum))


@pytest.mark.parametrize(("chunk_bytes", "slots"), [(65536, 16), (4096, 1), (64, 7)])
def test_stream_from_guest_to_host(chunk_bytes: int, slots: int) -> None:
    chunks = min(8 * MIB // chunk_bytes, 500)
    append = f"role=producer exit=1 bytes={chunks * chunk_bytes} chunk={chunk_bytes} slots={slots} seed=9 ring=0x40000"
    with (
        serving() as path,
        Peer.connect(path) as host,
        guest("stream", append, *doorbell(path)) as producer,
    ):
        host.wait_for_peer(1, LIMIT_S)
        result = consume(host, StreamRing(host.memory, 0x40000))
        status, lines = producer.ends()
    assert result.checksum == stream_checksum(9, chunks, chunk_bytes)
    assert (result.chunks, result.size_bytes) == (chunks, chunks * chunk_bytes)
    assert (status, lines[-1]) == (EXIT_OK, stream_line("producer", chunks, result.checksum))


@pytest.mark.parametrize(
    ("program", "append", "words"),
    [
        ("pingpong", "role=nope", "pingpong: role=nope is not ping or pong"),
        ("pingpong", "", "pingpong: no ivshmem-doorbell device on bus 0"),
        ("pingpong", "role=ping rounds=1e3", "rounds=1e3 is not a number of 32 bits"),
        ("pingpong", "rounds=4294967296", "rounds=4294967296 is not a number of 32 bits"),
        ("stream", "", "stream: role must be producer or consumer"),
        ("stream", "role=producer session=0", "stream: session 0 means no session"),
        ("stream", "role=producer ring=100", "stream: ring must be a multiple of 64 bytes"),
    ],
)
def test_a_wrong_option_is_named_and_ends_the_guest(program: str, append: str, words: str) -> None:
    with SharedMemory.create_memfd(MIB) as memory, guest(program, append, *plain_options(memory)) as machine:
        assert machine.ends() == (EXIT_FAILED, [words])


@pytest.mark.parametrize(
    ("append", "words"),
    [
        ("role=producer chunk=96", "stream: chunk must be a multiple of 64 bytes and slots at least 1"),
        ("role=producer slots=0", "stream: chunk must be a multiple of 64 bytes and slots at least 1"),
        ("role=producer slots=48", "stream: the ring does not fit into the shared memory"),
        ("role=producer chunk=0x80000000 slots=2", "stream: the ring does not fit into the shared memory"),
        ("role=consumer ring=0xfffff000", "stream: the ring does not fit into the shared memory"),
        ("role=producer bytes=65537", "stream: bytes must be a multiple of chunk"),
    ],
)
def test_a_stream_that_does_not_fit_is_refused(append: str, words: str) -> None:
    with serving() as path, guest("stream", append, *doorbell(path)) as machine:
        status, lines = machine.ends()
    assert (status, lines[-1]) == (EXIT_FAILED, words)


def test_a_consumer_guest_refuses_a_ring_that_makes_no_sense() -> None:
    with (
        serving() as path,
        Peer.connect(path) as host,
        guest("stream", "role=consumer session=2", *doorbell(path)) as machine,
    ):
        line = StreamRing(host.memory).producer
        line.chunk_bytes, line.slots, line.total_chunks, line.head = 64, 2**32 - 1, 5, 1
        line.session = 2
        status, lines = machine.ends()
    assert (status, lines[-1]) == (EXIT_FAILED, "stream: the ring does not fit into the shared memory")


def test_unknown_options_are_named_and_ignored() -> None:
    with (
        SharedMemory.create_memfd(MIB) as memory,
        guest("probe", " colour=red  exit=1 verbose", *plain_options(memory)) as probe,
    ):
        status, lines = probe.ends()
    assert status == EXIT_OK
    assert lines[:2] == ["ignored: colour=red", "ignored: verbose"]
    assert lines[-1] == "probe: done"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
@pytest.mark.parametrize(
    ("statement", "vector"),
    [
        ('__asm__ volatile("ud2");', 6),
        ('__asm__ volatile("int3");', 3),
        ("((void (*)(void))0x300000)();", 14),  # data is not executable where the CPU knows NX
        ('__asm__ volatile("mov $0x123, %%ax; mov %%ax, %%ds" ::: "eax");', 13),
    ],
)
def test_an_exception_is_reported_and_ends_the_guest(
    statement: str, vector: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toolchain.SOURCES, tmp_path / "src")
    monkeypatch.setattr(toolchain, "SOURCES", tmp_path / "src")
    source = tmp_path / "src" / "probe.c"
    source.write_text(source.read_text().replace("void program(void)\n{", "void program(void)\n{\n    " + statement))
    elf = toolchain.build("probe", tmp_path)
    with Guest(elf, "exit=1") as machine:
        status, lines = machine.ends()
    assert status == EXIT_FAULT
    assert len(lines) == 1
    assert lines[0].startswith(f"fault {vector} at 0x00")
