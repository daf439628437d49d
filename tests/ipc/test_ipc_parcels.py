"""Many messages, a descriptor each, in one call: none lost, none mixed up."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.ipc.fdpass import close_all, receive_message
from ivshmem_lab.ipc.parcels import BATCH_PARCELS, Batch, Parcel

if TYPE_CHECKING:
    from collections.abc import Iterator

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, two:
        one.setblocking(False)
        two.setblocking(False)
        yield one, two


@pytest.mark.parametrize("count", [1, 2, 3, BATCH_PARCELS])
def test_each_message_arrives_with_its_own_descriptor(ends: Ends, count: int) -> None:
    lines = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
    parcels = [Parcel(f"{index:08}".encode(), fd) for index, fd in enumerate(lines)]
    assert Batch().send(ends[0], parcels) == count
    for index, line in enumerate(lines):
        data, fds = receive_message(ends[1], 4096)
        assert (data, len(fds)) == (f"{index:08}".encode(), 1)
        os.eventfd_write(fds[0], index + 1)
        assert os.eventfd_read(line) == index + 1
        close_all(fds)
    close_all(lines)


def test_messages_with_and_without_descriptor_mix(ends: Ends) -> None:
    line = os.eventfd(0)
    batch = Batch()
    assert (
        batch.send(ends[0], [Parcel(b"plain..0"), Parcel(b"with...1", line), Parcel(b"plain..2"), Parcel(b"x" * 8)])
        == 4
    )
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


@pytest.mark.parametrize("size", [2, BATCH_PARCELS])
def test_full_socket_takes_a_part_and_then_says_so(ends: Ends, size: int) -> None:
    ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    batch, parcels, sent = Batch(), [Parcel(b"12345678")] * size, 0
    with contextlib.suppress(BlockingIOError):
        while sent < 100_000:
            sent += batch.send(ends[0], parcels)
    received = 0
    with contextlib.suppress(BlockingIOError):
        while received < 1_000_000:
            received += len(ends[1].recv(4096))
    assert 0 < sent < 100_000
    assert received == 8 * sent


@pytest.mark.parametrize("size", [1, BATCH_PARCELS])
def test_reader_that_is_gone_is_an_error_and_no_signal(ends: Ends, size: int) -> None:
    ends[1].close()
    with pytest.raises(BrokenPipeError):
        Batch().send(ends[0], [Parcel(b"12345678")] * size)
