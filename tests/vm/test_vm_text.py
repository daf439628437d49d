from __future__ import annotations

import asyncio
import os
import socket

import pytest

from ivshmem_lab.errors import VmError
from ivshmem_lab.vm.text import TextStream, VmTimeoutError


def with_stream(test, limit_bytes=4096):
    async def run():
        read, write = os.pipe()
        stream = TextStream(read, "the console of x", limit_bytes)
        try:
            with os.fdopen(write, "wb", buffering=0) as writer:
                await test(stream, writer)
        finally:
            stream.close()

    asyncio.run(run())


def test_a_text_that_comes_in_pieces_is_found():
    async def test(stream, writer):
        waiting = asyncio.create_task(stream.wait_text("ready\n", 5.0))
        for piece in (b"boot\r\nre", b"ad", b"y\r\n"):
            writer.write(piece)
            await asyncio.sleep(0)
        assert await waiting == "boot\nready\n"

    with_stream(test)


def test_a_text_that_was_there_before_is_found_without_waiting():
    async def test(stream, writer):
        writer.write(b"ready")
        stream.drain()
        assert await stream.wait_text("ready", 0.0) == "ready"

    with_stream(test)


def test_a_text_that_does_not_come_is_a_timeout_that_shows_the_last_lines():
    async def test(stream, writer):
        writer.write(b"one\ntwo\n\nthree\nfour\n")
        with pytest.raises(
            VmTimeoutError, match=r"the console of x did not show 'five' in 0.05 s.*two.*three.*four"
        ) as caught:
            await stream.wait_text("five", 0.05)
        assert isinstance(caught.value, TimeoutError)
        assert "one" not in str(caught.value)

    with_stream(test)


def test_the_end_of_the_stream_ends_the_wait():
    async def test(stream, writer):
        waiting = asyncio.create_task(stream.wait_text("never", 30.0))
        await asyncio.sleep(0)
        writer.write(b"panic")
        writer.close()
        with pytest.raises(VmError, match=r"ended without 'never'.*panic"):
            await waiting
        assert stream.at_end
        assert stream.text == "panic"

    with_stream(test)


def test_only_the_tail_is_kept_and_the_rest_is_counted():
    async def test(stream, writer):
        writer.write(b"a" * 100 + b"b" * 50 + b"end")
        assert await stream.wait_text("end", 5.0) == "b" * 29 + "end"
        assert stream.dropped_bytes == 153 - 32

    with_stream(test, limit_bytes=32)


def test_a_socket_whose_other_end_died_with_unread_input_is_an_end():
    async def run():
        ours, theirs = socket.socketpair()
        ours.send(b"never read")
        theirs.send(b"last words")
        theirs.close()
        stream = TextStream(ours.detach(), "x", 100)
        with pytest.raises(VmError, match="ended without"):
            await stream.wait_text("more", 5.0)
        assert stream.text == "last words"

    asyncio.run(run())
