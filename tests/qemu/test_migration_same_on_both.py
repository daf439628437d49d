"""Migration beside real QEMU 7.2: the same conversation, states, events and refusals, and the same guest."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest
from machines import LIMIT_S, Machine, Qmp, memfd_backend, served
from migrations import BLOCKER, MIGRANT, attach, detach, goes_on, migrate, negotiated, pair, status

from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu

KINDS = ("unicorn", "qemu")
MIB = 1 << 20
COUNTERS = {
    *("total", "remaining", "transferred", "duplicate", "normal", "normal-bytes", "skipped", "dirty-pages-rate"),
    *("dirty-sync-count", "dirty-sync-missed-zero-copy", "page-size", "mbps", "multifd-bytes", "pages-per-second"),
    *("postcopy-requests", "postcopy-bytes", "precopy-bytes", "downtime-bytes"),
}


def plain(memory: SharedMemory, master: str) -> list[str]:
    return [*memfd_backend(memory), "-device", f"ivshmem-plain,id=iv,memdev=m,addr=6,master={master}"]


def happened(qmp: Qmp) -> list[tuple[str, Any]]:
    """Return the events so far, and forget them."""
    events = [(event["event"], event.get("data")) for event in qmp.events if event["event"] != "MIGRATION_PASS"]
    qmp.events.clear()
    return events


def migrations(*statuses: str) -> list[tuple[str, Any]]:
    return [("MIGRATION", {"status": status}) for status in statuses]


def until_over(qmp: Qmp) -> dict[str, Any]:
    """Look until a migration is over, and keep its events.

    QEMU 7.2 answers that it is before it says so as an event and before its run state is the last one.
    """
    while (told := qmp.ok("query-migrate")).get("status") not in ("completed", "failed", "cancelled"):
        pass
    qmp.hears("MIGRATION", status=told["status"])
    while qmp.ok("query-status")["status"] == "finish-migrate":
        pass
    return told


def move(kind: str, source: Machine, destination: Machine, uri: str) -> None:
    """Migrate; on a busy machine QEMU 7.2's TCG loses stores of a guest that runs while it is copied, so that one stands still."""
    if kind == "qemu":
        source.qmp.ok("stop")
    assert migrate(source, uri)["status"] == "completed"
    if kind == "qemu":
        destination.qmp.ok("cont")


def converse(kind: str, uri: str) -> list[Any]:
    """Have one conversation about a master that moves; returns all that both emulators have to answer alike.

    Its guest is halted, for the reason that `move` gives.
    """
    said: list[Any] = []
    with SharedMemory.create_memfd(MIB) as ours, SharedMemory.create_memfd(MIB) as theirs:
        guest = [*MIGRANT, "-append", "idle=1"]
        here, there = [*guest, *plain(ours, "auto")], [*guest, *plain(theirs, "on")]
        with pair(kind, here, there, incoming=uri) as (source, destination):
            source.says("migrant: ready\n")
            said.append(source.qmp.ok("qom-get", path="/machine/peripheral/iv", property="master"))
            said += [source.qmp.ok("query-migrate"), destination.qmp.ok("query-migrate")]
            said += [status(destination), destination.qmp.ok("query-status")]
            said.append(source.qmp.ok("query-migrate-capabilities"))
            for capabilities in ([{"capability": "bogus", "state": True}], [{"capability": "events"}]):
                said.append(source.qmp.execute("migrate-set-capabilities", capabilities=capabilities))
            said += [destination.qmp.execute("migrate", uri="unix:/x"), source.qmp.execute("migrate")]
            said.append(source.qmp.execute("migrate-incoming", uri="unix:/x"))
            said += [source.qmp.execute("migrate", uri=bad) for bad in ("tcp:x", "unix:")]
            said.append(source.qmp.ok("query-migrate"))
            source.qmp.ok("migrate", uri="unix:/nonexistent/x")
            said += [until_over(source.qmp), source.qmp.ok("migrate_cancel"), status(source)]
            said.append(happened(source.qmp))
            source.qmp.ok("migrate", uri=uri)
            told = until_over(source.qmp)
            assert told["ram"].keys() == COUNTERS
            assert told["ram"]["total"] >= 33 * MIB
            assert told["ram"]["normal"] >= 2 * MIB // 4096
            said.append(sorted(told))
            source.qmp.hears("STOP")
            said += [happened(source.qmp), status(source)]
            destination.qmp.hears("RESUME")
            said += [status(destination), destination.qmp.ok("query-migrate"), happened(destination.qmp)]
            said.append(source.qmp.execute("migrate", uri=uri))
            # It runs elsewhere; who wants it here too gets it.
            said += [source.qmp.ok("cont"), status(source)]
    return said


