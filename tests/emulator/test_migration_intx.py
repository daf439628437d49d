"""INTx that is raised while a machine moves: masked, in service or about to be taken, it is taken once on arrival."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import bare
from machines import LIMIT_S, served
from migrations import EVENTS, ended, migrate, pair
from qtest_client import Qtest

from ivshmem_lab.device.registers import INT_MASK, INT_STATUS, IV_POSITION
from ivshmem_lab.guests import guest_path
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SLOT, LINE = 4, 11  # by the PIIX3's wires and the firmware's routes
FIRST_PIC, SECOND_PIC = 0x20, 0xA0
BASE_VECTOR = 0x40
VECTOR = BASE_VECTOR + LINE - 8
BIT = 1 << LINE - 8
READ_REQUESTED, READ_IN_SERVICE, EOI = 0x0A, 0x0B, 0x20
STATUS_INTERRUPT = 0x08
COUNT = bare.COUNTS + 4 * VECTOR


def legacy(path: Path) -> list[str]:
    device = f"ivshmem,chardev=c,id=iv,msi=off,size=64K,role=master,addr={SLOT}"
    return ["-chardev", f"socket,path={path},id=c", "-device", device]


class Watched(Qtest):
    """A running guest, and what software sees of its interrupts."""

    @property
    def registers(self) -> int:
        return self.config(SLOT, 0x10) & ~0xF

    def requested(self) -> bool:
        self.out(SECOND_PIC, READ_REQUESTED, 1)
        return bool(self.inp(SECOND_PIC, 1) & BIT)

    def in_service(self) -> bool:
        self.out(SECOND_PIC, READ_IN_SERVICE, 1)
        return bool(self.inp(SECOND_PIC, 1) & BIT)

    def raised(self) -> bool:
        """Tell what the Status register says of the pin; IntrStatus would be cleared by a look."""
        return bool(self.config(SLOT, 0x06, 2) & STATUS_INTERRUPT)

    def taken(self) -> int:
        return self.read(COUNT)

    def until(self, condition: Callable[[], bool]) -> None:
        """Look again and again; each question lets the guest go on."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline

    def end_of_interrupt(self) -> None:
        for port in (SECOND_PIC, FIRST_PIC):
            self.out(port, EOI, 1)

    def mask(self, masked: bool) -> None:
        self.out(SECOND_PIC + 1, 0xFF if masked else 0xFF & ~BIT, 1)

    def set_up(self) -> None:
        for port, base, cascade in ((FIRST_PIC, 0x30, 4), (SECOND_PIC, BASE_VECTOR, 2)):
            for offset, value in ((0, 0x11), (1, base), (1, cascade), (1, 1)):
                self.out(port + offset, value, 1)
        self.out(FIRST_PIC + 1, 0xFF & ~4, 1)
        self.mask(True)
        self.write(self.registers + INT_MASK.offset, 0xFFFFFFFF)


@contextlib.contextmanager
def two(tmp_path: Path) -> Iterator[tuple[Watched, Watched, Peer]]:
    """A source and a destination whose guest counts each interrupt, and ends none; and a peer of the destination."""
    elf = tmp_path / "counting.elf"
    handler = bare.increment(COUNT) + bare.IRET
    elf.write_bytes(bare.elf(bare.kernel(bare.STI + bare.for_ever(bare.HLT), {VECTOR: handler})))
    options = ["-m", "32", "-kernel", str(elf)]
    with contextlib.ExitStack() as stack:
        for name in "ab":
            stack.enter_context(served(tmp_path / name))
        source = stack.enter_context(Watched("unicorn", *options, *legacy(tmp_path / "a"), accelerator=[]))
        there = [*options, *legacy(tmp_path / "b"), "-incoming", f"unix:{tmp_path / 'm'}"]
        destination = stack.enter_context(Watched("unicorn", *there, accelerator=[]))
        for machine in (source, destination):
            machine.qmp.ok("migrate-set-capabilities", capabilities=EVENTS)
        source.set_up()
        ring(tmp_path / "a")
        yield source, destination, stack.enter_context(Peer.connect(tmp_path / "b"))


