"""Interrupts and news as they come: callbacks, event loops, and what came before anybody looked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

import pytest
from peer_tools import LIMIT_S, scripted, served

from ivshmem_lab.errors import PeerClosedError, UnknownPeerError
from ivshmem_lab.peer.events import Interrupt, ServerGone
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path


def test_a_wait_that_starts_late_still_sees_the_count(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.lines[1, 0].ring(3)  # before the peer exists
        script.introduce((0, None), (1, None), (-1, script.memory.fd), (0, script.line(0)), (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            assert peer.wait(0, 0) == 3
            script.lines[1, 0].ring(2)
            assert peer.wait(0, LIMIT_S) == 2
            assert peer.wait(0, 0) == 0
            assert peer.wait(0, -1) == 0


def test_callbacks_are_called_by_dispatch_with_counts_and_ids(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2) as end, Peer.connect(tmp_path / "s") as alice:
        seen: list[object] = []
        alice.on_interrupt(0, lambda count: seen.append(("interrupt", count)))
        alice.on_join(lambda peer_id: seen.append(("join", peer_id)))
        alice.on_leave(lambda peer_id: seen.append(("leave", peer_id)))
        alice.on_server(seen.append)
        assert alice.dispatch(0) == 0
        with Peer.connect(tmp_path / "s") as bob:
            assert alice.dispatch(LIMIT_S) == 1
            for _ in range(3):
                bob.ring(0)
            bob.ring(0, 1)
            assert alice.dispatch(LIMIT_S) == 1
        assert alice.dispatch(LIMIT_S) == 1
        assert alice.wait(1, 0) == 1, "a vector without a callback is left alone"
        end()
        assert alice.dispatch(LIMIT_S) == 1
        assert seen == [("join", 1), ("interrupt", 3), ("leave", 1), ServerGone()]


def test_what_a_callback_raises_comes_out_and_the_others_are_called_later(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        counts: list[int] = []

        def fail(count: int) -> None:
            raise KeyError(count)

        peer.on_interrupt(0, fail)
        peer.on_interrupt(0, counts.append)
        peer.ring(0)
        with pytest.raises(KeyError):
            peer.dispatch(LIMIT_S)
        assert peer.dispatch(LIMIT_S) == 1
        assert counts == [1]
        with pytest.raises(UnknownPeerError, match="no vector 7"):
            peer.on_interrupt(7, fail)


def test_interrupts_are_iterated_on_a_running_loop(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        alice.wait_for_peer(1, LIMIT_S)
        threads = threading.active_count()

        async def run() -> list[Interrupt]:
            alice.ring(1, 1)
            alice.ring(1, 1)
            seen: list[Interrupt] = []
            asyncio.get_running_loop().call_later(0.01, alice.ring, 1, 0)
            async for interrupt in bob.interrupts():
                seen.append(interrupt)
                if len(seen) == 2:
                    break
            assert threading.active_count() == threads
            return seen

        assert asyncio.run(run()) == [Interrupt(1, 2), Interrupt(0, 1)]


def test_several_tasks_iterate_at_the_same_time(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=3), Peer.connect(tmp_path / "s") as peer:

        async def first(vector: int) -> Interrupt:
            return await anext(peer.interrupts(vector))

        async def run() -> list[Interrupt]:
            tasks = [asyncio.create_task(first(vector)) for vector in range(3)]
            await asyncio.sleep(0)
            for vector in range(3):
                peer.ring(0, vector)
            return await asyncio.gather(*tasks)

        assert asyncio.run(asyncio.wait_for(run(), LIMIT_S)) == [Interrupt(vector, 1) for vector in range(3)]


def test_closing_ends_the_iteration_also_from_another_thread(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:

        async def run() -> None:
            task = asyncio.ensure_future(anext(peer.interrupts()))
            await asyncio.sleep(0)
            await asyncio.to_thread(peer.close)
            with pytest.raises(PeerClosedError, match="is closed"):
                await asyncio.wait_for(task, LIMIT_S)

        asyncio.run(run())


def test_a_cancelled_wait_takes_nothing(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:

        async def run() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(anext(peer.interrupts()), 0.01)

        asyncio.run(run())
        peer.ring(0)
        assert peer.wait(0, LIMIT_S) == 1


def test_serve_calls_callbacks_on_the_loop_until_close(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:

        async def run() -> list[int]:
            task = asyncio.create_task(alice.serve())
            await asyncio.sleep(0)
            counts: list[int] = []
            called = asyncio.Event()
            alice.on_interrupt(0, lambda count: (counts.append(count), called.set()))  # heard while serve() waits
            bob.ring(0)
            await asyncio.wait_for(called.wait(), LIMIT_S)
            alice.close()
            await asyncio.wait_for(task, LIMIT_S)
            return counts

        assert asyncio.run(run()) == [1]
