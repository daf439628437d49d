from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ivshmem_lab.lab import reaper

REAPER = [sys.executable, "-I", "-S", reaper.__file__]
SLEEPER = [sys.executable, "-I", "-S", "-c", "print(1, flush=True); import signal; signal.pause()"]


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "lab-x"
    path.mkdir()
    (path / "board.sock").touch()
    return path


@pytest.fixture
def start(directory):
    """Start a reaper for this process; the test closes its pipe."""
    started = []

    def run(token="no such token", parent=None):
        argv = [*REAPER, str(parent or os.getpid()), token, str(directory)]
        started.append(subprocess.Popen(argv, stdin=subprocess.PIPE, bufsize=0, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()


@pytest.fixture
def sleeper():
    """Start processes that wait for ever."""
    started = []

    def run(**variables):
        started.append(subprocess.Popen(SLEEPER, stdout=subprocess.PIPE, env={**os.environ, **variables}))
        assert started[-1].stdout.readline() == b"1\n"
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def tell(process, *lines):
    process.stdin.write("".join(f"{line}\n" for line in lines).encode())


def end(process):
    process.stdin.close()
    assert process.wait(20.0) == 0


def test_at_end_of_file_it_removes_what_is_left_and_nothing_else(start, sleeper, directory, tmp_path):
    left, gone, kept = sleeper(), sleeper(), sleeper()
    paths = [tmp_path / name for name in ("left", "given back")]
    for path in paths:
        path.touch()
    names = [f"ivlab-reaper-{os.getpid()}-{part}" for part in ("left", "given-back")]
    objects = [Path("/dev/shm", name) for name in names]
    for each in objects:
        each.touch()
    try:
        process = start()
        for each in (left, gone):
            tell(process, f"+pid {each.pid} {reaper.start_time(each.pid)}")
        tell(process, f"+path {paths[0]}", f"+path {paths[1]}", f"-path {paths[1]}")
        tell(process, f"+shm /{names[0]}", f"+shm {names[1]}", f"-shm {names[1]}", f"-pid {gone.pid}")
        end(process)
        assert left.wait(20.0) == -signal.SIGKILL
        assert (gone.poll(), kept.poll()) == (None, None)
        assert [path.exists() for path in (*paths, *objects)] == [False, True, False, True]
        assert not directory.exists()
    finally:
        for each in objects:
            each.unlink(missing_ok=True)


def test_a_process_id_that_was_reused_is_left_alone(start, sleeper):
    stranger = sleeper()
    process = start()
    tell(process, f"+pid {stranger.pid} {reaper.start_time(stranger.pid) - 1}")
    end(process)
    assert stranger.poll() is None


def test_a_process_that_was_never_reported_is_found_by_its_token(start, sleeper):
    ours, other = sleeper(**{reaper.TOKEN_VARIABLE: "abc"}), sleeper(**{reaper.TOKEN_VARIABLE: "abcd"})
    end(start(token="abc"))
    assert ours.wait(20.0) == -signal.SIGKILL
    assert other.poll() is None


def test_broken_lines_cost_nothing(start, directory):
    process = start()
    tell(process, "", "+", "+pid", "+pid x y", "-pid z", "nonsense", "+shm", "+path /nonexistent/x", "-path never")
    process.stdin.write(b"+pid 1 \xff")  # cut off in the middle
    end(process)
    assert not directory.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_whole_session_do_not_stop_it(start, sleeper, number):
    left = sleeper()
    process = start()
    wait_until(lambda: ignores(process.pid, number))
    process.send_signal(number)
    tell(process, f"+pid {left.pid} {reaper.start_time(left.pid)}")
    end(process)
    assert left.wait(20.0) == -signal.SIGKILL


def ignores(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("SigIgn:")).split()[1], 16)
    return mask >> (number - 1) & 1


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)


def test_a_forked_child_that_holds_the_pipe_does_not_keep_it_waiting(directory):
    # The lab's process dies; its forked child lives on with a copy of the pipe's end.
    script = f"""
import os, signal, subprocess
reaper = subprocess.Popen({REAPER!r} + [str(os.getpid()), "none", {str(directory)!r}], stdin=subprocess.PIPE)
child = os.fork()
if child:
    print(reaper.pid, child, flush=True)
signal.pause()
"""
    lab = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    reaper_pid, child_pid = map(int, lab.stdout.readline().split())
    ended, child = os.pidfd_open(reaper_pid), os.pidfd_open(child_pid)
    try:
        wait_until(lambda: waits_for_a_process(reaper_pid))
        lab.kill()
        lab.wait()
        assert select.select([ended], [], [], 20.0)[0] == [ended]
        assert not directory.exists()
        assert select.select([child], [], [], 0)[0] == []
    finally:
        signal.pidfd_send_signal(child, signal.SIGKILL)
        select.select([child], [], [], 20.0)
        os.close(ended)
        os.close(child)
        lab.stdout.close()


def waits_for_a_process(pid):
    held = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been closed
            held.append(str(fd.readlink()))
    return "anon_inode:[pidfd]" in held and b") S " in Path(f"/proc/{pid}/stat").read_bytes()


def test_a_lab_that_ended_before_the_reaper_looked_is_cleaned_up(start, directory):
    process = start(parent=os.getpid() + 1)  # not its parent: as if it had been adopted already
    assert process.wait(20.0) == 0
    assert not directory.exists()


def test_the_start_time_of_a_process_with_any_name_is_read(tmp_path):
    odd = tmp_path / "a) R 1 (b"
    odd.symlink_to(sys.executable)
    process = subprocess.Popen([odd, *SLEEPER[1:]], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        uptime_ticks = float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK")
        assert uptime_ticks - 60 * os.sysconf("SC_CLK_TCK") < reaper.start_time(process.pid) <= uptime_ticks
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert reaper.start_time(process.pid) is None
