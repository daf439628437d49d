"""Messages out of bytes and descriptors (any split: test_wire_splits)."""

from __future__ import annotations

import pytest

from ivshmem_lab.errors import LocalProtocolError, RemoteProtocolError
from ivshmem_lab.wire.messages import Decoder, Message, encode


def test_numbers_are_signed_little_endian() -> None:
    assert encode(-1) == b"\xff" * 8
    assert encode(258) == b"\x02\x01" + bytes(6)
    with pytest.raises(LocalProtocolError, match=str(2**63)):
        encode(2**63)


@pytest.mark.parametrize("first_has_it", [True, False])
def test_descriptor_may_ride_on_either_part(first_has_it: bool) -> None:
    decoder: Decoder[str] = Decoder()
    assert decoder.feed(encode(7)[:3], ["fd"] if first_has_it else []) == []
    assert decoder.pending_bytes == 3
    assert decoder.feed(encode(7)[3:], [] if first_has_it else ["fd"]) == [Message(7, "fd")]


def test_descriptor_belongs_to_the_last_message_of_its_piece() -> None:
    decoder: Decoder[str] = Decoder()
    assert decoder.feed(encode(1) + encode(2), ["fd"]) == [Message(1), Message(2, "fd")]
    assert decoder.feed(encode(3) + encode(4)[:1], ["fd"]) == [Message(3)]
    assert decoder.feed(encode(4)[1:] + encode(5)) == [Message(4, "fd"), Message(5)]


def test_more_than_one_descriptor_is_an_error() -> None:
    decoder: Decoder[str] = Decoder()
    with pytest.raises(RemoteProtocolError, match="2 file descriptors"):
        decoder.feed(encode(1), ["a", "b"])
    with pytest.raises(RemoteProtocolError, match="0 bytes"):
        decoder.feed(b"", ["a"])
    decoder.feed(encode(1)[:4], ["a"])
    with pytest.raises(RemoteProtocolError, match="second file descriptor"):
        decoder.feed(encode(1)[4:], ["b"])
    assert decoder.abandon() == ["a"]
    assert decoder.pending_bytes == 0
