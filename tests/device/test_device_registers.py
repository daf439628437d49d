"""BAR 0 at every width, as measured on QEMU 7.2, and the doorbell."""

from __future__ import annotations

import re
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.device.effects import Effects, RingDoorbell
from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.device.registers import BAR0_REGISTERS, document
from ivshmem_lab.errors import UsageError

MASK, STATUS, POSITION, DOORBELL = 0, 4, 8, 12
MEMORY_BYTES = 4096


@pytest.fixture
def device() -> Ivshmem:
    """Peer 5 of a world with peer 0 (2 vectors), peer 1 (300 vectors) and itself (2 vectors)."""
    return make_device()


def make_device() -> Ivshmem:
    device = Ivshmem(MEMORY_BYTES, vectors=2, peer_id=5)
    for peer_id, vectors in ((0, 2), (1, 300), (5, 2)):
        for vector in range(vectors):
            device.peer_vector(peer_id, vector)
    return device


def read(device: Ivshmem, offset: int, size: int = 4) -> int:
    return device.read_bar(0, offset, size)


def write(device: Ivshmem, offset: int, value: int, size: int = 4) -> Effects:
    return device.write_bar(0, offset, size, value)


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0, 1, 0x1E),
        (0, 2, 0xF01E),
        (0, 4, 0xA5C3F01E),
        (1, 1, 0),
        (2, 1, 0),
        (3, 1, 0),
        (2, 2, 0),
        (4, 1, 0x78),
        (4, 2, 0x5678),
        (4, 4, 0x12345678),
        (5, 1, 0),
        (6, 2, 0),
        (8, 1, 5),
        (8, 4, 5),
        (9, 1, 0),
        (12, 4, 0),
        (16, 4, 0),
        (0xFC, 4, 0),
        (0, 8, 0x12345678_A5C3F01E),
        (8, 8, 5),
        # Unaligned ones are made of aligned ones: three bytes of the mask as zeros, one of the status.
        (1, 4, 0x78000000),
        (3, 2, 0x7800),
        (2, 4, 0x56780000),
    ],
)
def test_what_a_read_of_any_width_returns(device: Ivshmem, offset: int, size: int, value: int) -> None:
    write(device, MASK, 0xA5C3F01E)
    write(device, STATUS, 0x12345678)
    assert hex(read(device, offset, size)) == hex(value)


@pytest.mark.parametrize(
    ("offset", "size", "cleared"),
    [
        *((offset, size, offset == STATUS) for size in (1, 2, 4) for offset in (0, 4, 8, 12, 16)),
        (5, 1, False),
        (6, 1, False),
        (7, 1, False),
        (6, 2, False),
        (0, 8, True),
        (8, 8, False),
        (1, 4, True),
        (3, 2, True),
        (5, 2, False),
    ],
)
def test_which_reads_clear_the_status(device: Ivshmem, offset: int, size: int, cleared: bool) -> None:
    write(device, STATUS, 0x12345678)
    read(device, offset, size)
    assert read(device, STATUS) == (0 if cleared else 0x12345678)


@pytest.mark.parametrize(
    ("offset", "size", "value", "mask", "status"),
    [
        (0, 4, 0xA5C3F01E, 0xA5C3F01E, 0),
        (0, 1, 0x06, 0x06, 0),
        (1, 1, 0x06, 0x06, 0),
        (3, 1, 0x06, 0x06, 0),
        (2, 2, 0x1234, 0x1234, 0),
        (4, 4, 0x11, 0xFFFFFFFF, 0x11),
        (7, 1, 0x22, 0xFFFFFFFF, 0x22),
        (0, 8, 0x00000033_00000044, 0x44, 0x33),
        # 1 + 2 + 1 bytes: the mask gets 0x88, then 0x7766, the status 0x55.
        (1, 4, 0x55776688, 0x7766, 0x55),
        (8, 4, 0x99, 0xFFFFFFFF, 0),
        (16, 4, 0x99, 0xFFFFFFFF, 0),
        (0xFC, 4, 0x99, 0xFFFFFFFF, 0),
    ],
)
def test_what_a_write_of_any_width_changes(
    device: Ivshmem, offset: int, size: int, value: int, mask: int, status: int
) -> None:
    write(device, MASK, 0xFFFFFFFF)
    assert write(device, offset, value, size) == ()
    assert (read(device, MASK), read(device, STATUS)) == (mask, status)
    assert read(device, POSITION) == 5


