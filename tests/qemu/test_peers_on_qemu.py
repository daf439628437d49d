"""Real QEMU, our emulator and this process as peers of one server: interrupts in every direction, none lost."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from machines import LIMIT_S, Machine, served

from ivshmem_lab.guests import guest_path
from ivshmem_lab.guests.exchange import STATE_READY, Mailbox
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.qemu

ROUNDS = 1000
VECTORS = 2
PINGPONG = str(guest_path("pingpong"))


def until(condition: Callable[[], bool]) -> None:
    never = threading.Event()
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        never.wait(0.001)


@dataclass
class Board:
    """Who is there: this process (peer 0), a guest in QEMU (1) and one in our emulator (2)."""

    peer: Peer
    machines: dict[str, Machine]
    mailboxes: dict[str, Mailbox]

    def counts(self, name: str) -> tuple[int, int]:
        mailbox = self.mailboxes[name]
        return mailbox.received, mailbox.sent

    def comes_to(self, name: str, received: int, sent: int) -> None:
        """A guest counts what it sent after it rang: wait for that, and see that no more comes."""
        until(lambda: self.counts(name) >= (received, sent))
        assert self.counts(name) == (received, sent)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    path = tmp_path / "s"
    with contextlib.ExitStack() as stack:
        stack.enter_context(served(path, vectors=VECTORS, size_bytes=1 << 20))
        peer = stack.enter_context(Peer.connect(path))
        machines, mailboxes = {}, {}
        for peer_id, kind in ((1, "qemu"), (2, "unicorn")):
            options = ["-kernel", PINGPONG, "-chardev", f"socket,id=c,path={path}"]
            options += ["-device", f"ivshmem-doorbell,chardev=c,vectors={VECTORS}"]
            machine = stack.enter_context(Machine(kind, *options))
            machine.says(f"pingpong: peer_id={peer_id} vectors={VECTORS}")
            machine.says("ready")
            machines[kind], mailboxes[kind] = machine, Mailbox(peer.memory, peer_id)
            assert peer.wait_for_peer(peer_id, LIMIT_S) == peer_id
        yield Board(peer, machines, mailboxes)
        mailboxes.clear()  # views of the shared memory keep it, and pytest keeps the board


def test_a_guest_in_qemu_and_one_in_ours_exchange_1000_interrupts_each_way(board: Board) -> None:
    for name, other in (("unicorn", "qemu"), ("qemu", "unicorn")):
        before = {each: board.counts(each) for each in board.mailboxes}
        mailbox, target = board.mailboxes[name], board.mailboxes[other]
        mailbox.target, mailbox.rounds, mailbox.warmup = target.owner - 1, ROUNDS, 0
        mailbox.controller = board.peer.peer_id + 1
        mailbox.command += 1
        board.peer.ring(mailbox.owner - 1)
        assert board.peer.wait(timeout_s=LIMIT_S) == 1
        assert (mailbox.done, mailbox.status, mailbox.state) == (mailbox.command, 0, STATE_READY)
        # Its own counts hold our command and its answer to us, too.
        board.comes_to(name, before[name][0] + ROUNDS + 1, before[name][1] + ROUNDS + 1)
        board.comes_to(other, before[other][0] + ROUNDS, before[other][1] + ROUNDS)


@pytest.mark.parametrize("name", ["qemu", "unicorn"])
def test_a_guest_and_this_process_exchange_1000_interrupts_each_way_on_each_vector(board: Board, name: str) -> None:
    mailbox = board.mailboxes[name]
    mailbox.reply_to = board.peer.peer_id + 1
    answers = dict.fromkeys(range(VECTORS), 0)
    for _ in range(ROUNDS):
        for vector in range(VECTORS):
            board.peer.ring(mailbox.owner - 1, vector)
            answers[vector] += board.peer.wait(vector, timeout_s=LIMIT_S)
    assert answers == dict.fromkeys(range(VECTORS), ROUNDS)
    board.comes_to(name, VECTORS * ROUNDS, VECTORS * ROUNDS)
    assert [board.peer.wait(vector, timeout_s=0) for vector in range(VECTORS)] == [0] * VECTORS


def test_when_qemu_leaves_the_others_go_on(board: Board) -> None:
    board.machines["qemu"].qmp.negotiate()
    board.machines["qemu"].qmp.ok("quit")
    assert board.machines["qemu"].wait() == 0
    until(lambda: 1 not in board.peer.peers)
    mailbox = board.mailboxes["unicorn"]
    mailbox.reply_to = board.peer.peer_id + 1
    for _ in range(100):
        board.peer.ring(2)
        assert board.peer.wait(timeout_s=LIMIT_S) == 1
    board.comes_to("unicorn", 100, 100)
