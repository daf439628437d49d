"""Real QEMU through rounds of join, leave and hot-unplug: alive behind the shield, dead without it."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import json
import os
import resource
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest
from server_tools import LIMIT_S, Client, open_fds, serving, until

from ivshmem_lab.server.events import ClientRefused, MessageWithheld, PeerDeparted, PeerJoined, PeerSettled
from ivshmem_lab.server.policy import Admission, Policy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from server_tools import Watched

pytestmark = pytest.mark.qemu

ROUNDS = int(os.environ.get("IVSHMEM_LAB_SHIELD_ROUNDS", "20"))
VECTORS = 2
SLOT = 4
EJECT_PORT = 0xAE08  # ACPI PCI hot-plug of machine pc: what a guest writes to let go of a slot


class QemuDiedError(Exception):
    """QEMU ended in the middle of a conversation."""


class Machine:
    """A stopped QEMU, and its monitor on a socket pair."""

    def __init__(self, process: asyncio.subprocess.Process, monitor: socket.socket) -> None:
        self.process = process
        self._monitor = monitor
        self._heard = b""
        self.events: list[str] = []

    async def execute(self, command: str, fds: tuple[int, ...] = (), **arguments: Any) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._monitor.sendmsg([request], ancillary)
        except OSError as error:
            raise QemuDiedError from error
        while True:
            answer = await self._hear()
            if "return" in answer or "error" in answer:
                assert "return" in answer, answer
                return answer["return"]

    async def until_event(self, name: str) -> None:
        while name not in self.events:
            await self._hear()
        self.events.clear()

    async def eject(self) -> None:
        """Do what a guest does when it is asked to let go of the device."""
        await self.execute("human-monitor-command", **{"command-line": f"o /w 0x{EJECT_PORT:x} 0x{1 << SLOT:x}"})

    async def _hear(self) -> dict[str, Any]:
        async with asyncio.timeout(LIMIT_S):
            while b"\n" not in self._heard:
                try:
                    more = await asyncio.get_running_loop().sock_recv(self._monitor, 4096)
                except OSError as error:
                    raise QemuDiedError from error
                if not more:
                    raise QemuDiedError
                self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.events.append(message["event"])
        return message


@contextlib.asynccontextmanager
async def qemu() -> AsyncIterator[Machine]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    process = await asyncio.create_subprocess_exec(
        *["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "pc", "-S"],
        *["-accel", "tcg", "-m", "32"],
        *["-chardev", f"socket,id=mon,fd={theirs.fileno()}", "-mon", "chardev=mon,mode=control"],
        pass_fds=[theirs.fileno()],
        stderr=asyncio.subprocess.DEVNULL,
    )
    theirs.close()
    try:
        machine = Machine(process, ours)
        await machine._hear()  # the greeting
        await machine.execute("qmp_capabilities")
        yield machine
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        ours.close()


async def plug(machine: Machine, watched: Watched) -> int:
    """Plug the device in; return its peer id."""
    backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": watched.path}}, "server": False}}
    joined = sum(isinstance(event, PeerJoined) for event in watched.events)
    await machine.execute("chardev-add", id="c", backend=backend)
    await machine.execute("device_add", driver="ivshmem-doorbell", id="d", chardev="c", vectors=VECTORS, addr=f"{SLOT}")
    peer_id = (await watched.event(PeerJoined, joined + 1)).peer_id
    await until(lambda: not watched.server.peers[peer_id].queued and not unread(watched, peer_id))
    await machine.execute("query-status")
    return peer_id


def unread(watched: Watched, peer_id: int) -> int:
    """Return the bytes that a peer has not read yet (unix(7), SIOCOUTQ)."""
    room = array.array("i", [0])
    fcntl.ioctl(watched.server._roster.connections[peer_id].sock, 0x5411, room)
    return room[0]


async def unplug(machine: Machine, watched: Watched, peer_id: int, held: int) -> None:
    """Unplug in the way that QEMU 7.2 survives, as long as it never heard of anybody's leaving.

    Drained first, and then the numbers of the `held` eventfds and of the memory are taken, since QEMU goes on polling them.
    """
    await until(lambda: not unread(watched, peer_id))
    await machine.execute("query-status")
    await machine.execute("device_del", id="d")
    await machine.eject()
    await machine.until_event("DEVICE_DELETED")
    for _ in range(held + 1):
        guard = os.eventfd(0)
        try:
            await machine.execute("add-fd", (guard,), **{"fdset-id": 99})
        finally:
            os.close(guard)
    gone = sum(isinstance(event, PeerDeparted) for event in watched.events)
    await machine.execute("chardev-remove", id="c")
    await watched.event(PeerDeparted, gone + 1)


async def round_of_life(machines: list[Machine], watched: Watched, number: int) -> None:
    """All three have the device; a host peer comes and goes, under a lease or not; one device is unplugged and back."""
    settled = sum(isinstance(event, PeerSettled) for event in watched.events)
    gone = sum(isinstance(event, PeerDeparted) for event in watched.events)
    with Client(watched.path, lease="host" if number % 2 else "") as host:
        await watched.event(PeerSettled, settled + 1)
        host.drain()
    await watched.event(PeerDeparted, gone + 1)
    machine = machines[number % len(machines)]
    peers = watched.server.peers
    (peer_id,) = (each.peer_id for each in peers.values() if each.pid == machine.process.pid)
    remembered = watched.server._roster.protocol._remembered.get(peer_id, peers)
    await unplug(machine, watched, peer_id, VECTORS * len(remembered))
    await plug(machine, watched)
    for each in machines:
        await each.execute("query-status")


async def live(watched: Watched, rounds: int) -> int:
    """Return the exit status of the first QEMU that died, or 0."""
    async with contextlib.AsyncExitStack() as stack:
        machines = [await stack.enter_async_context(qemu()) for _ in range(3)]
        try:
            for machine in machines:
                await plug(machine, watched)
            for number in range(rounds):
                await round_of_life(machines, watched, number)
        except QemuDiedError:
            async with asyncio.timeout(LIMIT_S):
                dead = [asyncio.create_task(machine.process.wait()) for machine in machines]
                done, _ = await asyncio.wait(dead, return_when=asyncio.FIRST_COMPLETED)
                status = done.pop().result()
                for task in dead:
                    task.cancel()
                await asyncio.gather(*dead, return_exceptions=True)
                return status
    return 0


def test_shielded_qemus_survive_joins_leaves_and_unplugs(tmp_path: Path) -> None:
    """Two hundred rounds: IVSHMEM_LAB_SHIELD_ROUNDS=200."""

    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=VECTORS, shield_qemu=True) as watched:
            with await watched.join({0: VECTORS}) as alice:
                assert await live(watched, ROUNDS) == 0
                withheld = [event for event in watched.events if isinstance(event, MessageWithheld)]
                assert watched.server.status()["counters"]["withheld"] == len(withheld) >= 2 * ROUNDS
                assert all("left" in event.reason for event in withheld)
                await alice.until_vectors({0: VECTORS} | dict.fromkeys(held(watched), VECTORS))
                assert len(set(alice.departures)) == len(alice.departures)

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def held(watched: Watched) -> list[int]:
    return [lease["id"] for lease in watched.server.status()["leases_held"]]


def test_unshielded_qemus_die_in_the_same_rounds(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=VECTORS) as watched:
            with await watched.join({0: VECTORS}):
                assert await live(watched, ROUNDS) in {-signal.SIGSEGV, -signal.SIGABRT}
                assert watched.server.status()["counters"]["withheld"] == 0

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    asyncio.run(scenario())


def test_connection_is_shielded_when_its_process_is_qemu_or_it_was_announced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", shield_qemu=True) as watched:
            watched.server.expect(os.getpid(), Admission(shield_qemu=True))
            with await watched.join({0: 1}) as announced, await watched.join({0: 1, 1: 1}) as other:
                async with qemu() as machine:
                    peer_id = await plug(machine, watched)
                    assert [peer.shielded for peer in watched.server.peers.values()] == [True, False, True]
                await other.until(lambda: peer_id in other.departures)
                announced.drain()
                assert announced.departures == []
                assert await watched.event(MessageWithheld) == MessageWithheld(0, peer_id, f"peer {peer_id} left")

    asyncio.run(scenario())


def test_qemu_that_may_not_join_gets_an_error_and_does_not_spin(tmp_path: Path) -> None:
    """On a bare end of file it would read for ever and answer nobody (measured, 7.2)."""

    async def scenario() -> None:
        async with serving(tmp_path / "s", policy=Policy(uids=set())) as watched, qemu() as machine:
            with pytest.raises(AssertionError, match="server sent version -1, expecting 0"):
                await plug(machine, watched)
            assert (await watched.event(ClientRefused)).pid == machine.process.pid
            assert (await machine.execute("query-status"))["running"] is False

    asyncio.run(scenario())