def test_the_conversation_about_a_master_is_that_of_qemu(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'm'}"
    ours, theirs = (converse(kind, uri) for kind in KINDS)
    assert ours == theirs
    assert ours[0] == "on"
    assert migrations("setup", "active", "completed")[0] in ours[-8]


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_is_refused_until_it_is_unplugged_and_plugged_in_again_after(kind: str, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'm'}"
    with served(tmp_path / "a"), served(tmp_path / "b"), Peer.connect(tmp_path / "b") as me:
        here = ["-chardev", f"socket,path={tmp_path / 'a'},id=c"]
        here += ["-device", "ivshmem-doorbell,id=iv,chardev=c,vectors=1,addr=5,master=off"]
        there = ["-chardev", f"socket,path={tmp_path / 'b'},id=c"]
        with pair(kind, [*MIGRANT, *here], [*MIGRANT, *there], incoming=uri) as (source, destination):
            source.says("migrant: ready\n")
            goes_on(source)
            refusal = {"class": "GenericError", "desc": BLOCKER}
            assert source.qmp.execute("migrate", uri=uri)["error"] == refusal
            assert source.qmp.ok("query-migrate") == {"blocked-reasons": [BLOCKER]}
            assert status(source) == "running"
            detach(source)
            # QEMU 7.2 dies when it migrates while the device is still being taken apart; then nobody uses the chardev.
            while "error" in source.qmp.execute("chardev-remove", id="c"):
                pass
            assert source.qmp.ok("query-migrate") == {}
            move(kind, source, destination, uri)
            goes_on(destination)
            attach(destination)
            assert goes_on(destination)["peer_id"] == 1
            me.wait_for_peer(1, timeout_s=LIMIT_S)
            me.ring(1, 0)
            destination.says("migrant: rung 0\n")


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_takes_its_server_s_memory_along(kind: str, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'm'}"
    with served(tmp_path / "a", size_bytes=MIB), served(tmp_path / "b", size_bytes=MIB):
        here, there = (
            [
                *("-chardev", f"socket,path={tmp_path / name},id=c"),
                *("-device", "ivshmem-doorbell,id=iv,chardev=c,vectors=1,addr=5,master=on"),
            ]
            for name in "ab"
        )
        with pair(kind, [*MIGRANT, *here], [*MIGRANT, *there], incoming=uri) as (source, destination):
            source.says("migrant: ready\n")
            before = goes_on(source)
            move(kind, source, destination, uri)
            assert goes_on(destination)["round"] > before["round"]
            with Peer.connect(tmp_path / "b") as me:
                me.store32(0, me.peer_id + 1)
                me.ring(0, 0)
                destination.says("migrant: rung 0\n")
                assert me.wait(0, timeout_s=LIMIT_S) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_destination_that_does_not_match_ends_and_the_source_runs_on(kind: str, tmp_path: Path) -> None:
    uri = f"unix:{tmp_path / 'm'}"
    with SharedMemory.create_memfd(MIB) as ours, SharedMemory.create_memfd(2 * MIB) as theirs:
        here, there = [*MIGRANT, *plain(ours, "on")], [*MIGRANT, *plain(theirs, "on")]
        with pair(kind, here, there, incoming=uri) as (source, destination):
            source.says("migrant: ready\n")
            goes_on(source)
            assert migrate(source, uri)["status"] == "failed"
            assert destination.wait() == 1
            assert "load of migration failed: " in destination.errors
            assert status(source) == "running"
            goes_on(source)


@pytest.mark.parametrize("kind", KINDS)
def test_garbage_ends_the_destination(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with negotiated(Machine(kind, "-incoming", f"unix:{path}")) as destination, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"garbage" * 1000)
        sock.shutdown(socket.SHUT_WR)
        assert destination.wait() == 1
        assert "load of migration failed: " in destination.errors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("master", ["on", "off"])
def test_only_migratable_is_in_qemu_s_words(kind: str, master: str) -> None:
    text = f"disallowing migration blocker (--only-migratable) for: {BLOCKER}"
    with SharedMemory.create_memfd(MIB) as memory:
        with Machine(kind, "-S", "-only-migratable", *memfd_backend(memory)) as machine:
            machine.qmp.negotiate()
            answer = machine.qmp.execute("device_add", driver="ivshmem-plain", memdev="m", id="iv", master=master)
            refusal = {"error": {"class": "GenericError", "desc": text}}
            assert answer == ({"return": {}} if master == "on" else refusal)
        if master == "off":
            with Machine(kind, "-only-migratable", *plain(memory, master)) as machine:
                assert machine.wait() != 0
                assert text in machine.errors
