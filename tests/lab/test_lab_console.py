"""The serial port of a machine: read, typed to, listened to, saved."""

from __future__ import annotations

import threading

import pytest

from ivshmem_lab import Lab
from ivshmem_lab.errors import VmError
from ivshmem_lab.vm.text import VmTimeoutError

QEMU = pytest.param("qemu", marks=pytest.mark.qemu)


@pytest.fixture
def lab():
    with Lab() as lab:
        yield lab


class Listener:
    """Collects what it is told; `wait` until a text is in it."""

    def __init__(self) -> None:
        self.text = ""
        self._news = threading.Condition()

    def __call__(self, piece: str) -> None:
        with self._news:
            self.text += piece
            self._news.notify_all()

    def wait(self, text: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: text in self.text, 20.0), self.text


@pytest.mark.parametrize("emulator", ["unicorn", QEMU])
def test_what_is_typed_reaches_the_guest_and_listeners_hear_all_of_it(lab, emulator, tmp_path) -> None:
    early, late = Listener(), Listener()
    vm = lab.vm("alice", "migrant", emulator=emulator, connect=lab.server("board"))
    vm.console.subscribe(early)
    vm.start()
    early.wait("migrant: ready")
    stop = vm.console.subscribe(late)
    vm.console.write("c")
    early.wait("migrant: round=")
    late.wait("memory=4194304")
    assert early.text.replace("\r", "").startswith("migrant: ready\n")
    assert late.text.replace("\r", "").rstrip() == vm.console.text().rstrip()
    assert vm.console.save(tmp_path / "alice.txt").read_text() == vm.console.text()
    stop()
    stop()
    heard = late.text
    early.text = ""
    vm.console.write("c")
    early.wait("migrant: round=")
    assert late.text == heard


def test_a_guest_that_does_not_read_is_told_in_time(lab) -> None:
    vm = lab.vm("alice", "probe", {"watch": 1})
    with pytest.raises(VmError, match="not running"):
        vm.console.write("x")
    vm.start()
    with pytest.raises(VmTimeoutError, match="does not read the serial port"):
        vm.console.write("x" * 4_000_000, timeout_s=0.3)
    assert lab.loop.call(vm._vm.execute("query-status"))["running"]
    vm.stop()
    with pytest.raises(VmError, match="not running"):
        vm.console.write("x")
