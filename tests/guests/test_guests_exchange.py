"""Mailboxes, ring headers, the stream's pattern and checksum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.guests import exchange
from ivshmem_lab.guests.exchange import (
    CHUNK_STRIDE,
    ConsumerLine,
    Mailbox,
    ProducerLine,
    StreamRing,
    add_checksum,
    chunk_checksum,
    stream_checksum,
    write_pattern,
)

U32 = st.integers(0, 2**32 - 1)
MIB = 1 << 20


def rotate_left(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) % 2**32


def checksum_word_by_word(words: list[int]) -> int:
    """The definition, one word at a time."""
    lanes = [sum(words[lane::4]) % 2**32 for lane in range(4)]
    return lanes[0] ^ rotate_left(lanes[1], 8) ^ rotate_left(lanes[2], 16) ^ rotate_left(lanes[3], 24)


@given(st.integers(1, 40).flatmap(lambda lines: st.lists(U32, min_size=16 * lines, max_size=16 * lines)))
def test_checksum_of_a_chunk_is_the_definition(words: list[int]) -> None:
    assert chunk_checksum(np.array(words, np.uint32)) == checksum_word_by_word(words)


@pytest.mark.parametrize("words", [16, 48, 1024, 3 * 1024, 16384, 16384 + 16])
def test_checksum_does_not_depend_on_the_chunk_s_shape(words: int) -> None:
    chunk = np.random.default_rng(words).integers(0, 2**32, words, np.uint32)
    assert chunk_checksum(chunk) == checksum_word_by_word(chunk.tolist())


@given(seed=U32, chunk=U32)
def test_pattern_is_the_definition(seed: int, chunk: int) -> None:
    out = np.zeros(32, np.uint32)
    write_pattern(out, seed, chunk)
    assert out.tolist() == [(seed + chunk * CHUNK_STRIDE + i) % 2**32 for i in range(32)]


@given(seed=U32, chunks=st.integers(0, 5), lines=st.integers(1, 4))
def test_checksum_of_a_stream_is_the_definition(seed: int, chunks: int, lines: int) -> None:
    expected = 0
    for chunk in range(chunks):
        words = [(seed + chunk * CHUNK_STRIDE + i) % 2**32 for i in range(16 * lines)]
        expected = rotate_left(expected, 1) ^ checksum_word_by_word(words)
    assert stream_checksum(seed, chunks, 64 * lines) == expected


@given(st.data())
def test_checksum_notices_a_changed_word_exchanged_lanes_and_exchanged_chunks(data: st.DataObject) -> None:
    words = np.zeros(64, np.uint32)
    write_pattern(words, 7, 0)
    changed = words.copy()
    changed[data.draw(st.integers(0, 63))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert chunk_checksum(changed) != chunk_checksum(words)
    swapped = words.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert chunk_checksum(swapped) != chunk_checksum(words)
    first, second = chunk_checksum(words), chunk_checksum(changed)
    assert add_checksum(add_checksum(0, first), second) != add_checksum(add_checksum(0, second), first)


@pytest.mark.parametrize("line_type", [Mailbox, ProducerLine, ConsumerLine])
def test_each_word_has_its_own_place_in_the_line(line_type: type[exchange.Mailbox]) -> None:
    memory = np.zeros(4096, np.uint8)
    line = line_type(memory, 0)
    names = list(line.as_dict())
    for value, name in enumerate(names, start=1):
        setattr(line, name, value)
    assert list(line.as_dict().values()) == list(range(1, len(names) + 1))
    assert memory[64:].sum() == 0


def test_mailbox_lies_where_the_guest_has_it() -> None:
    memory = np.zeros(1024 * 64, np.uint8)
    Mailbox(memory, 1027).status = 0x01020304
    assert memory[3 * 64 + 48 : 3 * 64 + 52].tolist() == [4, 3, 2, 1]
    assert Mailbox(memory, 3).status == 0x01020304


def test_mailbox_is_ready_for_its_own_peer_only() -> None:
    memory = np.zeros(64, np.uint8)
    mailbox = Mailbox(memory, 1024)
    readiness = [mailbox.ready]
    for mailbox.owner, mailbox.state in (
        (1025, exchange.STATE_READY),
        (1025, exchange.STATE_BUSY),
        (1, exchange.STATE_READY),
    ):
        readiness.append(mailbox.ready)
    assert readiness == [False, True, False, False]
    assert Mailbox(memory, 0).ready


def test_log_is_a_view_of_the_memory_and_never_beyond_it() -> None:
    memory = np.zeros(2 * 65536, np.uint8)
    mailbox = Mailbox(memory, 5)
    mailbox.rounds, mailbox.log_offset = 3, 2 * 65536 - 12
    memory[2 * 65536 - 12] = 9
    assert mailbox.log_cycles().tolist() == [9, 0, 0]
    for log_offset, rounds in ((0, 3), (65536 - 4, 3), (65538, 3), (2 * 65536 - 12, 4), (2**32 - 4, 2**32 - 1)):
        mailbox.log_offset, mailbox.rounds = log_offset, rounds
        with pytest.raises(UsageError, match=f"log_offset {log_offset} "):
            mailbox.log_cycles()


def test_wide_words_hold_64_bits_low_word_first() -> None:
    ring = StreamRing(np.zeros(2 * MIB, np.uint8))
    ring.producer.total_cycles = 0x0123456789ABCDEF
    assert ring.producer.words[7:9].tolist() == [0x89ABCDEF, 0x01234567]
    assert ring.producer.total_cycles == 0x0123456789ABCDEF


def test_slots_lie_behind_the_header_one_after_the_other() -> None:
    memory = np.zeros(2 * MIB, np.uint8)
    ring = StreamRing(memory, 128)
    ring.slot(2, 192)[:] = 0xFFFFFFFF
    assert np.flatnonzero(memory).tolist() == list(range(128 + 4096 + 384, 128 + 4096 + 576))


@pytest.mark.parametrize(
    ("chunk_bytes", "slots", "fits"),
    [
        (64, 1, True),
        (65536, 15, True),
        (65536, 16, False),
        (0, 4, False),
        (96, 4, False),
        (64, 0, False),
        (64, 2**31, False),
    ],
)
def test_ring_knows_which_shapes_fit(chunk_bytes: int, slots: int, fits: bool) -> None:
    assert StreamRing(np.zeros(2 * MIB, np.uint8)).fits(chunk_bytes, slots) is fits


@pytest.mark.parametrize("offset", [2 * MIB, 2 * MIB - 64, -64, 100])
def test_ring_outside_the_memory_is_refused(offset: int) -> None:
    with pytest.raises(UsageError, match=f"offset {offset if offset != 2 * MIB - 64 else 2 * MIB} "):
        StreamRing(np.zeros(2 * MIB, np.uint8), offset)


def test_names_and_values_show_in_the_repr() -> None:
    assert "owner=0 reply_to=0 command=0" in repr(Mailbox(np.zeros(64, np.uint8), 0))
    assert str(Mailbox.reply_to.__doc__).startswith("peer id + 1")
