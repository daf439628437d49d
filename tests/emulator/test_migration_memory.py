"""Memory on its way: blocks, pieces, and what a hostile source may send."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmem_lab.emulator.migration.memory import Block, Filler
from ivshmem_lab.emulator.migration.stream import CHUNK_BYTES, MigrationError, decode, encode

PAGE = 4096

pages = st.sampled_from([bytes(PAGE), b"a" * PAGE, bytes(PAGE - 1) + b"z"])
memories = st.lists(
    st.integers(0, 40).flatmap(lambda count: st.lists(pages, min_size=count, max_size=count)), max_size=3
)


def blocks_of(contents: list[list[bytes]]) -> list[Block]:
    return [Block(str(number), memoryview(bytearray(b"".join(content)))) for number, content in enumerate(contents)]


@settings(max_examples=60)
@given(memories, st.booleans())
def test_what_is_read_here_is_there_whatever_was_there_before(contents: list[list[bytes]], fresh: bool) -> None:
    source = blocks_of(contents)
    before = bytes if fresh else (lambda size: b"\xee" * size)
    target = [Block("", memoryview(bytearray(before(len(block.memory)))), fresh) for block in source]
    filler, sent = Filler(target), 0
    for number, block in enumerate(source):
        for size_bytes, runs in block.chunks():
            assert 0 < size_bytes <= CHUNK_BYTES
            for offset, data in runs:
                assert len(data) <= CHUNK_BYTES
                filler.take(number, offset, memoryview(data))
                sent += len(data) // PAGE
    filler.finish()
    assert [block.memory for block in target] == [block.memory for block in source]
    # No page of zeros is sent.
    assert sent == sum(page != bytes(PAGE) for content in contents for page in content)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 20).map(lambda page: page * PAGE), st.integers(0, 3)), max_size=8
    )
)
def test_pieces_in_any_order_fill_each_page_at_most_once(pieces: list[tuple[int, int, int]]) -> None:
    target = blocks_of([[b"\xee" * PAGE] * 16] * 2)
    filler = Filler(target)
    taken: list[tuple[int, int]] = []
    for number, offset, count in pieces:
        with contextlib.suppress(MigrationError):
            filler.take(number, offset, memoryview(b"x" * (count * PAGE)))
            taken += [(number, offset + page * PAGE) for page in range(count)]
    filler.finish()
    assert len(set(taken)) == len(taken)
    assert taken == sorted(taken)
    for number, block in enumerate(target):
        for at in range(0, len(block.memory), PAGE):
            wanted = b"x" if (number, at) in taken else b"\0"
            assert bytes(block.memory[at : at + PAGE]) == wanted * PAGE


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**300), 2**300) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda name: name != "hex"), inner),
    max_leaves=10,
)


@given(plain)
def test_plain_values_arrive_as_they_left(value: object) -> None:
    assert decode(encode(value)) == value


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff", b"[" * 100000, b'{"hex": "0"}', b"1" * 5000])
def test_what_is_no_plain_value_is_refused(damaged: bytes) -> None:
    with pytest.raises(MigrationError, match="a section of the migration stream is damaged"):
        decode(damaged)
