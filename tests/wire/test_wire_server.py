"""The server's state machine: order, ids, and the right view for every client whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ivshmem_lab.errors import LocalProtocolError
from ivshmem_lab.wire.client import ClientProtocol, PeerLeft, VectorAdded
from ivshmem_lab.wire.messages import MEMORY, Message, encode
from ivshmem_lab.wire.server import Outgoing, ServerProtocol


def heard_by(recipient: int, outgoing: list[Outgoing[str]]) -> list[tuple[int, str | None]]:
    return [(o.message.value, o.message.fd) for o in outgoing if o.recipient == recipient]


def test_first_peer_hears_version_id_memory_and_its_own_vectors() -> None:
    server = ServerProtocol("memory")
    peer_id, outgoing = server.join(["a0", "a1"])
    assert peer_id == 0
    assert heard_by(0, outgoing) == [(0, None), (0, None), (MEMORY, "memory"), (0, "a0"), (0, "a1")]


def test_newcomer_and_the_others_hear_in_the_order_of_qemus_server() -> None:
    server = ServerProtocol("memory")
    server.join(["a0", "a1"])
    server.join(["b0", "b1"])
    peer_id, outgoing = server.join(["c0", "c1"])
    assert peer_id == 2
    assert [(o.recipient, o.message.value, o.message.fd) for o in outgoing] == [
        *[(2, 0, None), (2, 2, None), (2, MEMORY, "memory")],
        *[(0, 2, "c0"), (0, 2, "c1"), (1, 2, "c0"), (1, 2, "c1")],
        *[(2, 0, "a0"), (2, 0, "a1"), (2, 1, "b0"), (2, 1, "b1")],
        *[(2, 2, "c0"), (2, 2, "c1")],
    ]


def test_departure_reaches_every_other_once() -> None:
    server = ServerProtocol("memory")
    for name in "abc":
        server.join([name])
    assert server.leave(1) == [Outgoing(0, Message(1)), Outgoing(2, Message(1))]
    with pytest.raises(LocalProtocolError, match=r"peer 1 is not connected; connected are \[0, 2\]"):
        server.leave(1)


def test_peer_without_vectors_was_never_announced_so_nobody_hears_it_leave() -> None:
    server = ServerProtocol("memory")
    server.join(["a"])
    peer_id, outgoing = server.join([])
    assert heard_by(0, outgoing) == []
    assert heard_by(peer_id, outgoing) == [(0, None), (1, None), (MEMORY, "memory"), (0, "a")]
    assert server.leave(peer_id) == []


def test_ids_are_not_reused_before_all_have_been() -> None:
    server = ServerProtocol("memory")
    for expected in range(5):
        peer_id, _ = server.join(["v"])
        assert peer_id == expected
        server.leave(peer_id)


def test_ids_start_again_after_65535_and_pass_over_those_in_use() -> None:
    server = ServerProtocol("memory", first_id=65534)
    assert [server.join([])[0] for _ in range(3)] == [65534, 65535, 0]
    server = ServerProtocol("memory")
    holders = [server.join([])[0] for _ in range(3)]
    server.leave(1)
    for _ in range(65536 - 3):
        server.leave(server.join([])[0])
    assert holders == [0, 1, 2]
    assert server.join([])[0] == 1


def test_exhausted_ids_are_refused_by_name_and_a_departure_helps() -> None:
    server = ServerProtocol("memory")
    server._introductions = {peer_id: [] for peer_id in range(65536)}  # joining them all takes a minute
    with pytest.raises(LocalProtocolError, match="all 65536 peer ids are taken"):
        server.join([])
    server.leave(4711)
    assert server.join([])[0] == 4711


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(LocalProtocolError, match="first peer id 65536"):
        ServerProtocol("memory", first_id=65536)
    with pytest.raises(LocalProtocolError, match="65537 vectors"):
        ServerProtocol("memory").join(["v"] * 65537)


class JoinsAndLeaves(RuleBasedStateMachine):
    """Every client is fed what it is sent, late or at once; its view must follow."""

    connected = Bundle("connected")

    @initialize(first_id=st.sampled_from([0, 65533]))
    def begin(self, first_id: int) -> None:
        self.server = ServerProtocol("memory", first_id)
        self.clients: dict[int, ClientProtocol[str]] = {}
        self.views: dict[int, dict[int, list[str]]] = {}
        self.mail: dict[int, list[Message[str]]] = {}
        self.present: dict[int, list[str]] = {}
        self.made = 0

    @rule(target=connected, vectors=st.integers(0, 3))
    def join(self, vectors: int) -> int:
        fds = [f"{self.made}.{vector}" for vector in range(vectors)]
        self.made += 1
        peer_id, outgoing = self.server.join(fds)
        assert peer_id not in self.present
        self.present[peer_id] = fds
        self.clients[peer_id] = ClientProtocol()
        self.views[peer_id] = {}
        self.mail[peer_id] = []
        self.post(outgoing)
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

    def post(self, outgoing: list[Outgoing[str]]) -> None:
        for item in outgoing:
            self.mail[item.recipient].append(item.message)  # a KeyError: sent to one who is gone

    def teardown(self) -> None:
        for peer_id in list(getattr(self, "clients", {})):
            self.read_everything(peer_id)


TestJoinsAndLeaves = JoinsAndLeaves.TestCase
TestJoinsAndLeaves.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
