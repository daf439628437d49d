"""MSI-X: where table and pending bits lie, what may be accessed how, what masks do (reference: QEMU 7.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.device.effects import Effects, MapBar, RingDoorbell, SendMsi
from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.device.pci import COMMAND

CONTROL = 0x42
ENABLE, FUNCTION_MASK = 0x8000, 0x4000
MASTER = 0x4
PBA = 0x800


def make_device(vectors: int = 2) -> Ivshmem:
    return Ivshmem(4096, vectors=vectors)


def control(device: Ivshmem, value: int) -> Effects:
    return device.write_config(CONTROL, 2, value)


def write(device: Ivshmem, offset: int, value: int, size: int = 4) -> Effects:
    return device.write_bar(1, offset, size, value)


def read(device: Ivshmem, offset: int, size: int = 4) -> int:
    return device.read_bar(1, offset, size)


def message(vector: int) -> SendMsi:
    return SendMsi(0xFEE00000 | vector << 12, 0x40 + vector)


def program(device: Ivshmem, vector: int, *, masked: bool = False) -> Effects:
    entry = 16 * vector
    wanted = message(vector)
    write(device, entry, wanted.address & 0xFFFFFFFF)
    write(device, entry + 4, wanted.address >> 32)
    write(device, entry + 8, wanted.data)
    return write(device, entry + 12, int(masked))


@pytest.fixture
def device() -> Ivshmem:
    """Two vectors, programmed and unmasked; bus master and MSI-X on."""
    device = make_device()
    device.write_config(COMMAND, 2, MASTER)
    control(device, ENABLE)
    for vector in range(2):
        program(device, vector)
    return device


@pytest.mark.parametrize(
    ("vectors", "pba_offset", "bar_bytes", "pba_bytes"),
    [
        (1, 0x800, 4096, 8),
        (2, 0x800, 4096, 8),
        (64, 0x800, 4096, 8),
        (65, 0x800, 4096, 16),
        (128, 0x800, 4096, 16),
        (129, 0x810, 4096, 24),
        (255, 0xFF0, 8192, 32),
        (256, 0x1000, 8192, 32),
        (2048, 0x8000, 65536, 256),
    ],
)
def test_where_table_and_pending_bits_lie(vectors: int, pba_offset: int, bar_bytes: int, pba_bytes: int) -> None:
    device = make_device(vectors)
    assert device.read_config(0x40, 4) == 0x11 | (vectors - 1) << 16
    assert (device.read_config(0x44, 4), device.read_config(0x48, 4)) == (1, pba_offset | 1)
    device.write_config(0x14, 4, 0xFFFFFFFF)
    assert device.read_config(0x14, 4) == 0x100000000 - bar_bytes
    assert device.msix is not None
    assert device.msix.pba_bytes == pba_bytes
    # Every vector has its entry and its bit, and nothing lies beyond.
    device.write_config(COMMAND, 2, MASTER)
    control(device, ENABLE)
    last = vectors - 1
    assert read(device, 16 * last + 12) == 1
    assert device.interrupt(last) == ()
    word = pba_offset + last // 32 * 4
    assert read(device, word) == 1 << last % 32
    assert (read(device, word - 4), read(device, pba_offset + pba_bytes)) == (
        1 if word - 4 == 16 * last + 12 else 0,
        0,
    )


def test_the_control_word_keeps_its_size_and_two_bits() -> None:
    device = make_device(2)
    control(device, 0xFFFF)
    assert device.read_config(CONTROL, 2) == 0xC001
    control(device, 0)
    assert device.read_config(CONTROL, 2) == 0x0001


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_control_word_can_be_written_at_any_width(device: Ivshmem, size: int) -> None:
    offset = {1: CONTROL + 1, 2: CONTROL, 4: 0x40}[size]
    shift = 8 * (CONTROL - offset)
    device.write_config(offset, size, 0x4000 << shift if shift >= 0 else 0x40)
    assert device.interrupt(0) == ()
    device.write_config(offset, size, 0x8000 << shift if shift >= 0 else 0x80)
    assert device.interrupt(0) == (message(0),)


def test_after_reset_every_entry_is_zero_and_masked() -> None:
    device = make_device(3)
    for entry in range(3):
        assert [read(device, 16 * entry + word) for word in (0, 4, 8, 12)] == [0, 0, 0, 1]


@pytest.mark.parametrize("word", [0, 4, 8, 12])
def test_every_bit_of_an_entry_is_stored(word: int) -> None:
    device = make_device()
    write(device, 16 + word, 0xFFFFFFFF)
    assert read(device, 16 + word) == 0xFFFFFFFF
    write(device, 16 + word, 0x12345670)
    assert read(device, 16 + word) == 0x12345670
    assert read(device, word) == (1 if word == 12 else 0), "the other entry changed"


def test_eight_bytes_at_once() -> None:
    device = make_device()
    write(device, 16, 0x1122334455667788, 8)
    assert (read(device, 16), read(device, 20), read(device, 16, 8)) == (0x55667788, 0x11223344, 0x1122334455667788)


@pytest.mark.parametrize("size", [1, 2])
def test_narrow_accesses_read_zero_and_write_nothing(size: int) -> None:
    device = make_device()
    write(device, 8, 0xFFFFFFFF)
    assert read(device, 8, size) == 0
    write(device, 8, 0, size)
    assert read(device, 8) == 0xFFFFFFFF


@pytest.mark.parametrize("offset", [32, 36, 0x7FC, 0xFFC])
def test_gaps_read_zero_and_take_nothing(offset: int) -> None:
    device = make_device()
    assert write(device, offset, 0xFFFFFFFF) == ()
    assert read(device, offset) == 0


def test_the_pending_bits_are_read_only(device: Ivshmem) -> None:
    write(device, 12, 1)
    device.interrupt(0)
    assert (read(device, PBA), read(device, PBA, 8), read(device, PBA, 2)) == (1, 1, 0)
    for value in (0, 0xFFFFFFFF):
        assert write(device, PBA, value) == ()
        assert read(device, PBA) == 1


def test_an_event_on_an_unmasked_vector_is_a_message(device: Ivshmem) -> None:
    assert device.interrupt(0) == (message(0),)
    assert device.interrupt(1) == (message(1),)
    assert read(device, PBA) == 0


def test_a_message_has_64_bits_of_address_and_32_of_data(device: Ivshmem) -> None:
    write(device, 0, 0x9ABCDEF0)
    write(device, 4, 0x12345678)
    write(device, 8, 0xFEDCBA98)
    assert device.interrupt(0) == (SendMsi(0x123456789ABCDEF0, 0xFEDCBA98),)


def test_an_event_with_msix_off_is_lost() -> None:
    device = make_device()
    device.write_config(COMMAND, 2, MASTER)
    program(device, 0)
    assert device.interrupt(0) == ()
    assert read(device, PBA) == 0
    assert control(device, ENABLE) == ()


@pytest.mark.parametrize("vector", [2, 2047, 65535])
def test_an_event_on_a_vector_that_the_device_has_not_is_lost(device: Ivshmem, vector: int) -> None:
    assert device.interrupt(vector) == ()
    assert read(device, PBA) == 0


def test_a_masked_entry_keeps_one_event_until_it_is_unmasked(device: Ivshmem) -> None:
    write(device, 12, 1)
    for _ in range(3):
        assert device.interrupt(0) == ()
    assert read(device, PBA) == 1
    assert write(device, 8, 0x77) == (), "only the mask may send"
    assert write(device, 12, 0) == (SendMsi(message(0).address, 0x77),)
    assert read(device, PBA) == 0
    assert write(device, 12, 0) == ()


def test_the_function_mask_holds_every_vector(device: Ivshmem) -> None:
    control(device, ENABLE | FUNCTION_MASK)
    for vector in range(2):
        assert device.interrupt(vector) == ()
    assert read(device, PBA) == 3
    assert control(device, ENABLE) == (message(0), message(1))
    assert read(device, PBA) == 0


def test_unmasking_the_function_leaves_masked_entries_pending(device: Ivshmem) -> None:
    write(device, 12, 1)
    control(device, ENABLE | FUNCTION_MASK)
    for vector in range(2):
        device.interrupt(vector)
    assert control(device, ENABLE) == (message(1),)
    assert read(device, PBA) == 1


def test_what_is_pending_survives_switching_off_and_is_sent_when_on(device: Ivshmem) -> None:
    write(device, 12, 1)
    device.interrupt(0)
    control(device, 0)
    assert read(device, PBA) == 1
    assert write(device, 12, 0) == (), "unmasked, but MSI-X is off"
    assert read(device, PBA) == 1
    assert control(device, ENABLE) == (message(0),)
    assert read(device, PBA) == 0


def test_without_bus_master_a_message_is_lost_and_not_pending(device: Ivshmem) -> None:
    device.write_config(COMMAND, 2, 0)
    assert device.interrupt(0) == ()
    assert read(device, PBA) == 0
    device.write_config(COMMAND, 2, MASTER)
    assert device.interrupt(0) == (message(0),)


def test_a_reset_masks_everything_and_forgets_what_is_pending(device: Ivshmem) -> None:
    write(device, 12, 1)
    device.interrupt(0)
    device.reset()
    assert device.read_config(CONTROL, 2) == 1
    assert [read(device, offset) for offset in (0, 8, 12, 28, PBA)] == [0, 0, 1, 1, 0]
    device.write_config(COMMAND, 2, MASTER)
    assert control(device, ENABLE) == ()
    assert device.interrupt(0) == ()
    assert read(device, PBA) == 1


operations = st.one_of(
    st.tuples(st.just("table"), st.integers(0, 130 * 16), st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("control"), st.integers(0, 0xFFFF), st.just(2)),
    st.tuples(st.just("command"), st.sampled_from([0, MASTER, MASTER | 2]), st.just(2)),
    st.tuples(st.just("event"), st.integers(0, 130), st.just(0)),
)


@given(st.lists(st.tuples(operations, st.integers(0, 2**64 - 1)), max_size=60))
def test_no_event_is_sent_twice_and_none_while_it_is_masked(
    steps: list[tuple[tuple[str, int, int], int]],
) -> None:
    device = make_device(129)
    assert device.msix is not None
    for (kind, where, size), value in steps:
        before = device.msix.pending
        if kind == "table":
            effects = write(device, where, value & ((1 << 8 * size) - 1), size)
        elif kind == "control":
            effects = control(device, where)
        elif kind == "command":
            effects = device.write_config(COMMAND, 2, where)
        else:
            effects = device.interrupt(where)
        sent = [effect for effect in effects if isinstance(effect, SendMsi)]
        assert all(isinstance(effect, SendMsi | MapBar) for effect in effects)
        assert not any(isinstance(effect, RingDoorbell) for effect in effects)
        assert device.msix.pending >> 129 == 0
        live = device.msix.enabled and not device.msix.function_masked
        if sent:
            assert live
            assert device.command & MASTER
        if live:
            # What is pending now is masked by its own entry.
            assert all(read(device, 16 * vector + 12) & 1 for vector in range(129) if device.msix.pending >> vector & 1)
        limit = 1 if kind == "event" else (before & ~device.msix.pending).bit_count()
        assert len(sent) <= limit
