"""The command ``ivshmem-lab vm`` on labs that ``ivshmem-lab up`` runs, each a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.cli import main
from ivshmem_lab.lab.control import MOST_CLIENTS, MOST_LINE_BYTES, control_path, control_paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

QEMU = pytest.param("qemu", marks=pytest.mark.qemu)
LIMIT_S = 60.0
COMMAND = [sys.executable, "-m", "ivshmem_lab"]
FILE = """\
version: 1
servers: {board: {size: 1M, vectors: 2}}
memories: {frame: {size: 1M}}
"""


class Up:
    """A lab that ``ivshmem-lab up`` runs."""

    def __init__(self, path: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "up", str(path), "--json", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.said = self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, err


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    running: list[Up] = []

    def begin(name: str = "lab", text: str = FILE, *options: str) -> Up:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        running.append(Up(path, *options))
        return running[-1]

    yield begin
    for each in running:
        if each.process.poll() is None:
            each.end()


@pytest.fixture
def vm(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        status = main(["vm", *words])
        return status, *capsys.readouterr()

    return call


def connect(name: str = "lab") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(LIMIT_S)
    sock.connect(str(control_path(name)))
    return sock


@pytest.mark.parametrize("emulator", ["unicorn", QEMU])
def test_a_machine_s_life_from_the_shell(up, vm, emulator):
    up()
    assert vm("ps") == (0, "VM  EMULATOR  GUEST  STATE  PID  DEVICES\n", "")
    start = ["start", "carol", "--emulator", emulator, "--guest", "migrant", "--args", "watch=1"]
    assert vm(*start) == (0, "carol is running\n", "")
    assert vm("console", "carol", "--wait", "migrant: ready\n", "--timeout", "30")[0] == 0
    status, out, _ = vm("plug", "carol", "board")
    assert status == 0
    states = re.findall(r"^ +[\d.]+ ms +(\w+) ", out, re.MULTILINE)
    assert states == ["ready", "connected", "plugged", "seen"]
    assert out.endswith("hot0 in carol, pci.0 slot 0x02: seen, peer 0\n")
    (row,) = json.loads(vm("ps", "--json")[1])
    assert (row["vm"], row["emulator"], row["state"], row["guest"]) == ("carol", emulator, "running", "migrant")
    assert [(each["source"], each["peer_id"]) for each in row["devices"]] == [("board", 0)]
    assert re.search(
        rf"^carol +{emulator} +migrant +running +{row['pid']} +board \(hot0, peer 0\)$", vm("ps")[1], re.MULTILINE
    )
    assert vm("migrate", "carol", "--to", "dave")[0] == 1
    status, out, _ = vm("migrate", "carol", "--to", "dave", "--peers", "replug")
    assert status == 0
    assert re.search(
        r"^carol has moved to dave in \d+ ms, stood still for \d+ ms\nhot0 is peer 1 now$", out, re.MULTILINE
    )
    assert vm("unplug", "dave", "board")[1].endswith("hot0 in dave, pci.0 slot 0x02: absent, peer 1\n")
    assert vm("stop", "dave") == (0, "dave is stopped: exit status 0\n", "")
    assert vm("start", "dave")[1].endswith("\ndave is running\n")
    assert vm("console", "dave", "--wait", "migrant: ready\n", "--timeout", "30")[0] == 0
    assert "migrant: ready\n" in vm("console", "dave", "--read")[1]
    assert vm("stop", "dave", "--remove")[0] == 0
    assert json.loads(vm("ps", "--json")[1]) == []


def test_a_silent_guest_leaves_a_choice(up, vm):
    up()
    assert vm("start", "deaf", "--guest", "pingpong", "--connect", "board")[0] == 0
    assert vm("plug", "deaf", "frame", "--no-wait")[0] == 0
    status, _, err = vm("unplug", "deaf", "frame", "--timeout", "0.05")
    assert status == 1
    assert "has not let hot0 go in 0.05 s" in err
    assert vm("unplug", "deaf", "frame", "--timeout", "0.05", "--give-up")[1].endswith(": plugged\n")
    assert vm("unplug", "deaf", "--id", "hot0", "--timeout", "0.05", "--force")[1].endswith(": absent\n")


def test_wrong_calls_say_what_there_is(up, vm):
    assert vm("ps")[0] == 2
    up()
    for words, said in (
        (["stop", "nobody"], "there is no VM 'nobody' in this lab; there are none"),
        (["plug", "nobody", "board"], "there is no VM 'nobody'"),
        (["start", "carol", "--guest", "nope"], "guest 'nope' is unknown; there are "),
        (["start", "carol", "--connect", "nope"], "there is no server and no memory 'nope'; there are board, frame"),
        (["start", "board"], "the name 'board' is taken (a server)"),
        (["plug", "carol", "board", "--property", "x"], "--property 'x' is no pair; write --property name=value"),
        (["ps", "--lab", "other"], "no lab 'other' runs; there are lab"),
    ):
        status, out, err = vm(*words)
        assert (status, out) == (2, "")
        assert said in err
    assert vm("start", "carol", "--guest", "probe", "--args", "watch=1")[0] == 0
    assert "carol is running already" in vm("start", "carol")[2]
    assert "leave guest out" in vm("start", "carol", "--guest", "probe")[2]
    assert "name what is unplugged: either source or id" in vm("unplug", "carol")[2]
    assert "carol has no such device" in vm("unplug", "carol", "board")[2]


def test_several_labs_are_told_apart(up, vm):
    up("one")
    up("two", FILE, "--name", "second")
    status, _, err = vm("ps")
    assert status == 2
    assert "there are the labs one, second; say --lab NAME" in err
    assert vm("start", "carol", "--lab", "second")[0] == 0
    assert json.loads(vm("ps", "--lab", "one", "--json")[1]) == []
    code, err = up("one").end()
    assert code == 2
    assert "a lab 'one' runs already; end it, or give this one another --name" in err


def test_a_lab_that_was_killed_leaves_no_trace_for_the_next_call(up, vm):
    lab = up()
    assert lab.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert control_path("lab").exists()
    assert "no lab runs; start one" in vm("ps")[2]
    assert not control_path("lab").exists()
    up()
    assert vm("ps")[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_of_a_lab_is_told_to_whom_it_talks_with(up, number):
    lab = up()
    with connect() as sock:
        sock.sendall(b'{"execute": "start", "arguments": {"vm": "carol"}}\n')
        assert b"return" in sock.recv(1 << 16)
        sock.sendall(b'{"execute": "console", "arguments": {"vm": "carol"}}\n')
        code, err = lab.end(number)
        assert (code, err) == (0, "ivshmem-lab up: interrupted; everything is ended\n")
        while sock.recv(1 << 16):
            pass
    assert control_paths() == {}


def test_rubbish_costs_only_who_sends_it(up, vm):
    up()
    with connect() as sock:
        for line in (b"x", b"[]", b"{}", b'{"execute": 1}', b'{"execute": "nope"}', b'{"execute": "ps", "x": 1}'):
            sock.sendall(line + b"\n")
            assert json.loads(sock.recv(1 << 16))["error"]["type"] == "UsageError"
        for arguments in ('{"vm": 1}', '{"vm": "a", "cpu": true}', '{"vm": "a", "bogus": 1}', "[]", '{"cpu": 1}'):
            sock.sendall(f'{{"execute": "start", "arguments": {arguments}}}\n'.encode())
            assert json.loads(sock.recv(1 << 16))["error"]["type"] == "UsageError"
        sock.sendall(b"[" * 50_000 + b"\n")
        assert b"error" in sock.recv(1 << 16)
    with connect() as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"x" * (4 * MOST_LINE_BYTES))
        assert sock.recv(1) == b""
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(connect()) for _ in range(MOST_CLIENTS + 1)]
        assert b"others ask" in crowd[-1].recv(1 << 16)
    assert vm("ps")[0] == 0


def test_a_client_that_dies_in_the_middle_takes_nothing_with_it(up, vm):
    up()
    assert vm("start", "deaf", "--guest", "pingpong", "--connect", "board")[0] == 0
    assert vm("plug", "deaf", "frame", "--no-wait")[0] == 0
    with connect() as sock:
        sock.sendall(b'{"execute": "unplug", "arguments": {"vm": "deaf", "source": "frame", "timeout_s": 0.5}}\n')
        assert b"device_del" in sock.recv(1 << 16)
    while json.loads(vm("ps", "--json")[1])[0]["devices"][1]["state"] != "unplugging":
        pass
    assert vm("unplug", "deaf", "frame", "--timeout", "0.05", "--force")[1].endswith(": absent\n")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a stranger")
def test_a_stranger_is_refused_even_where_it_can_reach_the_socket(up):
    up()
    path = control_path("lab")
    assert [each.stat().st_mode & 0o777 for each in (path, path.parent)] == [0o600, 0o700]
    program = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('up-lab.sock'); print(s.recv(1000).decode())"
    opened = [path.parent, path.parent.parent, path.parent.parent.parent]
    modes = [each.stat().st_mode for each in opened]
    try:
        for each in opened:
            each.chmod(0o755)
        path.chmod(0o666)
        done = subprocess.run(
            ["python3", "-I", "-c", program],
            cwd=path.parent, user=65534, capture_output=True, text=True, check=True, timeout=LIMIT_S,
        )  # fmt: skip
    finally:
        for each, mode in zip(opened, modes, strict=True):
            each.chmod(mode)
    assert "this lab belongs to another user" in done.stdout


def test_a_console_in_a_terminal(up, vm):
    up()
    assert vm("start", "carol", "--guest", "migrant", "--args", "watch=1")[0] == 0
    ours, theirs = pty.openpty()
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + LIMIT_S
        while text not in seen:
            assert select.select([ours], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(ours, 4096)

    try:
        process = subprocess.Popen([*COMMAND, "vm", "console", "carol"], stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        until(b"connected; Ctrl-] leaves")
        until(b"migrant: ready\r\n")
        os.write(ours, b"c")
        until(b"without a device\r\n")
        os.write(ours, b"\x1d")
        assert process.wait(LIMIT_S) == 0
    finally:
        os.close(ours)


def test_help_has_an_example_for_every_command(capsys):
    for command in ("ps", "start", "stop", "plug", "unplug", "console", "migrate"):
        assert main(["vm", command, "--help"]) == 0
        assert f"example: ivshmem-lab vm {command}" in re.sub(r"\s+", " ", capsys.readouterr().out)
