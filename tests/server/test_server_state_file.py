"""The command ends, also by kill -9, and comes back: the same memory, no id twice, leases to those who had them."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_tools import Foreground
from server_tools import Client

from ivshmem_lab.errors import UsageError
from ivshmem_lab.peer.events import Reconnected, ServerGone
from ivshmem_lab.peer.peer import Peer
from ivshmem_lab.server.leases import ServerState
from ivshmem_lab.server.statefile import StateFile

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = f"ivshmem-lab-state-{os.getpid()}"
OBJECT = Path("/dev/shm", NAME)
LIMIT_S = 20.0


@pytest.fixture
def options(tmp_path: Path) -> Iterator[list[str]]:
    yield [
        *("-S", str(tmp_path / "s"), "-M", NAME, "-l", "4K", "-n", "2"),
        *("--keep-memory", "--state", str(tmp_path / "state")),
    ]
    OBJECT.unlink(missing_ok=True)


def join(server: Foreground, path: str, lease: str = "") -> tuple[Client, int]:
    """Connect, and return the id that the server prints."""
    client = Client(path, lease)
    while " has its whole introduction" not in (line := server.line()):
        pass
    return client, int(line.split()[1])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_comes_back_keeps_memory_ids_and_leases(end: int, options: list[str], tmp_path: Path) -> None:
    path = options[1]
    with Foreground(*options) as server:
        server.line()
        first, first_id = join(server, path)
        alice, alice_id = join(server, path, "alice")
        with first, alice:
            assert (first_id, alice_id) == (0, 1)
            OBJECT.write_bytes(b"lives" + bytes(4091))
            server.end(end)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o600
    with Foreground(*options) as server:
        server.line()
        stranger, stranger_id = join(server, path)
        alice, alice_id = join(server, path, "alice")
        with stranger, alice:
            assert alice_id == 1
            assert stranger_id == 2 if end == signal.SIGTERM else stranger_id > 2
            alice.drain()
            assert alice.vectors == {1: 2, stranger_id: 2}
            assert os.pread(alice.memory_fd, 5, 0) == b"lives"
            server.end(signal.SIGTERM)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_host_peer_joins_the_server_that_came_back_and_says_so(end: int, options: list[str], tmp_path: Path) -> None:
    events: list[ServerGone | Reconnected] = []
    with Foreground(*options) as server:
        server.line()
        with Peer.connect(options[1], reconnect=True) as peer:
            peer.on_server(events.append)
            peer.memory[0:2] = 7, 8
            server.end(end)
            with Foreground(*options) as next_server:
                next_server.line()
                deadline = time.monotonic() + LIMIT_S
                while len(events) < 2 and time.monotonic() < deadline:
                    peer.dispatch(LIMIT_S)
                assert events == [ServerGone(), Reconnected(peer_id=peer.peer_id, previous_id=0, same_memory=True)]
                assert peer.peer_id > 0  # somebody may still remember 0
                assert peer.memory[:2].tolist() == [7, 8]
                assert json.loads((tmp_path / "state").read_bytes())["next_id"] > peer.peer_id


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_host_peers_with_leases_have_the_same_ids_on_the_server_that_came_back(
    end: int, options: list[str], tmp_path: Path
) -> None:
    def connect(lease: str) -> Peer:
        return Peer.connect(options[1], reconnect=True, lease=lease)

    with Foreground(*options) as server:
        server.line()
        with Peer.connect(options[1]), connect("red") as red, connect("blue") as blue:
            events: dict[Peer, list[object]] = {red: [], blue: []}
            for peer, heard in events.items():
                peer.on_server(heard.append)
            server.end(end)
            with Foreground(*options) as next_server:
                next_server.line()
                deadline = time.monotonic() + LIMIT_S
                while min(map(len, events.values())) < 2 and time.monotonic() < deadline:
                    for peer in events:
                        peer.dispatch(0.02)
                assert events[red] == [ServerGone(), Reconnected(peer_id=1, previous_id=1, same_memory=True)]
                assert events[blue] == [ServerGone(), Reconnected(peer_id=2, previous_id=2, same_memory=True)]
                assert red.wait_for_peer(2, LIMIT_S) == 2
                red.ring(2, 1)
                assert blue.wait(1, LIMIT_S) == 1
                assert red.peers == {2: 2}  # the one without a lease did not come back
    leases = json.loads((tmp_path / "state").read_bytes())["leases"]
    assert [(each["name"], each["id"]) for each in leases] == [("red", 1), ("blue", 2)]


def test_ids_are_reserved_before_they_are_given_also_across_the_wrap(tmp_path: Path) -> None:
    file = StateFile(str(tmp_path / "state"))
    file.create(ServerState(65500, 1))
    for given in [*range(65500, 65536), *range(200)]:
        file.update(ServerState(given, 1))
        state = StateFile(file.path).load()
        assert state is not None
        assert 32 <= (state.next_id - given) % 65536 <= 64
    file.update(ServerState(200, 1), last=True)
    file.update(ServerState(201, 1))
    state = StateFile(file.path).load()
    assert state is not None
    assert state.next_id == 200


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"next_id": 65536, "vectors": 1, "leases": []}',
        b'{"next_id": 1, "vectors": 1, "leases": [{"name": "a/b", "uid": 0, "id": 0}]}',
        b'{"next_id": 1, "vectors": 1, "leases": [{"name": "a", "uid": 0, "id": 0}, {"name": "b", "uid": 0, "id": 0}]}',
    ],
)
def test_a_file_that_is_no_state_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(UsageError, match=r"state file .* cannot be used"):
        StateFile(str(tmp_path / "state")).load()


def test_a_file_that_cannot_be_written_ends_the_start_in_one_line(options: list[str], tmp_path: Path) -> None:
    options[-1] = str(tmp_path / "nowhere" / "state")
    with Foreground(*options) as server:
        assert server.process.wait(LIMIT_S) == 2
        assert server.process.stderr is not None
        error = server.process.stderr.read().decode()
    assert error.count("\n") == 1
    assert "nowhere" in error
    assert not Path(options[1]).exists()
