"""The process that cleans up after a lab that could not do it itself. Standard library only.

Run as ``python -I -S reaper.py LAB_PID TOKEN DIRECTORY`` with a pipe as standard input and in a
session of its own. The lab writes what it has made and what is gone again, one per line::

    +pid N STARTTIME    -pid N       a process (its start time is field 22 of /proc/N/stat)
    +path P             -path P      a file, a socket or a named pipe
    +shm NAME           -shm NAME    an object in /dev/shm

At end-of-file, or when the lab's process ends while a forked child still holds the pipe, what is
left is removed: processes by SIGKILL (only where the start time matches: a process id may have
been reused), names by unlink, and the lab's directory with all that is in it. A process that was
started in the lab's last moment and never reported has TOKEN in its environment.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from pathlib import Path

LAST_LOOKS, LAST_LOOK_S = 50, 0.1
TOKEN_VARIABLE = "IVSHMEM_LAB_TOKEN"


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot (proc(5), ``stat`` field 22); None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # Field 2 is the program's name in parentheses and may hold anything, parentheses and blanks too.
    return int(fields[fields.rindex(b")") + 2 :].split()[19])


class Inventory:
    """What the lab has made and not yet removed."""

    def __init__(self) -> None:
        self.processes: dict[int, int] = {}
        self.paths: set[str] = set()
        self.shm_names: set[str] = set()

    def note(self, line: str) -> None:
        """Take in one line of the lab; a broken last line (the lab died writing it) counts for nothing."""
        action, _, what = line.partition(" ")
        with contextlib.suppress(ValueError):
            if action == "+pid":
                pid, started = what.split()
                self.processes[int(pid)] = int(started)
            elif action == "-pid":
                self.processes.pop(int(what), None)
        names = {"path": self.paths, "shm": self.shm_names}.get(action[1:])
        if names is not None and action[0] == "+":
            names.add(what)
        elif names is not None:
            names.discard(what)

    def remove(self, token: str, directory: str) -> None:
        """End and unlink all of it."""
        for pid, started in [*self.processes.items(), *_processes_with(token)]:
            _kill(pid, started)
        for path in [*self.paths, *(f"/dev/shm/{name.lstrip('/')}" for name in self.shm_names)]:
            with contextlib.suppress(OSError):
                Path(path).unlink()
        shutil.rmtree(directory, ignore_errors=True)


def _processes_with(token: str) -> list[tuple[int, int]]:
    """Find the processes that have the token in their environment, with their start times."""
    mark = f"{TOKEN_VARIABLE}={token}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        started = start_time(pid)
        with contextlib.suppress(OSError):  # gone, or somebody else's
            if started is not None and mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append((pid, started))
    return found


def _kill(pid: int, started: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    try:
        # The pidfd keeps the id from being reused, so what is checked is what is killed.
        if start_time(pid) == started:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def _watch(lab_pid: int, inventory: Inventory) -> None:
    """Read the lab's lines until it has ended."""
    os.set_blocking(0, False)
    lab = os.pidfd_open(os.getppid())
    ended = os.getppid() != lab_pid  # before we looked
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(lab, select.POLLIN)
    pending = b""
    while True:
        ended = ended or lab in {fd for fd, _ in poll.poll()}
        try:
            data = os.read(0, 65536)
        except BlockingIOError:
            if ended:
                return
            continue
        if not data:
            return
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            inventory.note(os.fsdecode(line))


def main() -> None:
    """Wait for the lab's end, then remove what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # whoever ends the whole session ends the lab, and then it is our turn
    lab_pid, token, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    inventory = Inventory()
    _watch(lab_pid, inventory)
    inventory.remove(token, directory)
    # A process that the lab was just starting holds the pipe until it runs its program, and shows its
    # environment a moment after that. Others may hold the pipe for ever: they are not waited for.
    for _ in range(LAST_LOOKS):
        at_end = _pipe_ends(LAST_LOOK_S)
        inventory.remove(token, directory)
        if at_end:
            time.sleep(LAST_LOOK_S)
            inventory.remove(token, directory)
            return


def _pipe_ends(timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(0, select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return False
    try:
        return not os.read(0, 65536)
    except BlockingIOError:
        return False


if __name__ == "__main__":
    main()