@pytest.mark.parametrize(
    ("offset", "size", "value", "rung"),
    [
        (12, 4, 0x0000_0000, (0, 0)),
        (12, 4, 0x0000_0001, (0, 1)),
        (12, 4, 0x0001_0000, (1, 0)),
        (12, 4, 0x0005_0001, (5, 1)),  # our own id: a self interrupt
        (12, 4, 0x0000_0002, None),  # a vector too high
        (12, 4, 0x0002_0000, None),  # nobody
        (12, 4, 0xFFFF_FFFF, None),
        # All 16 bits of the vector count, as the specification says; QEMU's slow path looks at 8.
        (12, 4, 0x0001_0100, (1, 256)),
        (12, 4, 0x0000_0100, None),
        (12, 1, 1, (0, 1)),
        (13, 1, 1, (0, 1)),
        (14, 1, 1, (0, 1)),
        (15, 1, 1, (0, 1)),
        (14, 2, 1, (0, 1)),
        (12, 8, 0x0001_0000, (1, 0)),
        (8, 8, 0x0005_0000_0000_0001, (5, 0)),
        (0, 4, 0, None),
        (16, 4, 0, None),
        (28, 4, 0, None),
    ],
)
def test_who_is_rung_by_a_write(
    device: Ivshmem, offset: int, size: int, value: int, rung: tuple[int, int] | None
) -> None:
    assert write(device, offset, value, size) == ((RingDoorbell(*rung),) if rung else ())


def test_a_plain_device_rings_nobody_and_has_id_0() -> None:
    device = Ivshmem(MEMORY_BYTES)
    device.peer_vector(0, 0)
    assert write(device, DOORBELL, 0) == ()
    assert read(device, POSITION) == 0


def test_who_left_is_not_rung_and_who_comes_again_is(device: Ivshmem) -> None:
    device.peer_left(0)
    assert write(device, DOORBELL, 0) == ()
    device.peer_left(0)
    device.peer_vector(0, 0)
    assert write(device, DOORBELL, 0) == (RingDoorbell(0, 0),)
    assert write(device, DOORBELL, 1) == ()


def test_events_do_not_touch_the_registers(device: Ivshmem) -> None:
    write(device, MASK, 0xFFFFFFFF)
    device.interrupt(0)
    assert read(device, STATUS) == 0


def test_a_reset_clears_the_registers_and_keeps_id_and_peers(device: Ivshmem) -> None:
    write(device, MASK, 7)
    write(device, STATUS, 7)
    device.reset()
    assert [read(device, offset) for offset in (MASK, STATUS, POSITION)] == [0, 0, 5]
    assert write(device, DOORBELL, 1 << 16) == (RingDoorbell(1, 0),)


def test_its_repr_shows_every_register_with_value_and_meaning(device: Ivshmem) -> None:
    write(device, MASK, 0xABCD)
    text = repr(device)
    for register in BAR0_REGISTERS:
        assert re.search(rf"{register.offset:#04x} {register.name} .*{re.escape(register.meaning)}", text)
    assert "0x0000abcd" in text
    assert "MSI-X off (events are lost): 2 vectors, 2 masked, 0 pending (0x0)" in text
    assert read(device, STATUS) == 0


sizes = st.sampled_from([1, 2, 4, 8])
offsets = st.integers(0, 0xFF)


