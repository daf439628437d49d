"""Crowds, endless coming and going, draining, listening in, and interference."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import socket
from collections import Counter
from pathlib import Path

import pytest
from server_tools import LIMIT_S, Client, open_fds, serving, until

from ivshmem_lab.errors import RemoteProtocolError
from ivshmem_lab.ipc.fdpass import close_all, receive_message
from ivshmem_lab.server.events import (
    Delivery,
    PeerDeparted,
    PeerJoined,
    PeerSettled,
    ServerEvent,
    ServerStarted,
)
from ivshmem_lab.wire.messages import MESSAGE_BYTES

CYCLES = int(os.environ.get("IVSHMEM_LAB_JOIN_CYCLES", "2000"))


class Counting:
    """Counts the messages of every peer and lets go of their descriptors at once: a crowd's would not fit."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.sock.connect(path)
        self.heard: Counter[int] = Counter()
        self.descriptors = 0

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, fds = receive_message(self.sock, MESSAGE_BYTES)
                assert len(data) == MESSAGE_BYTES
                close_all(fds)
                self.descriptors += len(fds)
                self.heard[int.from_bytes(data, "little", signed=True)] += 1


@pytest.mark.parametrize(("peers", "vectors"), [(300, 1), (70, 16)])
def test_crowd_beyond_the_references_limits_loses_nothing(peers: int, vectors: int, tmp_path: Path) -> None:
    """The reference loses from 278 messages per peer on, and aborts at 61 peers of 16 vectors (measured, 7.2)."""

    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=vectors) as watched:
            clients = [Counting(watched.path) for _ in range(peers)]
            expected = 3 + peers * vectors
            async with asyncio.timeout(60):
                while any(client.heard.total() < expected for client in clients):
                    await asyncio.sleep(0)
                    for client in clients:
                        client.drain()
            for client in clients:
                assert client.descriptors == 1 + peers * vectors
                assert client.heard.total() == expected
                assert all(client.heard[peer_id] >= vectors for peer_id in range(peers))
                client.sock.close()
            assert watched.server.status()["counters"]["messages"] == peers * expected

    asyncio.run(scenario())


def test_joining_and_leaving_without_end_uses_up_nothing(tmp_path: Path) -> None:
    """A hundred thousand rounds: IVSHMEM_LAB_JOIN_CYCLES=100000."""

    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2) as watched:
            with await watched.join({0: 2}) as alice:

                async def rounds(count: int) -> None:
                    for _ in range(count):
                        watched.events.clear()
                        with Client(watched.path) as client:
                            await watched.event(PeerSettled)
                        await watched.event(PeerDeparted)
                        del client
                        alice.drain()
                        alice.departures.clear()

                async def settle() -> None:
                    await until(lambda: watched.server.peers[0].queued == 0)
                    await alice.until(lambda: alice.vectors == {0: 2})

                await rounds(min(500, CYCLES // 2))
                await settle()
                fds, pages = open_fds(), resident_pages()
                await rounds(CYCLES - min(500, CYCLES // 2))
                await settle()
                assert open_fds() == fds
                assert resident_pages() - pages < 256  # 1 MB
                assert watched.server.status()["counters"]["leaves"] == CYCLES

    asyncio.run(scenario())


def resident_pages() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1])


def test_start_says_how_many_peers_fit_and_raises_the_limit(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))

    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=3) as watched:
            started = await watched.event(ServerStarted)
            assert started.open_files == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            assert hard // 4 - 50 < started.peers_allowed <= hard // 4

    asyncio.run(scenario())
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_drain_admits_who_has_connected_sends_all_and_refuses_later_ones(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=300) as watched:
            with Client(watched.path) as slow, Client(watched.path) as waiting:
                assert await watched.server.drain(timeout_s=0.01) is False  # 300 vectors do not fit into a socket
                with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
                    late.connect(watched.path)
                drained = asyncio.create_task(watched.server.drain(LIMIT_S))
                await slow.until_vectors({0: 300, 1: 300})
                await waiting.until_vectors({0: 300, 1: 300})
                assert await drained is True
                await watched.server.close()
                await slow.until_end()
                assert slow.departures == []

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


