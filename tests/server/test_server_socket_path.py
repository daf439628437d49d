"""A server's socket: stale ones are replaced, live ones and foreign files are left alone."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest
from server_tools import open_fds, serving

from ivshmem_lab.errors import ServerError, UsageError
from ivshmem_lab.server.listener import Listener

if TYPE_CHECKING:
    from pathlib import Path


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()

    async def scenario() -> None:
        async with serving(path) as watched, asyncio.timeout(20):
            (await watched.join({0: 1})).close()

    asyncio.run(scenario())
    assert not path.exists()


def test_live_server_is_refused_by_name_and_its_peers_hear_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path / "s") as watched:
            with await watched.join({0: 1}) as alice:
                known = list(watched.events)
                with pytest.raises(ServerError, match=f"listens on '{tmp_path}/s' already"):
                    async with serving(tmp_path / "s"):
                        pass
                with await watched.join({0: 1, 1: 1}) as bob:  # the very next id
                    assert bob.peer_id == 1
                alice.drain()
                assert [type(e).__name__ for e in known] == ["ServerStarted", "PeerJoined", "PeerSettled"]
                assert alice.departures in ([], [1])

    before = open_fds()
    asyncio.run(scenario())
    assert open_fds() == before


def test_live_server_under_another_spelling_of_its_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listener = Listener.open("s")
    try:
        for spelling in (tmp_path / "s", tmp_path / "." / ".." / tmp_path.name / "s"):
            with pytest.raises(ServerError, match="already"):
                Listener.open(os.fspath(spelling))
        assert (tmp_path / "s").is_socket()
    finally:
        listener.close()
    assert not (tmp_path / "s").exists()


def test_datagram_socket_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "s"))
        with pytest.raises(ServerError, match="already"):
            Listener.open(tmp_path / "s")
    assert (tmp_path / "s").is_socket()


def test_file_in_the_way_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(UsageError, match="is not a socket"):
        Listener.open(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


def test_impossible_paths_are_refused_by_name(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(UsageError, match="nowhere/s': No such file"):
        Listener.open(tmp_path / "nowhere" / "s")
    with pytest.raises(UsageError, match="1 to 107"):
        Listener.open(tmp_path / ("x" * 108))
    assert open_fds() == before


def test_socket_that_took_the_path_later_is_spared(tmp_path: Path) -> None:
    first = Listener.open(tmp_path / "s")
    (tmp_path / "s").unlink()
    second = Listener.open(tmp_path / "s")
    first.close()
    assert (tmp_path / "s").is_socket()
    second.close()
    assert not (tmp_path / "s").exists()


def test_working_directory_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listener = Listener.open("s")
    monkeypatch.chdir("/")
    listener.close()
    assert not (tmp_path / "s").exists()
