"""``-device ivshmem``, revision 0: a guest takes INTx, sees -1 and then its id; properties and refusals."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from machines import LIMIT_S, MIB, Machine, served
from migrations import BLOCKER

from ivshmem_lab.guests import guest_path
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator

GUEST = ["-kernel", str(guest_path("intx")), "-append", "exit=2"]
NOTICE = "ivshmem is deprecated, please use ivshmem-plain or ivshmem-doorbell instead"


class SlowServer:
    """Speaks the server's side of the protocol when it is told to."""

    def __init__(self, path: Path) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._listening.settimeout(LIMIT_S)
        self.client: socket.socket | None = None

    def send(self, number: int, fd: int | None = None) -> None:
        if self.client is None:
            self.client, _ = self._listening.accept()
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
        self.client.sendmsg([number.to_bytes(8, "little", signed=True)], rights)

    def close(self) -> None:
        self._listening.close()
        if self.client is not None:
            self.client.close()


@contextlib.contextmanager
def slow_server(path: Path) -> Iterator[SlowServer]:
    with contextlib.closing(SlowServer(path)) as server:
        yield server


BLOCKED = f"disallowing migration blocker (--only-migratable) for: {BLOCKER}"
LATE = "master must connect to the server before any peers"


def legacy(path: Path, properties: str) -> list[str]:
    return ["-chardev", f"socket,path={path},id=c", "-device", f"ivshmem,chardev=c,id=iv,{properties}"]


@pytest.mark.parametrize("addr", ["4", "5", "6", "7"], ids=lambda addr: f"slot {addr}")
def test_a_guest_sees_minus_one_then_its_id_and_takes_intx(tmp_path: Path, addr: str) -> None:
    path = tmp_path / "s"
    with (
        slow_server(path) as server,
        SharedMemory.create_memfd(MIB) as memory,
        Machine("unicorn", *legacy(path, f"msi=off,size=1,addr={addr}"), *GUEST) as machine,
    ):
        line = 11 if addr in ("4", "7") else 10
        machine.says(f"intx: revision 0 pin 1 line {line}\n")
        machine.says("intx: position ffffffff\n")
        for number in (0, 5):
            server.send(number)
        server.send(-1, memory.fd)
        machine.says("intx: attached as 5, memory 1d1d1d1d\n")
        assert memory.map[:4] == b"\x1d" * 4
        vector = os.eventfd(0)
        try:
            server.send(5, vector)
            for number in (1, 2):
                os.eventfd_write(vector, 1)
                machine.says(f"intx: interrupt {number} status 1 then 0\n")
            assert machine.wait() == 1
        finally:
            os.close(vector)
        assert machine.errors.count(NOTICE) == 1


def test_a_prompt_server_is_waited_for_and_a_peer_rings_with_intx(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        served(path, vectors=2, size_bytes=MIB),
        Machine("unicorn", *legacy(path, "msi=off,size=64K,vectors=2"), *GUEST) as machine,
    ):
        machine.says("intx: attached as 0, memory 1d1d1d1d\n")
        with Peer.connect(path) as peer:
            for vector in (1, 0):
                peer.ring(0, vector)
                machine.says(f"status {1} then 0\n")
        assert machine.wait() == 1


