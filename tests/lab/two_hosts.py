"""Two hosts with a cable between them, each a network namespace with a lab of its own; run by test_lab_migration_network.py.

``unshare -Urn python two_hosts.py EMULATOR`` is the first host; it starts the second one in a namespace of its own.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

from ivshmem_lab import Lab
from ivshmem_lab.errors import MigrationError

HERE, THERE, PORT = "192.0.2.1", "192.0.2.2", 4444
PLACE = {"device_id": "hot0", "bus": 6, "master": "on"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def migrant(lab: Lab, name: str, emulator: str):
    return lab.vm(name, "migrant", {"watch": 1}, emulator=emulator)


def second(emulator: str) -> None:
    sys.stdin.readline()  # the cable is plugged in
    ip("addr", "add", f"{THERE}/24", "dev", "cable1")
    ip("link", "set", "cable1", "up")
    with Lab() as lab:
        bob = migrant(lab, "bob", emulator)
        bob.start_waiting()
        bob.plug(lab.memory("theirs", "1M"), **PLACE)
        print("waits", flush=True)
        bob.receive(f"tcp:{THERE}:{PORT}")
        bob.resume()
        bob.console.write("c")
        bob.wait_text(" mask=", 30.0)
        print(json.dumps({"state": bob.state, "said": bob.console.text()}), flush=True)


def first(emulator: str) -> None:
    command = ["unshare", "-n", sys.executable, __file__, emulator, "second"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    try:
        with Lab() as lab:
            alice = migrant(lab, "alice", emulator)
            alice.start()
            alice.wait_text("migrant: ready\n", 30.0)
            alice.plug(lab.memory("ours", "1M"), **PLACE)
            alice.wait_text("migrant: opened\n", 30.0)
            ip("link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
            ip("link", "set", "cable1", "netns", str(other.pid))
            ip("addr", "add", f"{HERE}/24", "dev", "cable0")
            ip("link", "set", "cable0", "up")
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "waits\n"
            alice.pause()  # QEMU 7.2's TCG loses stores of a guest that runs while it is copied
            moved = None
            while moved is None:  # it listens a moment later
                with contextlib.suppress(MigrationError):
                    moved = alice.migrate(f"tcp:{THERE}:{PORT}")
            there = json.loads(other.stdout.readline())
            print(json.dumps({"here": alice.state, "sent_bytes": moved.sent_bytes, "there": there}))
        assert other.wait(30.0) == 0
    finally:
        other.kill()
        other.communicate()


if __name__ == "__main__":
    (second if sys.argv[2:] else first)(sys.argv[1])
