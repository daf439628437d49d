"""The server's state machine: order, ids, and the right view for every client whatever happens."""

from __future__ import annotations

from typing import TypeAlias

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ivshmem_lab.errors import LocalProtocolError
from ivshmem_lab.wire.client import ClientProtocol, PeerLeft, VectorAdded
from ivshmem_lab.wire.messages import MEMORY, Message, encode
from ivshmem_lab.wire.server import MOST_REMEMBERED, ServerProtocol, Step

Protocol: TypeAlias = ServerProtocol[str, Message[str]]


def serve(first_id: int = 0) -> Protocol:
    return ServerProtocol(Message, "memory", first_id)


def sent(step: Step[Message[str]]) -> list[tuple[int, int, str | None]]:
    return [(to, m.value, m.fd) for posting in step.postings for to in posting.recipients for m in posting.messages]


def heard_by(recipient: int, step: Step[Message[str]]) -> list[tuple[int, str | None]]:
    return [(value, fd) for to, value, fd in sent(step) if to == recipient]


def test_first_peer_hears_version_id_memory_and_its_own_vectors() -> None:
    server = serve()
    peer_id, step = server.join(["a0", "a1"])
    assert peer_id == 0
    assert heard_by(0, step) == [(0, None), (0, None), (MEMORY, "memory"), (0, "a0"), (0, "a1")]


def test_newcomer_and_the_others_hear_in_the_order_of_qemus_server() -> None:
    server = serve()
    server.join(["a0", "a1"])
    server.join(["b0", "b1"])
    peer_id, step = server.join(["c0", "c1"])
    assert peer_id == 2
    assert sent(step) == [
        *[(2, 0, None), (2, 2, None), (2, MEMORY, "memory")],
        *[(0, 2, "c0"), (0, 2, "c1"), (1, 2, "c0"), (1, 2, "c1")],
        *[(2, 0, "a0"), (2, 0, "a1"), (2, 1, "b0"), (2, 1, "b1")],
        *[(2, 2, "c0"), (2, 2, "c1")],
    ]


def test_departure_reaches_every_other_once() -> None:
    server = serve()
    for name in "abc":
        server.join([name])
    assert sent(server.leave(1)) == [(0, 1, None), (2, 1, None)]
    with pytest.raises(LocalProtocolError, match=r"peer 1 is not connected; connected are \[0, 2\]"):
        server.leave(1)


def test_peer_without_vectors_was_never_announced_so_nobody_hears_it_leave() -> None:
    server = serve()
    server.join(["a"])
    peer_id, step = server.join([])
    assert heard_by(0, step) == []
    assert heard_by(peer_id, step) == [(0, None), (1, None), (MEMORY, "memory"), (0, "a")]
    assert sent(server.leave(peer_id)) == []


def test_ids_are_not_reused_before_all_have_been() -> None:
    server = serve()
    for expected in range(5):
        peer_id, _ = server.join(["v"])
        assert peer_id == expected
        server.leave(peer_id)


def test_ids_start_again_after_65535_and_pass_over_those_in_use() -> None:
    server = serve(65534)
    assert [server.join([])[0] for _ in range(3)] == [65534, 65535, 0]
    server = serve()
    holders = [server.join([])[0] for _ in range(3)]
    server.leave(1)
    for _ in range(65536 - 3):
        server.leave(server.join([])[0])
    assert holders == [0, 1, 2]
    assert server.join([])[0] == 1


def test_exhausted_ids_are_refused_by_name_and_a_departure_helps() -> None:
    server = serve()
    server._introductions = {peer_id: [] for peer_id in range(65536)}  # joining them all takes a minute
    with pytest.raises(LocalProtocolError, match="all 65536 peer ids are taken"):
        server.join([])
    server.leave(4711)
    assert server.join([])[0] == 4711


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="first peer id 65536"):
        serve(65536)
    with pytest.raises(LocalProtocolError, match="65537 vectors"):
        serve().join(["v"] * 65537)


def test_shielded_peer_hears_no_goodbye_and_nobody_gets_an_id_that_it_remembers() -> None:
    server = serve(65535)
    shielded, _ = server.join(["q"], shielded=True)
    gone, _ = server.join(["a"])
    plain, _ = server.join(["b"])
    step = server.leave(gone)
    assert (sent(step), step.withheld) == ([(plain, gone, None)], [shielded])
    for _ in range(65536):  # once round: 0 stays out of use
        peer_id, _ = server.join([])
        assert peer_id not in {shielded, gone, plain}
        server.leave(peer_id)
    with pytest.raises(LocalProtocolError, match=f"peer id {gone} is taken, or somebody remembers"):
        server.join(["c"], peer_id=gone)
    server.leave(shielded)
    assert server.join(["c"], peer_id=gone)[0] == gone


def test_shielded_peer_that_remembers_too_many_is_not_told_of_newcomers() -> None:
    server = serve()
    shielded, _ = server.join(["q"], shielded=True)
    for _ in range(MOST_REMEMBERED - 1):
        peer_id, step = server.join(["x"])
        assert heard_by(shielded, step) == [(peer_id, "x")]
        server.leave(peer_id)
    peer_id, step = server.join(["x"])
    assert (heard_by(shielded, step), step.withheld) == ([], [shielded])
    assert server.leave(peer_id).withheld == []  # it never knew


