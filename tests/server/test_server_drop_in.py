"""The command ivshmem-server beyond its socket: pid file, memory of every kind, who may join, control socket."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_tools import LIMIT_S, Foreground
from server_tools import Client

from ivshmem_lab.errors import UsageError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.options import parse_arguments
from ivshmem_lab.server.policy import Credentials, Rule
from ivshmem_lab.trace import read_trace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    RunCli = Callable[..., subprocess.CompletedProcess[str]]

NAME = f"ivshmem-lab-drop-in-{os.getpid()}"
OBJECT = Path("/dev/shm", NAME)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "s"
    assert not (tmp_path / "s").exists()
    assert not OBJECT.exists()


def introduced(path: Path) -> Client:
    """Join, and read until the memory has come."""
    client = Client(str(path))
    while not client.protocol.ready:
        assert select.select([client.sock], [], [], LIMIT_S)[0]
        client.drain()
    return client


def end_of(pid: int, number: int = signal.SIGTERM) -> None:
    """End a process that is not our child, and wait for it."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, number)
        assert select.select([process], [], [], LIMIT_S)[0]
    finally:
        os.close(process)


# The daemon and its pid file


def test_daemon_writes_its_pid_and_removes_the_file_at_its_end(path: Path, run_cli: RunCli) -> None:
    pid_file = path.with_name("pid")
    done = run_cli(["ivshmem-server", "-S", str(path), "-M", NAME, "-p", str(pid_file)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with introduced(path) as client:
        assert int(pid_file.read_text()) == Credentials.of(client.sock).pid
    second = run_cli(["ivshmem-server", "-S", f"{path}2", "-M", f"{NAME}-2", "-p", str(pid_file)])
    assert second.returncode == 1
    assert f"is that of process {pid_file.read_text().strip()}, which runs" in second.stderr
    end_of(int(pid_file.read_text()))
    assert not pid_file.exists()


def test_pid_file_of_a_dead_server_is_overwritten(path: Path, run_cli: RunCli) -> None:
    pid_file = path.with_name("pid")
    pid_file.write_text("999999999\nand more")
    assert run_cli(["ivshmem-server", "-S", str(path), "-M", NAME, "-p", str(pid_file)]).returncode == 0
    with introduced(path) as client:
        assert pid_file.read_text() == f"{Credentials.of(client.sock).pid}\n"
    end_of(int(pid_file.read_text()))


def test_foreground_writes_no_pid_file(path: Path) -> None:
    with Foreground("-S", str(path), "-M", NAME, "-p", str(path.with_name("pid"))) as server:
        server.line()
        assert not path.with_name("pid").exists()
        assert server.end(signal.SIGTERM)[0] == 0


def test_pid_file_that_cannot_be_written_is_a_wrong_call(path: Path, run_cli: RunCli) -> None:
    done = run_cli(["ivshmem-server", "-S", str(path), "-M", NAME, "-p", "/nonexistent/pid"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "the pid file '/nonexistent/pid' cannot be written" in done.stderr


# The memory


def memory_of(client: Client) -> tuple[str, int]:
    """Name the memory that a client got, and its size."""
    return os.readlink(f"/proc/self/fd/{client.memory_fd}"), os.fstat(client.memory_fd).st_size  # noqa: PTH115


def test_memfd_of_4g_is_4g_and_sealed(path: Path) -> None:
    with Foreground("-S", str(path), "--memfd", "-l", "4G") as server:
        assert "shared memory ivshmem of 4G" in server.line()
        with introduced(path) as client:
            name, size_bytes = memory_of(client)
            assert name.startswith("/memfd:")
            assert size_bytes == 4 << 30
            seals = fcntl.fcntl(client.memory_fd, fcntl.F_GET_SEALS)
            assert seals & (fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW) == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def test_memory_in_a_directory_has_no_name_there(path: Path, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    with Foreground("-S", str(path), "-m", str(tmp_path / "pages"), "-l", "64K") as server:
        server.line()
        assert list((tmp_path / "pages").iterdir()) == []
        with introduced(path) as client:
            name, size_bytes = memory_of(client)
            assert name.startswith(str(tmp_path / "pages"))
            assert size_bytes == 65536


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [
        ("4M", 4 << 20),
        ("4194304", 4 << 20),
        ("0x400000", 4 << 20),
        ("0.5M", 512 << 10),
        ("2G", 2 << 30),
        ("4G", 4 << 30),
    ],
)
def test_sizes_are_what_was_asked_for(size: str, size_bytes: int) -> None:
    assert parse_arguments(["-l", size]).size_bytes == size_bytes


def test_3g_is_refused_with_the_nearest_and_the_help_says_why(run_cli: RunCli) -> None:
    with pytest.raises(UsageError, match="3G is not a power of two; the nearest that are: 2G and 4G"):
        parse_arguments(["-l", "3G"])
    assert "this one refuses 3M" in run_cli(["ivshmem-server", "-h"]).stdout


@pytest.mark.parametrize(("text", "vectors"), [("16", 16), ("0x10", 16), ("010", 8), ("0", 0), ("2048", 2048)])
def test_vectors_are_read_as_c_reads_numbers(text: str, vectors: int) -> None:
    assert parse_arguments(["-n", text]).vectors == vectors


def test_memory_of_a_killed_server_is_gone_on_with_untouched(path: Path) -> None:
    with Foreground("-S", str(path), "-M", NAME, "-l", "64K") as server:
        server.line()
        with introduced(path) as client:
            os.pwrite(client.memory_fd, b"alive", 100)
            server.process.kill()
            server.process.wait(LIMIT_S)
            assert OBJECT.stat().st_size == 65536
            with Foreground("-S", str(path), "-M", NAME, "-l", "64K", "--keep-memory") as second:
                second.line()
                with introduced(path) as newcomer:
                    assert os.pread(newcomer.memory_fd, 5, 100) == b"alive"
                    assert os.path.samestat(os.fstat(newcomer.memory_fd), os.fstat(client.memory_fd))
                assert second.end(signal.SIGTERM)[0] == 0
    assert OBJECT.exists()
    OBJECT.unlink()


def test_memory_that_exists_is_refused_and_what_can_be_done_is_said(path: Path, run_cli: RunCli) -> None:
    with SharedMemory.create_posix(NAME, 65536) as left:
        other_size = run_cli(["ivshmem-server", "-F", "-S", str(path), "-M", NAME, "-l", "4K", "--keep-memory"])
        assert other_size.returncode == 2
        assert "has 64K, not 4K; ask for -l 64K: it may be in use, and is not resized" in other_size.stderr
        refused = run_cli(["ivshmem-server", "-F", "-S", str(path), "-M", NAME, "-l", "64K"])
        assert refused.returncode == 1
        assert f"shared memory '{NAME}' exists already" in refused.stderr
        assert f"rm {OBJECT}" in refused.stderr
        assert "--keep-memory" in refused.stderr
        assert OBJECT.stat().st_size == 65536
        left.unlink()


def test_empty_memory_is_refused_by_name(path: Path, run_cli: RunCli) -> None:
    OBJECT.touch(mode=0o600)
    refused = run_cli(["ivshmem-server", "-F", "-S", str(path), "-M", NAME, "--keep-memory"])
    assert refused.returncode == 1
    assert f"shared memory '{NAME}' has size 0" in refused.stderr
    OBJECT.unlink()


@pytest.mark.parametrize("keep", [["--keep-memory"], []])
def test_two_servers_on_one_name_are_refused_even_if_peers_of_a_dead_one_are_there(
    keep: list[str], path: Path, run_cli: RunCli
) -> None:
    with Foreground("-S", str(path), "-M", NAME, "-l", "64K") as server:
        server.line()
        with introduced(path):
            refused = run_cli(["ivshmem-server", "-F", "-S", f"{path}2", "-M", NAME, "-l", "64K", *keep])
        assert refused.returncode == 1
        assert f"shared memory '{NAME}' belongs to a server that is running" in refused.stderr
        assert OBJECT.stat().st_size == 65536


# Who may join


def test_options_of_admission_become_a_policy() -> None:
    me = os.getuid()
    assert parse_arguments([]).policy.uids is None
    assert parse_arguments([]).policy.socket_mode == 0o600
    policy = parse_arguments(
        ["--allow-uid", "4001", "--allow-uid", "root", "--allow-gid", "4002", "--max-peers-per-uid", "3"]
    ).policy
    assert (policy.uids, policy.gids, policy.peers_per_uid) == ({4001, 0, me}, {4002}, 3)
    assert policy.socket_mode == 0o666
    observers = parse_arguments(["--observer-uid", "4003", "--socket-mode", "660"]).policy
    assert observers.uids == {4003, me}
    assert observers.rules == (Rule("observer", uid=4003),)
    assert observers.socket_mode == 0o660


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--allow-uid", "nobody-of-that-name"], "user 'nobody-of-that-name' is not known here"),
        (["--allow-gid", "-3"], "gid '-3' is not allowed"),
        (["--max-peers-per-uid", "0"], "peers per uid '0' is not allowed"),
        (["--socket-mode", "999"], "socket mode '999' is not allowed"),
        (["--queue-limit", "none"], "queue limit 'none' is not allowed"),
        (["--lease-hold", "-1"], "lease hold '-1' is not allowed"),
        (["--lease-hold", "nan"], "lease hold 'nan' is not allowed"),
        (["--fault", "rain"], "fault 'rain' is not known; there are delay, "),
        (["--json"], "--json needs something that reports"),
        (["--memfd", "--keep-memory"], "only memory with a name can be kept"),
        (["--memfd", "-m", "/tmp"], "not allowed with argument"),
        (["--control", "x" * 108], "has 108 bytes"),
    ],
)
def test_wrong_option_is_refused_by_name(options: list[str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_arguments(options)
    assert words in str(refused.value)


def test_limit_of_peers_per_uid_is_kept(path: Path) -> None:
    with Foreground("-S", str(path), "-M", NAME, "--max-peers-per-uid", "1") as server:
        server.line()
        with introduced(path), Client(str(path)):
            while "client refused" not in (line := server.line()):
                pass
            assert f"uid {os.getuid()} has 1 peers already; 1 are allowed" in line


def test_observer_gets_memory_that_it_cannot_write(path: Path) -> None:
    with Foreground("-S", str(path), "--memfd", "-n", "2", "--observer-uid", str(os.getuid())) as server:
        server.line()
        with introduced(path) as observer:
            assert observer.vectors == {}
            assert fcntl.fcntl(observer.memory_fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(observer.memory_fd, b"x")


# Seeing it


def test_status_is_told_over_the_control_socket(path: Path, run_cli: RunCli) -> None:
    control = path.with_name("control")
    with Foreground("-S", str(path), "-M", NAME, "-l", "64K", "-n", "2", "--control", str(control)) as server:
        server.line()
        assert stat.S_IMODE(control.stat().st_mode) == 0o600
        with introduced(path):
            assert "introduction" in [server.line(), server.line()][1]
            told = run_cli(["ivshmem-server", "--status", str(control), "--json"])
            shown = run_cli(["ivshmem-server", "--status", str(control)])
        assert server.end(signal.SIGTERM)[0] == 0
    assert (told.returncode, told.stderr) == (0, "")
    status: dict[str, Any] = json.loads(told.stdout)
    assert status["vectors"] == 2
    assert [(peer["id"], peer["pid"], peer["role"]) for peer in status["peers"]] == [(0, os.getpid(), "peer")]
    assert (status["counters"]["joins"], status["counters"]["messages"]) == (1, 5)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"memory {NAME} of 64K (posix), 2 vectors per peer" in shown.stdout
    assert "joins 1, leaves 0, messages 5" in shown.stdout
    assert str(os.getpid()) in shown.stdout.splitlines()[-1]
    assert not control.exists()


def test_status_of_nobody_or_of_something_else_is_a_failure(path: Path, run_cli: RunCli) -> None:
    gone = run_cli(["ivshmem-server", "--status", str(path), "--json"])
    assert (gone.returncode, gone.stdout) == (1, "")
    assert f"no server answers on '{path}': No such file" in gone.stderr
    with Foreground("-S", str(path), "-M", NAME) as server:
        server.line()
        wrong = run_cli(["ivshmem-server", "--status", str(path)])
    assert wrong.returncode == 1
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "answer", [b"hello\n", b"[]\n", b'{"return": 5}\n', b'{"return": {"memory": 5}}\n', b"\xff\n", b""]
)
def test_status_that_is_no_status_is_named(answer: bytes, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c"))
        listener.listen()
        asking = subprocess.Popen(
            [sys.executable, "-m", "ivshmem_lab.server.cli", "--status", str(tmp_path / "c")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        sock, _ = listener.accept()
        with sock:
            assert sock.recv(100) == b'{"execute": "status"}\n'
            sock.send(answer)
        out, err = asking.communicate(timeout=LIMIT_S)
    assert (asking.returncode, out, err.count("\n")) == (1, "", 1)
    assert "is not the control socket of an ivshmem-server" in err


def test_events_are_printed_as_json_lines(path: Path) -> None:
    with Foreground("-S", str(path), "-M", NAME, "--json") as server:
        started = json.loads(server.line())
        assert (started["event"], started["path"]) == ("ServerStarted", str(path))
        assert started["peers_allowed"] > 0
        with introduced(path):
            joined = json.loads(server.line())
            assert joined == {"event": "PeerJoined", "peer_id": 0, "pid": os.getpid(), "uid": os.getuid()}
            assert json.loads(server.line()) == {"event": "PeerSettled", "peer_id": 0}
        assert json.loads(server.line())["event"] == "PeerDeparted"
        status, rest, _ = server.end(signal.SIGTERM)
        assert (status, json.loads(rest)) == (0, {"event": "ServerEnded"})


def test_trace_holds_every_message_of_the_server(path: Path) -> None:
    record = path.with_name("trace.jsonl")
    with Foreground("-S", str(path), "-M", NAME, "-l", "64K", "-n", "2", "--trace", str(record)) as server:
        server.line()
        with introduced(path):
            assert "introduction" in [server.line(), server.line()][1]
        assert "left" in server.line()
        assert server.end(signal.SIGTERM)[0] == 0
    trace = read_trace(record)
    assert (trace.vectors, trace.memory_bytes, trace.truncated) == (2, 65536, False)
    said = [(message.value, message.has_fd) for message in trace.conversation(0)]
    assert said == [(0, False), (0, False), (-1, True), (0, True), (0, True)]


def test_trace_that_cannot_be_written_is_a_wrong_call(path: Path, run_cli: RunCli) -> None:
    done = run_cli(["ivshmem-server", "-F", "-S", str(path), "-M", NAME, "--trace", "/nonexistent/t"])
    assert done.returncode == 2
    assert "the trace '/nonexistent/t' cannot be written" in done.stderr


def test_full_disk_ends_the_trace_and_not_the_server(path: Path) -> None:
    with Foreground("-S", str(path), "-M", NAME, "--trace", "/dev/full") as server:
        server.line()
        with introduced(path):
            assert server.line().startswith("peer 0 joined")
            assert "introduction" in server.line()
            status, _, err = server.end(signal.SIGTERM)
    assert status == 0
    assert err == "ivshmem-server: the trace '/dev/full' ends here: No space left on device\n"


def test_faults_are_listed_and_injected(path: Path, run_cli: RunCli) -> None:
    listed = run_cli(["ivshmem-server", "--faults"])
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "\nwrong-version  [peer, index, version]\n" in listed.stdout
    with Foreground(
        "-S", str(path), "-M", NAME, "--fault", "wrong-version:version=3", "--fault", "churn:rounds=2"
    ) as server:
        for expected in (
            "listening",
            "peer 0 joined",
            "peer 0 has",
            "peer 0 left",
            "peer 1 joined",
            "peer 1 has",
            "peer 1 left",
        ):
            assert server.line().startswith(expected)
        with Client(str(path)) as client:
            assert client.sock.fileno() >= 0
            assert select.select([client.sock], [], [], LIMIT_S)[0]
            assert client.sock.recv(8) == (3).to_bytes(8, "little")
