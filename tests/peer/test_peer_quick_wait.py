"""A wait without a time limit reads its eventfd and nothing else; what that must not cost."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from peer_tools import LIMIT_S, served

from ivshmem_lab.errors import PeerClosedError
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable


def quick(peer: Peer) -> Peer:
    """Have a peer wait once, after which it waits the quick way."""
    peer.ring(peer.peer_id)
    assert peer.wait() == 1
    assert os.get_blocking(peer._line(peer.peer_id, 0).fileno())
    return peer


def in_a_thread(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def sleeps(thread: threading.Thread) -> bool:
    """Tell whether a thread waits in the kernel (proc(5))."""
    return ") S " in Path(f"/proc/self/task/{thread.native_id}/stat").read_text()


def test_counts_are_whole_and_none_is_lost(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as me, Peer.connect(tmp_path / "s") as other:
        quick(me)

        def ring() -> None:
            for _ in range(2000):
                other.ring(me.peer_id)

        thread = in_a_thread(ring)
        came = 0
        while came < 2000:
            came += me.wait()
        thread.join(LIMIT_S)
        assert (came, me.wait(0, 0)) == (2000, 0)


def test_closing_wakes_every_thread_that_waits(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        quick(peer)
        errors: list[str] = []

        def wait() -> None:
            with pytest.raises(PeerClosedError) as caught:
                peer.wait()
            errors.append(str(caught.value))

        threads = [in_a_thread(wait) for _ in range(3)]
        while len(peer._polling) < 3:
            threading.Event().wait(0.001)
        peer.close()
        for thread in threads:
            thread.join(LIMIT_S)
        assert len(errors) == 3


@pytest.mark.parametrize("meanwhile", ["a callback is wanted", "the descriptor is lent"])
def test_closing_wakes_one_that_began_to_wait_the_quick_way_before(tmp_path: Path, meanwhile: str) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        quick(peer)
        ended: list[str] = []

        def wait() -> None:
            with pytest.raises(PeerClosedError):
                peer.wait()
            ended.append("closed")

        thread = in_a_thread(wait)
        while not sleeps(thread):
            threading.Event().wait(0.001)
        if meanwhile == "a callback is wanted":
            peer.on_join(lambda peer_id: None)
        else:
            peer.vector_fd()
        peer.close()
        thread.join(LIMIT_S)
        assert ended == ["closed"]


def test_one_whose_eventfd_qemu_makes_a_non_blocking_one_again_goes_on(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as me, Peer.connect(tmp_path / "s") as other:
        fd = quick(me)._line(me.peer_id, 0).fileno()
        os.set_blocking(fd, False)  # as every peer does that joins: the open file is shared
        thread = in_a_thread(lambda: other.ring(me.peer_id))
        assert me.wait() == 1
        thread.join(LIMIT_S)
        assert me.wait(0, 0) == 0


def test_a_time_limit_holds_and_takes_nothing_while_the_eventfd_is_a_blocking_one(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        quick(peer)
        assert peer.wait(0, 0) == 0
        assert peer.wait(0, 0.01) == 0
        peer.ring(peer.peer_id)
        assert peer.wait(0, LIMIT_S) == 1


def test_callbacks_make_waits_hear_the_server_again(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        quick(peer)
        seen: list[int] = []
        peer.on_join(seen.append)
        with Peer.connect(tmp_path / "s") as other:
            other.ring(peer.peer_id)
            assert peer.wait() == 1
            while not seen:
                peer.dispatch(LIMIT_S)
        assert seen == [1]


def test_a_descriptor_that_is_lent_is_and_stays_non_blocking(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        fd = quick(peer).vector_fd()
        assert not os.get_blocking(fd)
        peer.ring(peer.peer_id)
        assert peer.wait() == 1
        assert not os.get_blocking(fd)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
