"""The rule that a test leaves nothing behind, tried on tests that do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).with_name("conftest.py")

LEAKY = """
import ctypes, os, socket, subprocess, sys, threading, time
import posix_ipc, pytest

kept = []
go = threading.Event()

@pytest.fixture(scope="module")
def allowed():
    end = os.open("/dev/null", os.O_RDONLY)
    yield
    os.close(end)

def test_clean(allowed):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.environ["XDG_RUNTIME_DIR"] + "/clean")
    os.unlink(os.environ["XDG_RUNTIME_DIR"] + "/clean")
    subprocess.run(["true"], check=True)
    thread = threading.Thread(target=lambda: None)
    thread.start()

def test_shared_directory():
    os.mkdir(os.environ["XDG_RUNTIME_DIR"] + "/ivshmem-lab")

def test_fd():
    kept.append(os.open("/dev/null", os.O_RDONLY))

def test_eventfd():
    kept.append(os.eventfd(0))

def test_thread():
    threading.Thread(target=go.wait, args=(20,)).start()

def test_child():
    kept.append(subprocess.Popen(["sleep", "20"]))

def test_zombie():
    child = os.posix_spawnp("true", ["true"], os.environ)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

def test_orphan():
    started = subprocess.run(["sh", "-c", "setsid sleep 20 >&2 & echo $!"], stdout=subprocess.PIPE, check=True)
    kept.append(int(started.stdout))
    # A process has no environment to be known by until its program runs.
    words = b""
    while not words.startswith(b"sleep"):
        with open(f"/proc/{kept[-1]}/cmdline", "rb") as line:
            words = line.read()

def test_shared_memory():
    posix_ipc.SharedMemory("/ivshmem-test-NAME", posix_ipc.O_CREX, size=4096).close_fd()

def test_socket():
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.environ["XDG_RUNTIME_DIR"] + "/ivshmem-lab/left")

def test_end_of_the_leaks():
    posix_ipc.unlink_shared_memory("/ivshmem-test-NAME")
    go.set()
    _, _, child, orphan = kept
    child.kill()
    child.wait()
    os.kill(orphan, 9)
"""

MARKED = """
import pytest

@pytest.mark.qemu
def test_with_qemu():
    pass

@pytest.mark.browser
def test_with_browser():
    pass
"""


def run_pytest(directory: Path, text: str, **environment: str) -> tuple[str, dict[str, set[str]]]:
    """Run tests under a copy of our conftest; return what pytest said and the outcomes of each test."""
    tests = directory / "tests"
    tests.mkdir()
    (tests / "conftest.py").write_text(CONFTEST.read_text().replace("SETTLE_S = 2.0", "SETTLE_S = 0.1"))
    shutil.copy(CONFTEST.parent.parent / "pyproject.toml", directory)
    (tests / "test_it.py").write_text(text)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "tests"],
        cwd=directory,
        env={**os.environ, "IVSHMEM_LAB_REQUIRE": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    outcomes: dict[str, set[str]] = {}
    for outcome, test in re.findall(r"^(PASSED|FAILED|ERROR) \S+::(\w+)", run.stdout, re.MULTILINE):
        outcomes.setdefault(test, set()).add(outcome)
    for reason in re.findall(r"^SKIPPED .*: (.*)$", run.stdout, re.MULTILINE):
        outcomes.setdefault(reason, set()).add("SKIPPED")
    return run.stdout + run.stderr, outcomes


def test_a_test_that_leaves_something_behind_fails(tmp_path: Path) -> None:
    said, outcomes = run_pytest(tmp_path, LEAKY.replace("NAME", str(os.getpid())))
    clean = {"test_clean", "test_shared_directory", "test_end_of_the_leaks"}
    leaky = set(re.findall(r"def (test_\w+)", LEAKY)) - clean
    # The last test is also where the run as a whole is judged: the socket is still there.
    assert {test for test, seen in outcomes.items() if "ERROR" in seen} == leaky | {"test_end_of_the_leaks"}, said
    assert all("PASSED" in outcomes[test] for test in clean | leaky), said
    for kind in (
        "files: anon_inode:[eventfd]",
        "threads: <Thread",
        "processes: sleep",
        "true, dead but not waited for",
        "ivshmem-test-",
        "/left",
    ):
        assert kind in said


def test_without_its_program_a_marked_test_is_skipped(tmp_path: Path) -> None:
    said, outcomes = run_pytest(tmp_path, MARKED, PATH=str(tmp_path))
    expected = {"qemu-system-x86_64 is not on PATH": {"SKIPPED"}, "chromium is not on PATH": {"SKIPPED"}}
    assert outcomes == expected, said


def test_without_a_required_program_a_marked_test_fails(tmp_path: Path) -> None:
    said, outcomes = run_pytest(tmp_path, MARKED, PATH=str(tmp_path), IVSHMEM_LAB_REQUIRE="qemu,chromium")
    assert {test: "PASSED" in seen for test, seen in outcomes.items()} == {
        "test_with_qemu": False,
        "test_with_browser": False,
    }, said


def test_a_misspelt_requirement_is_refused(tmp_path: Path) -> None:
    said, outcomes = run_pytest(tmp_path, MARKED, IVSHMEM_LAB_REQUIRE="quemu")
    assert "IVSHMEM_LAB_REQUIRE names ['quemu']; it may name ['chromium', 'qemu']" in said
    assert outcomes == {}
