"""What is left when the process that holds a lab ends without closing it: nothing."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import atexit, json, os, signal, sys
from ivshmem_lab import Lab
atexit.register(lambda: print("closed:", lab.closed, file=sys.stderr))  # runs after the lab's own
lab = Lab()
board = lab.server("board")
vm = lab.vm("alice", connect=board, emulator=sys.argv[1])
me = lab.peer("me", connect=board)
lab.start()
vm.wait_text("ready", 30)
print(json.dumps({"pids": [vm.pid, lab.guard.pid], "directory": str(lab.directory)}), flush=True)
"""

ENDS = {
    "by kill -9": ("signal.pause()", signal.SIGKILL, -signal.SIGKILL),
    "by ctrl-c": ("signal.pause()", signal.SIGINT, -signal.SIGINT),
    "by sigterm": ("signal.pause()", signal.SIGTERM, -signal.SIGTERM),
    "by its end without close": ("", None, 0),
    "by an error": ("raise SystemExit(3)", None, 3),
    "by os._exit": ("os._exit(4)", None, 4),
    "by kill -9 of the group": ("signal.pause()", "group", -signal.SIGKILL),
}


@pytest.fixture(params=["unicorn", pytest.param("qemu", marks=pytest.mark.qemu)])
def emulator(request):
    return request.param


def ended(pidfds, timeout_s=20.0):
    """Wait until all have ended."""
    deadline = time.monotonic() + timeout_s
    return all(select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0] for pidfd in pidfds)


@pytest.mark.parametrize("end", ENDS)
def test_a_lab_whose_process_ends_leaves_nothing(emulator, end):
    tail, number, status = ENDS[end]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + tail, emulator],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        made = json.loads(process.stdout.readline())
        pidfds = [os.pidfd_open(pid) for pid in made["pids"]] if number else []
        try:
            if number == "group":
                os.killpg(process.pid, signal.SIGKILL)
            elif number:
                process.send_signal(number)
            assert process.wait(20.0) == status
            assert ended(pidfds)
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
        said = process.stderr.read().decode()
    wait_until(lambda: not Path(made["directory"]).exists() and not any(map(alive, made["pids"])))
    assert "never" not in said  # "exception was never retrieved", "coroutine was never awaited"
    assert ("closed: True" in said) == (end in {"by ctrl-c", "by its end without close", "by an error"})
    assert ("Traceback" in said) == (end == "by ctrl-c")  # python's own, for the KeyboardInterrupt


def alive(pid):
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def wait_until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.005)


DIE = "lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
MOMENTS = {
    "before the machine is reported": f"vm._vm._on_spawn = {DIE}",
    "when its monitor is to be connected": f"vm._vm._monitor.connect = {DIE}",
    "when it is paused": f"vm._vm.cont = {DIE}",
    # Then only the token in its environment can tell that it is ours.
    "before it is reported, where there is no setpriv": (
        f"import ivshmem_lab.vm.process as p; p.death_signal_launcher = tuple; vm._vm._on_spawn = {DIE}"
    ),
}


@pytest.mark.parametrize("connect", ["board", "None"])  # without its server a machine that is left ends by itself
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_in_the_middle_of_the_start_leaves_nothing(emulator, moment, connect):
    name = f"m{os.getpid()}-{time.monotonic_ns()}"
    script = SCRIPT.replace("lab.start()", f"print(lab.directory, flush=True); {MOMENTS[moment]}; lab.start()")
    script = script.replace('"alice", connect=board', f'"{name}", connect={connect}')
    with subprocess.Popen([sys.executable, "-c", script, emulator], stdout=subprocess.PIPE) as process:
        directory = process.stdout.readline().decode().strip()
        assert process.wait(20.0) == -signal.SIGKILL
    wait_until(lambda: not Path(directory).exists() and not processes_that_name(name))


def processes_that_name(text):
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if alive(entry.name) and text.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found
