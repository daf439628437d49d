"""Where the firmware puts BARs: aligned, apart, in the window or above 4 GiB."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.device.pci import Bar
from ivshmem_lab.pc.firmware import HIGH_START, WINDOW_END, WINDOW_START, Allocator

GIB = 1 << 30

memory_bars = st.builds(lambda bits, is_64bit: Bar(0, 1 << bits, is_64bit=is_64bit), st.integers(4, 36), st.booleans())
io_bars = st.builds(lambda bits: Bar(0, 1 << bits, is_io=True), st.integers(2, 8))


def ends(bar: Bar, address: int) -> tuple[bool, int, int]:
    return bar.is_io, address, address + bar.size_bytes


@given(st.lists(st.one_of(memory_bars, io_bars), max_size=40), st.sampled_from([WINDOW_START, 0xE0000000, WINDOW_END]))
def test_addresses_are_aligned_and_apart_and_where_they_may_be(bars: list[Bar], window_start: int) -> None:
    allocator = Allocator(window_start)
    taken: list[tuple[bool, int, int]] = []
    for bar in bars:
        address = allocator.address(bar)
        if address is None:
            assert not bar.is_64bit
            continue
        assert address % bar.size_bytes == 0
        is_io, start, end = ends(bar, address)
        if is_io:
            assert start >= 0xC000
        elif start >= HIGH_START:
            assert bar.is_64bit
        else:
            assert window_start <= start < end <= WINDOW_END
        assert all(io != is_io or end <= other or last <= start for io, other, last in taken)
        taken.append((is_io, start, end))


def test_a_bar_too_large_for_the_window_lies_above_4_gib_at_its_own_alignment() -> None:
    allocator = Allocator()
    assert allocator.address(Bar(2, 4 * GIB, is_64bit=True)) == HIGH_START
    assert allocator.address(Bar(2, GIB, is_64bit=True)) == 2 * HIGH_START
    assert allocator.address(Bar(2, 4 * GIB, is_64bit=True)) == 3 * HIGH_START
    assert allocator.address(Bar(0, 256)) == 0xFEBFFF00


def test_a_32_bit_bar_without_room_gets_none() -> None:
    allocator = Allocator()
    assert allocator.address(Bar(0, 512 << 20)) is not None
    assert allocator.address(Bar(0, 2 * GIB)) is None


def test_a_window_that_is_full_of_ram_has_room_above_only() -> None:
    allocator = Allocator(WINDOW_END)
    assert allocator.address(Bar(0, 256)) is None
    assert allocator.address(Bar(2, 4096, is_64bit=True)) == HIGH_START
