"""Many messages, a descriptor each, in one call: none lost, none mixed up."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.ipc.fdpass import close_all, receive_message
from ivshmem_lab.ipc.parcels import Parcel, ParcelQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

MANY = 64


def queue_of(*parcels: Parcel) -> ParcelQueue:
    queue = ParcelQueue()
    queue.put(parcels)
    return queue


Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, two:
        one.setblocking(False)
        two.setblocking(False)
        yield one, two


@pytest.mark.parametrize("count", [1, 2, 3, MANY])
def test_each_message_arrives_with_its_own_descriptor(ends: Ends, count: int) -> None:
    lines = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
    parcels = [Parcel(f"{index:08}".encode(), fd) for index, fd in enumerate(lines)]
    assert queue_of(*parcels).send(ends[0].fileno(), 0, MANY) == count
    for index, line in enumerate(lines):
        data, fds = receive_message(ends[1], 4096)
        assert (data, len(fds)) == (f"{index:08}".encode(), 1)
        os.eventfd_write(fds[0], index + 1)
        assert os.eventfd_read(line) == index + 1
        close_all(fds)
    close_all(lines)


def test_messages_with_and_without_descriptor_mix(ends: Ends) -> None:
    line = os.eventfd(0)
    queue = queue_of(Parcel(b"plain..0"), Parcel(b"with...1", line), Parcel(b"plain..2"), Parcel(b"x" * 8))
    assert queue.send(ends[0].fileno(), 0, MANY) == 4
    first, none = receive_message(ends[1], 8)
    second, fds = receive_message(ends[1], 8)
    rest, nothing = receive_message(ends[1], 4096)
    close_all([line, *fds])
    assert (first, none, second, len(fds), rest, nothing) == (
        b"plain..0",
        [],
        b"with...1",
        1,
        b"plain..2" + b"x" * 8,
        [],
    )


@pytest.mark.parametrize("size", [2, MANY])
def test_full_socket_takes_a_part_and_then_says_so(ends: Ends, size: int) -> None:
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    queue, sent = queue_of(*[Parcel(b"12345678")] * size), 0
    with contextlib.suppress(BlockingIOError):
        while sent < 100_000:
            sent += queue.send(ends[0].fileno(), 0, MANY)
    received = 0
    with contextlib.suppress(BlockingIOError):
        while received < 1_000_000:
            received += len(ends[1].recv(4096))
    assert 0 < sent < 100_000
    assert received == 8 * sent


@pytest.mark.parametrize("size", [1, MANY])
def test_reader_that_is_gone_is_an_error_and_no_signal(ends: Ends, size: int) -> None:
    ends[1].close()
    with pytest.raises(BrokenPipeError):
        queue_of(*[Parcel(b"12345678")] * size).send(ends[0].fileno(), 0, MANY)


def test_parcels_are_sent_from_any_index_and_no_more_than_asked_for(ends: Ends) -> None:
    queue = queue_of(*[Parcel(f"{index:08}".encode()) for index in range(5)])
    assert queue.send(ends[0].fileno(), 1, 2) == 2
    assert queue.send(ends[0].fileno(), 4, 10) == 1
    assert ends[1].recv(4096) == b"000000010000000200000004"
    assert len(queue) == 5


def test_a_block_is_found_whole_or_what_is_left_of_it_and_taken_out(ends: Ends) -> None:
    first, block, last = Parcel(b"first..."), [Parcel(b"block..%d" % index) for index in range(3)], Parcel(b"last....")
    queue = queue_of(first, *block, last)
    assert queue.find(block) == (1, 4)
    queue.forget(0, 2)
    assert queue.find(block) == (0, 2)
    queue.forget(*queue.find(block))
    assert queue.find(block) == (0, 0)
    other = ParcelQueue()
    other.put([first])
    other.put_rest(queue, 0)
    assert other.send(ends[0].fileno(), 0, MANY) == 2
    assert ends[1].recv(4096) == b"first...last...."
