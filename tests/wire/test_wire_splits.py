"""A stream may be cut anywhere: the messages and events stay the same."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.wire.client import ClientProtocol
from ivshmem_lab.wire.messages import Decoder, Message, encode

Said = list[tuple[int, str | None]]

numbers = st.integers(-(2**63), 2**63 - 1)
descriptors = st.none() | st.text(min_size=1, max_size=3)


def pieces_of(conversation: Said, data: st.DataObject) -> list[tuple[bytes, list[str]]]:
    """Cut a conversation as a kernel may: anywhere, but never past bytes that carry a descriptor."""
    pieces: list[tuple[bytes, list[str]]] = []
    buffer = b""
    for number, fd in conversation:
        message = encode(number)
        cuts = [0, *sorted(data.draw(st.sets(st.integers(1, 7), max_size=2))), 8]
        parts = [message[start:end] for start, end in pairwise(cuts)]
        carrier = -1 if fd is None else data.draw(st.integers(0, len(parts) - 1))
        for index, part in enumerate(parts):
            buffer += part
            if index == carrier and fd is not None:
                pieces.append((buffer, [fd]))
                buffer = b""
            elif index + 1 < len(parts) or data.draw(st.booleans()):
                pieces.append((buffer, []))
                buffer = b""
    pieces.append((buffer, []))
    return pieces


@given(conversation=st.lists(st.tuples(numbers, descriptors)), data=st.data())
def test_every_split_gives_the_same_messages(conversation: Said, data: st.DataObject) -> None:
    decoder: Decoder[str] = Decoder()
    seen = [message for piece, fds in pieces_of(conversation, data) for message in decoder.feed(piece, fds)]
    assert seen == [Message(number, fd) for number, fd in conversation]
    assert (decoder.pending_bytes, decoder.abandon()) == (0, [])


@given(
    own=st.integers(0, 65535),
    later=st.lists(st.tuples(st.integers(0, 4) | st.integers(0, 65535), descriptors)),
    data=st.data(),
)
def test_every_split_gives_the_same_events(own: int, later: Said, data: st.DataObject) -> None:
    conversation: Said = [(0, None), (own, None), (-1, "memory"), *[said for said in later if said != (own, None)]]
    whole: ClientProtocol[str] = ClientProtocol()
    expected = [event for number, fd in conversation for event in whole.receive(encode(number), [fd] if fd else [])]
    assert len(expected) >= 2
    split: ClientProtocol[str] = ClientProtocol()
    events = [event for piece, fds in pieces_of(conversation, data) for event in split.receive(piece, fds)]
    assert events == expected
    assert (split.peer_id, split.ready, split.vectors) == (own, True, whole.vectors)
