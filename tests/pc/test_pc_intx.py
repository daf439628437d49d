"""From a slot's pin to the CPU: routing by the PIIX3, the 8259 pair, LINT0 of the local APIC."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.pc import lapic
from ivshmem_lab.pc.lapic import Lapic
from ivshmem_lab.pc.pic import Pic
from ivshmem_lab.pc.piix import ROUTES, Piix3, wire

SPURIOUS = 0x28 + 7


class Wired:
    """A local APIC behind an 8259 pair behind the router."""

    def __init__(self) -> None:
        self.lapic = Lapic()
        self.pic = Pic(self.lapic.set_external)
        self.lapic.external = self.pic
        self.piix = Piix3(self.pic.set_irq)
        self.ports = {
            port: (ports, port - ports.start) for ports in self.pic.ranges() for port in (ports.start, ports.start + 1)
        }

    def out(self, port: int, *values: int) -> None:
        ports, offset = self.ports[port]
        for value in values:
            ports.write(offset, 1, value)

    def read(self, port: int) -> int:
        ports, offset = self.ports[port]
        return ports.read(offset, 1)

    def set_up(self) -> None:
        self.out(0x20, 0x11)
        self.out(0x21, 0x20, 4, 1, 0)
        self.out(0xA0, 0x11)
        self.out(0xA1, 0x28, 2, 1, 0)

    def take(self) -> int:
        vector = self.lapic.pending()
        assert vector is not None
        self.lapic.acknowledge(vector)
        return vector


@pytest.fixture
def wired() -> Wired:
    wired = Wired()
    wired.set_up()
    return wired


def test_slots_are_spread_over_the_wires_as_on_qemu() -> None:
    assert [wire(slot) for slot in (1, 2, 3, 4, 5)] == [0, 1, 2, 3, 0]


def test_a_level_is_there_until_the_device_lets_go(wired: Wired) -> None:
    wired.out(0x4D1, 0x0C)
    wired.piix.write_config(ROUTES, 4, 0x0B0B0A0A)
    wired.piix.set_intx(4, True)
    assert wired.lapic.requested
    assert wired.take() == 0x28 + 3
    assert wired.lapic.pending() is None, "it is in service"
    wired.out(0xA0, 0x20)
    wired.out(0x20, 0x20)
    assert wired.take() == 0x28 + 3, "and still there"
    wired.piix.set_intx(4, False)
    wired.out(0xA0, 0x20)
    wired.out(0x20, 0x20)
    assert wired.lapic.pending() is None
    assert not wired.lapic.requested


def test_several_slots_share_a_line_until_the_last_one_lets_go(wired: Wired) -> None:
    wired.out(0x4D1, 0x0C)
    wired.piix.write_config(ROUTES, 4, 0x0A0A0A0A)
    wired.piix.set_intx(4, True)
    wired.piix.set_intx(6, True)
    wired.piix.set_intx(4, False)
    assert wired.lapic.pending() == 0x2A
    wired.piix.set_intx(6, False)
    assert wired.lapic.pending() == SPURIOUS


def test_a_route_that_changes_moves_a_raised_line(wired: Wired) -> None:
    wired.out(0x4D1, 0x0C)
    wired.piix.set_intx(5, True)
    assert wired.lapic.pending() is None, "after reset nothing is routed"
    wired.piix.write_config(ROUTES, 1, 10)
    assert wired.lapic.pending() == 0x2A
    wired.piix.write_config(ROUTES, 1, 11)
    assert wired.lapic.pending() == 0x2B
    wired.piix.write_config(ROUTES, 1, 0x80)
    assert wired.lapic.pending() == SPURIOUS


def test_a_request_taken_back_too_late_is_spurious_and_in_service_at_the_first_chip_only(wired: Wired) -> None:
    wired.out(0x4D1, 0x0C)
    wired.pic.set_irq(10, True)
    wired.pic.set_irq(10, False)
    assert wired.take() == SPURIOUS
    for port, in_service in ((0x20, 0x04), (0xA0, 0)):
        wired.out(port, 0x0B)
        assert wired.read(port) == in_service
    wired.out(0x20, 0x20)
    wired.pic.set_irq(10, True)
    assert wired.take() == 0x2A


def test_polling_takes_a_line_without_the_cpu(wired: Wired) -> None:
    wired.pic.set_irq(5, True)
    wired.out(0x20, 0x0C)
    assert wired.read(0x20) == 0x85
    assert wired.lapic.pending() is None
    wired.out(0x20, 0x0C)
    assert wired.read(0x21) == 0
    assert wired.read(0x21) == 0, "the mask again"


def test_rotation_puts_the_line_that_was_served_last(wired: Wired) -> None:
    for irq in (3, 4):
        wired.pic.set_irq(irq, True)
    assert wired.take() == 0x23
    wired.out(0x20, 0xA0)
    wired.pic.set_irq(3, False)
    wired.pic.set_irq(3, True)
    assert wired.take() == 0x24
    wired.out(0x20, 0x20)
    assert wired.take() == 0x23


def test_masks_and_priorities(wired: Wired) -> None:
    for irq in (12, 3, 9):
        wired.pic.set_irq(irq, True)
    assert wired.take() == 0x28 + 1
    assert wired.lapic.pending() is None, "line 3 comes after the cascade"
    wired.out(0xA0, 0x20)
    wired.out(0x20, 0x20)
    assert wired.take() == 0x28 + 4
    wired.out(0xA0, 0x60 | 4)
    wired.out(0x20, 0x60 | 2)
    wired.out(0x21, 0x08)
    assert wired.lapic.pending() is None
    wired.out(0x21, 0)
    assert wired.take() == 0x20 + 3
    wired.out(0x20, 0x0B)
    assert wired.read(0x20) == 0x08
    wired.out(0x20, 0x0A)
    assert wired.read(0x20) == 0


def test_lint0_masks_the_pair_and_messages_come_first(wired: Wired) -> None:
    wired.pic.set_irq(9, True)
    wired.lapic.write(lapic.SVR, 4, 0x1FF)
    wired.lapic.message(lapic.BASE, 0x60)
    assert wired.take() == 0x60
    assert wired.take() == 0x29
    wired.out(0xA0, 0x20)
    wired.out(0x20, 0x20)
    wired.lapic.write(lapic.LINT0, 4, lapic.MASKED | lapic.EXTERNAL_MODE)
    wired.pic.set_irq(9, False)
    wired.pic.set_irq(9, True)
    assert wired.lapic.pending() is None
    assert wired.lapic.read(lapic.IRR, 4) == 0
    wired.lapic.write(lapic.LINT0, 4, lapic.EXTERNAL_MODE)
    assert wired.lapic.pending() == 0x29


steps = st.one_of(
    st.tuples(st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.integers(0, 255)),
    st.tuples(st.just(0), st.integers(0, 31)),
    st.tuples(st.just(1), st.just(0)),
)


@given(st.lists(steps, max_size=60))
def test_whatever_software_does_the_pair_answers_and_its_copy_is_the_same(work: list[tuple[int, int]]) -> None:
    wired = Wired()
    for where, value in work:
        if where >= 0x20:
            wired.out(where, value)
        elif where == 0:
            wired.pic.set_irq(value & 15, bool(value & 16))
        elif wired.lapic.pending() is not None:
            wired.take()
        assert bool(wired.lapic.requested & 1) == (wired.pic.pending() is not None)
        assert all(0 <= wired.read(port) <= 255 for port in wired.ports)
    other = Wired()
    other.pic.restore(wired.pic.snapshot())
    assert other.pic.snapshot() == wired.pic.snapshot()
    assert other.lapic.pending() == wired.lapic.pending()
