"""Servers other than ours, good and bad: their order, their slowness, their mistakes."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from peer_tools import LIMIT_S, Script, not_an_eventfd, scripted

from ivshmem_lab.errors import PeerError, RemoteProtocolError, SharedMemoryError, UnknownPeerError
from ivshmem_lab.peer.peer import Peer


def hello(script: Script, peer_id: int = 1) -> list[tuple[int, int | None]]:
    return [(0, None), (peer_id, None), (-1, script.memory.fd)]


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_introduction_in_qemus_order(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce(
            *hello(script), (0, script.line(0)), (0, script.line(0, 1)), (1, script.line(1)), (1, script.line(1, 1))
        )
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            assert (peer.peer_id, peer.vectors, peer.peers) == (1, 2, {0: 2})
            peer.ring(0, 1)
            assert script.lines[0, 1].take() == 1
            script.lines[1, 0].ring(3)
            assert peer.wait(0, LIMIT_S) == 3


def test_peers_told_of_before_the_memory_are_known(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        first, second, memory = hello(script)
        script.introduce(first, second, (0, script.line(0)), memory, (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            assert (peer.peers, peer.vectors) == ({0: 1}, 1)


def test_vector_that_comes_late_is_found_when_it_is_asked_for(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce(*hello(script), (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            with pytest.raises(UnknownPeerError, match="no vector 1"):
                peer.wait(1, 0)
            script.say((1, script.line(1, 1)))
            script.lines[1, 1].ring()
            assert peer.wait(1, LIMIT_S) == 1


def test_departure_and_return_of_an_id(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce(*hello(script), (0, script.line(0)), (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            script.say((0, None), (2, None), (0, script.line(2)))
            assert peer.peers == {0: 1}
            peer.ring(0)
            assert (script.lines[0, 0].take(), script.lines[2, 0].take()) == (0, 1)


def test_peer_with_fewer_vectors_is_waited_for_only_a_moment(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce(*hello(script), (1, script.line(1)), (1, script.line(1, 1)), (0, script.line(0)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            assert peer.wait_for_peer(0, LIMIT_S) == 0


def test_server_that_ends_right_after_the_introduction_is_good_enough(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce(*hello(script), (1, script.line(1)), end=True)
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            assert not peer.connected
            script.lines[1, 0].ring()
            assert peer.wait(0, LIMIT_S) == 1


def test_silent_server_is_given_up_with_what_is_missing(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        before = open_fds()
        script.introduce((0, None))
        with pytest.raises(PeerError, match=r"within 0.2 s: the peer id, the shared memory did not come"):
            Peer.connect(tmp_path / "s", 0.2)
        script.hang_up()
        assert open_fds() == before


def test_server_that_never_accepts_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as filler:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        filler.connect(str(tmp_path / "s"))
        with pytest.raises(PeerError, match=r"no ivshmem server answers .*temporarily unavailable"):
            Peer.connect(tmp_path / "s", 0.05)


@pytest.mark.parametrize(
    "case",
    [
        "version",
        "version with",
        "cut with",
        "id",
        "memory without",
        "vector",
        "own departure",
        "cut",
        "early end",
        "http",
    ],
)
def test_bad_server_is_refused_and_nothing_stays_open(case: str, tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        before = open_fds()
        version, own, memory = hello(script)
        null = not_an_eventfd()
        said: dict[str, tuple[str, list[tuple[int, int | None]], bytes, bool]] = {
            "version": ("version", [(1, None)], b"", False),
            "version with": ("version", [(0, script.line(0))], b"", False),
            "cut with": ("message", [version, own, memory], b"", False),
            "id": ("peer id", [version, (65536, None)], b"", False),
            "memory without": ("shared memory", [version, own, (-1, None)], b"", False),
            "vector": (
                "vector",
                [version, own, memory, (0, script.line(0)), (0, null), (1, script.line(1))],
                b"",
                False,
            ),
            "own departure": ("departure", [version, own, memory, (0, script.line(0)), (1, None)], b"", False),
            "cut": ("message", [version, own, memory], b"abc", True),
            "early end": ("message", [version, own], b"", True),
            "http": ("version", [], b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
        }
        field, conversation, tail, end = said[case]
        script.introduce(*conversation, end=end, tail=tail, cut_with=script.line(0) if case == "cut with" else None)
        with pytest.raises(RemoteProtocolError) as caught:
            Peer.connect(tmp_path / "s", LIMIT_S)
        assert caught.value.field == field
        os.close(null)
        script.close()
        assert open_fds() <= before


def test_two_descriptors_in_one_message_are_refused(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce(*hello(script)[:2])
        failure: list[RemoteProtocolError] = []

        def connect() -> None:
            with pytest.raises(RemoteProtocolError) as caught:
                Peer.connect(tmp_path / "s", LIMIT_S)
            failure.append(caught.value)

        thread = threading.Thread(target=connect)
        thread.start()
        assert script._thread is not None
        script._thread.join(LIMIT_S)
        assert script.client is not None
        fds = [script.memory.fd, script.line(0)]
        socket.send_fds(script.client, [b"\xff" * 8], fds)
        thread.join(LIMIT_S)
        assert failure[0].field == "message"


def test_memory_that_is_none_is_refused(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce((0, None), (1, None), (-1, script.line(0)))
        with pytest.raises(SharedMemoryError, match="size 0"):
            Peer.connect(tmp_path / "s", LIMIT_S)


def test_mistake_after_the_introduction_is_told_once_and_interrupts_go_on(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce(*hello(script), (0, script.line(0)), (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            script.say((70000, None))
            with pytest.raises(RemoteProtocolError, match="number 70000"):
                peer.wait(0, LIMIT_S)
            assert not peer.connected
            script.lines[1, 0].ring(2)
            assert peer.wait(0, LIMIT_S) == 2
            peer.ring(0)
            assert script.lines[0, 0].take() == 1
