"""Whatever the other side writes into a channel: an error that names it, and no byte outside the channel's area."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.channel import ChannelCorruptError, ChannelError, Receiver, Sender, area_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

RING = 256
SIZE = area_bytes(RING)
OFFSET = 4096
GUARD = 0xA5


def fresh() -> tuple[np.ndarray, Sender, Receiver]:
    memory = np.full(OFFSET + SIZE + 4096, GUARD, dtype=np.uint8)
    memory[OFFSET : OFFSET + SIZE] = 0
    return memory, Sender(memory, OFFSET, SIZE), Receiver(memory, OFFSET, SIZE)


def check_inside(memory: np.ndarray, view: np.ndarray) -> None:
    start = view.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    assert view.size == 0 or OFFSET + 128 <= start <= start + view.size <= OFFSET + SIZE


bytes_or_words = st.one_of(
    st.tuples(st.just("u1"), st.integers(0, SIZE - 1), st.integers(0, 255)),
    st.tuples(
        st.just("<u4"),
        st.sampled_from([*range(0, 128, 4), *range(128, SIZE, 16), *range(132, SIZE, 16)]),
        st.one_of(
            st.sampled_from([0, 1, 15, 16, 112, 113, 240, 256, 1 << 31, 2**32 - 16, 2**32 - 1]),
            st.integers(0, 2**32 - 1),
        ),
    ),
)
steps = st.one_of(
    st.tuples(st.just("corrupt"), bytes_or_words),
    st.tuples(st.sampled_from(["send", "reserve"]), st.integers(0, 112)),
    st.tuples(st.sampled_from(["receive", "peek", "peek_all", "release", "new sender", "new receiver"]), st.just(0)),
)


@settings(deadline=None, max_examples=400)
@given(script=st.lists(steps, min_size=2, max_size=30))
def test_no_corruption_raises_anything_else_or_leaves_the_area(script: list[tuple[str, object]]) -> None:
    memory, sender, receiver = fresh()
    for what, argument in script:
        try:
            if what == "corrupt":
                dtype, at, value = argument  # type: ignore[misc]
                memory[OFFSET : OFFSET + SIZE].view(dtype)[at // np.dtype(dtype).itemsize] = value
            elif what == "send":
                sender.send(bytes([1]) * argument, 0)  # type: ignore[operator]
            elif what == "reserve":
                room = sender.reserve(argument, 0)  # type: ignore[arg-type]
                check_inside(memory, room)
                room[:] = 2
                sender.commit()
            elif what == "receive":
                receiver.receive(0)
            elif what == "peek":
                if (view := receiver.peek(0)) is not None:
                    check_inside(memory, view)
            elif what == "peek_all":
                for view in receiver.peek_all(0):
                    check_inside(memory, view)
            elif what == "release":
                if receiver.peek(0) is not None:
                    receiver.release()
            elif what == "new sender":
                sender = Sender(memory, OFFSET, SIZE)
            else:
                receiver = Receiver(memory, OFFSET, SIZE)
        except ChannelError:
            pass
        assert (memory[:OFFSET] == GUARD).all()
        assert (memory[OFFSET + SIZE :] == GUARD).all()


def word(index: int, value: int) -> Callable[[np.ndarray], None]:
    def write(memory: np.ndarray) -> None:
        memory[OFFSET : OFFSET + SIZE].view("<u4")[index] = value

    return write


@pytest.mark.parametrize(
    ("field", "write"),
    [
        ("head", word(4, 17)),
        ("head", word(4, 1 << 20)),
        ("head", word(4, 2**32 - 16)),
        ("length", word(32, 113)),
        ("length", word(32, 2**32 - 2)),
        ("length", word(32, 2**32 - 1)),
        ("length", word(32, 40)),
        ("record", word(33, 16)),
        ("record", word(34, 9)),
        ("record", word(35, 1)),
    ],
)
def test_a_receiver_names_what_is_wrong(field: str, write: Callable[[np.ndarray], None]) -> None:
    memory, sender, receiver = fresh()
    sender.send(b"hello")
    write(memory)
    for take in (receiver.receive, receiver.peek, receiver.peek_all):
        with pytest.raises(ChannelCorruptError, match=f"channel's {field}: ") as caught:
            take(0)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "write"),
    [("magic", word(0, 1)), ("version", word(1, 2)), ("data_bytes", word(2, 512)), ("data_bytes", word(2, 0))],
)
def test_a_receiver_does_not_join_what_is_no_channel_of_this_size(
    field: str, write: Callable[[np.ndarray], None]
) -> None:
    memory, _, _ = fresh()
    write(memory)
    with pytest.raises(ChannelCorruptError) as caught:
        Receiver(memory, OFFSET, SIZE)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "write"),
    [
        ("receiver magic", word(16, 1)),
        ("tail", word(18, 8)),
        ("tail", word(18, 1 << 20)),
        ("tail", word(18, 2**32 - 32)),
    ],
)
def test_a_sender_names_what_is_wrong(field: str, write: Callable[[np.ndarray], None]) -> None:
    memory, sender, receiver = fresh()
    sender.send(b"hello")
    assert receiver.receive(0) == b"hello"
    sender.send(bytes(100))
    assert receiver.receive(0) == bytes(100)
    sender.send(bytes(10))
    write(memory)
    with pytest.raises(ChannelCorruptError) as caught:
        sender.send_all([bytes(100)] * 3, 0)
    assert caught.value.field == field


SCRIBBLER = """
import mmap, os, random, sys
fd, offset, size = map(int, sys.argv[1:])
memory = memoryview(mmap.mmap(fd, 0))[offset : offset + size].cast("I")
choose = random.Random(3)
nasty = [0, 1, 16, 112, 113, 240, 256, 1 << 31, 2**32 - 16, 2**32 - 1]
print("scribbling", flush=True)
while os.getppid() != 1:
    index = choose.randrange(32) if choose.random() < 0.5 else 32 + 4 * choose.randrange(16) + choose.randrange(4)
    memory[index] = choose.choice(nasty)
"""


def test_another_process_that_scribbles_meanwhile_is_never_followed_out_of_the_area() -> None:
    """What is checked cannot change between check and use: each word is read once, by either side."""
    choose = random.Random(5)
    with SharedMemory.create_memfd(OFFSET + SIZE + 4096) as shared:
        memory = shared.array()
        memory[:] = GUARD
        memory[OFFSET : OFFSET + SIZE] = 0
        scribbler = subprocess.Popen(
            [sys.executable, "-c", SCRIBBLER, str(shared.fd), str(OFFSET), str(SIZE)],
            pass_fds=[shared.fd],
            stdout=subprocess.PIPE,
        )
        try:
            assert scribbler.stdout is not None
            assert scribbler.stdout.readline() == b"scribbling\n"
            good = errors = 0
            for _ in range(3000):
                try:
                    sender, receiver = Sender(memory, OFFSET, SIZE), Receiver(memory, OFFSET, SIZE)
                    for _ in range(4):
                        room = sender.reserve(choose.randrange(113), 0)
                        check_inside(memory, room)
                        room[:] = 2
                        sender.commit()
                        for view in receiver.peek_all(0):
                            check_inside(memory, view)
                            view.sum()
                            good += 1
                        sender.send(bytes(choose.randrange(113)), 0)
                        receiver.receive(0)
                        good += 1
                except ChannelError:
                    errors += 1
        finally:
            scribbler.kill()
            scribbler.communicate()
        assert (memory[:OFFSET] == GUARD).all()
        assert (memory[OFFSET + SIZE :] == GUARD).all()
        assert good
        assert errors
        del memory, room, view, sender, receiver