def move(source: Watched, destination: Watched, path: Path) -> None:
    source.qmp.ok("migrate", uri=f"unix:{path / 'm'}")
    assert ended(source.qmp)["status"] == "completed"
    destination.qmp.event("RESUME")


def is_over(machine: Watched, taken: int) -> bool:
    """Tell that nothing more comes: the line is down, nothing is in service, and the guest has had its turn."""
    counts = [machine.taken() for _ in range(20)]
    return not machine.raised() and not machine.requested() and not machine.in_service() and set(counts) == {taken}


def test_a_masked_interrupt_is_taken_once_where_it_is_unmasked(tmp_path: Path) -> None:
    with two(tmp_path) as (source, destination, peer):
        source.until(source.raised)
        assert (source.requested(), source.in_service(), source.taken()) == (True, False, 0)
        move(source, destination, tmp_path)
        assert (destination.raised(), destination.requested()) == (True, True)
        assert (destination.in_service(), destination.taken()) == (False, 0)
        assert destination.read(destination.registers + INT_MASK.offset) == 0xFFFFFFFF
        assert destination.read(destination.registers + IV_POSITION.offset) == 0
        destination.mask(False)
        destination.until(lambda: destination.taken() == 1)
        settle(destination, peer, 1)


def test_an_interrupt_in_service_is_not_taken_again(tmp_path: Path) -> None:
    with two(tmp_path) as (source, destination, peer):
        source.mask(False)
        source.until(lambda: source.taken() == 1)
        assert (source.raised(), source.in_service()) == (True, True)
        move(source, destination, tmp_path)
        assert (destination.raised(), destination.in_service(), destination.taken()) == (True, True, 1)
        settle(destination, peer, 1)


def test_a_line_that_was_let_go_in_service_stays_down(tmp_path: Path) -> None:
    with two(tmp_path) as (source, destination, peer):
        source.mask(False)
        source.until(lambda: source.taken() == 1)
        assert source.read(source.registers + INT_STATUS.offset) == 1
        move(source, destination, tmp_path)
        assert (destination.raised(), destination.in_service(), destination.taken()) == (False, True, 1)
        destination.end_of_interrupt()
        assert is_over(destination, 1)
        again(destination, peer, 2)


def settle(machine: Watched, peer: Peer, taken: int) -> None:
    """Do what a handler does, see that this was all, and take one more."""
    assert machine.in_service()
    assert [machine.read(machine.registers + INT_STATUS.offset) for _ in range(2)] == [1, 0]
    assert not machine.raised()
    machine.end_of_interrupt()
    assert is_over(machine, taken)
    again(machine, peer, taken + 1)


def again(machine: Watched, peer: Peer, taken: int) -> None:
    peer.ring(0, 0)
    machine.until(lambda: machine.taken() == taken)
    assert (machine.raised(), machine.in_service()) == (True, True)


def test_a_guest_takes_what_came_while_it_stood_still_once_where_it_arrives(tmp_path: Path) -> None:
    guest = ["-kernel", str(guest_path("intx")), "-append", "exit=2"]
    uri = f"unix:{tmp_path / 'm'}"
    with served(tmp_path / "a"), served(tmp_path / "b"):
        here, there = ([*guest, *legacy(tmp_path / name)] for name in "ab")
        with pair("unicorn", here, there, incoming=uri) as (source, destination):
            source.says("intx: attached as 0, memory 1d1d1d1d\n")
            source.qmp.ok("stop")
            ring(tmp_path / "a")
            assert migrate(source, uri)["status"] == "completed"
            ended(destination.qmp)
            destination.qmp.ok("cont")
            destination.says("intx: interrupt 1 status 1 then 0\n")
            ring(tmp_path / "b")
            destination.says("intx: interrupt 2 status 1 then 0\n")
            assert destination.wait() == 1
            assert source.text == ""


def ring(path: Path) -> None:
    with Peer.connect(path) as peer:
        peer.ring(0, 0)
