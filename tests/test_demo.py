"""The demonstration: what it counts, prints and draws, and that nothing is left however it ends."""

from __future__ import annotations

import itertools
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ivshmem_lab import Peer
from ivshmem_lab.bench import throughput
from ivshmem_lab.demo.options import DemoOptions
from ivshmem_lab.demo.run import run_demo
from ivshmem_lab.units import MIB

SMALL = ["--no-qemu", "--rounds", "16", "--bytes", "1M"]
COMMAND = [sys.executable, "-m", "ivshmem_lab", "demo"]
LIMIT_S = 30.0
PNG = b"\x89PNG\r\n\x1a\n"


def labs() -> list[Path]:
    return list(Path(os.environ["XDG_RUNTIME_DIR"], "ivshmem-lab").glob("lab-*"))


def wait_until(condition, timeout_s=LIMIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)


def width_and_height(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(PNG)
    return int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")


# What it finds


@pytest.mark.qemu
def test_as_installed_it_does_all_of_it_and_says_so_in_one_object(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_cli(["ivshmem-lab", "demo", "--json"], timeout_s=60)
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert [(peer["name"], peer["emulator"], peer["peer_id"]) for peer in found["peers"]] == [
        ("alice", "unicorn", 1),
        ("bob", "unicorn", 2),
        ("carol", "qemu", 3),
        ("dave", "qemu", 4),
        ("me", "host", 0),
    ]
    ends = [["alice", "bob"], ["carol", "dave"], ["me", "alice"], ["alice", "carol"]]
    assert [path["between"] for path in found["paths"]] == ends
    for path in found["paths"]:
        assert (path["rounds"], path["interrupts_sent"], path["interrupts_received"]) == (2000, 4000, 4000)
        assert (path["bytes_moved"], path["checksum_ok"]) == (throughput.TURNS * 64 * MIB, True)
        assert 0 < path["min_us"] <= path["p50_us"] <= path["p90_us"] <= path["p99_us"] <= path["max_us"]
        assert 0 < path["write_s"] < path["total_s"]
        assert 0 < path["read_s"] < path["total_s"]
        assert path["gbytes_per_s"] in path["gbytes_per_s_runs"]
    assert (found["interrupts_sent"], found["interrupts_received"]) == (16000, 16000)
    assert (found["bytes_moved"], found["checksum_ok"]) == (4 * throughput.TURNS * 64 * MIB, True)
    assert (found["failures"], found["note"]) == ([], None)
    assert found["unicorn_to_qemu_p50"] == pytest.approx(
        found["paths"][0]["p50_us"] / found["paths"][1]["p50_us"], abs=0.001
    )
    circumstances = {"cpu", "cores", "load", "kernel", "python", "unicorn", "qemu", "pinning", "measured_cpu", "clock"}
    assert circumstances < set(found["host"])
    figure = tmp_path / "ivshmem-demo.png"
    assert found["figure"] == str(figure)
    assert width_and_height(figure.read_bytes()) >= (1200, 600)
    assert list(tmp_path.iterdir()) == [figure]


@pytest.mark.qemu
def test_the_report_holds_the_same_as_text(tmp_path) -> None:
    steps: list[str] = []
    report = run_demo(DemoOptions(rounds=16, size_bytes=MIB, figure=tmp_path / "a.svg"), steps.append)
    text, found = report.as_text(), report.as_dict()
    for peer in found["peers"]:
        assert any(
            line.split()[0::1][:1] == [peer["name"]] and f" {peer['peer_id']} " in line for line in text.splitlines()
        )
        assert len(set(peer["stream_peer_ids"])) == {"alice": 9, "bob": 3, "carol": 6, "dave": 3, "me": 1}[peer["name"]]
    for path in found["paths"]:
        line = next(line for line in text.splitlines() if line.startswith(" ↔ ".join(path["between"])))
        assert {f"{path['p50_us']:.1f}", f"{path['p90_us']:.1f}", f"{path['p99_us']:.1f}", "16", "ok"} <= set(
            line.split()
        )
        assert f"{path['gbytes_per_s']:.2f}" in line
    assert "128 interrupts sent, 128 received, 12M moved" in text
    assert f"{report.unicorn_to_qemu:.2f} times that of the QEMU pair" in text
    assert all(line in text for line in report.circumstances)
    assert steps[0] == "measuring the guests' clock"
    assert steps[-1] == "drawing the figure"
    assert "interrupts, turn 8 of 8: carol and dave" in steps
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_without_qemu_it_says_so_with_the_remedy(tmp_path, monkeypatch, capfd) -> None:
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "setpriv").symlink_to(shutil.which("setpriv"))
    environment = {**os.environ, "PATH": str(bin_directory), "PYTHONIOENCODING": "ascii"}
    words = [*COMMAND, *SMALL[1:], "--figure", "a.png"]
    run = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    note = "Real QEMU took no part: qemu-system-x86_64 is not on PATH (Debian, Ubuntu: apt install qemu-system-x86)."
    assert note in run.stdout.splitlines()
    assert "carol" not in run.stdout
    assert "64 interrupts sent, 64 received, 6M moved" in run.stdout
    assert "alice ? bob" in run.stdout  # the best that this terminal can show


def test_on_one_cpu_everything_runs_there_and_it_says_so(tmp_path) -> None:
    code = f"import os, sys; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}}); sys.argv[1:] = {['demo', '--json', *SMALL]}"
    code += "; from ivshmem_lab.cli import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    found = json.loads(run.stdout)
    assert found["host"]["pinning"] == f"everything on CPU {min(os.sched_getaffinity(0))}, the only one"
    assert (found["interrupts_received"], found["checksum_ok"], found["note"]) == (
        64,
        True,
        "Real QEMU was left out, as asked.",
    )


# What is wrong is said


def test_memory_that_somebody_else_writes_is_a_failure_by_name(tmp_path) -> None:
    words = [*COMMAND, "--no-qemu", "--rounds", "8", "--bytes", "32M", "--json"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        vandal = threading.Thread(target=overwrite_the_ring, args=(process,))
        vandal.start()
        out, err = process.communicate(timeout=LIMIT_S)
        vandal.join()
    assert process.returncode == 1
    found = json.loads(out)
    assert found["checksum_ok"] is False
    assert found["interrupts_sent"] == found["interrupts_received"] == 32
    assert "ivshmem-lab demo: alice → bob: checksum 0x" in err
    assert err.splitlines() == [f"ivshmem-lab demo: {failure}" for failure in found["failures"]]


def overwrite_the_ring(process) -> None:
    """Join the demonstration's server, as any program may, and write where its streams lie."""
    wait_until(lambda: any(lab.joinpath("board.sock").exists() for lab in labs()))
    with Peer.connect(labs()[0] / "board.sock") as peer:
        data = peer.memory[MIB + 4096 : 2 * MIB + 4096]
        while peer.connected:
            data[::4096] = 0xA5
            select.select([], [], [], 0.0002)


def test_a_figure_that_cannot_be_written_in_the_end_costs_only_the_figure(tmp_path, capsys) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    report = run_demo(
        DemoOptions(rounds=8, size_bytes=MIB, figure=gone / "a.png", qemu=False),
        lambda text: gone.rmdir() if text == "drawing the figure" else None,
    )
    assert report.as_dict()["figure"] is None
    (failure,) = report.failures
    assert failure == f"the figure could not be written to '{gone / 'a.png'}': No such file or directory"
    assert report.as_dict()["interrupts_received"] == 32


# However it ends, nothing is left


@contextmanager
def on_a_terminal(folder, *words):
    """Run the command with a terminal for its stderr; gives the process and a function that waits for a text there."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [*COMMAND, *words], cwd=folder, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        said = ""

        def says(text: str | None) -> str:
            nonlocal said
            deadline = time.monotonic() + LIMIT_S
            while text is None or text not in said:
                assert select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0], said
                try:
                    data = os.read(ours, 65536).decode()
                except OSError:  # the terminal's other side is closed
                    assert text is None, said
                    break
                said += data
            return said

        with process:
            try:
                yield process, says
            finally:
                process.kill()
    finally:
        os.close(ours)


MOMENTS = [
    ("loading", SMALL),
    ("measuring the guests' clock", SMALL),
    ("starting alice, bob ", SMALL),
    ("interrupts, turn 2 of 8: alice and bob", ["--no-qemu", "--rounds", "40000"]),
    ("interrupts, turn 1 of 8: me and alice", ["--no-qemu", "--rounds", "40000"]),
    ("bytes, turn 1 of 3: alice to bob", ["--no-qemu", "--rounds", "8", "--bytes", "2G"]),
    ("bytes, turn 1 of 3: me to alice", ["--no-qemu", "--rounds", "8", "--bytes", "512M"]),
    ("drawing the figure", SMALL),
    pytest.param("starting alice, bob, carol, dave", [], marks=pytest.mark.qemu),
    pytest.param("interrupts, turn 1 of 8: alice and carol", [], marks=pytest.mark.qemu),
]


@pytest.mark.parametrize(("moment", "words"), MOMENTS)
def test_ctrl_c_ends_it_in_one_line(tmp_path, moment, words) -> None:
    interrupt(tmp_path, moment, words)


def test_ctrl_c_may_come_twice(tmp_path) -> None:
    interrupt(tmp_path, "interrupts, turn 1", SMALL, twice=True)


def interrupt(tmp_path, moment, words, *, twice=False) -> None:
    with on_a_terminal(tmp_path, *words) as (process, says):
        says(moment)
        process.send_signal(signal.SIGINT)
        if twice:
            process.send_signal(signal.SIGINT)
        said = says(None)
        assert process.wait(LIMIT_S) == 130
        assert process.stdout.read() == b""
    assert (
        said.rpartition("\r")[0].rpartition("\r")[2].strip() == "ivshmem-lab demo: interrupted; nothing is left running"
    )
    assert "Traceback" not in said
    assert labs() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        ("starting alice", SMALL),
        ("bytes, turn 1 of 3: alice to bob", ["--no-qemu", "--rounds", "8"]),
        pytest.param("interrupts, turn 2 of 8: carol and dave", [], marks=pytest.mark.qemu),
    ],
)
def test_kill_9_leaves_nothing(tmp_path, moment, words) -> None:
    with on_a_terminal(tmp_path, *words) as (process, says):
        says(moment)
        assert len(labs()) == 1
        process.kill()
        assert process.wait(LIMIT_S) == -signal.SIGKILL
        wait_until(lambda: labs() == [])
    assert list(tmp_path.iterdir()) == []


def test_progress_is_one_line_that_is_gone_at_the_end(tmp_path) -> None:
    with on_a_terminal(tmp_path, *SMALL) as (process, says):
        assert process.stdout.read().startswith(b"One ivshmem server")
        said = says(None)
        assert process.wait(LIMIT_S) == 0
    assert "\n" not in said
    steps = said.split("\r")
    assert [steps[1].strip(), steps[-1], steps[-2].strip()] == ["loading ...", "", ""]
    assert all(len(after) >= len(before.rstrip()) for before, after in itertools.pairwise(steps[:-1]))


def test_quiet_says_nothing_on_the_terminal(tmp_path) -> None:
    with on_a_terminal(tmp_path, *SMALL, "--quiet", "--json") as (process, says):
        assert json.loads(process.stdout.read())["failures"] == []
        assert says(None) == ""
        assert process.wait(LIMIT_S) == 0