def test_absent_peer_is_introduced_to_newcomers_and_its_return_is_told_to_nobody_else() -> None:
    server = serve()
    for name in ("a", "b"):
        server.join([name])
    server.expect_back(0)
    assert server.peers == {1: 1}
    peer_id, step = server.join(["c"])
    assert heard_by(peer_id, step)[3:] == [(0, "a"), (1, "b"), (2, "c")]
    assert heard_by(0, step) == []
    back = server.come_back(0)
    assert {to for to, _, _ in sent(back)} == {0}
    assert heard_by(0, back) == [(0, None), (0, None), (MEMORY, "memory"), (1, "b"), (2, "c"), (0, "a")]
    with pytest.raises(LocalProtocolError, match="peer 0 is not absent"):
        server.come_back(0)


def test_absent_peer_that_never_comes_is_taken_leave_of() -> None:
    server = serve()
    for name in ("a", "b"):
        server.join([name])
    server.expect_back(0)
    assert sent(server.leave(0)) == [(1, 0, None)]


def test_restored_peer_is_absent_with_its_id_and_descriptors() -> None:
    server = serve(5)
    server.restore(3, ["old"])
    assert server.peers == {}
    assert heard_by(5, server.join(["n"])[1])[3:] == [(3, "old"), (5, "n")]
    assert heard_by(3, server.come_back(3))[3:] == [(5, "n"), (3, "old")]


def test_observer_hears_three_messages_and_nobody_hears_of_it() -> None:
    server = serve()
    server.join(["a"])
    peer_id, step = server.observe("read-only")
    assert sent(step) == [(1, 0, None), (1, 1, None), (1, MEMORY, "read-only")]
    assert sent(server.join(["b"])[1])[3][0] == 0
    assert peer_id in server.peers
    assert sent(server.leave(peer_id)) == []
    assert peer_id not in server.peers


def test_id_asked_for_is_given_when_it_is_free() -> None:
    server = serve()
    assert server.join(["a"], peer_id=7)[0] == 7
    assert [server.join([])[0] for _ in range(8)] == [0, 1, 2, 3, 4, 5, 6, 8]
    for wrong, words in ((7, "is taken"), (65536, "not allowed"), (-1, "not allowed")):
        with pytest.raises(LocalProtocolError, match=words):
            server.join([], peer_id=wrong)


class JoinsAndLeaves(RuleBasedStateMachine):
    """Every client is fed what it is sent, late or at once; its view must follow."""

    connected = Bundle("connected")

    @initialize(first_id=st.sampled_from([0, 65533]))
    def begin(self, first_id: int) -> None:
        self.server = serve(first_id)
        self.clients: dict[int, ClientProtocol[str]] = {}
        self.views: dict[int, dict[int, list[str]]] = {}
        self.mail: dict[int, list[Message[str]]] = {}
        self.present: dict[int, list[str]] = {}
        self.made = 0

    @rule(target=connected, vectors=st.integers(0, 3))
    def join(self, vectors: int) -> int:
        fds = [f"{self.made}.{vector}" for vector in range(vectors)]
        self.made += 1
        peer_id, step = self.server.join(fds)
        assert peer_id not in self.present
        self.present[peer_id] = fds
        self.clients[peer_id] = ClientProtocol()
        self.views[peer_id] = {}
        self.mail[peer_id] = []
        self.post(step)
        return peer_id

    @rule(peer_id=consumes(connected))
    def leave(self, peer_id: int) -> None:
        del self.present[peer_id], self.clients[peer_id], self.views[peer_id], self.mail[peer_id]
        self.post(self.server.leave(peer_id))

    @rule(peer_id=connected)
    def read_everything(self, peer_id: int) -> None:
        client, view = self.clients[peer_id], self.views[peer_id]
        for message in self.mail[peer_id]:
            events = client.receive(encode(message.value), [] if message.fd is None else [message.fd])
            introduced = message.value in view
            for event in events:
                if isinstance(event, VectorAdded):
                    view.setdefault(event.peer_id, []).append(event.fd)
                elif isinstance(event, PeerLeft):
                    assert introduced
                    del view[event.peer_id]
            if client.ready and message.fd is None:
                assert events, "told of the departure of a peer that it did not know"
        self.mail[peer_id].clear()
        assert client.peer_id == peer_id
        assert client.ready
        assert view == {other: fds for other, fds in self.present.items() if fds}

    @invariant()
    def the_server_knows_who_is_there(self) -> None:
        if hasattr(self, "server"):
            assert self.server.peers == {peer_id: len(fds) for peer_id, fds in self.present.items()}

    def post(self, step: Step[Message[str]]) -> None:
        for posting in step.postings:
            for recipient in posting.recipients:
                self.mail[recipient].extend(posting.messages)  # a KeyError: sent to one who is gone

    def teardown(self) -> None:
        for peer_id in list(getattr(self, "clients", {})):
            self.read_everything(peer_id)


TestJoinsAndLeaves = JoinsAndLeaves.TestCase
TestJoinsAndLeaves.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
