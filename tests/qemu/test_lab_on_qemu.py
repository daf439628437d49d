"""Real QEMU in a lab: it joins our server, and no interrupt is lost between it, our emulator and this process."""

from __future__ import annotations

import select
import time

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.guests.layout import Mailbox

pytestmark = pytest.mark.qemu

ROUNDS = 1000


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


def settled(mailbox, received, sent, timeout_s=10.0):
    """Wait until a guest's counts are what they shall be: it counts after it has rung."""
    deadline = time.monotonic() + timeout_s
    while (mailbox.received, mailbox.sent) != (received, sent) and time.monotonic() < deadline:
        select.select([], [], [], 0.001)
    return mailbox.received, mailbox.sent


def run_block(me, pinger, target_id, rounds):
    """Have one guest ping another, and wait until it says that it is done."""
    mailbox = Mailbox(me.memory, pinger.peer_id)
    mailbox.target, mailbox.rounds, mailbox.warmup, mailbox.log_offset = target_id, rounds, 0, 0
    mailbox.controller = me.peer_id + 1
    mailbox.command = command = mailbox.command + 1
    me.ring(pinger.peer_id, 0)
    assert me.wait(0, timeout_s=60.0) == 1
    assert (mailbox.done, mailbox.status) == (command, 0)


def test_a_host_peer_and_qemu_exchange_1000_interrupts_each_way_on_each_vector(lab):
    board = lab.server("board", vectors=2)
    alice = lab.vm("alice", connect=board, emulator="qemu")
    me = lab.peer("me", connect=board)
    lab.start()
    alice.wait_text("ready", 30.0)
    mailbox = Mailbox(me.memory, alice.peer_id)
    mailbox.reply_to = me.peer_id + 1
    answers = [0, 0]
    for _ in range(ROUNDS):
        for vector in (0, 1):
            me.ring(alice.peer_id, vector)
            answers[vector] += me.wait(vector, timeout_s=10.0)
    assert answers == [ROUNDS, ROUNDS]
    assert settled(mailbox, 2 * ROUNDS, 2 * ROUNDS) == (2 * ROUNDS, 2 * ROUNDS)
    assert [me.wait(vector, timeout_s=0.0) for vector in (0, 1)] == [0, 0]


@pytest.mark.parametrize("pinging", ["qemu", "unicorn"])
@pytest.mark.parametrize("answering", ["qemu", "unicorn"])
def test_two_guests_exchange_1000_interrupts_each_way_whoever_runs_them(lab, pinging, answering):
    board = lab.server("board", vectors=1)
    alice = lab.vm("alice", connect=board, emulator=pinging)
    bob = lab.vm("bob", connect=board, emulator=answering)
    me = lab.peer("me", connect=board)
    lab.start()
    for guest in (alice, bob):
        guest.wait_text("ready", 30.0)
    run_block(me, alice, bob.peer_id, ROUNDS)
    pinger, ponger = Mailbox(me.memory, alice.peer_id), Mailbox(me.memory, bob.peer_id)
    assert settled(ponger, ROUNDS, ROUNDS) == (ROUNDS, ROUNDS)
    # The pinger's own counts hold the command that started it and the doorbell that told us.
    assert settled(pinger, ROUNDS + 1, ROUNDS + 1) == (ROUNDS + 1, ROUNDS + 1)


def test_a_departed_qemu_is_seen_to_leave_and_its_id_is_not_given_again(lab):
    board = lab.server("board")
    me = lab.peer("me", connect=board)
    first = lab.vm("first", connect=board, emulator="qemu")
    first.start()
    assert me.wait_for_peer(first.peer_id, timeout_s=10.0) == first.peer_id
    first.close()
    second = lab.vm("first", connect=board, emulator="qemu")
    second.start()
    assert (first.peer_id, second.peer_id) == (1, 2)
    me.wait_for_peer(2, timeout_s=10.0)
    assert set(me.peers) == {2}
    assert set(board.peers) == {0, 2}


def test_qemu_shows_its_device_and_takes_commands(lab):
    board = lab.server("board", size="1M")
    alice = lab.vm("alice", connect=board, emulator="qemu")
    lab.start()
    alice.wait_text("ready", 30.0)
    devices = alice.execute("query-pci")[0]["devices"]
    device = next(each for each in devices if each["qdev_id"] == "ivshmem0")
    assert (device["id"]["vendor"], device["id"]["device"]) == (0x1AF4, 0x1110)
    assert sorted(region["size"] for region in device["regions"]) == [256, 4096, 1 << 20]
    alice.execute("stop")
    assert alice.state == "paused"
    alice.execute("cont")
    assert alice.state == "running"
