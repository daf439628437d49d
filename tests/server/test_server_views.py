"""Whatever peers do, in whatever order: the view of every one of them is that of the model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from server_tools import Client, until

from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.server.policy import Admission
from ivshmem_lab.server.server import Server
from ivshmem_lab.server.statefile import StateFile

if TYPE_CHECKING:
    from collections.abc import Callable

VECTORS = 2
NAMES = ["", "", "red", "blue"]


class Views(RuleBasedStateMachine):
    """Clients join, read late or never, leave politely or not, and come back; some are shielded; so does the server."""

    clients = Bundle("clients")

    @initialize()
    def begin(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="ivlab-", dir="/tmp"))
        self.runner = asyncio.Runner()
        self.memory = SharedMemory.create_memfd(4096)
        self.server = Server(self.directory / "s", self.memory, VECTORS)
        self.runner.run(self.server.start())
        self.there: dict[int, Client] = {}  # connected, by the id that the model expects
        self.shielded: dict[int, set[int]] = {}  # what a shielded one must still know
        self.leases: dict[str, int] = {}  # id by name
        self.next_id = 0

    @rule(target=clients, name=st.sampled_from(NAMES), shield=st.booleans())
    def join(self, name: str, shield: bool) -> object:
        if name in self.leases and self.leases[name] in self.there:
            return multiple()
        if shield:
            self.server.expect(os.getpid(), Admission(lease=name or None, shield_qemu=True))
        client = Client(self.server.path, name)
        if name in self.leases:
            peer_id = self.leases[name]
        else:
            peer_id, self.next_id = self.next_id, self.next_id + 1
            if name:
                self.leases[name] = peer_id
        self.until(lambda: peer_id in self.server.peers)
        self.there[peer_id] = client
        if shield:
            self.shielded[peer_id] = self.present()
        for known in self.shielded.values():
            known.add(peer_id)
        return peer_id

    @rule(peer_id=consumes(clients), how=st.sampled_from(["close", "shutdown", "garbage"]))
    def leave(self, peer_id: int, how: str) -> None:
        if peer_id not in self.there:  # the server went in the meantime
            return
        client = self.there.pop(peer_id)
        self.shielded.pop(peer_id, None)
        if how == "shutdown":
            client.sock.shutdown(1)
        elif how == "garbage":
            client.sock.send(b"?" * 100)
        else:
            client.close()
        self.until(lambda: peer_id not in self.server.peers)
        client.close()

    @rule(peer_id=clients)
    def read(self, peer_id: int) -> None:
        """The others stay slow."""
        if peer_id in self.there:
            self.compare(peer_id)

    @rule(killed=st.booleans())
    def server_comes_back(self, killed: bool) -> None:
        """All connections end; who joins again under a lease is who he was."""
        state = self.server.export_state()
        if killed:  # what a server that had no time to say anything left on disk
            file = StateFile(str(self.directory / "state"))
            file.create(state)
            loaded = file.load()
            assert loaded is not None
            assert self.next_id < loaded.next_id <= self.next_id + 64
            state, self.next_id = loaded, loaded.next_id
        self.runner.run(self.server.close())
        for client in self.there.values():
            self.runner.run(asyncio.wait_for(client.until_end(), 3))
            client.close()
        self.there.clear()
        self.shielded.clear()
        self.server = Server(self.directory / "s", self.memory, VECTORS, state=state)
        self.runner.run(self.server.start())

    @rule()
    def server_gives_up_the_absent(self) -> None:
        roster = self.server._roster
        for lease in roster.leases.held():
            self.runner.run(self.call(lambda lease=lease: roster.end_lease(lease, "the test says so")))
            del self.leases[lease.name]

    @invariant()
    def server_agrees(self) -> None:
        if hasattr(self, "there"):
            assert set(self.server.peers) == set(self.there)

    def present(self) -> set[int]:
        return set(self.there) | set(self.leases.values())

    def compare(self, peer_id: int) -> None:
        client = self.there[peer_id]
        expected = self.present() | self.shielded.get(peer_id, set())
        self.runner.run(asyncio.wait_for(client.until_vectors(dict.fromkeys(expected, VECTORS)), 3))
        assert client.peer_id == peer_id
        if peer_id in self.shielded:
            assert client.departures == []
        assert len(client.departures) == len(set(client.departures))

    def until(self, condition: Callable[[], bool]) -> None:
        self.runner.run(until(condition))

    async def call(self, deed: Callable[[], None]) -> None:
        deed()

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory)
            stack.callback(self.memory.close)
            stack.callback(self.runner.close)
            stack.callback(lambda: self.runner.run(self.server.close()))
            for client in self.there.values():
                stack.callback(client.close)
            for peer_id in self.there:
                self.compare(peer_id)


TestViews = Views.TestCase
TestViews.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
