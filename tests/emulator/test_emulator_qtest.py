"""qtest: what a libqtest client asks and is answered; how it starts, how it ends, and what bad input costs."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import LIMIT_S, memfd_backend, served
from qtest_client import Qtest

from ivshmem_lab.emulator.options import parse_arguments
from ivshmem_lab.emulator.qtest import LINE_LIMIT_BYTES
from ivshmem_lab.errors import UsageError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MIB = 1 << 20
BAR0, BAR1, BAR2 = 0xE0000000, 0xE0001000, 0xE0100000
PLAIN = ["-object", f"memory-backend-ram,size={MIB},id=m", "-device", "ivshmem-plain,memdev=m,addr=4"]


@pytest.fixture(scope="module")
def pc() -> Iterator[Qtest]:
    with Qtest("unicorn", "-m", "32", *PLAIN) as machine:
        yield machine


def place(machine: Qtest, slot: int = 4) -> None:
    """Give a device the addresses of this file, and switch it on."""
    for offset, address in {0x10: BAR0, 0x14: BAR1, 0x18: BAR2, 0x1C: 0}.items():
        machine.config(slot, offset, value=address)
    machine.config(slot, 4, 2, value=6)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_every_width_of_memory_is_written_and_read(pc: Qtest) -> None:
    for width, letter in {1: "b", 2: "w", 4: "l", 8: "q"}.items():
        value = 0x1122334455667788 & (1 << 8 * width) - 1
        assert pc.ask(f"write{letter} 0x2000 {value:#x}") == ""
        assert pc.ask(f"read{letter} 0x2000") == f"0x{value:016x}"
    assert pc.ask("write 0x2000 0x4 0xDEADbeef") == ""
    assert pc.ask("read 8192 4") == "0xdeadbeef", "lower case, decimal and hexadecimal numbers"
    assert pc.ask("memset 0x2000 0x3 0xaa") == ""
    assert pc.ask("b64read 0x2000 0x4") == "qqqq7w=="
    assert pc.ask("b64write 0x2000 0x2 AQI=") == ""
    assert pc.ask("write 0x2002 0x4 0xff") == ""
    assert pc.ask("read 020000 06") == "0x0102ff000000", "octal numbers; what is missing is zeros"


def test_two_mebibytes_of_hexadecimal_go_in_one_line_in_pieces(pc: Qtest) -> None:
    data = os.urandom(MIB)
    request = f"write 0x100000 {MIB:#x} 0x{data.hex()}\n".encode()
    for first in range(0, len(request), 100_003):
        pc.sock.sendall(request[first : first + 100_003])
    assert pc.answer() == "OK"
    assert pc.ask(f"read 0x100000 {MIB:#x}") == f"0x{data.hex()}"


def test_a_line_may_come_byte_by_byte_and_many_may_come_at_once(pc: Qtest) -> None:
    for byte in b"readb 0x1\n":
        pc.sock.sendall(bytes([byte]))
    assert pc.answer().startswith("OK 0x")
    assert pc.ask_all(["writeb 0x1 7", "readb 0x1"] * 1000) == ["OK", "OK 0x0000000000000007"] * 1000


def test_the_firmware_configuration_tells_the_memory_size(pc: Qtest) -> None:
    def item(key: int, size: int) -> bytes:
        pc.out(0x510, key, 2)
        return bytes(pc.inp(0x511, 1) for _ in range(size))

    assert item(0, 5) == b"QEMU\0"
    assert int.from_bytes(item(3, 8), "little") == 32 * MIB
    assert item(0x19, 4) == bytes(4), "no files"
    assert item(0x1234, 2) == bytes(2)
    pc.out(0x510, 3, 1)
    assert pc.inp(0x510, 2) == 0, "only words select, only bytes are read"


def test_no_firmware_has_been_here(pc: Qtest) -> None:
    assert [pc.config(4, offset) for offset in (4, 0x10, 0x18, 0x1C)] == [0, 0, 0xC, 0]


def test_intercepted_interrupt_lines_are_told_before_the_answer(pc: Qtest) -> None:
    assert pc.raw("irq_intercept_in nope") == "FAIL Unknown device"
    pc.ask("set_irq_in ioapic unnamed-gpio-in 5 1")
    assert pc.ask("irq_intercept_in ioapic") == pc.ask("irq_intercept_out ioapic") == ""
    for level in (0, 0, 1, 1, 0):
        pc.ask(f"set_irq_in ioapic unnamed-gpio-in 5 {level}")
    assert pc.irqs == ["IRQ raise 5", "IRQ lower 5"], "levels count from the interception on"


def test_the_client_moves_the_clock_and_only_forward(pc: Qtest) -> None:
    start = int(pc.ask("clock_step"))
    assert int(pc.ask("clock_step 100")) == start + 100
    assert int(pc.ask(f"clock_set {start + 50}")) == start + 100
    assert int(pc.ask(f"clock_set {start + 500}")) == int(pc.ask("clock_step")) == start + 500


@pytest.mark.parametrize(
    "request_",
    [
        "",
        " ",
        "READ 0 4",
        "rtas x",
        "read",
        "read 0",
        "read 0 x",
        "read zero 4",
        f"read 0 {1 << 40}",
        "read 0x10000000000000000 4",
        "readq -",
        "inb 0x10000",
        "outb 0x80",
        "write 0 4 0xzz00",
        "write 0 4 00",
        "b64write 0 4 ===",
        "memset 0 0xffffffffffffffff 0",
        "irq_intercept_in",
        "set_irq_in ioapic named 1 1",
        "set_irq_in ioapic unnamed-gpio-in 24 1",
        "clock_set",
        "module_load a b",
        "\x01\xff",
    ],
)
def test_what_is_wrong_is_answered_with_fail_and_the_next_request_is_carried_out(pc: Qtest, request_: str) -> None:
    answer = pc.raw(request_)
    assert answer.startswith("FAIL")
    assert "Traceback" not in answer
    assert pc.ask("endianness") == "little"


@given(st.lists(st.sampled_from([*"0x1f ab", "read", "write", "inl", "outl", "memset", "b64read", "\0", "0xffff"])))
def test_any_words_get_one_answer(pc: Qtest, words: list[str]) -> None:
    assert pc.raw(" ".join(words)).startswith(("OK", "FAIL"))


# -- devices -----------------------------------------------------------------------------------------------------------


def test_registers_and_memory_of_a_device(pc: Qtest) -> None:
    place(pc)
    pc.write(BAR0, 0xFFFFFFFF)
    pc.write(BAR0 + 4, 1)
    assert [pc.read(BAR0 + offset) for offset in (0, 4, 4, 8, 12)] == [0xFFFFFFFF, 1, 0, 0, 0]
    pc.write(BAR2 + MIB - 4, 0x12345678)
    assert pc.read(BAR2 + MIB - 4, 8) == 0x12345678, "zeros behind the end"


def test_doorbells_of_peers_are_heard_between_requests(tmp_path: Path) -> None:
    options = [
        "-chardev",
        f"socket,path={tmp_path / 's'},id=c",
        "-device",
        "ivshmem-doorbell,chardev=c,vectors=2,addr=4",
    ]
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as peer, Qtest("unicorn", *options) as machine:
        place(machine)
        peer_id = peer.wait_for_peer(timeout_s=LIMIT_S)
        assert machine.read(BAR0 + 8) == peer_id
        machine.config(4, 0x42, 2, value=0x8000)
        peer.ring(peer_id, 1)
        while not (pending := machine.read(BAR1 + 0x800, 8)):  # its own vectors come last; until then the ring is kept
            pass
        assert pending == 2
        machine.write(BAR0 + 12, peer.peer_id << 16)
        assert peer.wait(timeout_s=LIMIT_S)
        # To itself, with the question right behind it.
        machine.sock.sendall(f"writel {BAR0 + 12:#x} {peer_id << 16:#x}\nreadq {BAR1 + 0x800:#x}\n".encode())
        assert [machine.answer(), machine.answer()] == ["OK", f"OK 0x{3:016x}"]
        machine.write(BAR1 + 16, 0x2000)
        machine.write(BAR1 + 24, 0x5A5A)
        machine.write(BAR1 + 28, 0)
        assert (machine.read(0x2000), machine.read(BAR1 + 0x800, 8)) == (0x5A5A, 1)


def test_two_machines_share_memory(tmp_path: Path) -> None:
    with SharedMemory.create_memfd(MIB) as memory, contextlib.ExitStack() as stack:
        options = [*memfd_backend(memory), "-device", "ivshmem-plain,memdev=m,addr=4"]
        first, second = (stack.enter_context(Qtest("unicorn", *options)) for _ in range(2))
        for machine in (first, second):
            place(machine)
        pattern = bytes(range(256)) * 4096
        first.ask(f"write {BAR2:#x} {MIB:#x} 0x{pattern.hex()}")
        assert second.ask(f"read {BAR2:#x} {MIB:#x}") == f"0x{pattern.hex()}"
        assert bytes(memory.array()) == pattern


def test_a_device_is_plugged_and_ejected_through_the_hot_plug_ports() -> None:
    with Qtest("unicorn", "-object", f"memory-backend-ram,size={MIB},id=m") as machine:
        machine.qmp.ok("device_add", driver="ivshmem-plain", id="iv1", addr="0x06", memdev="m")
        assert [machine.inp(0xAE00), machine.inp(0xAE00)] == [1 << 6, 0]
        assert machine.config(6, 0) == 0x11101AF4
        machine.qmp.ok("device_del", id="iv1")
        machine.out(0xAE08, 1 << 6)
        assert machine.qmp.event("DEVICE_DELETED")["data"]["device"] == "iv1"
        assert machine.config(6, 0) == 0xFFFFFFFF


# -- machines ----------------------------------------------------------------------------------------------------------


def test_the_machine_none_has_qmp_and_qtest_and_nothing_else() -> None:
    with Qtest("unicorn", "-machine", "none", "-object", f"memory-backend-ram,size={MIB},id=m") as machine:
        names = {entry.get("alias", entry["name"]) for entry in machine.qmp.ok("query-machines")}
        assert names == {"pc", "q35", "none"}
        assert machine.qmp.ok("query-pci") == []
        refused = machine.qmp.execute("device_add", driver="ivshmem-plain", memdev="m")["error"]["desc"]
        assert refused == "No 'PCI' bus found for device 'ivshmem-plain'"
        assert machine.raw("read 0 4").startswith("FAIL")
        assert machine.raw("inb 0x80").startswith("FAIL")
        assert machine.raw("irq_intercept_in ioapic") == "FAIL Unknown device"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-accel", "qtest"], "-accel qtest runs no guest"),
        (["-qtest", "unix:/a", "-qtest", "unix:/b"], "there is one qtest connection"),
        (["-qtest", "tcp:1"], "not one of unix:PATH"),
        (["-machine", "none", "-kernel", sys.executable], "the machine none has no memory"),
        (["-machine", "microvm"], "this machine has pc, q35, none"),
    ],
)
def test_options_that_do_not_go_together_are_refused(argv: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_arguments(argv)


# -- connections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "connection",
    [
        ("-qtest", "unix:{}"),
        ("-chardev", "socket,id=qtest,path={}", "-qtest", "chardev:qtest"),
        ("-trace", "x", "-qtest", "unix:{}"),
    ],
    ids=["unix", "chardev", "trace"],
)
@pytest.mark.parametrize("accelerator", [["-accel", "qtest"], ["-S"], ["-machine", "pc,accel=qtest"]], ids=" ".join)
def test_a_machine_ends_with_status_0_when_terminated(connection: tuple[str, ...], accelerator: list[str]) -> None:
    with Qtest("unicorn", connection=connection, accelerator=accelerator) as machine:
        assert machine.terminate() == 0
        assert machine.errors == ""


def test_a_stopped_guest_starts_with_firmware_and_kernel_when_it_is_let_go() -> None:
    with Qtest("unicorn", *PLAIN, accelerator=["-S"]) as machine:
        assert machine.config(4, 0x18) == 0xC
        machine.qmp.ok("cont")
        assert machine.config(4, 0x18) > 0xC
        machine.qmp.ok("system_reset")
        assert machine.qmp.ok("query-status")["running"]


def test_the_log_has_requests_and_answers(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Qtest("unicorn", log=str(log)) as machine:
        machine.ask("outb 0x80 1")
        machine.raw("nope")
        assert machine.terminate() == 0
    words = [line.split("] ", 1)[1] for line in log.read_text().splitlines()]
    assert words[:3] == ["OPENED", "endianness", "OK little"]
    assert words[3:7] == ["outb 0x80 1", "OK", "nope", "FAIL Unknown command 'nope'"]


def test_without_a_log_file_the_log_is_on_stderr(tmp_path: Path) -> None:
    with Qtest("unicorn", log="/dev/fd/2") as machine:
        assert "R +" in machine.errors
        assert "endianness" in machine.errors


@pytest.mark.parametrize("rude", ["a line without end", "never reads", "goes in the middle"])
def test_a_rude_client_loses_its_connection_and_the_machine_goes_on(rude: str) -> None:
    with Qtest("unicorn") as machine:
        if rude == "a line without end":
            with contextlib.suppress(ConnectionError):
                for _ in range(LINE_LIMIT_BYTES // MIB + 2):
                    machine.sock.sendall(b"x" * MIB)
            assert hung_up(machine.sock)
        elif rude == "never reads":
            machine.sock.settimeout(1)
            with contextlib.suppress(ConnectionError, TimeoutError):
                for _ in range(100):
                    machine.sock.sendall(b"read 0x0 0x100000\n")
            machine.sock.close()
        else:
            machine.sock.sendall(b"read 0x0 0x100000\nread 0x")
            machine.sock.close()
        assert machine.qmp.ok("query-status")["status"] == "running"
        assert machine.terminate() == 0


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def test_a_listening_machine_talks_to_one_client_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "q"
    command = [sys.executable, "-m", "ivshmem_lab.emulator", "-display", "none", "-accel", "qtest", "-qmp", "stdio"]
    command += ["-qtest", f"unix:{path},server=on,wait=off", "-qtest-log", "none"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        json.loads(process.stdout.readline())
        for value in (1, 2):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(LIMIT_S)
                client.connect(str(path))
                client.sendall(f"readb 0x1000\nwriteb 0x1000 {value}\n".encode())
                with client.makefile("rb") as answers:
                    assert [answers.readline(), answers.readline()] == [f"OK 0x{value - 1:016x}\n".encode(), b"OK\n"]
        process.terminate()
        assert process.wait(LIMIT_S) == 0
