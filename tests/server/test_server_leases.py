"""Leases: who comes back under its name has its id and its eventfds again, and nobody noticed."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest
from server_tools import Client, open_fds, serving

from ivshmem_lab.errors import UsageError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server import leases
from ivshmem_lab.server.events import ClientRefused, LeaseEnded, LeaseReturned, PeerDeparted, PeerJoined
from ivshmem_lab.server.policy import Admission, Policy
from ivshmem_lab.server.server import Server

if TYPE_CHECKING:
    from pathlib import Path


def test_holder_that_comes_back_is_the_same_to_everybody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2) as watched:
            with await watched.join({0: 2}) as alice:
                bob = await watched.join({0: 2, 1: 2}, lease="bob")
                await alice.until_vectors({0: 2, 1: 2})
                bob.close()
                await watched.event(PeerDeparted)
                assert watched.server.status()["leases_held"] == [{"name": "bob", "uid": os.getuid(), "id": 1}]
                os.eventfd_write(alice.fds[1][1], 5)  # rung in its absence
                with await watched.join({0: 2, 1: 2, 2: 2}):  # a newcomer is told of it
                    pass
                await watched.event(PeerDeparted, 2)
                with await watched.join({0: 2, 1: 2}, lease="bob") as again:
                    assert again.peer_id == 1
                    assert await watched.event(LeaseReturned) == LeaseReturned(1, "bob")
                    with pytest.raises(BlockingIOError):  # drained
                        os.eventfd_read(again.fds[1][1])
                    os.eventfd_write(alice.fds[1][1], 3)  # the descriptor from before
                    assert os.eventfd_read(again.fds[1][1]) == 3
                    assert watched.server.peers[1].lease == "bob"
                    await alice.until(lambda: 2 in alice.departures)
                    assert alice.departures == [2]
                    assert alice.vectors == {0: 2, 1: 2}

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_lease_has_one_holder_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with await watched.join({0: 1}, lease="a"), Client(watched.path, lease="a") as second:
                refused = await watched.event(ClientRefused)
                assert refused.reason == f"lease 'a' of uid {os.getuid()} is held by peer 0, which is connected"
                await second.until_end()
            async with asyncio.timeout(20):
                (await watched.join({0: 1}, lease="a")).close()

    asyncio.run(scenario())


def test_holder_may_come_back_before_its_end_was_noticed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with await watched.join({0: 1}) as alice:
                for _ in range(50):  # both are ready in the same turn of the loop
                    bob = Client(watched.path, lease="bob")
                    await bob.until_vectors({0: 1, 1: 1})
                    bob.close()
                await watched.event(LeaseReturned, 49)
                await watched.event(PeerDeparted, 50)
                alice.drain()
                assert alice.departures == []
                assert not any(isinstance(event, ClientRefused) for event in watched.events)

    asyncio.run(scenario())


def test_holder_that_does_not_come_back_is_taken_leave_of_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", lease_hold_s=0.05) as watched:
            with await watched.join({0: 1}) as alice:
                (await watched.join({0: 1, 1: 1}, lease="bob")).close()
                ended = await watched.event(LeaseEnded)
                assert ended == LeaseEnded(1, "bob", "its holder did not come back within 0.05 s")
                await alice.until(lambda: 1 in alice.departures)
                with await watched.join({0: 1, 2: 1}, lease="bob") as late:  # a new id: the old one was given up
                    assert late.peer_id == 2
                assert alice.departures == [1]

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_leases_that_are_kept_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MOST_HELD", 3)

    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            for index in range(5):
                client = Client(watched.path, lease=f"name-{index}")
                await watched.event(PeerJoined, index + 1)
                client.close()
                await watched.event(PeerDeparted, index + 1)
            assert [event.lease for event in watched.events if isinstance(event, LeaseEnded)] == ["name-0", "name-1"]
            assert len(watched.server.status()["leases_held"]) == 3

    asyncio.run(scenario())


def test_kept_lease_counts_for_the_limit_of_its_uid(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", policy=Policy(peers_per_uid=1)) as watched:
            (await watched.join({0: 1}, lease="a")).close()
            await watched.event(PeerDeparted)
            with Client(watched.path):
                assert "1 peers already" in (await watched.event(ClientRefused)).reason
            (await watched.join({0: 1}, lease="a")).close()

    asyncio.run(scenario())


def test_ids_needed_by_newcomers_end_leases(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            (await watched.join({0: 1}, lease="a")).close()
            await watched.event(PeerDeparted)
            for peer_id in range(1, 65536):  # joining them all takes a minute
                watched.server._roster.protocol.restore(peer_id, [])
            with Client(watched.path) as late:
                await late.until(lambda: 0 in late.vectors)
                assert late.peer_id == 0
            assert (await watched.event(LeaseEnded)).reason == "its id was needed"

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["", "a b", "x" * 49, "ü"])
def test_impossible_name_of_a_lease_is_refused(name: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(b"\0ivshmem-lease/" + name.encode() + b"/" + os.urandom(8))
                sock.connect(watched.path)
                sock.setblocking(False)
                assert "lease name" in (await watched.event(ClientRefused)).reason

    asyncio.run(scenario())


def test_process_that_is_expected_joins_as_it_was_announced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            watched.server.expect(os.getpid(), Admission(peer_id=40, lease="vm"))
            watched.server.expect(os.getpid(), Admission(peer_id=41))
            with (
                await watched.join({40: 1}) as first,
                await watched.join({40: 1, 41: 1}),
                await watched.join({40: 1, 41: 1, 0: 1}),
            ):
                assert first.peer_id == 40
                assert [peer.lease for peer in watched.server.peers.values()] == ["vm", None, None]
            watched.server.expect(os.getpid(), Admission(peer_id=0))
            watched.server.expect_no_more(os.getpid())
            await watched.event(PeerDeparted, 3)
            (await watched.join({40: 1, 1: 1})).close()

    asyncio.run(scenario())


def test_id_that_is_taken_is_refused_by_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with await watched.join({0: 1}):
                watched.server.expect(os.getpid(), Admission(peer_id=0))
                with Client(watched.path):
                    assert "peer id 0 is taken" in (await watched.event(ClientRefused)).reason

    asyncio.run(scenario())


def test_server_that_comes_back_knows_its_leases_and_goes_on_with_the_ids(tmp_path: Path) -> None:
    async def scenario() -> None:
        with SharedMemory.create_memfd(4096) as memory:
            first = Server(tmp_path / "s", memory, 1)
            await first.start()
            with Client(first.path, lease="bob") as bob, Client(first.path) as alice:
                await bob.until_vectors({0: 1, 1: 1})
                await alice.until_vectors({0: 1, 1: 1})
                memory.map[:4] = b"kept"
                state = first.export_state()
                await first.close()
                await bob.until_end()
                second = Server(tmp_path / "s", memory, 1, state=state)
                await second.start()
                with Client(second.path) as carol, Client(second.path, lease="bob") as again:
                    await again.until_vectors({0: 1, 2: 1})
                    await carol.until_vectors({0: 1, 2: 1})
                    assert (again.peer_id, carol.peer_id) == (0, 2)
                    os.eventfd_write(alice.fds[0][0], 1)  # a descriptor from the first server's days
                    assert os.eventfd_read(again.fds[0][0]) == 1
                    assert os.pread(again.memory_fd, 4, 0) == b"kept"
                await second.close()
                with pytest.raises(UsageError, match="the state handed over has 1 vectors per peer, not 2"):
                    Server(tmp_path / "s", memory, 2, state=state)

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before
