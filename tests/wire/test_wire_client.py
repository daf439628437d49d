"""The client's state machine: a right conversation is understood, every wrong one is named."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import RemoteProtocolError
from ivshmem_lab.wire.client import ClientProtocol, MemoryArrived, PeerLeft, VectorAdded, Welcome
from ivshmem_lab.wire.messages import MAX_VECTORS, encode

Said = list[tuple[int, str | None]]

HELLO: Said = [(0, None), (5, None), (-1, "memory")]
INTRODUCTION: Said = [*HELLO, (3, "3.0"), (3, "3.1"), (5, "5.0"), (5, "5.1")]


def told(conversation: Said) -> tuple[ClientProtocol[str], list[object]]:
    client: ClientProtocol[str] = ClientProtocol()
    events: list[object] = []
    for number, fd in conversation:
        events += client.receive(encode(number), [] if fd is None else [fd])
    return client, events


def test_introduction_is_understood() -> None:
    client, events = told(INTRODUCTION)
    assert events == [
        Welcome(5),
        MemoryArrived("memory"),
        VectorAdded(3, 0, "3.0"),
        VectorAdded(3, 1, "3.1"),
        VectorAdded(5, 0, "5.0"),
        VectorAdded(5, 1, "5.1"),
    ]
    assert (client.peer_id, client.ready, client.vectors) == (5, True, {3: 2, 5: 2})
    client.eof()
    assert client.abandon() == []


def test_departure_is_told_once_and_of_known_peers_only() -> None:
    client, events = told([*INTRODUCTION, (3, None), (3, None), (77, None), (3, "new")])
    assert events[6:] == [PeerLeft(3), VectorAdded(3, 0, "new")]
    assert client.vectors == {3: 1, 5: 2}


def test_vectors_and_departures_before_the_memory_are_tolerated() -> None:
    client, events = told([*HELLO[:2], (3, "3.0"), (5, "5.0"), (3, None), (-1, "memory")])
    assert events[1:] == [VectorAdded(3, 0, "3.0"), VectorAdded(5, 0, "5.0"), PeerLeft(3), MemoryArrived("memory")]
    assert client.ready


def test_missing_parts_are_named_until_ready() -> None:
    assert told([])[0].missing == "the protocol version, the peer id, the shared memory"
    assert told(HELLO[:1])[0].missing == "the peer id, the shared memory"
    assert told(HELLO[:2])[0].missing == "the shared memory"
    assert told(HELLO)[0].missing == ""


@pytest.mark.parametrize(
    ("before", "number", "fd", "field", "words"),
    [
        ([], 1, None, "version", "version 1; this client speaks 0"),
        ([], -1, "x", "version", "version -1"),
        ([], 0, "x", "version", "file descriptor came with the version"),
        (HELLO[:1], -1, None, "peer id", "id -1; allowed are 0 to 65535"),
        (HELLO[:1], 65536, None, "peer id", "id 65536"),
        (HELLO[:1], 5, "x", "peer id", "file descriptor came with our id 5"),
        (HELLO[:2], -1, None, "shared memory", "no file descriptor"),
        (HELLO, -1, "x", "shared memory", "second memory"),
        (HELLO, -1, None, "shared memory", "no file descriptor"),
        (HELLO[:2], -2, None, "message", "number -2"),
        (HELLO, -2, "x", "message", "number -2"),
        (HELLO, 65536, "x", "message", "number 65536"),
        (HELLO, 2**63 - 1, None, "message", str(2**63 - 1)),
        (HELLO, 5, None, "departure", "we, peer 5, left"),
        (HELLO[:2], 5, None, "departure", "we, peer 5, left"),
    ],
)
def test_malformed_message_is_named(before: Said, number: int, fd: str | None, field: str, words: str) -> None:
    client, _ = told(before)
    with pytest.raises(RemoteProtocolError, match=words) as caught:
        client.receive(encode(number), [] if fd is None else [fd])
    assert caught.value.field == field
    assert client.abandon() == ([] if fd is None else [fd])
    with pytest.raises(RemoteProtocolError) as again:
        client.receive(encode(0), ["late"])
    assert again.value is caught.value
    assert client.abandon() == ["late"]
    with pytest.raises(RemoteProtocolError):
        client.eof()


def test_descriptors_of_a_lost_piece_all_come_back() -> None:
    client, _ = told(HELLO)
    client.receive(encode(3)[:5], ["held"])
    with pytest.raises(RemoteProtocolError):
        client.receive(encode(3)[5:] + encode(-9) + encode(3)[:1], ["last"])
    assert sorted(client.abandon()) == ["held", "last"]


def test_second_descriptor_on_one_message_comes_back_with_the_first() -> None:
    client, _ = told(HELLO)
    client.receive(encode(3)[:5], ["first"])
    with pytest.raises(RemoteProtocolError, match="second file descriptor"):
        client.receive(encode(3)[5:], ["second"])
    assert sorted(client.abandon()) == ["first", "second"]


def test_descriptor_of_an_incomplete_message_comes_back() -> None:
    client, _ = told(HELLO)
    client.receive(encode(3)[:5], ["held"])
    assert client.abandon() == ["held"]


@pytest.mark.parametrize(("count", "words"), [(0, "protocol version"), (1, "peer id"), (2, "shared memory")])
def test_end_before_the_introduction_names_what_is_missing(count: int, words: str) -> None:
    client, _ = told(HELLO[:count])
    with pytest.raises(RemoteProtocolError, match=f"before it sent .*{words}") as caught:
        client.eof()
    assert caught.value.field == "message"


def test_end_inside_a_message_is_an_error() -> None:
    client, _ = told(INTRODUCTION)
    client.receive(b"abc")
    with pytest.raises(RemoteProtocolError, match="after 3 of a message's 8 bytes"):
        client.eof()


def test_vectors_end_where_the_doorbell_does() -> None:
    client, _ = told(HELLO)
    for _ in range(MAX_VECTORS):
        client.receive(encode(3), ["v"])
    with pytest.raises(RemoteProtocolError, match="more than 65536 vectors") as caught:
        client.receive(encode(3), ["v"])
    assert caught.value.field == "vector"


@given(st.lists(st.tuples(st.binary(max_size=40), st.lists(st.integers(), max_size=2))), st.booleans())
def test_random_bytes_are_understood_or_refused_and_no_descriptor_is_lost(
    pieces: list[tuple[bytes, list[int]]], start_right: bool
) -> None:
    client: ClientProtocol[int] = ClientProtocol()
    given_fds: list[int] = []
    owned: list[int] = []
    if start_right:
        client.receive(encode(0) + encode(1) + encode(-1), [1000])
    for data, fds in pieces:
        given_fds += fds
        with contextlib.suppress(RemoteProtocolError):
            owned += [e.fd for e in client.receive(data, fds) if isinstance(e, (MemoryArrived, VectorAdded))]
    with contextlib.suppress(RemoteProtocolError):
        client.eof()
    assert sorted(owned + client.abandon()) == sorted(given_fds)


@given(st.lists(st.tuples(st.integers(-3, 4), st.none() | st.integers(0, 9)), max_size=30))
def test_random_messages_are_understood_or_refused(said: list[tuple[int, int | None]]) -> None:
    client: ClientProtocol[int] = ClientProtocol()
    try:
        for number, fd in said:
            client.receive(encode(number), [] if fd is None else [fd])
    except RemoteProtocolError:
        return
    assert client.peer_id == (said[1][0] if len(said) > 1 else None)
    assert client.ready == any(number == -1 for number, _ in said)