class Ear:
    def __init__(self) -> None:
        self.messages: list[tuple[int, int, bool]] = []
        self.events: list[ServerEvent] = []
        self.times: list[int] = []

    def message(self, now_ns: int, peer_id: int, value: int, has_fd: bool) -> None:
        self.times.append(now_ns)
        self.messages.append((peer_id, value, has_fd))

    def event(self, now_ns: int, event: ServerEvent) -> None:
        self.times.append(now_ns)
        self.events.append(event)


def test_tap_hears_every_message_and_event_in_order(tmp_path: Path) -> None:
    ear = Ear()

    async def scenario() -> None:
        async with serving(tmp_path / "s", tap=ear) as watched:
            with await watched.join({0: 1}) as alice:
                (await watched.join({0: 1, 1: 1})).close()
                await alice.until(lambda: alice.departures == [1])
            await watched.event(PeerDeparted, 2)
            assert ear.events == watched.events

    asyncio.run(scenario())
    assert [(value, fd) for to, value, fd in ear.messages if to == 0] == [
        *[(0, False), (0, False), (-1, True), (0, True), (1, True), (1, False)]
    ]
    assert [(value, fd) for to, value, fd in ear.messages if to == 1] == [
        *[(0, False), (1, False), (-1, True), (0, True), (1, True)]
    ]
    assert ear.times == sorted(ear.times)


class Plan:
    """Does one thing to one message of peer 0."""

    def __init__(self, at: int, delivery: Delivery) -> None:
        self.at = at
        self.delivery = delivery
        self.asked: list[tuple[int, int, int, bool]] = []

    def deliver(self, peer_id: int, index: int, value: int, has_fd: bool) -> Delivery:
        self.asked.append((peer_id, index, value, has_fd))
        return self.delivery if (peer_id, index) == (0, self.at) else Delivery()


@pytest.mark.parametrize(
    ("at", "delivery", "words"),
    [
        (0, Delivery(value=1), "version: the server speaks version 1"),
        (1, Delivery(value=70000), "peer id: the server gave us id 70000"),
        (2, Delivery(leave_out_fd=True), "shared memory: no file descriptor came with -1"),
        (2, Delivery(copies=2), "shared memory: the server sent a second memory"),
        (1, Delivery(cut_after_bytes=3), "message: the server closed after 3 of a message's 8 bytes"),
        (2, Delivery(cut_after_bytes=0), "message: the server closed before it sent the shared memory"),
    ],
)
def test_faults_reach_the_client_and_only_it(at: int, delivery: Delivery, words: str, tmp_path: Path) -> None:
    plan = Plan(at, delivery)

    async def scenario() -> None:
        async with serving(tmp_path / "s", faults=plan) as watched:
            with Client(watched.path) as victim:
                with pytest.raises(RemoteProtocolError, match=words):  # noqa: PT012
                    await victim.until_end()
                    victim.protocol.eof()
                close_all(victim.protocol.abandon())
            await watched.event(PeerDeparted)
            (await watched.join({1: 1})).close()

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before
    assert plan.asked[:3] == [(0, 0, 0, False), (0, 1, 0, False), (0, 2, -1, True)]


def test_delayed_message_holds_back_what_follows_and_dropped_one_is_missing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=3, faults=Plan(3, Delivery(delay_s=0.05))) as watched:
            begun = asyncio.get_running_loop().time()
            with await watched.join({0: 3}), await watched.join({0: 3, 1: 3}):
                assert asyncio.get_running_loop().time() - begun >= 0.05
        async with serving(tmp_path / "s", vectors=3, faults=Plan(4, Delivery(copies=0))) as watched:
            with await watched.join({0: 2}):
                await watched.event(PeerSettled)

    asyncio.run(scenario())


def test_departing_while_delayed_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=3, faults=Plan(2, Delivery(delay_s=3600))) as watched:
            with Client(watched.path):
                await watched.event(PeerJoined)
            await watched.event(PeerDeparted)

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before
