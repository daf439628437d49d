"""A Python process as a peer of our server: memory, interrupts, who comes and goes."""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from peer_tools import LIMIT_S, served

from ivshmem_lab.errors import PeerClosedError, PeerError, UnknownPeerError, UsageError
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path


def test_memory_is_one_and_the_same_without_copies(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        assert (alice.memory.shape, alice.memory.dtype, alice.size_bytes) == ((1 << 16,), np.dtype(np.uint8), 1 << 16)
        alice.memory[100:103] = [1, 2, 3]
        assert bob.memory[100:103].tolist() == [1, 2, 3]
        words = bob.memory.view("<u4")
        words[10] = 0xDEADBEEF
        assert alice.memory[40:44].tobytes() == b"\xef\xbe\xad\xde"
        assert np.shares_memory(alice.memory, alice.memory[5:9])


def test_memory_outlives_the_peer(tmp_path: Path) -> None:
    with served(tmp_path / "s"):
        with Peer.connect(tmp_path / "s") as alice:
            memory = alice.memory
        memory[0] = 9
        with Peer.connect(tmp_path / "s") as bob:
            assert bob.memory[0] == 9


def test_everybody_knows_ids_and_vectors_at_once(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=4), ExitStack() as stack:
        peers = [stack.enter_context(Peer.connect(tmp_path / "s")) for _ in range(8)]
        for index, peer in enumerate(peers):
            assert (peer.peer_id, peer.vectors) == (index, 4)
        assert peers[7].peers == dict.fromkeys(range(7), 4)
        for newcomer in range(1, 8):
            assert peers[0].wait_for_peer(newcomer, LIMIT_S) == newcomer
        assert peers[0].peers == dict.fromkeys(range(1, 8), 4)


def test_interrupts_are_counted_by_vector(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        alice.wait_for_peer(bob.peer_id, LIMIT_S)
        for _ in range(5):
            alice.ring(bob.peer_id, vector=1)
        alice.ring(bob.peer_id)
        assert bob.wait(vector=1, timeout_s=LIMIT_S) == 5
        assert bob.wait(vector=0, timeout_s=LIMIT_S) == 1
        assert bob.wait(vector=0, timeout_s=0) == 0
        bob.ring(bob.peer_id)
        assert bob.wait(timeout_s=LIMIT_S) == 1


def test_thousand_interrupts_each_way_and_none_is_lost(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        alice.wait_for_peer(bob.peer_id, LIMIT_S)

        def answer() -> None:
            for _ in range(1000):
                assert bob.wait(timeout_s=LIMIT_S) == 1
                bob.ring(alice.peer_id)

        thread = threading.Thread(target=answer)
        thread.start()
        received = 0
        for _ in range(1000):
            alice.ring(bob.peer_id)
            received += alice.wait(timeout_s=LIMIT_S)
        thread.join(LIMIT_S)
        assert received == 1000


def test_wait_ends_in_time_and_hears_of_newcomers_meanwhile(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice:
        start = time.monotonic()
        assert alice.wait(timeout_s=0.03) == 0
        assert time.monotonic() - start >= 0.03
        with Peer.connect(tmp_path / "s") as bob:
            bob.ring(alice.peer_id)
            assert alice.wait(timeout_s=LIMIT_S) == 1
            assert alice.peers == {1: 1}
        assert alice.wait(timeout_s=0.1) == 0
        assert alice.peers == {}


def test_ringing_who_is_not_there_names_who_is(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s"):
        with pytest.raises(UnknownPeerError, match=r"no peer 7; .*0 with 2, 1 with 2 \(we are peer 0\)"):
            alice.ring(7)
        for vector in (2, -1, 65536):
            with pytest.raises(UnknownPeerError, match=f"peer 1 has no vector {vector}; "):
                alice.ring(1, vector)
        with pytest.raises(UnknownPeerError, match="peer 0 has no vector 2"):
            alice.wait(vector=2)
        with pytest.raises(UnknownPeerError, match="peer 0 has no vector -1"):
            alice.vector_fd(-1)


def test_newcomer_can_be_rung_without_asking_first(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        alice.ring(bob.peer_id)
        assert bob.wait(timeout_s=LIMIT_S) == 1


def test_wait_for_peer_gives_the_newcomer_or_names_who_is_there(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice:
        with pytest.raises(UnknownPeerError, match=r"another peer did not come, not within 0.02 s; .* 0 with 1"):
            alice.wait_for_peer(None, 0.02)
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(alice.wait_for_peer(None, LIMIT_S)))
        thread.start()
        with Peer.connect(tmp_path / "s") as bob:
            thread.join(LIMIT_S)
            assert found == [bob.peer_id]


def test_server_that_ends_leaves_memory_and_interrupts(tmp_path: Path) -> None:
    with served(tmp_path / "s") as end, Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        alice.wait_for_peer(bob.peer_id, LIMIT_S)
        states = [alice.connected]
        end()
        assert [*states, alice.connected] == [True, False]
        assert "the server is gone" in repr(alice)
        alice.ring(bob.peer_id)
        assert bob.wait(timeout_s=LIMIT_S) == 1
        alice.memory[3] = 3
        assert bob.memory[3] == 3
        assert bob.wait(timeout_s=0.01) == 0
        with pytest.raises(UnknownPeerError, match="the server is gone"):
            alice.wait_for_peer(17)


def test_closing_wakes_those_who_wait(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice:
        outcomes: list[str] = []

        def wait_on(call: str) -> None:
            try:
                alice.wait() if call == "wait" else alice.wait_for_peer()
            except PeerClosedError as error:
                outcomes.append(str(error))

        threads = [threading.Thread(target=wait_on, args=(call,), daemon=True) for call in ("wait", "wait_for_peer")]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + LIMIT_S
        while len(alice._polling) < 2 and time.monotonic() < deadline:
            threads[0].join(0.001)
        alice.close()
        for thread in threads:
            thread.join(1)
        assert len(outcomes) == 2
        assert all("peer 0 of" in text and "is closed" in text for text in outcomes)


def test_after_close_everything_says_so(tmp_path: Path) -> None:
    with served(tmp_path / "s"):
        alice = Peer.connect(tmp_path / "s")
        alice.close()
        alice.close()
        assert alice.closed
        assert not alice.connected
        assert repr(alice).endswith("closed>")
        for call in (lambda: alice.memory, lambda: alice.peers, lambda: alice.vectors, lambda: alice.size_bytes):
            with pytest.raises(PeerClosedError):
                call()
        for method in (alice.wait, alice.wait_for_peer, alice.vector_fd):
            with pytest.raises(PeerClosedError):
                method(0)
        with pytest.raises(PeerClosedError, match="connect again"):
            alice.ring(0)


def test_vector_descriptor_works_with_select(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice:
        assert select.select([alice.vector_fd()], [], [], 0) == ([], [], [])
        alice.ring(alice.peer_id)
        assert select.select([alice.vector_fd()], [], [], LIMIT_S)[0] == [alice.vector_fd()]
        assert os.eventfd_read(alice.vector_fd()) == 1


def test_peers_without_vectors_connect_and_share_memory(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=0), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        assert (bob.peer_id, bob.vectors, bob.peers) == (1, 0, {})
        alice.memory[0] = 1
        assert bob.memory[0] == 1
        with pytest.raises(UnknownPeerError, match="peer 1 has no vector 0"):
            bob.wait()


def test_two_thousand_vectors_arrive_before_connect_returns(tmp_path: Path) -> None:
    with (
        served(tmp_path / "s", vectors=2048),
        Peer.connect(tmp_path / "s") as alice,
        Peer.connect(tmp_path / "s") as bob,
    ):
        assert bob.peers == {0: 2048}
        assert bob.vectors == 2048
        bob.ring(0, 2047)
        assert alice.wait(2047, LIMIT_S) == 1


def test_repr_shows_the_neighbourhood(tmp_path: Path) -> None:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s"), Peer.connect(tmp_path / "s") as bob:
        assert repr(bob) == (
            f"<Peer 1 of {tmp_path}/s: memory 64K, vectors 2; other peers and their vectors: 0 with 2>"
        )


def test_nobody_listening_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"no ivshmem server answers on '.*': No such file .*ivshmem-server -F -S"):
        Peer.connect(tmp_path / "s")
    (tmp_path / "s").touch()
    with pytest.raises(PeerError, match="refused"):
        Peer.connect(tmp_path / "s")
    with pytest.raises(UsageError, match="1 to 107"):
        Peer.connect("x" * 108)


def test_waiting_ends_in_time_where_qemu_has_just_made_the_eventfd_a_blocking_one(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice:
        assert alice.wait(timeout_s=0.01) == 0  # the short way is known from here on
        os.set_blocking(alice.vector_fd(0), True)
        assert alice.wait(timeout_s=0.02) == 0
        with Peer.connect(tmp_path / "s") as bob:  # news of the server, but no interrupt
            assert alice.wait(timeout_s=0.05) == 0
            bob.ring(alice.peer_id)
            assert alice.wait(timeout_s=LIMIT_S) == 1
