"""The command ivshmem-client: the lines and commands of QEMU's, and the end of its input."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from client_tools import LIMIT_S, Command, client
from peer_tools import served

from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path

NOTIFIED = "receive notification from peer_id={} vector={}\n"


def ask(path: Path, commands: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run it with these commands on its input, which then ends."""
    return subprocess.run(
        [sys.executable, "-m", "ivshmem_lab.peer.cli", "-S", str(path), *options],
        input=commands,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def joined(path: Path, *options: str) -> Command:
    """Start one, and wait until it is ready for commands and has done one."""
    started = client("-S", str(path), *options)
    started.until("cmd> ")
    started.type("dump\n")
    started.until("cmd> ")
    return started


def test_dump_prints_ourselves_first_then_the_others_as_qemus_client_does(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s"), Peer.connect(tmp_path / "s"):
        done = ask(tmp_path / "s", "dump\n")
    assert (done.returncode, done.stderr) == (0, "")
    pattern = (
        r"listen on server socket \d+\ncmd> "
        r"our_id = 2\n  vector 0 is enabled \(fd=(\d+)\)\n  vector 1 is enabled \(fd=(\d+)\)\n"
        r"peer_id = 0\n  vector 0 is enabled \(fd=(\d+)\)\n  vector 1 is enabled \(fd=(\d+)\)\n"
        r"peer_id = 1\n  vector 0 is enabled \(fd=(\d+)\)\n  vector 1 is enabled \(fd=(\d+)\)\n"
        r"cmd> "
    )
    match = re.fullmatch(pattern, done.stdout)
    assert match is not None, done.stdout
    assert len(set(match.groups())) == 6


@pytest.mark.parametrize(
    ("command", "rung"),
    [
        ("int 0 1", {(0, 1)}),
        ("int 1 all", {(1, 0), (1, 1)}),
        ("int all", {(0, 0), (0, 1), (1, 0), (1, 1)}),
        ("  int   0   0  ", {(0, 0)}),
        ("int 0 0;int 1 1", {(0, 0), (1, 1)}),
        ("int 0 0\rint 0 1\n\n", {(0, 0), (0, 1)}),
        ("int 0 2", set()),
        ("int 7 0", set()),
    ],
)
def test_int_rings_exactly_whom_it_names(command: str, rung: set[tuple[int, int]], tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as a, Peer.connect(tmp_path / "s") as b:
        assert ask(tmp_path / "s", command).returncode == 0
        heard = {(peer.peer_id, vector): peer.wait(vector, timeout_s=0) for peer in (a, b) for vector in (0, 1)}
    assert heard == {line: int(line in rung) for line in heard}


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("int 9 0", "cannot find peer_id = 9"),
        ("int 9 all", "cannot find peer_id = 9"),
        ("int 0 5", "peer_id = 0 has no vector 5; it has 1, counted from 0"),
        ("int", "invalid command, type help"),
        ("int x 0", "invalid command, type help"),
        ("int 0", "invalid command, type help"),
        ("int 0 -1", "invalid command, type help"),
        ("int 0 0 0", "invalid command, type help"),
        ("DUMP", "invalid command, type help"),
        ("\x00\x01", "invalid command, type help"),
    ],
)
def test_wrong_command_is_answered_and_the_next_is_obeyed(command: str, answer: str, tmp_path: Path) -> None:
    with served(tmp_path / "s"):
        done = ask(tmp_path / "s", f"{command}\nint 0 0\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.partition("cmd> ")[2] == f"{answer}\n{NOTIFIED.format(0, 0)}cmd> "


@pytest.mark.parametrize("command", ["help", "?"])
def test_help_names_every_command_and_is_not_invalid(command: str, tmp_path: Path) -> None:
    with served(tmp_path / "s"):
        done = ask(tmp_path / "s", command)
    for part in ("help", "?", "dump", "int P V", "int P all", "int all", "quit"):
        assert part in done.stdout
    assert "invalid" not in done.stdout


def test_quit_ends_it_and_what_follows_is_not_obeyed(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer, joined(tmp_path / "s") as running:
        running.type("int 0 0; quit; int 0 0\n")
        assert running.process.wait(LIMIT_S) == 0
        assert peer.wait(0, timeout_s=0) == 1


def test_end_of_input_ends_it(tmp_path: Path) -> None:
    with served(tmp_path / "s"), joined(tmp_path / "s") as running:
        assert running.rest() == (0, "")


def test_interrupt_is_printed_with_our_own_id_as_qemus_client_does(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as peer, joined(tmp_path / "s") as running:
        peer.ring(1, 1)
        assert running.until("\n") == NOTIFIED.format(1, 1)
        peer.ring(1, 0)
        assert running.until("\n") == NOTIFIED.format(1, 0)


def test_verbose_names_who_comes_and_goes(tmp_path: Path) -> None:
    with served(tmp_path / "s"), joined(tmp_path / "s", "-v") as running:
        with Peer.connect(tmp_path / "s"):
            assert running.line() == "peer_id = 1 has come\n"
        assert running.line() == "peer_id = 1 is gone\n"


def test_server_that_is_gone_is_said_and_found_again(tmp_path: Path) -> None:
    with client("-S", str(tmp_path / "s")) as running:
        assert running.line() == "cannot connect to server, retry in 1 second\n"
        with served(tmp_path / "s"):
            running.until("listen on server socket ")
            running.until("cmd> ")
        assert running.until("disconnected from server\n") == "disconnected from server\n"
        with served(tmp_path / "s", vectors=3):
            running.until("listen on server socket ")
            running.type("dump\n")
            assert "vector 2 is enabled" in running.until("cmd> our_id = 0\n") + running.until("\ncmd> ")
            assert running.rest() == (0, "")


def test_input_that_ends_without_a_server_is_a_failure_not_a_loop(tmp_path: Path) -> None:
    done = ask(tmp_path / "s", "int 0 0\n")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "cannot connect to server, retry in 1 second",
        f"ivshmem-client: the input ended and no ivshmem server answers on '{tmp_path / 's'}'",
    ]


def test_server_that_talks_nonsense_is_named_and_left(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with client("-S", str(tmp_path / "s")) as running:
            sock, _ = listener.accept()
            with sock:
                sock.send((7).to_bytes(8, "little"))
                running.until("version: the server speaks version 7; this client speaks 0\n")
                assert running.line() == "disconnected from server\n"
                assert sock.recv(1) == b""


def test_json_prints_every_line_as_an_object(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as peer:
        done = ask(tmp_path / "s", "dump; int 0 1; int 1 all; int 9 0; int 0 9; bad; help\n", "--json")
        assert peer.wait(1, timeout_s=0) == 1
    assert (done.returncode, done.stderr) == (0, "")
    said: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    events = [each["event"] for each in said]
    assert events == [
        *("connected", "peer came", "introduced", "dump", "rang", "rang", "no such peer", "no such vector"),
        *("invalid command", "help", "interrupt", "interrupt"),
    ]
    by_event = {each["event"]: each for each in said}
    assert by_event["introduced"] == {"event": "introduced", "peer_id": 1, "vectors": 2}
    assert by_event["dump"] == {"event": "dump", "our_id": 1, "vectors": {"1": 2, "0": 2}}
    assert by_event["interrupt"] == {"event": "interrupt", "vector": 1, "count": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-S", "x" * 108], "has 108 bytes"),
        (["--lease", "a b"], "lease name 'a b' is not allowed"),
        (["-q"], "unrecognized arguments: -q"),
        (["-S"], "expected one argument"),
        (["extra"], "unrecognized arguments: extra"),
    ],
)
def test_wrong_call_of_the_client_is_refused_in_one_line(options: list[str], words: str, tmp_path: Path) -> None:
    done = ask(tmp_path / "s", "", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def test_help_of_the_client_has_every_flag_and_an_example(tmp_path: Path) -> None:
    for option in ("-h", "--help"):
        done = ask(tmp_path / "s", "", option)
        assert (done.returncode, done.stderr) == (0, "")
        for part in (
            "-v",
            "-S",
            "--json",
            "--lease",
            "/tmp/ivshmem_socket",
            "int P V",
            "example:",
            "ivshmem-client -S",
        ):
            assert part in done.stdout


def test_reader_of_the_clients_output_may_go_away(tmp_path: Path) -> None:
    with served(tmp_path / "s"), joined(tmp_path / "s") as running:
        assert running.process.stdout is not None
        running.process.stdout.close()
        running.type("dump\n")
        assert running.process.wait(LIMIT_S) == 1
