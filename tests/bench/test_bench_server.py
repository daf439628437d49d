"""The server's bench counts every message, in turns with another program, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.bench.churn import bench_churn
from ivshmem_lab.bench.process import cpu_seconds
from ivshmem_lab.bench.server import bench_server, main
from ivshmem_lab.errors import ServerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = {
    *("peers", "vectors", "complete", "messages_expected", "messages_received", "lost"),
    *("seconds", "server_cpu_seconds", "server_rss_mb"),
}


@pytest.fixture(autouse=True)
def _no_memory_is_left() -> Iterator[None]:
    yield
    assert list(Path("/dev/shm").glob("ivbench-*")) == []
    assert list(Path("/tmp").glob("ivbench-*")) == []


def program(path: Path, *lines: str) -> str:
    """Write a program in Python; the last line may run our server."""
    path.write_text("\n".join([f"#!{sys.executable}", f"import os, sys; sys.path[:0] = {sys.path!r}", *lines]))
    path.chmod(0o755)
    return str(path)


OURS = "from ivshmem_lab.server.cli import main; sys.exit(main())"


@pytest.mark.parametrize(("peers", "vectors"), [(1, 1), (5, 0), (16, 4), (100, 1)])
def test_everybody_joins_and_nothing_is_lost(peers: int, vectors: int) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    result = bench_server(peers, vectors)
    expected = peers * (3 + peers * vectors)
    assert result.keys() >= KEYS
    assert (result["peers"], result["vectors"], result["complete"], result["lost"]) == (peers, vectors, peers, 0)
    assert (result["messages_expected"], result["messages_received"]) == (expected, expected)
    assert 0 < result["server_cpu_seconds"] < 10
    assert 0 < result["seconds"] < 10
    assert 5 < result["server_rss_mb"] < 500
    assert "against" not in result
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limit


def test_another_program_is_measured_in_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    other = program(tmp_path / "other", f"open({str(log)!r}, 'a').write(sys.argv[-1] + ' ')", OURS)
    result = bench_server(8, 2, other, rounds=2)
    assert result["against"].keys() >= KEYS | {"program"}
    assert (result["against"]["complete"], result["against"]["lost"], result["complete"]) == (8, 0, 8)
    assert result["against"]["program"] == other
    assert result["rounds"] == 2
    assert log.read_text() == "2 2 "


def test_server_behind_a_script_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script"
    server = program(tmp_path / "server", OURS)
    script.write_text(f'#!/bin/sh\n{server} "$@" &\ntrap "kill $!; wait $!" TERM\nwait $!\n')
    script.chmod(0o755)
    result = bench_server(8, 2, str(script), rounds=1)
    assert result["against"]["lost"] == 0
    assert result["against"]["server_rss_mb"] > 5  # the server's: a shell has less
    assert result["against"]["server_cpu_seconds"] > 0


def test_server_that_loses_messages_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ivshmem_lab.bench.server.STALL_S", 0.3)
    spoil = "sys.argv += ['--fault', 'drop:peer=3,index=5', '--fault', 'no-fd:peer=2,index=4']"
    result = bench_server(6, 2, program(tmp_path / "lossy", spoil, OURS), rounds=1)["against"]
    assert (result["messages_expected"] - result["messages_received"], result["lost"], result["complete"]) == (1, 1, 4)


def test_server_that_dies_is_told_from_one_that_lives(tmp_path: Path) -> None:
    die = "import ivshmem_lab.server.roster as r; r.Roster.settle = lambda *a: os.kill(os.getpid(), 9)  # no clean-up either"
    result = bench_server(6, 1, program(tmp_path / "mortal", die, OURS), rounds=1)
    assert (result["complete"], result["server_survived"]) == (6, True)
    assert result["against"]["server_survived"] is False
    assert result["against"]["lost"] > 0


def test_program_that_does_not_listen_is_an_error_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"does not listen \(exit status 3\): no thanks"):
        bench_server(2, 1, program(tmp_path / "no", "print('no thanks', flush=True); sys.exit(3)"))


@pytest.mark.parametrize(
    ("peers", "vectors", "against", "words"),
    [
        (0, 1, None, "0 peers with 1 vectors are not allowed"),
        (1, -1, None, "1 peers with -1 vectors are not allowed"),
        (1, 1, "/nonexistent/server", "program '/nonexistent/server' is not there"),
    ],
)
def test_wrong_measurement_is_refused(peers: int, vectors: int, against: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        bench_server(peers, vectors, against)


def test_command_prints_json_or_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = program(tmp_path / "other", OURS)
    assert main(["--peers", "4", "--vectors", "2", "--against", other, "--rounds", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["peers"], printed["lost"], printed["against"]["lost"]) == (4, 0, 0)
    assert main(["--peers", "4"]) == 0
    assert "server_cpu_seconds" in capsys.readouterr().out
    assert main(["--peers", "many"]) == 2
    assert "invalid int value: 'many'" in capsys.readouterr().err
    assert main(["--peers", "0"]) == 2
    assert main(["--help"]) == 0
    assert "example:" in capsys.readouterr().out


def test_cpu_time_is_that_of_the_process() -> None:
    before = cpu_seconds(os.getpid())
    began = time.process_time()
    while time.process_time() - began < 0.05:
        pass
    assert 0.03 < cpu_seconds(os.getpid()) - before < 1
    assert cpu_seconds(2**22 + 1) == 0.0


def test_a_server_does_not_grow_while_peers_come_and_go(run_cli) -> None:
    result = run_cli(["ivshmem-lab", "bench", "server", "--cycles", "500", "--vectors", "3", "--json"])
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["cycles"], told["complete"]) == (500, 500)
    assert told["server_fds"][0] == told["server_fds"][1] > 0
    assert told["ids_used"] == 500
    assert told["grown"] is False


def test_a_server_that_keeps_descriptors_is_found_out(tmp_path: Path) -> None:
    keep = "import ivshmem_lab.server.packet as p; p.SharedFd.__del__ = lambda self: None"
    result = bench_churn(50, 1, program(tmp_path / "leaking", keep, OURS))
    assert (result["grown"], result["against"]["grown"], result["against"]["lost"]) == (False, True, 0)
    before, after = result["against"]["server_fds"]
    assert after - before == 44  # the first look is after six of fifty


def test_too_few_cycles_are_refused(run_cli) -> None:
    result = run_cli(["ivshmem-lab", "bench", "server", "--cycles", "9"])
    assert (result.returncode, result.stdout) == (2, "")
    assert "9 cycles are not allowed; at least 10" in result.stderr
