"""The server goes and comes back on the same path."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from peer_tools import LIMIT_S, scripted, served

from ivshmem_lab.errors import UnknownPeerError
from ivshmem_lab.peer.events import Interrupt, Reconnected, ServerGone
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path


def test_a_peer_comes_back_by_itself_and_says_so(tmp_path: Path) -> None:
    events: list[ServerGone | Reconnected] = []
    with ExitStack() as stack:
        end = stack.enter_context(served(tmp_path / "s"))
        stack.enter_context(Peer.connect(tmp_path / "s"))
        peer = stack.enter_context(Peer.connect(tmp_path / "s", reconnect=True))
        peer.on_server(events.append)
        left: list[int] = []
        peer.on_leave(left.append)
        old = peer.memory
        old[0] = 1
        end()
        assert peer.dispatch(LIMIT_S) == 1
        assert not peer.connected
        assert "the server is gone and is looked for" in repr(peer)
        with pytest.raises(UnknownPeerError, match="the server is gone and is looked for"):
            peer.ring(9)
        with pytest.raises(UnknownPeerError, match="did not come, the server is gone"):
            peer.wait_for_peer(9, 0.02)
        assert peer.wait(0, 0.02) == 0
        stack.enter_context(served(tmp_path / "s", size_bytes=1 << 17))
        deadline = time.monotonic() + LIMIT_S
        while len(events) < 2 and time.monotonic() < deadline:
            peer.dispatch(LIMIT_S)
        assert events == [ServerGone(), Reconnected(peer_id=0, previous_id=1, same_memory=False)]
        assert left == [0]
        assert (peer.connected, peer.peer_id, peer.size_bytes, old[0]) == (True, 0, 1 << 17, 1)
        with Peer.connect(tmp_path / "s") as other:
            other.memory[1 << 16] = 5
            assert peer.array("u1", 1 << 16, 1)[0] == peer.load32(1 << 16) == 5
            other.ring(0)
            assert peer.wait(0, LIMIT_S) == 1


def test_a_wait_goes_on_across_the_gap(tmp_path: Path) -> None:
    with ExitStack() as stack:
        end = stack.enter_context(served(tmp_path / "s"))
        peer = stack.enter_context(Peer.connect(tmp_path / "s", reconnect=True))
        peer.ring(0)
        peer.wait(0, LIMIT_S)  # by the short way from now on
        end()
        stack.enter_context(served(tmp_path / "s"))

        async def run() -> Interrupt:
            back = asyncio.Event()
            peer.on_server(lambda event: isinstance(event, Reconnected) and back.set())
            task, serving = asyncio.ensure_future(anext(peer.interrupts())), asyncio.ensure_future(peer.serve())
            await asyncio.wait_for(back.wait(), LIMIT_S)
            peer.ring(0)
            interrupt = await asyncio.wait_for(task, LIMIT_S)
            serving.cancel()
            return interrupt

        assert asyncio.run(run()) == Interrupt(0, 1)
        with Peer.connect(tmp_path / "s") as other:
            other.ring(0)
            assert peer.wait(0, LIMIT_S) == 1


def test_same_memory_stays_the_same_array_and_counts_are_kept(tmp_path: Path) -> None:
    events: list[ServerGone | Reconnected] = []
    with scripted(tmp_path / "s") as script:
        said = [(0, None), (1, None), (-1, script.memory.fd), (0, script.line(0)), (1, script.line(1))]
        script.introduce(*said)
        with Peer.connect(tmp_path / "s", LIMIT_S, reconnect=True) as peer:
            peer.on_server(events.append)
            memory = peer.memory
            script.lines[1, 0].ring(4)  # nobody takes it before the server goes
            script.hang_up()
            assert script._thread is not None
            script._thread.join(LIMIT_S)
            script.introduce((0, None), (2, None), (-1, script.memory.fd), (0, script.line(0)), (2, script.line(2)))
            while len(events) < 2:
                assert peer.dispatch(LIMIT_S)
            assert events[1] == Reconnected(peer_id=2, previous_id=1, same_memory=True)
            assert peer.memory is memory
            assert peer.wait(0, LIMIT_S) == 4
            script.lines[2, 0].ring()
            assert peer.wait(0, LIMIT_S) == 1


def test_a_bad_server_in_between_is_no_server(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce((0, None), (1, None), (-1, script.memory.fd), (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S, reconnect=True) as peer:
            script.hang_up()
            script.introduce((7, None), end=True)
            deadline = time.monotonic() + LIMIT_S
            assert script._thread is not None
            while script._thread.is_alive() and time.monotonic() < deadline:
                peer.wait(0, 0.01)
            script.introduce((0, None), (3, None), (-1, script.memory.fd), (3, script.line(2)))
            while not peer.connected and time.monotonic() < deadline:
                peer.wait(0, 0.01)
            assert peer.peer_id == 3


def test_without_reconnect_the_server_stays_gone(tmp_path: Path) -> None:
    with served(tmp_path / "s") as end, Peer.connect(tmp_path / "s") as peer:
        end()
        with served(tmp_path / "s"):
            assert peer.wait(0, 0.05) == 0
            assert not peer.connected
