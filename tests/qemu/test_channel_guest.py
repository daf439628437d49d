"""The ``echo`` guest: a bare-metal program and this process talk by two channels, on both emulators."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from machines import LIMIT_S, Machine, served

from ivshmem_lab.guests import guest_path
from ivshmem_lab.peer.channel import Channel, ChannelClosedError, area_bytes
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = area_bytes(4096)
IN, OUT = 4096, 16384
BAD_HEADER, BAD_COUNT, BAD_RECORD = 3, 4, 5  # of enum channel_error
XOR = 0x5A
LONGEST = 4096 // 2 - 16

both = pytest.mark.parametrize("kind", ["unicorn", pytest.param("qemu", marks=pytest.mark.qemu)])


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with served(tmp_path / "s", vectors=2, size_bytes=1 << 20), Peer.connect(tmp_path / "s") as peer:
        yield peer


@contextlib.contextmanager
def echo(kind: str, peer: Peer, options: str = "") -> Iterator[Machine]:
    words = f"in={IN} out={OUT} size={SIZE} xor={XOR} vector=1 {options}"
    arguments = ["-kernel", str(guest_path("echo")), "-append", words, "-chardev", f"socket,id=c,path={peer.path}"]
    with Machine(kind, *arguments, "-device", "ivshmem-doorbell,chardev=c,vectors=2") as machine:
        yield machine


def inverted(data: bytes) -> bytes:
    return bytes(each ^ XOR for each in data)


@both
def test_a_guest_answers_every_message_of_the_host(kind: str, peer: Peer) -> None:
    random = np.random.default_rng(7)
    sizes = [0, 1, 15, 16, 17, LONGEST, LONGEST - 1, *random.integers(0, LONGEST, 93).tolist()]
    messages = [random.bytes(size) for size in sizes]
    with echo(kind, peer, "exit=1") as machine:
        machine.says("ready")
        receiver = Channel.receiver(peer, OUT, SIZE, vector=1)
        with Channel.sender(peer, IN, SIZE, vector=1) as sender:
            for message in messages:  # each waits for its answer: both sides sleep until they are rung
                sender.send(message, LIMIT_S)
                assert receiver.receive(LIMIT_S) == inverted(message)
        machine.says(f"messages=100 bytes={sum(sizes)}")
        with pytest.raises(ChannelClosedError, match="has closed"):
            receiver.receive(LIMIT_S)
        assert machine.wait() == 1  # debug exit 0


@both
def test_a_full_ring_makes_either_side_wait_and_nothing_is_lost(kind: str, peer: Peer) -> None:
    messages = [bytes([index & 255]) * (index * 37 % 1500) for index in range(400)]
    with Peer.connect(peer.path) as second, echo(kind, peer) as machine, ThreadPoolExecutor(1) as pool:
        machine.says("ready")
        receiver = Channel.receiver(second, OUT, SIZE, vector=1)
        sender = Channel.sender(peer, IN, SIZE, vector=1)
        sent = pool.submit(sender.send_all, messages, LIMIT_S)
        for message in messages:
            assert receiver.receive(LIMIT_S) == inverted(message)
        sent.result()
        assert receiver.receive(0) is None
        sender.close()
        machine.says("messages=400")
        del receiver, sender  # views of the memory


@both
def test_the_next_sender_is_served_too(kind: str, peer: Peer) -> None:
    with echo(kind, peer) as machine:
        machine.says("ready")
        receiver = Channel.receiver(peer, OUT, SIZE, vector=1)
        for session in (1, 2, 3):
            with Channel.sender(peer, IN, SIZE, vector=1) as sender:
                sender.send(b"session %d" % session, LIMIT_S)
                assert receiver.receive(LIMIT_S) == inverted(b"session %d" % session)
            machine.says(f"session={session} messages={session} ")
        receiver.close()  # and the next receiver
        receiver = Channel.receiver(peer, OUT, SIZE, vector=1)
        sender = Channel.sender(peer, IN, SIZE, vector=1)
        sender.send(b"again", LIMIT_S)
        assert receiver.receive(LIMIT_S) == inverted(b"again")


@both
@pytest.mark.parametrize(
    ("index", "value", "error"),
    [(4, 17, BAD_COUNT), (4, 1 << 20, BAD_COUNT), (32, LONGEST + 1, BAD_RECORD), (33, 16, BAD_RECORD)],
)
def test_a_guest_names_what_is_corrupted_and_answers_nothing(
    kind: str, peer: Peer, index: int, value: int, error: int
) -> None:
    sender = Channel.sender(peer, IN, SIZE, vector=1)
    sender.send(b"good", LIMIT_S)
    peer.store32(IN + 4 * index, value)
    before = peer.memory[OUT + SIZE :].copy()
    with echo(kind, peer) as machine:
        machine.says(f"echo: channel=in error={error}")
        assert machine.wait() == 3  # debug exit 1
    assert (peer.memory[OUT + SIZE :] == before).all()
    assert peer.load32(OUT + 16) == 0  # head: nothing sent


@both
def test_a_sender_that_is_not_one_is_refused(kind: str, peer: Peer) -> None:
    Channel.sender(peer, IN, area_bytes(8192), vector=1)  # another size than the guest's
    with echo(kind, peer) as machine:
        machine.says(f"echo: channel=in error={BAD_HEADER}")
        assert machine.wait() == 3
