"""Whatever a server sends, bytes and descriptors: an error of ours at worst, no descriptor left, nobody else disturbed."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import IvshmemLabError, RemoteProtocolError
from ivshmem_lab.ipc.fdpass import send_message
from ivshmem_lab.peer.link import Link

if TYPE_CHECKING:
    from collections.abc import Iterator

FUZZ_INPUTS = int(os.environ.get("IVSHMEM_LAB_FUZZ_INPUTS", "5000"))
FUZZ_SEED = int(os.environ.get("IVSHMEM_LAB_FUZZ_SEED", "1"))
NUMBERS = [-(1 << 63), -2, -1, 0, 1, 2, 7, 65535, 65536, (1 << 63) - 1]

Piece = tuple[bytes, list[int]]


class Stock:
    """Descriptors that a server may send: right ones and wrong ones."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("ivshmem", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, 4096)
        self.vector = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.empty = os.memfd_create("empty", os.MFD_CLOEXEC)
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        self.pipe = os.pipe()

    @property
    def all(self) -> list[int]:
        return [self.memory, self.vector, self.empty, self.null, *self.pipe]

    def introduction(self) -> list[Piece]:
        """What a good server says to peer 2 when peer 0 is there: two vectors each, and peer 0 leaves."""
        numbers: list[tuple[int, list[int]]] = [(0, []), (2, []), (-1, [self.memory])]
        numbers += [(peer_id, [self.vector]) for peer_id in (0, 0, 2, 2)]
        numbers.append((0, []))
        return [(struct.pack("<q", number), fds) for number, fds in numbers]

    def close(self) -> None:
        for fd in self.all:
            os.close(fd)


@pytest.fixture
def stock() -> Iterator[Stock]:
    stock = Stock()
    yield stock
    stock.close()


def mutated(pieces: list[Piece], stock: Stock, dice: random.Random) -> list[Piece]:
    """Change one to four things: the bytes, the descriptors, the order, where reads end."""
    pieces = list(pieces)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(pieces))
        data, fds = pieces[at]
        match dice.randrange(10):
            case 0 if data:
                index = dice.randrange(len(data))
                data = data[:index] + bytes([data[index] ^ 1 << dice.randrange(8)]) + data[index + 1 :]
            case 1:
                data = data[: dice.randrange(len(data) + 1)]
            case 2:
                data = struct.pack("<q", dice.choice(NUMBERS))
            case 3:
                data = dice.randbytes(dice.randint(1, 40))
            case 4:
                fds = []
            case 5:
                fds = [dice.choice(stock.all)]
            case 6:
                fds = [*fds, *(dice.choice(stock.all) for _ in range(dice.randint(1, 3)))]
            case 7:
                pieces.insert(dice.randrange(len(pieces)), (data, fds))
            case 8 if len(data) > 1:
                cut = dice.randrange(1, len(data))
                late = dice.random() < 0.5
                pieces.insert(at + 1, (data[cut:], fds if late else []))
                data, fds = data[:cut], [] if late else fds
            case 9:
                other = dice.randrange(len(pieces))
                pieces[other], (data, fds) = (data, fds), pieces[other]
        pieces[at] = data, fds
    return pieces if dice.random() < 0.7 else pieces[: dice.randrange(len(pieces)) + 1]


def say(server: socket.socket, pieces: list[Piece]) -> None:
    for data, fds in pieces:
        if data:
            send_message(server, data, fds)


def view(link: Link) -> tuple[int, dict[int, int], bool]:
    return link.peer_id, {peer_id: len(lines) for peer_id, lines in link.lines.items()}, link.gone


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_mutated_servers_raise_only_our_errors_and_leave_no_descriptor(stock: Stock) -> None:
    """``IVSHMEM_LAB_FUZZ_INPUTS`` and ``IVSHMEM_LAB_FUZZ_SEED`` say how many and which."""
    dice = random.Random(FUZZ_SEED)
    good = stock.introduction()
    with select.epoll() as news:
        here, there = socket.socketpair()
        here.setblocking(False)
        valid = Link(here, news)
        say(there, good[:-1])
        valid.read()
        before = view(valid)
        assert before == (2, {0: 2, 2: 2}, False)
        descriptors = open_fds()
        refused = accepted = 0
        for count in range(FUZZ_INPUTS):
            pieces = mutated(good, stock, dice)
            client, server = socket.socketpair()
            client.setblocking(False)
            link = Link(client, news)
            try:
                say(server, pieces)
                link.read()
                server.close()
                link.read()
                accepted += 1
            except IvshmemLabError:
                assert link.gone
                refused += 1
            finally:
                server.close()
                link.close()
            if count % 1000 == 0:
                assert open_fds() == descriptors, f"input {count} of seed {FUZZ_SEED}: {pieces}"
        valid.read()
        assert view(valid) == before
        assert open_fds() == descriptors
        assert refused > FUZZ_INPUTS // 4
        assert accepted > FUZZ_INPUTS // 20
        say(there, good[-1:])  # and it still listens
        valid.read()
        assert view(valid) == (2, {2: 2}, False)
        valid.close()
        there.close()


@pytest.mark.parametrize(
    ("place", "wrong"),
    [(0, "version"), (1, "id"), (2, "memory")],
)
def test_a_missing_or_extra_descriptor_is_refused_by_name(stock: Stock, place: int, wrong: str) -> None:
    pieces = stock.introduction()
    data, fds = pieces[place]
    pieces[place] = data, [] if fds else [stock.vector]
    with select.epoll() as news:
        client, server = socket.socketpair()
        client.setblocking(False)
        link = Link(client, news)
        with server:
            say(server, pieces)
            with pytest.raises(RemoteProtocolError) as caught:
                link.read()
        assert wrong in caught.value.field
        link.close()


@pytest.mark.parametrize("bad", ["empty", "null"])
def test_memory_without_a_size_is_refused_by_its_size(stock: Stock, bad: str) -> None:
    pieces = stock.introduction()
    pieces[2] = pieces[2][0], [getattr(stock, bad)]
    with select.epoll() as news:
        client, server = socket.socketpair()
        client.setblocking(False)
        link = Link(client, news)
        with server:
            say(server, pieces)
            with pytest.raises(IvshmemLabError, match="size 0"):
                link.read()
        link.close()