def test_a_server_that_never_answers_leaves_a_guest_that_can_be_unplugged_and_ended(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with slow_server(path), Machine("unicorn", *legacy(path, "msi=off")) as machine:
        machine.qmp.negotiate()
        machine.qmp.ok("device_del", id="iv")
        machine.qmp.ok("system_reset")
        machine.qmp.event("DEVICE_DELETED")
        machine.qmp.ok("chardev-remove", id="c")
        machine.qmp.ok("quit")
        assert machine.wait() == 0


def test_memory_of_its_own_comes_by_name_and_by_device_add(tmp_path: Path) -> None:
    name = f"ivlegacy-{os.getpid()}"
    probe = ["-kernel", str(guest_path("probe")), "-append", "watch=1"]
    try:
        with Machine("unicorn", *probe) as machine:
            machine.says("probe: watching")
            machine.qmp.negotiate()
            machine.qmp.ok("device_add", driver="ivshmem", id="iv", shm=name, size="1", role="master")
            machine.says("peer_id 0\n")
            machine.says("msix none\n")
            machine.says("memory size 1048576 first 00000000")
            bar = machine.qmp.ok("query-pci")[0]["devices"][-1]
            assert (bar["irq_pin"], bar["id"]["device"]) == (1, 0x1110)
            assert machine.qmp.ok("qom-get", path="/machine/peripheral/iv", property="role") == "master"
            assert Path(f"/dev/shm/{name}").stat().st_size == MIB
    finally:
        Path(f"/dev/shm/{name}").unlink()


@pytest.mark.parametrize(
    ("properties", "text"),
    [
        ("size=1M", "You must specify either 'shm' or 'chardev'"),
        ("shm=x,chardev=c", "You must specify either 'shm' or 'chardev'"),
        ("shm=x,size=3", "Invalid size 3"),
        ("shm=x,role=both", "'role' must be 'peer' or 'master'"),
        ("chardev=c,msi=off,ioeventfd=on", "ioeventfd/irqfd requires MSI"),
        ("chardev=c,vectors=0", "The number of MSI-X vectors is invalid"),
        ("chardev=nope", "Property 'ivshmem.chardev' can't find value 'nope'"),
        ("shm=x,x-quirks=qemu-9", "doesn't take value 'qemu-9'; there are none, qemu-7.2"),
        ("shm=x,size=4G,use64=off", "use64=off: a BAR of 32 bits shows up to 2G"),
        ("memdev=m", "Property 'ivshmem.memdev' not found"),
    ],
)
def test_what_cannot_be_is_refused_in_the_words_of_qemu(properties: str, text: str) -> None:
    with Machine("unicorn", "-device", f"ivshmem,{properties}") as machine:
        assert machine.wait() == 2
        assert text in machine.errors
    assert not Path("/dev/shm/x").exists()


def test_memory_that_is_too_small_leaves_the_device_without_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(path, size_bytes=1 << 16), Machine("unicorn", *legacy(path, "msi=off,size=1"), *GUEST) as machine:
        machine.says("intx: position ffffffff\n")
        assert "server sent only 65536 bytes of shared memory" in machine.errors


@pytest.mark.parametrize(
    ("role", "options", "refusal"),
    [
        ("", [], None),
        ("", ["-only-migratable"], BLOCKED),
        ("role=peer", [], None),
        ("role=peer", ["-only-migratable"], BLOCKED),
        ("role=master", [], LATE),
        ("role=master", ["-only-migratable"], LATE),
    ],
)
def test_the_second_device_of_a_server_is_refused_where_its_id_forbids_it(
    role: str, options: list[str], refusal: str | None, tmp_path: Path
) -> None:
    """Both by ``-device``, before a guest sees it, and by ``device_add``, which leaves nothing in use."""
    path = tmp_path / "s"
    first = [*options, *legacy(path, "msi=off,size=64K,role=master")]
    second = ["-chardev", f"socket,path={path},id=c2"]
    properties = "driver=ivshmem,chardev=c2,id=iv2,msi=off,size=64K" + (f",{role}" if role else "")
    with served(path), Machine("unicorn", "-S", *first, *second) as machine:
        machine.qmp.negotiate()
        answer = machine.qmp.execute("device_add", **dict(pair.split("=") for pair in properties.split(",")))
        plugged = {entry["name"] for entry in machine.qmp.ok("qom-list", path="/machine/peripheral")}
        if refusal is None:
            assert answer == {"return": {}}
            assert plugged >= {"iv", "iv2"}
        else:
            assert answer == {"error": {"class": "GenericError", "desc": refusal}}
            assert "iv" in plugged
            assert "iv2" not in plugged
            machine.qmp.ok("chardev-remove", id="c2")
    with served(path), Machine("unicorn", "-S", *first, *second, "-device", properties) as machine:
        if refusal is None:
            machine.qmp.negotiate()
        else:
            assert machine.wait() == 2
            assert refusal in machine.errors


def test_an_id_that_comes_late_and_forbids_the_device_leaves_it_without_memory(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with (
        slow_server(path) as server,
        SharedMemory.create_memfd(MIB) as memory,
        Machine("unicorn", "-only-migratable", *legacy(path, "msi=off,size=1"), *GUEST) as machine,
    ):
        machine.says("intx: position ffffffff\n")
        server.send(0)
        server.send(5)
        server.send(-1, memory.fd)
        assert server.client is not None
        machine.qmp.negotiate()
        until_logged(machine, f"device iv gets no memory: {BLOCKED}")
        machine.qmp.ok("quit")
        assert machine.wait() == 0
        assert "attached as" not in machine.text


def until_logged(machine: Machine, text: str) -> None:
    """Ask for the status until something stands on stderr."""
    deadline = time.monotonic() + LIMIT_S
    while text not in machine.errors:
        machine.qmp.ok("query-status")
        assert time.monotonic() < deadline, machine.errors