@given(st.lists(st.tuples(st.booleans(), offsets, sizes, st.integers(0, 2**64 - 1)), max_size=40))
def test_no_access_to_the_registers_raises_or_shows_more_than_its_width(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    device = make_device()
    for writing, offset, size, value in accesses:
        if writing:
            for effect in write(device, offset, value & ((1 << 8 * size) - 1), size):
                assert isinstance(effect, RingDoorbell)
                assert effect.vector < device.peers[effect.peer_id]
        else:
            assert 0 <= read(device, offset, size) < 1 << 8 * size
        assert 0 <= device.int_mask <= 0xFFFFFFFF
        assert 0 <= device.int_status <= 0xFFFFFFFF
    assert read(device, POSITION) == 5


def test_peek_tells_what_a_read_would_give_and_clears_nothing(device: Ivshmem) -> None:
    write(device, STATUS, 5)
    assert [device.peek(STATUS) for _ in range(2)] == [5, 5]
    assert [read(device, STATUS) for _ in range(2)] == [5, 0]
    assert (device.peek(DOORBELL), device.peek(POSITION), device.peek(0x40)) == (0, device.peer_id, 0)


def test_every_bit_of_every_register_belongs_to_one_field() -> None:
    for register in BAR0_REGISTERS:
        masks = [field.mask for field in register.fields]
        assert sum(masks) == 0xFFFFFFFF
        assert all(one & other == 0 for i, one in enumerate(masks) for other in masks[i + 1 :])


def test_the_repr_takes_the_registers_apart_into_their_fields(device: Ivshmem) -> None:
    write(device, STATUS, 1)
    text = repr(device)
    for words in (
        "[31:0] status = 1 (rung)",
        "[31:16] peer: id of the peer",
        "[15:0] vector",
        f"id = {device.peer_id}",
    ):
        assert words in text
    assert device.int_status == 1, "looking is free"


def test_the_document_has_every_register_and_field() -> None:
    text = document()
    for register in BAR0_REGISTERS:
        assert f"| {register.offset:#04x} | {register.name} |" in text
        assert all(f"| {field.high}..{field.low} {field.name} |" in text for field in register.fields)


FAR = 1 << 16 | 0x0101
"""Vector 257 of peer 1, who has 300; with 8 bits it is vector 1."""


@pytest.mark.parametrize(
    ("quirks", "ioeventfd", "size", "offset", "rung"),
    [
        ("none", True, 4, DOORBELL, 0x101),
        ("none", False, 4, DOORBELL, 0x101),
        ("none", False, 8, POSITION, 0x101),
        ("qemu-7.2", True, 4, DOORBELL, 0x101),
        ("qemu-7.2", False, 4, DOORBELL, 1),
        ("qemu-7.2", True, 8, POSITION, 1),
    ],
)
def test_only_the_register_path_of_qemu_looks_at_8_bits_of_the_vector(
    quirks: str, ioeventfd: bool, size: int, offset: int, rung: int
) -> None:
    device = Ivshmem(4096, vectors=2, quirks=quirks, ioeventfd=ioeventfd)
    device.peer_vector(1, 299)
    assert device.write_bar(0, offset, size, FAR << 8 * (size - 4)) == (RingDoorbell(1, rung),)


def test_a_vector_that_nobody_has_reaches_another_one_only_with_the_quirk() -> None:
    for quirks, effects in (("none", ()), ("qemu-7.2", (RingDoorbell(1, 0),))):
        device = Ivshmem(4096, vectors=2, quirks=quirks)
        device.peer_vector(1, 1)
        assert device.write_bar(0, DOORBELL, 4, 0x0001_0100) == effects


def test_quirks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'qemu-1.0'.*none, qemu-7.2"):
        Ivshmem(4096, quirks="qemu-1.0")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_register_access_keeps_no_memory_and_takes_little_for_a_moment(size: int) -> None:
    device = Ivshmem(4096, vectors=2)

    def access() -> None:
        device.write_bar(0, MASK, size, 0x55)
        device.read_bar(0, MASK, size)
        device.write_bar(0, DOORBELL, size, 0)
        device.write_bar(1, 8, 4, 0x41)
        device.read_bar(1, 8, 4)

    def many(rounds: int) -> None:
        for _ in range(rounds):
            access()

    many(100)
    blocks = sys.getallocatedblocks()
    many(1000)
    assert sys.getallocatedblocks() - blocks < 50, "1000 rounds leave nothing behind"
    many(1)
    tracemalloc.start()
    try:
        access()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        access()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - before < 512, "frames and numbers, no lists"
