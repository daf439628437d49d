"""Who joins is introduced to everybody, and who leaves is told of once."""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from server_tools import Client, open_fds, serving

from ivshmem_lab.errors import ServerError, UsageError
from ivshmem_lab.ipc.eventfd import is_eventfd
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.events import ClientRefused, PeerDeparted, PeerInfo, PeerJoined, PeerSettled
from ivshmem_lab.server.server import Server

if TYPE_CHECKING:
    from pathlib import Path


def test_two_peers_share_memory_and_ring_each_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2) as watched:
            with await watched.join({0: 2}) as alice, await watched.join({0: 2, 1: 2}) as bob:
                await alice.until_vectors({0: 2, 1: 2})
                with (
                    SharedMemory.from_fd(os.dup(alice.memory_fd)) as one,
                    SharedMemory.from_fd(os.dup(bob.memory_fd)) as two,
                ):
                    one.map[7:9] = b"hi"
                    assert two.map[7:9] == b"hi"
                os.eventfd_write(alice.fds[1][1], 1)
                assert os.eventfd_read(bob.fds[1][1]) == 1
                os.eventfd_write(bob.fds[0][0], 2)
                assert os.eventfd_read(alice.fds[0][0]) == 2

    asyncio.run(scenario())


def test_events_and_peers_tell_who_is_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=3) as watched:
            with await watched.join({0: 3}):
                await watched.event(PeerSettled)
                assert watched.events[1:] == [PeerJoined(0, os.getpid(), os.getuid()), PeerSettled(0)]
                assert watched.server.peers == {0: PeerInfo(0, os.getpid(), os.getuid(), 3, 0)}
                assert "peers 0" in repr(watched.server)
            gone = await watched.event(PeerDeparted)
            assert gone == PeerDeparted(0, "it closed the connection")
            assert watched.server.peers == {}

    asyncio.run(scenario())


def test_departure_is_told_once_and_ids_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with await watched.join({0: 1}) as alice:
                with await watched.join({0: 1, 1: 1}):
                    await alice.until_vectors({0: 1, 1: 1})
                await alice.until_vectors({0: 1})
                with await watched.join({0: 1, 2: 1}) as carol:
                    await alice.until_vectors({0: 1, 2: 1})
                    assert alice.departures == [1]
                    assert carol.departures == []

    asyncio.run(scenario())


def test_what_waits_for_one_who_does_not_read_is_taken_back_when_its_peer_leaves(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=300) as watched:
            with Client(watched.path) as silent:
                await watched.event(PeerJoined)
                before = watched.server.peers[0].queued  # part of its introduction: the socket holds less than 300
                assert before > 0
                for count in range(20):
                    (await watched.join({0: 300, count + 1: 300})).close()
                    await watched.event(PeerDeparted, count + 1)
                assert watched.server.peers[0].queued == before
                await silent.until_vectors({0: 300})
                assert silent.departures == []
                assert all(is_eventfd(fd) for fd in silent.fds[0])

    asyncio.run(scenario())


def test_one_to_whom_a_part_went_hears_that_the_peer_left(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=300) as watched:
            early = await watched.join({0: 300})
            with Client(watched.path) as slow:
                await watched.event(PeerJoined, 2)
                assert (
                    watched.server.peers[1].queued > 300
                )  # the socket took a part of the other's 300, and none of its own
                early.close()
                await watched.event(PeerDeparted)
                await slow.until_vectors({1: 300})
                await slow.until(lambda: slow.departures == [0])

    asyncio.run(scenario())


def test_everybody_gets_everything_in_a_burst_while_one_does_not_read(tmp_path: Path) -> None:
    peers, vectors = 66, 4
    everybody = dict.fromkeys(range(peers), vectors)

    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=vectors) as watched:
            with ExitStack() as stack:
                clients = [stack.enter_context(Client(watched.path)) for _ in range(peers)]
                silent = clients[7]
                await asyncio.gather(*(c.until_vectors(everybody) for c in clients if c is not silent))
                assert watched.server.peers[7].queued > 0
                await silent.until_vectors(everybody)
                assert sorted(c.peer_id for c in clients) == list(range(peers))
                for client in clients:  # the same line from every side
                    os.eventfd_write(client.fds[3][2], 1)
                assert os.eventfd_read(clients[3].fds[3][2]) == peers
                await watched.event(PeerSettled, peers)

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_peers_without_vectors_share_memory_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=0) as watched:
            with await watched.join({}) as alice:
                with await watched.join({}) as bob:
                    assert (alice.peer_id, bob.peer_id) == (0, 1)
                await watched.event(PeerDeparted)
                alice.drain()
                assert alice.departures == []
                assert not alice.at_end

    asyncio.run(scenario())


def test_close_ends_connections_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2) as watched:
            with await watched.join({0: 2}) as alice, Client(watched.path) as late:
                await watched.server.close()
                await watched.server.close()
                await alice.until_end()
                assert alice.departures == []
                assert PeerDeparted(0, "the server closed") in watched.events
                with pytest.raises(ConnectionResetError):
                    late.drain()
            assert "not listening" in repr(watched.server)

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before
    assert not list(tmp_path.iterdir())


def test_full_house_refuses_the_newcomer_by_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            watched.server._roster.protocol._introductions = {peer_id: [] for peer_id in range(65536)}
            with Client(watched.path) as late:
                refused = await watched.event(ClientRefused)
                assert "all 65536 peer ids are taken" in refused.reason
                await late.until_end()

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


@pytest.mark.parametrize("vectors", [-1, 2049])
def test_vectors_out_of_range_are_refused(vectors: int, tmp_path: Path) -> None:
    with SharedMemory.create_memfd(4096) as memory, pytest.raises(UsageError, match=f"{vectors} vectors .*0 to 2048"):
        Server(tmp_path / "s", memory, vectors)


@pytest.mark.parametrize(("size_bytes", "words"), [(12288, "12K is not a power of two"), (2048, "2K is too small")])
def test_memory_that_would_abort_qemu_is_refused(size_bytes: int, words: str, tmp_path: Path) -> None:
    with SharedMemory.create_memfd(size_bytes) as memory, pytest.raises(UsageError, match=words):
        Server(tmp_path / "s", memory)


def test_socket_is_private_and_starting_twice_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
            with pytest.raises(ServerError, match="started already"):
                await watched.server.start()

    asyncio.run(scenario())
