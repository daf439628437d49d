"""The command as a process: its serial port, its signals, its hot-plugging, its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import bare
import pytest
from machines import COMMON, LIMIT_S, PROGRAMS, Machine, Qmp, memfd_backend, served

from ivshmem_lab.guests import guest_path
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.pc import uart
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path

EXIT_OK = 1  # isa-debug-exit: value << 1 | 1
LONG = 300_000
"""Bytes: more than a socket's or a pipe's buffer and our own together."""

IN_STATUS = b"\x66\xba" + (uart.COM1 + uart.LINE_STATUS).to_bytes(2, "little") + b"\xec"  # mov dx, LSR; in al, dx


def status_until(bit: int) -> bytes:
    """Wait for a bit of the line status. EAX, EDX."""
    turn = IN_STATUS + b"\xa8" + bytes([bit])
    return turn + b"\x74" + bytes([256 - len(turn) - 2])


# Sends a counting byte (bl) so often, then ends the machine.
TALKER = b"\x31\xdb" + bare.repeat(
    LONG, status_until(0x20) + b"\x66\xba\xf8\x03\x88\xd8\xee\xfe\xc3"
)  # mov dx, COM1; mov al, bl; out dx, al; inc bl
ECHO = bare.for_ever(
    status_until(1) + b"\x66\xba\xf8\x03\xec\x88\xc3" + status_until(0x20) + b"\x66\xba\xf8\x03\x88\xd8\xee"
)
COUNTED = bytes(number & 0xFF for number in range(LONG))


def program(path: Path, body: bytes) -> list[str]:
    elf = path / "bare.elf"
    elf.write_bytes(bare.elf(bare.kernel(body + bare.out(0xF4, 0) + bare.SLEEP)))
    return ["-kernel", str(elf)]


def read_all(fd: int) -> bytes:
    parts = []
    deadline = time.monotonic() + LIMIT_S
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        part = os.read(fd, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    raise AssertionError("no end in time")


# -- the serial port ---------------------------------------------------------------------------------------------------


def test_a_slow_reader_loses_no_byte_and_holds_up_nobody_else(tmp_path: Path) -> None:
    with Machine("unicorn", *program(tmp_path, TALKER)) as machine:
        machine.qmp.negotiate()
        assert select.select([machine.serial], [], [], LIMIT_S)[0]
        # Nobody reads: the guest is held up, the machine is not.
        for _ in range(200):
            assert machine.qmp.ok("query-status")["status"] == "running"
        assert read_all(machine.serial.fileno()) == COUNTED
        assert machine.wait() == EXIT_OK


def test_a_slow_reader_of_standard_output_loses_no_byte_and_holds_up_nobody_else(tmp_path: Path) -> None:
    near, far = socket.socketpair()
    command = [*PROGRAMS["unicorn"], *COMMON, *program(tmp_path, TALKER), "-serial", "stdio"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    command += ["-chardev", f"socket,id=c,fd={far.fileno()}", "-mon", "chardev=c,mode=control"]
    with (
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[far.fileno()]) as process,
        near,
    ):
        far.close()
        assert process.stdout is not None
        qmp = Qmp(near)
        qmp.negotiate()
        assert select.select([process.stdout], [], [], LIMIT_S)[0]
        for _ in range(200):
            assert qmp.ok("query-status")["status"] == "running"
        assert read_all(process.stdout.fileno()) == COUNTED
        assert process.wait(LIMIT_S) == EXIT_OK


def test_a_file_takes_all_that_is_said(tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = [*PROGRAMS["unicorn"], *COMMON, *program(tmp_path, TALKER), "-serial", f"file:{said}"]
    command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=LIMIT_S, check=False).returncode == EXIT_OK
    assert said.read_bytes() == COUNTED


def test_much_that_is_typed_at_once_is_read_by_the_guest_to_the_last_byte(tmp_path: Path) -> None:
    typed = COUNTED[:50_000]
    with Machine("unicorn", *program(tmp_path, ECHO)) as machine:
        writer = threading.Thread(target=machine.serial.sendall, args=(typed,))
        writer.start()
        heard = b""
        while len(heard) < len(typed):
            assert select.select([machine.serial], [], [], LIMIT_S)[0], f"{len(heard)} bytes came back"
            heard += machine.serial.recv(1 << 16)
        writer.join()
        assert heard == typed


def test_a_reader_that_leaves_does_not_stop_the_guest(tmp_path: Path) -> None:
    with Machine("unicorn", *program(tmp_path, TALKER)) as machine:
        machine.qmp.negotiate()
        assert select.select([machine.serial], [], [], LIMIT_S)[0]
        machine.serial.close()
        assert machine.wait() == EXIT_OK
        assert machine.errors == ""


def test_a_serial_socket_takes_one_client_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    command = [*PROGRAMS["unicorn"], *COMMON, *program(tmp_path, ECHO), "-serial", f"unix:{path},server=on,wait=off"]
    near, far = socket.socketpair()
    command += ["-chardev", f"socket,id=c,fd={far.fileno()}", "-mon", "chardev=c,mode=control"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[far.fileno()]) as process, near:
        far.close()
        qmp = Qmp(near)
        qmp.negotiate()
        for word in (b"first", b"second"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(LIMIT_S)
                client.connect(str(path))
                client.sendall(word)
                heard = b""
                while len(heard) < len(word):
                    heard += client.recv(100)
                assert heard == word
        qmp.ok("quit")
        assert process.wait(LIMIT_S) == 0
    assert not path.exists()


# -- its end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "q"
    with Machine("unicorn", *program(tmp_path, ECHO), "-qmp", f"unix:{path},server=on,wait=off") as machine:
        machine.qmp.negotiate()
        machine.process.send_signal(number)
        assert machine.qmp.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-signal"}
        assert (machine.wait(), machine.errors, path.exists()) == (0, "", False)


def test_a_monitor_that_does_not_read_does_not_hold_up_the_end() -> None:
    with Machine("unicorn", "-S") as machine:
        machine.qmp.negotiate()
        machine.qmp.sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(5000):
                machine.qmp.send(b'{"execute": "query-commands"}')
        machine.process.send_signal(signal.SIGTERM)
        assert machine.wait() == 0
        assert machine.errors == ""


def wait_for(path: Path) -> None:
    """Wait until something appears at a path."""
    never = threading.Event()
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline
        never.wait(0.002)


def test_a_signal_ends_it_while_it_waits_for_a_client(tmp_path: Path) -> None:
    path = tmp_path / "serial"
    with Machine("unicorn", "-chardev", f"socket,id=s2,path={path},server=on") as machine:
        wait_for(path)
        machine.process.send_signal(signal.SIGINT)
        assert (machine.wait(), path.exists()) == (0, False)


def test_it_goes_on_when_the_client_it_waited_for_comes(tmp_path: Path) -> None:
    path = tmp_path / "monitor"
    with Machine("unicorn", "-qmp", f"unix:{path},server=on") as machine, socket.socket(socket.AF_UNIX) as client:
        wait_for(path)
        assert not select.select([machine.qmp.sock], [], [], 0)[0]
        while client.connect_ex(str(path)):  # bound, and about to listen
            pass
        machine.qmp.negotiate()
        Qmp(client).negotiate()


def test_a_signal_ends_it_while_a_server_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(LIMIT_S)
        options = ["-chardev", f"socket,id=c,path={path}", "-device", "ivshmem-doorbell,chardev=c"]
        with Machine("unicorn", *options) as machine:
            connection, _ = server.accept()
            with connection:
                started = time.monotonic()
                machine.process.send_signal(signal.SIGTERM)
                assert machine.wait() == 0
                assert time.monotonic() - started < 4, "it waited for the server's five seconds"
            assert "Traceback" not in machine.errors


def test_a_server_that_closes_at_once_is_one_line_and_a_status(tmp_path: Path) -> None:
    path = tmp_path / "server"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(LIMIT_S)
        options = ["-chardev", f"socket,id=c,path={path}", "-device", "ivshmem-doorbell,chardev=c"]
        with Machine("unicorn", *options) as machine:
            server.accept()[0].close()
            assert machine.wait() in (1, 2)
            assert machine.errors.count("\n") == 1
            assert "chardev=c" in machine.errors
            assert "closed before it sent the protocol version" in machine.errors


def test_a_guest_that_resets_itself_starts_again_or_ends(tmp_path: Path) -> None:
    fatal = b"\x0f\x01\x1d" + bare.word(bare.DATA) + bare.INT3
    with Machine("unicorn", "-S", *program(tmp_path, fatal), "-no-reboot") as machine:
        machine.qmp.negotiate()
        machine.qmp.ok("cont")
        assert machine.qmp.event("SHUTDOWN")["data"] == {"guest": True, "reason": "guest-reset"}
        assert machine.wait() == 0
    with Machine("unicorn", "-S", *program(tmp_path, fatal)) as machine:
        machine.qmp.negotiate()
        machine.qmp.ok("cont")
        for _ in range(3):
            assert machine.qmp.event("RESET")["data"] == {"guest": True, "reason": "guest-reset"}
        machine.qmp.ok("quit")
        assert machine.wait() == 0


def test_a_guest_that_cannot_go_on_ends_a_machine_that_nobody_watches(tmp_path: Path) -> None:
    nowhere = b"\xb8\x00\x00\x00\x90\xff\xe0"  # mov eax, 0x90000000; jmp eax
    command = [*PROGRAMS["unicorn"], *COMMON, *program(tmp_path, nowhere), "-no-reboot"]
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert run.returncode in (0, 1)
    assert "Traceback" not in run.stderr
    assert "0x90000000" in run.stderr


def test_unanswered_accesses_are_logged_once_each_kind(tmp_path: Path) -> None:
    body = bare.store(0x90000000, 1) * 3 + bare.out(0x1234, 1) * 3
    with Machine("unicorn", *program(tmp_path, body)) as machine:
        assert machine.wait() == EXIT_OK
        lines = machine.errors.splitlines()
        assert len(lines) == 2
        assert "0x90000000" in lines[0]
        assert "0x1234" in lines[1]


# -- hot-plug ----------------------------------------------------------------------------------------------------------


def test_fifty_plugs_and_unplugs_of_a_paused_machine_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(path), Machine("unicorn", "-S") as machine, SharedMemory.create_memfd(4096) as memory:
        machine.qmp.negotiate()
        descriptors = f"/proc/{machine.process.pid}/fd"
        before = None
        for turn in range(50):
            backend = {"qom-type": "memory-backend-file", "id": "m", "size": 4096, "share": True}
            machine.qmp.ok("object-add", **backend, **{"mem-path": f"/proc/{os.getpid()}/fd/{memory.fd}"})
            unix = {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": False}
            machine.qmp.ok("chardev-add", id="c", backend={"type": "socket", "data": unix})
            machine.qmp.ok("device_add", driver="ivshmem-plain", id="p", memdev="m")
            machine.qmp.ok("device_add", driver="ivshmem-doorbell", id="d", chardev="c")
            for name in ("p", "d"):
                machine.qmp.ok("device_del", id=name)
            machine.qmp.ok("system_reset")  # carries out what is pending
            for _ in range(2):
                machine.qmp.event("DEVICE_DELETED")
            machine.qmp.ok("object-del", id="m")
            machine.qmp.ok("chardev-remove", id="c")
            if turn == 0:
                before = len(os.listdir(descriptors))  # noqa: PTH208
        assert len(os.listdir(descriptors)) == before  # noqa: PTH208


def test_the_machine_of_a_server_that_died_still_works(tmp_path: Path) -> None:
    from ivshmem_lab.guests.exchange import Mailbox

    path = tmp_path / "s"
    options = ["-kernel", str(guest_path("pingpong")), "-chardev", f"socket,id=c,path={path}"]
    options += ["-device", "ivshmem-doorbell,chardev=c"]
    with contextlib.ExitStack() as stack:
        end = stack.enter_context(served(path, size_bytes=1 << 20))
        peer = stack.enter_context(Peer.connect(path))
        machine = stack.enter_context(Machine("unicorn", *options))
        machine.says("ready")
        other = peer.wait_for_peer(timeout_s=LIMIT_S)
        mailbox = Mailbox(peer.memory, other)
        mailbox.reply_to = peer.peer_id + 1
        end()
        for _ in range(50):
            peer.ring(other)
            assert peer.wait(timeout_s=LIMIT_S) == 1
        machine.qmp.negotiate()
        machine.qmp.ok("quit")
        assert machine.wait() == 0
        assert machine.errors.count("known peers can still be rung") == 1


def test_a_plain_devices_memory_is_that_of_its_file() -> None:
    with SharedMemory.create_memfd(1 << 20) as memory:
        memory.array()[:4] = [0x78, 0x56, 0x34, 0x12]
        options = [*memfd_backend(memory), "-device", "ivshmem-plain,memdev=m"]
        with Machine("unicorn", "-kernel", str(guest_path("probe")), "-append", "exit=1", *options) as machine:
            machine.says("memory size 1048576 first 12345678 last 00000000")
            assert machine.wait() == EXIT_OK
