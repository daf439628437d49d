"""Guests that move while they compute: nothing of CPU, memory, shared memory and device is lost on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from machines import Machine, memfd_backend, served
from migrations import BLOCKER, MIGRANT, attach, detach, ended, goes_on, migrate, negotiated, pair, state, status

from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
MASK = 0x12345678
KIND = "unicorn"


def plain(memory: SharedMemory, master: str = "on", name: str = "m") -> list[str]:
    return [*memfd_backend(memory, name), "-device", f"ivshmem-plain,id=iv,memdev={name},addr=6,master={master}"]


def doorbell(path: Path, master: str = "on", vectors: int = 2) -> list[str]:
    device = f"ivshmem-doorbell,id=iv,chardev=c,vectors={vectors},addr=5,master={master}"
    return ["-chardev", f"socket,path={path},id=c", "-device", device]


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"unix:{tmp_path / 'm'}"


@pytest.mark.parametrize("master", ["on", "auto"])
def test_a_guest_moves_with_the_memory_of_a_plain_device(master: str, uri: str) -> None:
    with SharedMemory.create_memfd(MIB) as ours, SharedMemory.create_memfd(MIB) as theirs:
        theirs.array()[:] = 0xEE  # what the destination held before is gone afterwards
        there = [*MIGRANT, *plain(theirs, master, name="other")]
        with pair(KIND, [*MIGRANT, *plain(ours, master)], there, incoming=uri) as (source, destination):
            assert status(destination) == "inmigrate"
            source.says("migrant: ready\n")
            before = goes_on(source)
            told = migrate(source, uri)
            assert told["status"] == "completed"
            assert told["ram"]["remaining"] == 0
            assert told["ram"]["total"] == 33 * MIB
            assert told["ram"]["normal"] + told["ram"]["duplicate"] == 33 * MIB // 4096
            assert 2 * MIB < told["ram"]["transferred"] < 4 * MIB
            destination.qmp.event("RESUME")
            after = goes_on(destination)
            assert after["round"] > before["round"]
            assert (after["mask"], after["memory"]) == (MASK, MIB)
            assert (status(source), status(destination)) == ("postmigrate", "running")
            assert destination.qmp.ok("query-migrate") == {"status": "completed"}
            # The source's memory is its own again: it stands still.
            copy = bytes(ours.map)
            goes_on(destination)
            assert bytes(ours.map) == copy
            source.qmp.ok("quit")
            assert (source.wait(), source.errors) == (0, "")
            assert destination.errors == ""


@pytest.mark.parametrize("idle", [0, 1], ids=["computing", "halted"])
@pytest.mark.parametrize("master", ["on", "auto"])
def test_a_guest_moves_to_another_server_and_is_rung_there(master: str, idle: int, tmp_path: Path, uri: str) -> None:
    guest = [*MIGRANT, "-append", f"idle={idle}"]
    with served(tmp_path / "a", vectors=2), served(tmp_path / "b", vectors=2):
        here, there = doorbell(tmp_path / "a", master), doorbell(tmp_path / "b", master)
        with pair(KIND, [*guest, *here], [*guest, *there], incoming=uri) as (source, destination):
            source.says("migrant: ready\n")
            with Peer.connect(tmp_path / "a") as left:
                left.ring(0, 1)
                source.says("migrant: rung 1\n")
            assert migrate(source, uri)["status"] == "completed"
            destination.qmp.event("RESUME")
            with Peer.connect(tmp_path / "b") as me:
                me.store32(0, me.peer_id + 1)
                for vector in (0, 1):
                    me.ring(0, vector)
                    destination.says(f"migrant: rung {vector}\n")
                    assert me.wait(vector, timeout_s=10.0) == 1
                if not idle:
                    assert goes_on(destination)["interrupts"] == 3


@pytest.mark.parametrize("run", ["paused there", "paused here", "stop before", "cont before"])
def test_the_guest_runs_on_as_it_was_asked_to(run: str, uri: str) -> None:
    with SharedMemory.create_memfd(MIB) as ours, SharedMemory.create_memfd(MIB) as theirs:
        there = [*MIGRANT, *plain(theirs), *(["-S"] if run in ("paused there", "cont before") else [])]
        with pair(KIND, [*MIGRANT, *plain(ours)], there, incoming=uri) as (source, destination):
            source.says("migrant: ready\n")
            if run == "paused here":
                source.qmp.ok("stop")
            if run == "stop before":
                destination.qmp.ok("stop")
            if run == "cont before":
                destination.qmp.ok("cont")
            assert migrate(source, uri)["status"] == "completed"
            ended(destination.qmp)
            assert status(destination) == ("running" if run == "cont before" else "paused")
            if run != "cont before":
                destination.qmp.ok("cont")
            goes_on(destination)


def test_a_destination_may_be_told_later_where_to_listen_and_by_tcp() -> None:
    with SharedMemory.create_memfd(MIB) as ours, SharedMemory.create_memfd(MIB) as theirs:
        there = [*MIGRANT, *plain(theirs)]
        with pair(KIND, [*MIGRANT, *plain(ours)], there, incoming="defer") as (source, destination):
            source.says("migrant: ready\n")
            assert destination.qmp.ok("query-migrate") == {}
            destination.qmp.ok("migrate-incoming", uri="tcp:127.0.0.1:0")
            (address,) = destination.qmp.ok("query-migrate")["socket-address"]
            assert (address["type"], address["host"]) == ("inet", "127.0.0.1")
            assert migrate(source, f"tcp:127.0.0.1:{address['port']}")["status"] == "completed"
            goes_on(destination)


def test_a_machine_moves_again_and_a_reset_starts_it_anew(tmp_path: Path) -> None:
    first, second = f"unix:{tmp_path / '1'}", f"unix:{tmp_path / '2'}"
    with (
        SharedMemory.create_memfd(MIB) as one,
        SharedMemory.create_memfd(MIB) as two,
        pair(KIND, [*MIGRANT, *plain(one)], [*MIGRANT, *plain(two)], incoming=first) as (source, middle),
    ):
        source.says("migrant: ready\n")
        migrate(source, first)
        assert ended(middle.qmp) == {"status": "completed"}
        with negotiated(Machine(KIND, *MIGRANT, *plain(one), "-incoming", second)) as last:
            assert migrate(middle, second)["status"] == "completed"
            assert goes_on(last)["mask"] == MASK
            last.qmp.ok("system_reset")
            last.says("migrant: ready\n")
            goes_on(last)


def test_a_peer_detaches_moves_and_is_attached_again_under_a_new_id(tmp_path: Path, uri: str) -> None:
    """The sequence that QEMU's specification gives for peers: device_del, migrate, device_add."""
    with served(tmp_path / "a"), served(tmp_path / "b"), Peer.connect(tmp_path / "b") as me:
        here = doorbell(tmp_path / "a", "off", vectors=1)
        there = ["-chardev", f"socket,path={tmp_path / 'b'},id=c"]
        with pair(KIND, [*MIGRANT, *here], [*MIGRANT, *there], incoming=uri) as (source, destination):
            source.says("migrant: ready\n")
            refused = source.qmp.execute("migrate", uri=uri)
            assert refused["error"] == {"class": "GenericError", "desc": BLOCKER}
            assert source.qmp.ok("query-migrate") == {"blocked-reasons": [BLOCKER]}
            assert state(source)["peer_id"] == 0  # it has not noticed
            detach(source)
            assert source.qmp.ok("query-migrate") == {}
            assert migrate(source, uri)["status"] == "completed"
            goes_on(destination)
            attach(destination)
            assert goes_on(destination)["peer_id"] == 1
            me.wait_for_peer(1, timeout_s=10.0)
            me.ring(1, 0)
            destination.says("migrant: rung 0\n")
            assert destination.qmp.ok("query-migrate")["blocked-reasons"] == [BLOCKER]
