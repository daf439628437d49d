"""The local APIC: priorities, in service and EOI, destinations (Intel SDM volume 3, chapter 10)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.pc import lapic
from ivshmem_lab.pc.lapic import BASE, Lapic


@pytest.fixture
def apic() -> Lapic:
    """Switched on, as a guest does it."""
    return make_apic()


def make_apic() -> Lapic:
    apic = Lapic()
    apic.write(lapic.SVR, 4, 0x1FF)
    return apic


def send(apic: Lapic, vector: int, destination: int = 0, mode: int = 0, *, logical: bool = False) -> bool:
    return apic.message(BASE | destination << 12 | (4 if logical else 0), vector | mode << 8)


def end(apic: Lapic) -> None:
    apic.write(lapic.EOI, 4, 0)


def test_a_message_is_pending_until_it_is_taken(apic: Lapic) -> None:
    assert apic.pending() is None
    assert send(apic, 0x40)
    assert apic.pending() == 0x40
    assert apic.read(lapic.IRR + 0x20, 4) == 1
    apic.acknowledge(0x40)
    assert apic.pending() is None
    assert (apic.read(lapic.IRR + 0x20, 4), apic.read(lapic.ISR + 0x20, 4)) == (0, 1)
    end(apic)
    assert apic.read(lapic.ISR + 0x20, 4) == 0


def test_the_same_vector_twice_is_one_interrupt(apic: Lapic) -> None:
    send(apic, 0x40)
    send(apic, 0x40)
    apic.acknowledge(0x40)
    end(apic)
    assert apic.pending() is None


def test_a_vector_that_comes_while_it_is_served_is_served_again(apic: Lapic) -> None:
    send(apic, 0x40)
    apic.acknowledge(0x40)
    send(apic, 0x40)
    assert apic.pending() is None
    end(apic)
    assert apic.pending() == 0x40


def test_the_highest_vector_goes_first_and_only_a_higher_class_interrupts_a_handler(apic: Lapic) -> None:
    for vector in (0x41, 0x4F, 0x52):
        send(apic, vector)
    assert apic.pending() == 0x52
    apic.acknowledge(0x52)
    assert apic.pending() is None
    send(apic, 0x5F)
    assert apic.pending() is None, "the same class waits"
    send(apic, 0x60)
    assert apic.pending() == 0x60
    apic.acknowledge(0x60)
    assert apic.read(lapic.PPR, 4) == 0x60
    end(apic)
    assert apic.pending() is None, "0x52 is still served"
    end(apic)
    assert apic.pending() == 0x5F


def test_eoi_ends_the_highest_in_service_at_any_width_and_any_value(apic: Lapic) -> None:
    for vector in (0x30, 0x50):
        send(apic, vector)
        apic.acknowledge(vector)
    apic.write(lapic.EOI, 1, 7)
    assert apic.read(lapic.ISR + 0x20, 4) == 0
    assert apic.read(lapic.ISR + 0x10, 4) == 1 << 16
    end(apic)
    end(apic)
    assert apic.read(lapic.PPR, 4) == 0


def test_the_task_priority_holds_back_its_class_and_below(apic: Lapic) -> None:
    send(apic, 0x4F)
    apic.write(lapic.TPR, 4, 0x40)
    assert apic.pending() is None
    apic.write(lapic.TPR, 4, 0x3F)
    assert apic.pending() == 0x4F
    apic.write(lapic.TPR, 4, 0xFF)
    assert apic.pending() is None
    assert apic.read(lapic.PPR, 4) == 0xFF


def test_while_it_is_switched_off_nothing_is_delivered() -> None:
    apic = Lapic()
    send(apic, 0x40)
    assert apic.pending() is None
    apic.write(lapic.SVR, 4, 0x1FF)
    assert apic.pending() == 0x40


@pytest.mark.parametrize(
    ("destination", "logical", "taken"),
    [
        (0, False, True),
        (1, False, False),
        (0xFF, False, True),
        (0, True, False),
        (1, True, True),
        (3, True, True),
        (2, True, False),
        (0xFF, True, True),
    ],
)
def test_who_is_meant(apic: Lapic, destination: int, logical: bool, taken: bool) -> None:
    apic.write(lapic.LDR, 4, 0x01000000)
    assert send(apic, 0x40, destination, logical=logical) == taken
    assert (apic.pending() == 0x40) == taken


@pytest.mark.parametrize(
    ("vector", "mode", "taken"),
    [
        (0x10, 0, True),
        (0x0F, 0, False),
        (0, 0, False),
        (0xFF, 0, True),
        (0x40, 1, True),
        (0x40, 2, False),
        (0x40, 4, False),
        (0x40, 7, False),
    ],
)
def test_only_fixed_and_lowest_priority_messages_of_legal_vectors_count(
    apic: Lapic, vector: int, mode: int, taken: bool
) -> None:
    assert send(apic, vector, mode=mode) == taken


def test_software_sends_to_itself(apic: Lapic) -> None:
    apic.write(lapic.ICR_LOW, 4, 1 << 18 | 0x55)
    assert apic.pending() == 0x55
    assert apic.read(lapic.ICR_LOW, 4) & 0x1000 == 0, "delivery is never seen to be under way"
    apic.acknowledge(0x55)
    end(apic)
    apic.write(lapic.ICR_LOW, 4, 3 << 18 | 0x55)
    assert apic.pending() is None, "all but oneself: nobody"
    apic.write(lapic.ICR_HIGH, 4, 0)
    apic.write(lapic.ICR_LOW, 4, 0x56)
    assert apic.pending() == 0x56


def test_the_registers_that_software_looks_at_first() -> None:
    apic = Lapic(3)
    assert apic.read(lapic.ID, 4) == 3 << 24
    assert apic.read(lapic.VERSION_AT, 4) & 0xFF == 0x14
    assert apic.read(lapic.SVR, 4) == 0xFF
    assert apic.read(lapic.DFR, 4) == 0xFFFFFFFF
    for lvt in range(lapic.LVT_FIRST, lapic.LVT_LAST + 1, 0x10):
        assert apic.read(lvt, 4) == (lapic.EXTERNAL_MODE if lvt == lapic.LINT0 else lapic.MASKED)


def test_a_reset_forgets_everything(apic: Lapic) -> None:
    send(apic, 0x60)
    apic.acknowledge(0x60)
    send(apic, 0x40)
    apic.write(lapic.LDR, 4, 0x01000000)
    apic.write(lapic.TPR, 4, 0x20)
    apic.reset()
    fresh = Lapic()
    for offset in range(0, lapic.SIZE, 16):
        assert apic.read(offset, 4) == fresh.read(offset, 4), hex(offset)
    apic.write(lapic.SVR, 4, 0x1FF)
    assert apic.pending() is None


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("write"), st.integers(0, 0xFFF), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)),
            st.tuples(st.just("read"), st.integers(0, 0xFFF), st.sampled_from([1, 2, 4]), st.just(0)),
            st.tuples(st.just("message"), st.integers(0, 0xFFFFF), st.just(4), st.integers(0, 2**32 - 1)),
            st.just(("take", 0, 0, 0)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_only_the_highest_allowed_vector_is_offered(steps: list[tuple[str, int, int, int]]) -> None:
    apic = make_apic()
    for kind, offset, size, value in steps:
        if kind == "write":
            apic.write(offset, size, value)
        elif kind == "read":
            assert 0 <= apic.read(offset, size) <= 0xFFFFFFFF
        elif kind == "message":
            apic.message(BASE | offset, value)
        elif (vector := apic.pending()) is not None:
            apic.acknowledge(vector)
        vector = apic.pending()
        if vector is not None:
            assert 16 <= vector <= 255
            assert vector == apic.requested.bit_length() - 1
            assert vector >> 4 > apic.read(lapic.PPR, 4) >> 4
