"""Channels between peers of one process: messages, room, waking, and the other side's end."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_tools import LIMIT_S, scripted, served

from ivshmem_lab.errors import PeerClosedError, SharedMemoryError, UnknownPeerError, UsageError
from ivshmem_lab.peer.channel import (
    Channel,
    ChannelClosedError,
    ChannelFullError,
    MergedChannelError,
    Receiver,
    Sender,
    area_bytes,
    merge,
)
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = area_bytes(4096)


def both(memory: np.ndarray, size_bytes: int = SIZE) -> tuple[Sender, Receiver]:
    return Sender(memory, 0, size_bytes), Receiver(memory, 0, size_bytes)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Peer, Peer]]:
    with served(tmp_path / "s", vectors=2), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        alice.wait_for_peer(1, LIMIT_S)
        yield alice, bob


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 2032), min_size=1, max_size=60), burst=st.integers(1, 5), many=st.booleans())
def test_any_messages_come_out_as_they_went_in(sizes: list[int], burst: int, many: bool) -> None:
    sender, receiver = both(np.zeros(SIZE, dtype=np.uint8))
    messages = [bytes([index & 255]) * size for index, size in enumerate(sizes)]
    waiting: list[bytes] = []
    for start in range(0, len(messages), burst):
        for message in messages[start : start + burst]:
            while True:
                try:
                    sender.send(message, 0)
                    break
                except ChannelFullError:
                    if many:
                        assert [view.tobytes() for view in receiver.peek_all(0)] == waiting
                        receiver.release()
                        waiting.clear()
                    else:
                        assert receiver.receive(0) == waiting.pop(0)
            waiting.append(message)
    assert [receiver.receive(0) for _ in waiting] == waiting
    assert receiver.receive(0) is None


def test_counters_wrap_at_two_to_the_32nd() -> None:
    memory = np.zeros(SIZE, dtype=np.uint8)
    sender, receiver = both(memory)
    for end in (sender, receiver):
        end._head = end._tail = (1 << 32) - 4096
    sender._limit = 1 << 32
    words = memory.view("<u4")
    words[4] = words[18] = (1 << 32) - 4096
    for index in range(20):
        sender.send(bytes([index]) * 700, 0)
        assert receiver.receive(0) == bytes([index]) * 700
    assert words[4] == words[18] < 20000


def test_what_is_sent_may_be_any_buffer_in_one_piece() -> None:
    sender, receiver = both(np.zeros(SIZE, dtype=np.uint8))
    words = np.arange(12, dtype="<u4").reshape(3, 4)
    for data in (
        b"abc",
        bytearray(b"abc"),
        memoryview(b"abcd").cast("I"),
        words,
        words[0],
        words[:0],
        np.ones(3, np.uint8),
    ):
        sender.send(data, 0)
        assert receiver.receive(0) == memoryview(data).tobytes()
    with pytest.raises(UsageError, match="one piece"):
        sender.send(words[:, 1])
    with pytest.raises(UsageError, match="2033 bytes does not fit; this channel takes 0 to 2032"):
        sender.send(bytes(2033))


def test_reserve_and_peek_copy_nothing_and_share_the_memory() -> None:
    memory = np.zeros(SIZE, dtype=np.uint8)
    sender, receiver = both(memory)
    room = sender.reserve(100, 0)
    assert np.shares_memory(room, memory)
    room[:] = 7
    assert receiver.peek(0) is None
    sender.commit(60)
    view = receiver.peek(0)
    assert view is not None
    assert np.shares_memory(view, memory)
    assert view.tolist() == [7] * 60
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    again = receiver.peek(0)
    assert again is not None
    assert again.tolist() == view.tolist()
    receiver.release()
    assert (sender.copied_bytes, receiver.copied_bytes) == (0, 0)
    sender.send(bytes(10))
    receiver.receive()
    assert (sender.copied_bytes, receiver.copied_bytes) == (10, 10)


def test_calls_out_of_order_are_refused() -> None:
    sender, receiver = both(np.zeros(SIZE, dtype=np.uint8))
    with pytest.raises(UsageError, match="nothing is reserved"):
        sender.commit()
    with pytest.raises(UsageError, match="nothing is peeked"):
        receiver.release()
    sender.reserve(10)
    with pytest.raises(UsageError, match="cannot commit 11 bytes: 10 were reserved"):
        sender.commit(11)
    with pytest.raises(UsageError, match="message of -1 bytes"):
        sender.reserve(-1)


def test_a_full_ring_is_said_in_time_and_goes_on_when_read() -> None:
    sender, receiver = both(np.zeros(SIZE, dtype=np.uint8))
    sender.send(bytes(2000))
    sender.send(bytes(2000))
    with pytest.raises(ChannelFullError, match=r"no room for 100 bytes within 0\.001 s"):
        sender.send(bytes(100), 0.001)
    assert receiver.receive(0) == bytes(2000)
    sender.send(bytes(100), 0)


@pytest.mark.parametrize(
    ("size_bytes", "offset"),
    [(SIZE + 64, 0), (SIZE - 1, 0), (100, 0), (0, 0), (SIZE, 32), (SIZE, -64), (SIZE, 1 << 13)],
)
def test_an_area_that_cannot_be_is_refused(size_bytes: int, offset: int) -> None:
    with pytest.raises(UsageError, match="channel"):
        Sender(np.zeros(1 << 13, dtype=np.uint8), offset, size_bytes)


def test_read_only_memory_is_refused() -> None:
    memory = np.zeros(SIZE, dtype=np.uint8)
    memory.flags.writeable = False
    with pytest.raises(SharedMemoryError, match="read-only"):
        Receiver(memory, 0, SIZE)


@pytest.mark.parametrize("doorbell", [True, False])
@pytest.mark.parametrize("receiver_first", [True, False])
def test_many_messages_between_two_threads(pair: tuple[Peer, Peer], doorbell: bool, receiver_first: bool) -> None:
    alice, bob = pair
    messages = [bytes([index % 251]) * (index * 37 % 1500) for index in range(400)]

    def send() -> None:
        with Channel.sender(alice, 4096, SIZE, vector=1, doorbell=doorbell) as sender:
            for message in messages[:200]:
                sender.send(message, LIMIT_S)
            sender.send_all(messages[200:], LIMIT_S)

    receiver = Channel.receiver(bob, 4096, SIZE, vector=1, doorbell=doorbell) if receiver_first else None
    thread = threading.Thread(target=send)
    thread.start()
    receiver = receiver or Channel.receiver(bob, 4096, SIZE, vector=1, doorbell=doorbell)
    received = [receiver.receive(LIMIT_S) for _ in messages]
    thread.join(LIMIT_S)
    assert received == messages
    with pytest.raises(ChannelClosedError, match="everything has been read"):
        receiver.receive(LIMIT_S)


def test_a_doorbell_side_and_a_looking_side_understand_each_other(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    sender = Channel.sender(alice, 0, SIZE, doorbell=False)
    receiver = Channel.receiver(bob, 0, SIZE)
    thread = threading.Timer(0.01, sender.send, [b"x"])
    thread.start()
    assert receiver.receive(LIMIT_S) == b"x"
    thread.join()


def test_a_closed_receiver_ends_the_sender(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    sender, receiver = Channel.sender(alice, 0, SIZE), Channel.receiver(bob, 0, SIZE)
    sender.send(b"1")
    receiver.close()
    receiver.close()
    with pytest.raises(PeerClosedError, match="the receiver has closed"):
        sender.send(b"2")
    with pytest.raises(ChannelClosedError, match=r"this end .* is closed"):
        receiver.receive()
    sender.close()
    with pytest.raises(ChannelClosedError, match=r"this end .* is closed"):
        sender.send(b"2")
    assert repr(sender) == "<Sender of 4096 bytes at 0x0: closed>"


def test_a_sender_that_leaves_without_a_word_is_noticed(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    sender, receiver = Channel.sender(alice, 0, SIZE), Channel.receiver(bob, 0, SIZE)
    sender.send(b"last words")
    alice.close()
    assert receiver.receive(LIMIT_S) == b"last words"
    with pytest.raises(ChannelClosedError, match="peer 0, the other side of the channel, has left"):
        receiver.receive(LIMIT_S)


def test_a_receiver_that_leaves_without_a_word_is_noticed(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    sender, receiver = Channel.sender(alice, 0, SIZE), Channel.receiver(bob, 0, SIZE)
    sender.send(b"x")
    assert receiver.receive(LIMIT_S) == b"x"
    bob.close()
    with pytest.raises(ChannelClosedError):
        sender.send_all([bytes(2000)] * 3, LIMIT_S)


def test_a_vector_that_the_peer_has_not_is_refused(pair: tuple[Peer, Peer]) -> None:
    with pytest.raises(UnknownPeerError, match="peer 0 has no vector 2"):
        Channel.sender(pair[0], 0, SIZE, vector=2)


def test_own_peer_closed_is_said(pair: tuple[Peer, Peer]) -> None:
    alice, bob = pair
    receiver = Channel.receiver(bob, 0, SIZE)
    bob.close()
    with pytest.raises(PeerClosedError):
        receiver.receive(LIMIT_S)
    assert alice.connected


def test_a_new_sender_is_a_new_session_and_a_new_receiver_goes_on() -> None:
    memory = np.zeros(SIZE, dtype=np.uint8)
    sender, receiver = both(memory)
    for message in (b"1", b"2", b"3"):
        sender.send(message)
    assert receiver.receive(0) == b"1"
    receiver = Receiver(memory, 0, SIZE)
    assert receiver.receive(0) == b"2"
    again = Sender(memory, 0, SIZE)
    assert receiver.receive(0) == b"3", "it was there when we looked last"
    with pytest.raises(ChannelClosedError, match="the sender has begun session 2, ours is 1"):
        receiver.receive(0)
    again.send(b"4")
    assert Receiver(memory, 0, SIZE).receive(0) == b"4"


def test_other_memory_after_reconnecting_ends_a_channel(tmp_path: Path) -> None:
    with ExitStack() as stack:
        end = stack.enter_context(served(tmp_path / "s"))
        peer = stack.enter_context(Peer.connect(tmp_path / "s", reconnect=True))
        receiver = Channel.receiver(peer, 0, SIZE)
        end()
        stack.enter_context(served(tmp_path / "s"))
        with pytest.raises(ChannelClosedError, match="reconnected to other memory"):
            receiver.receive(LIMIT_S)


def test_many_senders_are_read_as_one_and_a_bad_one_costs_only_itself(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as host, ExitStack() as stack:
        peers = [stack.enter_context(Peer.connect(tmp_path / "s")) for _ in range(3)]
        offsets = [index * 8192 for index in range(3)]
        merged = merge([Channel.receiver(host, offset, SIZE) for offset in offsets])
        senders = [Channel.sender(peer, offset, SIZE) for peer, offset in zip(peers, offsets, strict=True)]
        assert merged.receive(0.001) is None
        thread = threading.Timer(0.01, lambda: [sender.send(b"%d" % index) for index, sender in enumerate(senders)])
        thread.start()
        found = [merged.receive(LIMIT_S) for _ in senders]
        thread.join()
        assert sorted((receiver.offset, data) for receiver, data in filter(None, found)) == [
            (0, b"0"),
            (8192, b"1"),
            (16384, b"2"),
        ]
        host.store32(8192, 0xBAD)  # magic is looked at when joining only: the record is what counts here
        host.store32(8192 + 16, 5)
        senders[2].send(b"fine")
        with pytest.raises(MergedChannelError, match=r"channel at 0x2000 is left out: .*head"):
            all(merged.receive(LIMIT_S) for _ in range(9))
        senders[0].send(b"still here")
        heard = [merged.receive(0.01), merged.receive(0.01)]
        assert b"still here" in [each[1] for each in heard if each]
        peers[0].close()
        peers[2].close()
        for _ in range(2):
            with pytest.raises(MergedChannelError, match="has left"):
                all(merged.receive(LIMIT_S) for _ in range(9))
        with pytest.raises(UsageError, match="no channel is left"):
            merged.receive()
        with pytest.raises(UsageError, match="one peer and one vector"):
            merge([Channel.receiver(host, 0, SIZE), Channel.receiver(host, 16384, SIZE, doorbell=False)])


def test_a_receivers_unknown_number_from_an_old_run_is_not_rung(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.introduce((0, None), (1, None), (-1, script.memory.fd), (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as peer:
            peer.store32(68, 500)
            sender = Channel.sender(peer, 0, SIZE)
            sender.send(b"x")
            peer.store32(68, 1 << 20)
            sender.send(b"x")
