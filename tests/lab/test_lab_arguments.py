from __future__ import annotations

import os
from pathlib import Path

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.errors import EmulatorNotFoundError, LabError, UsageError
from ivshmem_lab.guests import guest_path
from ivshmem_lab.lab.arguments import read_cpu, read_guest, read_guest_arguments, read_name, read_vm_memory


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "a/b", "../x", "a,b=c", "x" * 33, "a\n", None, 7])
def test_a_name_that_cannot_stand_in_a_file_name_or_an_option_is_refused(name):
    with pytest.raises(UsageError, match="is not allowed: 1 to 32 letters"):
        read_name(name)


@pytest.mark.parametrize("name", ["a", "vm-1", "x.y_z", "Zoë", "0", "x" * 32])
def test_ordinary_names_are_taken(name):
    assert read_name(name) == name


def test_a_guest_is_known_by_name_or_is_a_file(tmp_path):
    assert read_guest("pingpong") == str(guest_path("pingpong"))
    assert read_guest(None) is None
    own = tmp_path / "own.elf"
    own.touch()
    assert read_guest(own) == read_guest(str(own)) == str(own)


def test_a_relative_path_of_a_guest_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "own.elf").touch()
    monkeypatch.chdir(tmp_path)
    assert read_guest("./own.elf") == read_guest(Path("own.elf")) == str(tmp_path / "own.elf")


def test_an_unknown_guest_is_refused_with_those_that_exist():
    with pytest.raises(
        UsageError, match=r"guest 'pong' is unknown; there are echo, intx, knock, migrant, pingpong, probe, stream"
    ):
        read_guest("pong")
    with pytest.raises(UsageError, match=r"guest '/no/such.elf' is no file"):
        read_guest("/no/such.elf")


def test_guest_arguments_become_tokens():
    assert read_guest_arguments({"role": "ping", "rounds": 100, "exit": True}) == "role=ping rounds=100 exit=1"
    assert read_guest_arguments("role=ping  x") == "role=ping  x"
    assert read_guest_arguments(None) == ""


def test_a_guest_argument_with_a_blank_is_refused():
    with pytest.raises(UsageError, match=r"'text=two words' has a blank"):
        read_guest_arguments({"text": "two words"})
    with pytest.raises(UsageError, match="neither a dict nor a text"):
        read_guest_arguments(["role=ping"])


@pytest.mark.parametrize(("memory", "size_bytes"), [("32M", 32 << 20), ("64", 64 << 20), (1 << 20, 1 << 20)])
def test_guest_memory_is_read_as_qemu_reads_it(memory, size_bytes):
    assert read_vm_memory(memory) == size_bytes


@pytest.mark.parametrize("memory", ["0", "1.5M", "4K", 32, "much"])
def test_guest_memory_that_is_no_whole_mib_is_refused(memory):
    with pytest.raises(UsageError, match="memory"):
        read_vm_memory(memory)


def test_a_cpu_that_this_process_may_not_use_is_refused():
    allowed = os.sched_getaffinity(0)
    assert read_cpu(min(allowed)) in allowed
    with pytest.raises(UsageError, match=r"cpu 4096 is not one this process may use"):
        read_cpu(4096)


def test_a_size_that_is_no_power_of_two_leaves_the_name_free(lab):
    with pytest.raises(UsageError, match="3M is not a power of two; the nearest that are: 2M and 4M"):
        lab.server("board", size="3M")
    with pytest.raises(UsageError, match="5000 vectors"):
        lab.server("board", vectors=5000)
    assert lab.server("board").size_bytes == 4 << 20


def test_a_name_is_free_again_when_its_holder_is_closed(lab):
    board = lab.server("board")
    with pytest.raises(UsageError, match=r"the name 'board' is taken \(a server\)"):
        lab.vm("board", connect=board)
    me = lab.peer("me", connect=board)
    with pytest.raises(UsageError, match=r"the name 'me' is taken \(a peer\)"):
        lab.peer("me", connect=board)
    me.close()
    lab.peer("me", connect=board)
    alice = lab.vm("alice", connect=board)
    with pytest.raises(UsageError, match=r"the name 'alice' is taken \(a VM\)"):
        lab.vm("alice")
    alice.close()
    lab.vm("alice")
    board.close()
    board.close()
    assert lab.server("board") is not board


def test_what_is_connected_to_must_be_a_living_server_of_this_lab(lab):
    with Lab() as other:
        foreign = other.server("board")
        with pytest.raises(UsageError, match="is closed, or belongs to another lab"):
            lab.vm("alice", connect=foreign)
    board = lab.server("board")
    with pytest.raises(UsageError, match="connect='board' is not a server"):
        lab.vm("alice", connect="board")
    with pytest.raises(UsageError, match="a peer joins one server"):
        lab.peer("me", connect=None)
    board.close()
    with pytest.raises(UsageError, match="is closed, or belongs"):
        lab.peer("me", connect=board)


def test_emulators_that_do_not_exist_or_are_not_installed_are_refused(lab, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="emulator 'kvm' is unknown"):
        lab.vm("alice", emulator="kvm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulatorNotFoundError):
        lab.vm("alice", emulator="qemu")


def test_what_a_machine_does_not_have_yet_is_named_with_the_remedy(lab):
    board = lab.server("board")
    alice, bob = lab.vm("alice", connect=board), lab.vm("bob")
    with pytest.raises(LabError, match=r"alice has no peer id before it is started; call lab.start\(\)"):
        _ = alice.peer_id
    with pytest.raises(LabError, match="bob is not connected to a server"):
        _ = bob.peer_id
    assert (alice.pid, alice.state, alice.console.text()) == (None, "defined", "")


def test_a_closed_lab_refuses_by_name_and_its_members_stay_readable():
    with Lab() as lab:
        board = lab.server("board")
        alice = lab.vm("alice", connect=board)
    assert repr(lab) == "<Lab: closed>"
    for call, text in [
        (lambda: lab.server("x"), "lab.server('x')"),
        (lambda: lab.vm("x"), "lab.vm('x')"),
        (lambda: lab.peer("x", connect=board), "lab.peer('x')"),
        (lab.start, "lab.start()"),
        (alice.start, "alice.start()"),
        (lambda: alice.execute("stop"), "alice.execute('stop')"),
        (lambda: alice.wait_text("x"), "alice.wait_text()"),
        (lambda: board.peers, "board.peers"),
        (lab.__enter__, "with lab"),
    ]:
        with pytest.raises(LabError) as caught:
            call()
        assert str(caught.value) == f"{text}: this lab is closed; make a new one with Lab()"
    lab.close()
    alice.close()
    board.close()
    assert alice.state == "stopped"
