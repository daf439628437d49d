"""The command ivshmem-server: its options, its errors, its end."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest
from server_tools import Client

from ivshmem_lab.server.connection import credentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    RunCli = Callable[..., subprocess.CompletedProcess[str]]

LIMIT_S = 20.0
NAME = f"ivshmem-lab-command-{os.getpid()}"
OBJECT = Path("/dev/shm", NAME)


class Foreground:
    """The command with -F -v, and what it prints; ended at the latest with the `with` block."""

    def __init__(self, *options: str) -> None:
        code = "import sys; from ivshmem_lab.server.cli import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "-F", "-v", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self._printed = b""

    def line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._printed:
            assert select.select([self.process.stdout], [], [], LIMIT_S)[0], "it prints nothing"
            more = self.process.stdout.read(4096)
            assert more, "it ended"
            self._printed += more
        line, _, self._printed = self._printed.partition(b"\n")
        return line.decode()

    def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, (self._printed + out).decode(), err.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(LIMIT_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "s"
    assert not (tmp_path / "s").exists()
    assert not OBJECT.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_it_cleanly(number: int, path: Path) -> None:
    with Foreground("-S", str(path), "-M", NAME, "-l", "1M", "-n", "2") as server:
        assert server.line() == f"listening on {path}: shared memory {NAME} of 1M, 2 vectors per peer"
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(OBJECT.stat().st_mode) == 0o600
        assert server.end(number) == (0, "closed\n", "")


def test_joins_and_departures_are_printed(path: Path) -> None:
    with Foreground("--socket", str(path), "--shm-name", NAME, "--size", "4K", "--vectors", "0x1") as server:
        server.line()
        me = f"(pid {os.getpid()}, uid {os.getuid()})"
        with Client(str(path)) as client:
            assert server.line() == f"peer 0 joined {me}"
            assert server.line() == "peer 0 has its whole introduction"
            client.drain()
            assert client.vectors == {0: 1}
            assert os.fstat(client.memory_fd).st_ino == OBJECT.stat().st_ino
        assert server.line() == "peer 0 left: it closed the connection"
        with Client(str(path)) as client:
            client.sock.send(b"x")
            joined = server.line()
            if joined.startswith("peer 1 joined"):  # the byte came after it was accepted
                assert server.line() == "peer 1 has its whole introduction"
                assert server.line() == "peer 1 left: it sent a byte, 0x78; clients only listen"
            else:
                assert joined == f"client refused {me}: it sent a byte, 0x78; clients only listen"
        assert server.end(signal.SIGTERM)[0] == 0


def test_reader_of_its_output_may_go_away(path: Path) -> None:
    with Foreground("-S", str(path), "-M", NAME) as server:
        server.line()
        assert server.process.stdout is not None
        server.process.stdout.close()
        with Client(str(path)) as client:
            while not client.protocol.ready:
                assert select.select([client.sock], [], [], LIMIT_S)[0]
                client.drain()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == b""


def test_without_foreground_it_listens_when_the_command_returns(path: Path, run_cli: RunCli) -> None:
    done = run_cli(["ivshmem-server", "-S", str(path), "-M", NAME, "-n", "3"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with Client(str(path)) as client:
        pid, _ = credentials(client.sock)
        daemon = os.pidfd_open(pid)
        assert os.getsid(pid) != os.getsid(0)
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert select.select([client.sock], [], [], LIMIT_S)[0]
    os.kill(pid, signal.SIGTERM)
    assert select.select([daemon], [], [], LIMIT_S)[0]
    os.close(daemon)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-l", "3M"], "size 3M is not a power of two; the nearest that are: 2M and 4M"),
        (["-l", "2K"], "size 2K is too small: at least one page, 4K"),
        (["-l", "big"], "size 'big' is not a size"),
        (["-n", "2049"], "vectors '2049' is not allowed; a whole number from 0 to 2048"),
        (["-n", "-1"], "vectors '-1' is not allowed"),
        (["-n", "1.5"], "vectors '1.5' is not allowed"),
        (["-n", ""], "vectors '' is not allowed"),
        (["-M", "a/b"], "shared memory name 'a/b' is not allowed"),
        (["-S", "/nonexistent/s"], "no socket can be made at '/nonexistent/s': No such file or directory"),
        (["-S", "x" * 108], "has 108 bytes"),
        (["-q"], "unrecognized arguments: -q"),
        (["-F", "extra"], "unrecognized arguments: extra"),
        (["-n"], "argument -n/--vectors: expected one argument"),
    ],
)
@pytest.mark.parametrize("mode", ["-F", ""])
def test_wrong_call_is_refused_in_one_line(
    options: list[str], words: str, mode: str, path: Path, run_cli: RunCli
) -> None:
    argv = ["ivshmem-server", "-S", str(path), "-M", NAME, *options]
    refused = run_cli([*argv, mode] if mode else argv)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("ivshmem-server: ")
    assert words in refused.stderr


def test_verbose_without_foreground_is_refused(path: Path, run_cli: RunCli) -> None:
    refused = run_cli(["ivshmem-server", "-v", "-S", str(path), "-M", NAME])
    assert refused.returncode == 2
    assert refused.stderr == "ivshmem-server: cannot use verbose in daemon mode; add -F or leave out -v\n"


@pytest.mark.parametrize("mode", ["-F", "--foreground", ""])
def test_taken_name_or_socket_is_a_failure_and_the_holder_is_unharmed(mode: str, path: Path, run_cli: RunCli) -> None:
    modes = [mode] if mode else []
    with Foreground("-S", str(path), "-M", NAME, "-l", "64K") as server:
        server.line()
        name_taken = run_cli(["ivshmem-server", "-S", f"{path}2", "-M", NAME, "-l", "4K", *modes])
        assert name_taken.returncode == 1
        assert f"shared memory '{NAME}' exists already" in name_taken.stderr
        assert f"rm {OBJECT}" in name_taken.stderr
        socket_taken = run_cli(["ivshmem-server", "-S", str(path), "-M", f"{NAME}-2", *modes])
        assert socket_taken.returncode == 1
        assert f"a program listens on '{path}' already" in socket_taken.stderr
        assert OBJECT.stat().st_size == 65536
        assert not Path(f"{path}2").exists()
        assert server.end(signal.SIGTERM) == (0, "closed\n", "")


def test_help_shows_every_option_and_an_example(run_cli: RunCli) -> None:
    for option in ("-h", "--help"):
        shown = run_cli(["ivshmem-server", option])
        assert (shown.returncode, shown.stderr) == (0, "")
        for part in ("-F", "-v", "-S", "-M", "-l", "-n", "example:", "qemu-system-x86_64", "/tmp/ivshmem_socket", "4M"):
            assert part in shown.stdout
        assert "do not use in production" not in shown.stdout.lower()


def test_stale_socket_of_a_killed_server_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Foreground("-S", str(path), "-M", NAME) as server:
        assert server.line().startswith("listening")
        assert server.end(signal.SIGTERM)[0] == 0
