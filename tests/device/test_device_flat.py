"""``ivshmem-flat``: four registers, a doorbell that checks, one line for all vectors, and QEMU's properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.device.effects import RingDoorbell
from ivshmem_lab.device.flat import FlatIvshmem, FlatProperties, PulseInterrupt
from ivshmem_lab.errors import DeviceError, SnapshotMismatchError, UsageError


@pytest.fixture
def device():
    flat = FlatIvshmem(4 << 20, peer_id=0x1234)
    flat.peer_vector(7, 0)
    flat.peer_vector(7, 1)
    return flat


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0, 4, 0),
        (4, 4, 0),
        (8, 4, 0x1234),
        (12, 4, 0),
        (8, 1, 0x34),
        (8, 2, 0x1234),
        (9, 1, 0),
        (10, 2, 0),
        (8, 8, 0x1234),
    ],
)
def test_only_the_position_reads_as_something(device, offset, size, value):
    assert device.read(offset, size) == value


def test_mask_and_status_ignore_writes(device):
    assert device.write(0, 4, 0xFFFFFFFF) == device.write(4, 4, 0xFFFFFFFF) == device.write(8, 4, 9) == ()
    assert (device.read(0, 4), device.read(4, 4), device.read(8, 4)) == (0, 0, 0x1234)


def test_doorbell_rings_known_vectors_of_known_peers_only(device):
    assert device.write(12, 4, 7 << 16 | 1) == (RingDoorbell(7, 1),)
    assert device.write(8, 8, (7 << 16 | 1) << 32) == (RingDoorbell(7, 1),)
    for value in (7 << 16 | 2, 7 << 16 | 0xFFFF, 8 << 16, 1):
        assert device.write(12, 4, value) == ()
    device.peer_left(7)
    device.peer_left(9)
    assert device.write(12, 4, 7 << 16) == ()


def test_any_vector_pulses_the_one_line(device):
    assert device.interrupt(0) == device.interrupt(63) == (PulseInterrupt(),)


@given(st.integers(0, 15), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFFFFFF))
def test_no_access_of_a_guest_rings_a_stranger(offset, size, value):
    flat = FlatIvshmem(4096)
    flat.peer_vector(0, 0)
    offset &= -size
    assert flat.write(offset, size, value & (1 << 8 * size) - 1) in ((), (RingDoorbell(0, 0),))
    assert 0 <= flat.read(offset, size) < 1 << 8 * size


def test_snapshot_fits_a_device_of_the_same_size_only(device):
    state = device.snapshot()
    assert state == {"version": 1, "model": "ivshmem-flat", "memory_bytes": 4 << 20}
    FlatIvshmem(4 << 20, peer_id=9).restore(state)
    with pytest.raises(SnapshotMismatchError) as refused:
        FlatIvshmem(8192).restore(state)
    assert refused.value.mismatches == {"memory_bytes": (4 << 20, 8192)}
    with pytest.raises(SnapshotMismatchError, match="version"):
        device.restore({**state, "version": 2})


def test_properties_have_qemus_names_and_defaults():
    assert FlatProperties.parse({}) == FlatProperties(4 << 20, 0x400FF000, 0x40100000)
    parsed = FlatProperties.parse({"shmem-size": "64K", "x-bus-address-iomem": "0x10", "x-bus-address-shmem": 0x2000})
    assert parsed == FlatProperties(65536, 0x10, 0x2000)


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"memdev": "m"}, "'ivshmem-flat.memdev' not found"),
        ({"shmem-size": 100}, "shmem-size=100 is no multiple of 4096"),
        ({"shmem-size": "many"}, "shmem-size"),
        ({"x-bus-address-iomem": 0x11}, "x-bus-address-iomem=0x11"),
        ({"x-bus-address-shmem": 0x800}, "x-bus-address-shmem=0x800"),
        ({"x-bus-address-shmem": "here"}, "is no number"),
    ],
)
def test_wrong_property_is_named(properties, words):
    with pytest.raises(UsageError, match=words):
        FlatProperties.parse(properties)


def test_memory_of_another_size_is_refused_in_qemus_words():
    with pytest.raises(
        DeviceError, match=r"Can't map shmem fd: shmem size different from device size! .*shmem-size=8192"
    ):
        FlatProperties().check_memory(8192)


def test_peer_id_has_sixteen_bits():
    with pytest.raises(DeviceError, match="65536 is out of range"):
        FlatIvshmem(4096, peer_id=65536)


def test_repr_teaches_the_registers(device):
    assert "0x08 IVPosition RO 0x00001234" in repr(device)
    assert "pulsed for any vector" in repr(device)
