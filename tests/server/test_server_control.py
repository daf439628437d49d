"""Status, and the control socket: every line gets one answer, whatever it holds, and the peers notice nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import socket
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
from server_tools import LIMIT_S, open_fds, serving, until

from ivshmem_lab.errors import ServerError
from ivshmem_lab.server import server
from ivshmem_lab.server.control import MOST_CLIENTS, MOST_LINE_BYTES, ControlSocket
from ivshmem_lab.server.events import PeerDeparted
from ivshmem_lab.server.statusview import show_status

if TYPE_CHECKING:
    from pathlib import Path

FUZZ_INPUTS = int(os.environ.get("IVSHMEM_LAB_FUZZ_INPUTS", "5000"))
BATCH = 250
"""Lines that are sent at once over a live socket."""
SEEDS = [b'{"execute": "status"}', b'{"execute": "help"}', b"[]", b'{"execute": {"a": [1, -2e9]}}', b'"\\u0000\xc3"']


async def ask(path: Path, *lines: bytes) -> list[Any]:
    """Send lines at once; return the answers."""
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
        try:
            writer.write(b"".join(line + b"\n" for line in lines))
            return [json.loads(await reader.readline()) for _ in lines]
        finally:
            writer.close()
            await writer.wait_closed()


async def keep_writing(writer: asyncio.StreamWriter) -> None:
    async with asyncio.timeout(LIMIT_S):
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0)


def test_status_tells_peers_and_counters(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2, control_path=tmp_path / "c") as watched:
            with await watched.join({0: 2}, lease="alice") as alice:
                (await watched.join({0: 2, 1: 2})).close()
                await alice.until(lambda: alice.departures == [1])
                (answer,) = await ask(tmp_path / "c", b'{"execute": "status"}')
                status = answer["return"]
                assert status["uptime_s"] > 0
                assert status["peers"] == [
                    {
                        "id": 0,
                        "pid": os.getpid(),
                        "uid": os.getuid(),
                        "vectors": 2,
                        "queued": 0,
                        "role": "peer",
                        "lease": "alice",
                        "shielded": False,
                        "rings_waiting": 0,
                    }
                ]
                counters = status["counters"]
                assert counters["queue_high_water"] == 7
                assert counters["messages"] == 5 + 7 + 2 + 1
                assert (counters["joins"], counters["leaves"], counters["drops"]) == (2, 1, {"closed": 1})
                assert status["open_files"] > status["peers_allowed"] > 0
                here = watched.server.status()
                assert here["peers"] == status["peers"]

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before
    assert not list(tmp_path.iterdir())


def test_status_tells_rings_that_nobody_has_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", vectors=2) as watched:

            def waiting() -> list[int | None]:
                return [peer["rings_waiting"] for peer in watched.server.status()["peers"]]

            with await watched.join({0: 2}) as alice:
                with await watched.join({0: 2, 1: 2}, lease="bob") as bob:
                    await alice.until_vectors({0: 2, 1: 2})
                    os.eventfd_write(alice.fds[1][0], 3)
                    os.eventfd_write(alice.fds[1][1], 20)
                    assert waiting() == [0, 23]
                    assert "     23  bob" in show_status(watched.server.status()).splitlines()[-1]
                    assert os.eventfd_read(bob.fds[1][1]) == 20  # telling took nothing
                    assert waiting() == [0, 3]
                await watched.event(PeerDeparted)
                with await watched.join({0: 2, 1: 2}, lease="bob"):
                    assert waiting() == [0, 0]
                    assert watched.server.status()["counters"]["rings_discarded"] == 3
                    monkeypatch.setattr(server, "_MOST_LOOKED_AT", 3)
                    assert waiting() == [None, None]
                    assert "      ?  bob" in show_status(watched.server.status()).splitlines()[-1]

    asyncio.run(scenario())


def test_control_socket_is_private_and_is_refused_where_another_one_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", control_path=tmp_path / "c"):
            assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600
            with pytest.raises(ServerError, match="listens on"):
                async with serving(tmp_path / "s2", control_path=tmp_path / "c"):
                    pass
            assert not (tmp_path / "s2").exists()
            assert "return" in (await ask(tmp_path / "c", b'{"execute": "status"}'))[0]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"status", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 4000, "not JSON"),
        (b"[]", "one key"),
        (b'{"execute": "status", "id": 1}', "one key"),
        (b'{"execute": "quit"}', "unknown command 'quit'; there are status, help"),
        (b'{"execute": ["status"]}', "unknown command"),
    ],
)
def test_what_is_not_understood_is_answered_in_one_line(line: bytes, words: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", control_path=tmp_path / "c"):
            wrong, right = await ask(tmp_path / "c", line, b'{"execute": "help"}')
            assert words in wrong["error"]["desc"]
            assert right == {"return": {"commands": ["status", "help"]}}

    asyncio.run(scenario())


def test_greedy_clients_of_the_control_socket_are_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s", control_path=tmp_path / "c"):
            with ExitStack() as stack:
                idle = []
                for _ in range(MOST_CLIENTS):
                    reader, writer = await asyncio.open_unix_connection(tmp_path / "c")
                    stack.callback(writer.close)
                    writer.write(b'{"execute": "help"}\n')
                    assert b"return" in await reader.readline()
                    idle.append((reader, writer))
                with socket.socket(socket.AF_UNIX) as one_more:
                    one_more.connect(str(tmp_path / "c"))
                    one_more.setblocking(False)
                    assert await asyncio.get_running_loop().sock_recv(one_more, 1) == b""
                reader, writer = idle[0]
                writer.write(b"x" * (MOST_LINE_BYTES + 1))
                assert await reader.read() == b""
                reader, writer = idle[1]  # asks and never reads
                writer.write(b'{"execute": "status"}\n' * 100_000)
                with pytest.raises((ConnectionResetError, BrokenPipeError)):
                    await keep_writing(writer)
            assert "return" in (await ask(tmp_path / "c", b'{"execute": "status"}'))[0]

    asyncio.run(scenario())


def mutated(chance: random.Random) -> bytes:
    line = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randrange(4)):
        where = chance.randrange(len(line) + 1)
        match chance.randrange(4):
            case 0:
                line[where:where] = chance.randbytes(chance.randrange(1, 5))
            case 1:
                del line[where : where + chance.randrange(1, 5)]
            case 2:
                line[where:] = chance.choice(SEEDS)
            case _:
                line[where:where] = line[: chance.randrange(40)] * chance.randrange(3)
    return bytes(line).replace(b"\n", b" ")


def test_mutated_requests_get_one_line_of_json_each() -> None:
    """A million of them: IVSHMEM_LAB_FUZZ_INPUTS=1000000."""
    control = ControlSocket("never-started", lambda: {"here": True})
    chance = random.Random(3)
    understood = 0
    for _ in range(FUZZ_INPUTS):
        answer = control.answer(mutated(chance))
        assert answer.count(b"\n") == 1
        assert answer.endswith(b"\n")
        (kind,) = json.loads(answer)
        assert kind in {"return", "error"}
        understood += kind == "return"
    assert 0 < understood < FUZZ_INPUTS


def test_mutated_bytes_on_both_sockets_change_nobodys_view(tmp_path: Path) -> None:
    chance = random.Random(4)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: failures.append(context))
        async with serving(tmp_path / "s", vectors=2, control_path=tmp_path / "c") as watched:
            with await watched.join({0: 2}) as alice, await watched.join({0: 2, 1: 2}) as bob:
                for _ in range(300):
                    with socket.socket(socket.AF_UNIX) as rude:
                        rude.connect(str(tmp_path / chance.choice("sc")))
                        rude.setblocking(False)
                        rude.send(mutated(chance) + chance.choice([b"", b"\n"]) or b"x")
                        if chance.random() < 0.3:
                            rude.shutdown(chance.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
                        await asyncio.sleep(0)
                await alice.until(lambda: alice.vectors == {0: 2, 1: 2} and not alice.at_end)
                await bob.until(lambda: bob.vectors == {0: 2, 1: 2} and not bob.at_end)
                await ask(tmp_path / "c", b'{"execute": "status"}')
                await until(lambda: len(watched.server.peers) == 2)

    failures: list[dict[str, Any]] = []
    before = open_fds()
    asyncio.run(scenario())
    assert failures == []
    assert open_fds() == before


def test_mutated_lines_over_a_live_control_socket_change_nobodys_view(tmp_path: Path) -> None:
    """A million of them: IVSHMEM_LAB_FUZZ_INPUTS=1000000. Each gets its answer; after each batch doorbells ring."""
    chance = random.Random(5)
    answered = dict.fromkeys(("return", "error"), 0)

    async def batch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: int) -> dict[str, Any]:
        lines = [mutated(chance) for _ in range(count)]
        writer.write(b"\n".join([*lines, b'{"execute": "status"}', b""]))
        async with asyncio.timeout(LIMIT_S):
            for line in lines:
                if line.strip():
                    (kind,) = json.loads(await reader.readline())
                    answered[kind] += 1
            status: dict[str, Any] = json.loads(await reader.readline())["return"]
        return status

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: failures.append(context))
        async with serving(tmp_path / "s", vectors=2, control_path=tmp_path / "c") as watched:
            with await watched.join({0: 2}) as alice, await watched.join({0: 2, 1: 2}, lease="bob") as bob:
                await alice.until_vectors({0: 2, 1: 2})
                events = list(watched.events)
                reader, writer = await asyncio.open_unix_connection(tmp_path / "c", limit=1 << 20)
                first, objects = await batch(reader, writer, BATCH), living()
                for count in [BATCH] * (FUZZ_INPUTS // BATCH - 1):
                    status = await batch(reader, writer, count)
                    assert (status["peers"], status["counters"]) == (first["peers"], first["counters"])
                    for one, other in ((alice, bob), (bob, alice)):
                        os.eventfd_write(one.fds[other.peer_id][1], 1)
                        assert os.eventfd_read(other.fds[other.peer_id][1]) == 1
                assert living() - objects < 500
                writer.close()
                await writer.wait_closed()
                for peer in (alice, bob):
                    peer.drain()
                    assert (peer.vectors, peer.departures, peer.at_end) == ({0: 2, 1: 2}, [], False)
                assert watched.events == events

    def living() -> int:
        gc.collect()
        return len(gc.get_objects())

    failures: list[dict[str, Any]] = []
    before = open_fds()
    asyncio.run(scenario())
    assert failures == []
    assert open_fds() == before
    assert sum(answered.values()) > 0.99 * (FUZZ_INPUTS // BATCH * BATCH)
    assert answered["return"]
