"""A rude client, a slow one, or a shortage in the kernel costs nobody else anything."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from server_tools import Client, limit_that_leaves, open_fds, serving

from ivshmem_lab.server.events import ClientRefused, PeerDeparted, PeerJoined, ServerStrained


def closes_at_once(client: Client) -> None:
    client.close()


def stops_reading(client: Client) -> None:
    client.sock.shutdown(socket.SHUT_RD)


def stops_writing(client: Client) -> None:
    client.sock.shutdown(socket.SHUT_WR)


def sends_garbage(client: Client) -> None:
    client.sock.send(b"GET / HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        (closes_at_once, "it closed the connection"),
        (stops_reading, "it does not read"),
        (stops_writing, "it closed the connection"),
        (sends_garbage, "it sent a byte, 0x47; clients only listen"),
    ],
)
@pytest.mark.parametrize("when", ["before it is accepted", "as a peer"])
def test_rude_client_costs_only_itself(deed: object, words: str, when: str, tmp_path: Path) -> None:
    assert callable(deed)

    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2) as watched:
            with await watched.join({0: 2}) as alice:
                if when == "as a peer":
                    with await watched.join({0: 2, 1: 2}) as rude:
                        deed(rude)
                        if deed is stops_reading:  # nobody notices before there is something to say
                            with Client(watched.path) as carol:
                                await carol.until_vectors({0: 2, 2: 2})
                        gone = await watched.event(PeerDeparted)
                    assert gone.peer_id == 1
                    if deed is not stops_reading:
                        assert gone.reason == words
                    await alice.until(lambda: 1 in alice.departures)
                else:
                    with Client(watched.path) as rude:
                        deed(rude)
                        refused = await watched.event(ClientRefused)
                        assert refused.reason.startswith(words)
                        assert (refused.pid, refused.uid) == (os.getpid(), os.getuid())
                    with await watched.join({0: 2, 1: 2}):  # the rude one never had an id
                        await alice.until_vectors({0: 2, 1: 2})
                        assert alice.departures == []

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_many_that_vanish_together_are_all_taken_leave_of(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with await watched.join({0: 1}) as alice:
                crowd = [Client(watched.path) for _ in range(40)]
                await watched.event(PeerJoined, 41)
                for client in crowd:
                    client.close()
                await alice.until(lambda: len(alice.departures) == 40)
                assert sorted(alice.departures) == list(range(1, 41))
                assert list(watched.server.peers) == [0]

    asyncio.run(scenario())


def test_peer_that_lets_too_much_wait_is_disconnected_by_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=50, queue_limit=100) as watched:
            with Client(watched.path) as silent:
                await watched.event(PeerJoined)
                others = []
                while not any(isinstance(event, PeerDeparted) for event in watched.events):
                    others.append(Client(watched.path))
                    joined = len(others) + 1
                    await watched.event(PeerJoined, joined)
                    others[-1].drain()
                    assert joined < 20
                gone = await watched.event(PeerDeparted)
                assert gone.peer_id == 0
                assert "messages wait for it, more than 1" in gone.reason
                left = dict.fromkeys(range(1, len(others) + 1), 50)
                await asyncio.gather(*(other.until_vectors(left) for other in others))
                for other in others:
                    other.close()
                silent.drain()

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_newcomer_waits_out_a_shortage_of_descriptors(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=8) as watched:
            with await watched.join({0: 8}) as alice, Client(watched.path) as bob, Client(watched.path) as carol:
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit_that_leaves(3), hard))
                try:
                    strained = await watched.event(ServerStrained)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert strained.reason == "no eventfds for a newcomer: Too many open files"
                await asyncio.gather(*(c.until_vectors({0: 8, 1: 8, 2: 8}) for c in (alice, bob, carol)))

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_accepting_waits_out_a_shortage_of_descriptors(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with Client(watched.path) as alice:
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                try:
                    strained = await watched.event(ServerStrained)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert strained.reason == "no newcomer can be accepted: Too many open files"
                await alice.until_vectors({0: 1})

    asyncio.run(scenario())


IN_FLIGHT = """
import asyncio, resource, sys
from pathlib import Path
from server_tools import Client, serving
from ivshmem_lab.server.events import PeerJoined

async def scenario():
    async with serving(Path(sys.argv[1]), vectors=20) as watched:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 4096))
        clients = [Client(watched.path) for _ in range(8)]
        await watched.event(PeerJoined, 8)
        # 8 memories and 1280 vectors to send, of which 300 can be in flight
        async with asyncio.timeout(20):  # until the kernel refuses some
            while all(peer.retry is None for peer in watched.server._roster.connections.values()):
                await asyncio.sleep(0)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        everybody = dict.fromkeys(range(8), 20)
        await asyncio.gather(*(client.until_vectors(everybody) for client in clients))
        for client in clients:
            client.close()

asyncio.run(scenario())
"""


def test_too_many_descriptors_in_flight_are_waited_out(tmp_path: Path) -> None:
    """The limit binds processes without CAP_SYS_RESOURCE and CAP_SYS_ADMIN only (unix(7), ETOOMANYREFS)."""
    weak = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if weak and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv (util-linux) when run by root")
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    subprocess.run(
        [*weak, sys.executable, "-W", "error", "-c", IN_FLIGHT, str(tmp_path / "s")],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        timeout=60,
    )
