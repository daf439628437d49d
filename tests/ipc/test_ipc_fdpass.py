"""Passed descriptors arrive once, close-on-exec, and never leak."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import RemoteProtocolError
from ivshmem_lab.ipc.eventfd import EventFd
from ivshmem_lab.ipc.fdpass import PassedFdLostError, close_all, receive_message, send_message

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, two = socket.socketpair()
    with one, two:
        yield one, two


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptor_arrives_with_its_bytes(pair: tuple[socket.socket, socket.socket]) -> None:
    with EventFd.create() as event:
        assert send_message(pair[0], b"12345678", [event.fileno()]) == 8
        data, fds = receive_message(pair[1], 8)
        assert (data, len(fds)) == (b"12345678", 1)
        assert not os.get_inheritable(fds[0])
        with EventFd(fds[0]) as other:
            event.ring(3)
            assert other.take() == 3


def test_bytes_alone_and_end_of_file(pair: tuple[socket.socket, socket.socket]) -> None:
    send_message(pair[0], b"abc")
    assert receive_message(pair[1], 8) == (b"abc", [])
    pair[0].close()
    assert receive_message(pair[1], 8) == (b"", [])


def test_nothing_there_is_the_kernels_own_error(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        receive_message(pair[1], 8)
    pair[0].setblocking(False)
    with pytest.raises(BlockingIOError):
        send_message(pair[0], bytes(8 << 20)) and send_message(pair[0], bytes(8))


@pytest.mark.parametrize("count", [2, 3, 10])
def test_too_many_descriptors_are_refused_and_closed(pair: tuple[socket.socket, socket.socket], count: int) -> None:
    with EventFd.create() as event:
        send_message(pair[0], b"12345678", [event.fileno()] * count)
        before = open_fds()
        with pytest.raises(RemoteProtocolError, match="more than 1 file descriptors") as caught:
            receive_message(pair[1], 8)
        assert caught.value.field == "message"
        assert open_fds() == before


def test_one_descriptor_beyond_a_limit_of_two_is_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    """Room for two has none to spare: the kernel drops the third and says so only by a flag."""
    with EventFd.create() as event:
        send_message(pair[0], b"12345678", [event.fileno()] * 3)
        with pytest.raises(RemoteProtocolError, match="more than 2 file descriptors"):
            receive_message(pair[1], 8, max_fds=2)


def test_descriptors_up_to_the_limit_arrive_in_order(pair: tuple[socket.socket, socket.socket]) -> None:
    with EventFd.create() as one, EventFd.create() as two, EventFd.create() as three:
        send_message(pair[0], b"x", [one.fileno(), two.fileno(), three.fileno()])
        _, fds = receive_message(pair[1], 8, max_fds=3)
        two.ring(9)
        assert [os.eventfd_read(fd) if i == 1 else None for i, fd in enumerate(fds)] == [None, 9, None]
        close_all(fds)


def test_reading_stops_at_bytes_that_carry_a_descriptor(pair: tuple[socket.socket, socket.socket]) -> None:
    """The decoder in wire/ rests on this: a descriptor belongs to the last message that was touched."""
    with EventFd.create() as event:
        send_message(pair[0], b"A" * 8)
        send_message(pair[0], b"B" * 8, [event.fileno()])
        send_message(pair[0], b"C" * 8)
        data, fds = receive_message(pair[1], 4096)
        assert (data, len(fds)) == (b"A" * 8 + b"B" * 8, 1)
        close_all(fds)
        assert receive_message(pair[1], 4096) == (b"C" * 8, [])


def test_lost_descriptor_is_told_apart_from_a_bad_message(pair: tuple[socket.socket, socket.socket]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with EventFd.create() as event:
        send_message(pair[0], b"12345678", [event.fileno()])
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(PassedFdLostError, match="ulimit -n"):
                receive_message(pair[1], 8)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
