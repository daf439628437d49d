"""Configuration space: header, write masks, BAR sizing and moving (reference: QEMU 7.2)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.device.effects import MapBar
from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.device.pci import COMMAND, Bar, PciFunction
from ivshmem_lab.errors import DeviceError, UsageError

MIB = 1 << 20
ALL_ONES = 0xFFFFFFFF


def plain(memory_bytes: int = MIB) -> Ivshmem:
    return Ivshmem(memory_bytes)


def doorbell(vectors: int = 2, memory_bytes: int = MIB) -> Ivshmem:
    return Ivshmem(memory_bytes, vectors=vectors, peer_id=3)


def header(function: PciFunction, writes: dict[int, bytes]) -> bytearray:
    config = bytearray(256)
    for offset, data in writes.items():
        config[offset : offset + len(data)] = data
    return config


IDENTITY = {0x00: bytes.fromhex("f41a 1011"), 0x08: bytes.fromhex("01 00 0005"), 0x2C: bytes.fromhex("f41a 0011")}
BAR2 = {0x18: b"\x0c"}


def test_a_plain_device_after_reset() -> None:
    assert plain().config_bytes() == header(plain(), {**IDENTITY, **BAR2})


def test_a_doorbell_device_after_reset() -> None:
    capability = bytes.fromhex("11 00 0100  01000000  01080000")
    more = {0x06: b"\x10", 0x34: b"\x40", 0x40: capability}
    assert doorbell().config_bytes() == header(doorbell(), {**IDENTITY, **BAR2, **more})


@pytest.mark.parametrize("device", [plain(), doorbell()], ids=["plain", "doorbell"])
def test_only_these_bits_can_be_written(device: Ivshmem) -> None:
    expected = bytearray(256)
    expected[0x04:0x06] = (0x0507).to_bytes(2, "little")
    expected[0x0C] = expected[0x3C] = 0xFF
    expected[0x10:0x14] = (0xFFFFFF00).to_bytes(4, "little")
    expected[0x18:0x20] = (2**64 - MIB).to_bytes(8, "little")
    expected[0x40:] = b"\xff" * 0xC0
    if device.msix:
        expected[0x14:0x18] = (0xFFFFF000).to_bytes(4, "little")
        expected[0x40:0x4C] = bytes(3) + b"\xc0" + bytes(8)
    found = bytearray(256)
    for offset in range(256):
        device.write_config(offset, 1, 0xFF)
        ones = device.read_config(offset, 1)
        device.write_config(offset, 1, 0)
        found[offset] = ones & ~device.read_config(offset, 1)
        device.reset()
    assert found.hex(" ") == expected.hex(" ")


@pytest.mark.parametrize("memory_bytes", [1 << bits for bits in (12, 20, 30, 32, 36)])
def test_bar_2_tells_its_size(memory_bytes: int) -> None:
    device = plain(memory_bytes)
    for offset in (0x18, 0x1C):
        device.write_config(offset, 4, ALL_ONES)
    both = device.read_config(0x18, 4) | device.read_config(0x1C, 4) << 32
    assert both == (2**64 - memory_bytes) | 0xC


@pytest.mark.parametrize("memory_bytes", [MIB, 1 << 33])
def test_asking_for_the_size_with_decoding_on_maps_nothing(memory_bytes: int) -> None:
    device = doorbell(memory_bytes=memory_bytes)
    device.write_config(COMMAND, 2, 0x7)
    for offset in (0x10, 0x14, 0x18, 0x1C):
        assert device.write_config(offset, 4, ALL_ONES) == ()
        device.read_config(offset, 4)
        assert device.write_config(offset, 4, 0) == ()
    assert device.mapped == {}


def test_asking_for_the_size_of_a_mapped_bar_hides_it_until_it_is_written_back() -> None:
    device = plain()
    device.write_config(0x18, 4, 0xE0000000)
    assert device.write_config(COMMAND, 2, 2) == (MapBar(2, 0xE0000000),)
    assert device.write_config(0x18, 4, ALL_ONES) == (MapBar(2, None),)
    assert device.write_config(0x18, 4, 0xE0000000) == (MapBar(2, 0xE0000000),)


def test_a_bar_that_moves_is_hidden_before_it_is_shown() -> None:
    device = plain()
    device.write_config(0x10, 4, 0xE0000000)
    device.write_config(COMMAND, 2, 2)
    assert device.write_config(0x10, 4, 0xE0001000) == (MapBar(0, None), MapBar(0, 0xE0001000))
    assert device.mapped == {0: 0xE0001000}


def test_all_bars_hide_before_any_is_shown() -> None:
    class Swapped(PciFunction):
        """Both BARs in one write of eight bytes, which no PC does, is the only way to move two at once."""

    function = Swapped("two", vendor=1, device=1, class_code=0, bars=(Bar(0, 4096), Bar(1, 4096)))
    function.write_config(0x10, 4, 0x10000)
    function.write_config(0x14, 4, 0x20000)
    function.write_config(COMMAND, 2, 2)
    effects = function.write_config(0x10, 8, 0x10000 << 32 | 0x20000)
    assert effects == (MapBar(0, None), MapBar(1, None), MapBar(0, 0x20000), MapBar(1, 0x10000))


def test_decoding_switches_all_memory_bars_and_io_bars_apart() -> None:
    function = PciFunction("mixed", vendor=1, device=1, class_code=0, bars=(Bar(0, 4096), Bar(4, 16, is_io=True)))
    function.write_config(0x10, 4, 0xE0000000)
    function.write_config(0x20, 4, 0xC000)
    assert function.read_config(0x20, 4) == 0xC001
    assert function.write_config(COMMAND, 2, 1) == (MapBar(4, 0xC000),)
    assert function.write_config(COMMAND, 2, 2) == (MapBar(4, None), MapBar(0, 0xE0000000))
    assert function.write_config(COMMAND, 2, 0) == (MapBar(0, None),)


def test_a_64_bit_bar_lies_above_4_gib() -> None:
    device = plain()
    device.write_config(COMMAND, 2, 2)
    device.write_config(0x1C, 4, 1)
    assert device.mapped == {2: 1 << 32}
    device.write_config(0x18, 4, 0x00300000)
    assert device.mapped == {2: 0x1_0030_0000}


def test_bytes_and_words_of_a_bar_can_be_written_one_by_one() -> None:
    device = plain()
    for index, byte in enumerate((0xE0123400).to_bytes(4, "little")):
        device.write_config(0x10 + index, 1, byte)
    assert device.read_config(0x10, 4) == 0xE0123400
    assert (device.read_config(0x12, 2), device.read_config(0x11, 1)) == (0xE012, 0x34)


def test_reads_beyond_the_end_are_ones_and_writes_are_lost() -> None:
    device = plain()
    assert device.read_config(256, 4) == ALL_ONES
    assert device.read_config(254, 4) & 0xFFFF0000 == 0xFFFF0000
    before = device.config_bytes()
    assert device.write_config(256, 4, 0x55555555) == ()
    assert device.config_bytes() == before


def test_a_device_has_256_bytes_of_configuration_whatever_is_written() -> None:
    device = plain()
    device.write_config(254, 4, 0x12345678)
    assert len(device.config_bytes()) == 256
    assert device.read_config(254, 2) == 0x5678


@pytest.mark.parametrize("size_bytes", [0, 1, 2048, 4095, 3 * MIB, -4096])
def test_a_memory_that_no_bar_can_show_is_refused(size_bytes: int) -> None:
    with pytest.raises(UsageError, match="ivshmem memory"):
        plain(size_bytes)


@pytest.mark.parametrize("vectors", [-1, 2049, 65537])
def test_a_number_of_vectors_that_no_table_has_is_refused(vectors: int) -> None:
    with pytest.raises(DeviceError, match=f"{vectors}.*1 to 2048"):
        Ivshmem(MIB, vectors=vectors)


@pytest.mark.parametrize("peer_id", [-1, 65536])
def test_a_peer_id_beyond_16_bits_is_refused(peer_id: int) -> None:
    with pytest.raises(DeviceError, match=f"{peer_id}.*0 to 65535"):
        Ivshmem(MIB, peer_id=peer_id)


@pytest.mark.parametrize("size_bytes", [0, 3, 4097])
def test_a_bar_that_is_no_power_of_two_is_refused(size_bytes: int) -> None:
    with pytest.raises(DeviceError, match="not a power of two"):
        PciFunction("odd", vendor=1, device=1, class_code=0, bars=(Bar(0, size_bytes),))


def check_bars(device: Ivshmem) -> None:
    """What must hold whatever software has written: the map is what the registers say, and aligned."""
    for index, bar in device.bars.items():
        address = device.mapped.get(index)
        assert address == device.bar_address(index)
        if address is None:
            continue
        assert device.command & 2
        assert address % bar.size_bytes == 0
        assert address > 0
        low = device.read_config(bar.offset, 4)
        high = device.read_config(bar.offset + 4, 4) if bar.is_64bit else 0
        assert address == (low | high << 32) & -bar.size_bytes
    identity = device.read_config(0, 4), device.read_config(0x08, 4), device.read_config(0x2C, 4)
    assert identity == (0x11101AF4, 0x05000001, 0x11001AF4)


accesses = st.tuples(st.integers(0, 260), st.sampled_from([1, 2, 4]), st.integers(0, ALL_ONES))


@given(st.sampled_from([0, 1, 129, 2048]), st.lists(accesses, max_size=40))
def test_any_configuration_writes_keep_the_bars_and_the_map_together(
    vectors: int, writes: list[tuple[int, int, int]]
) -> None:
    device = Ivshmem(MIB, vectors=vectors)
    shown: dict[int, int] = {}
    for offset, size, value in writes:
        for effect in device.write_config(offset, size, value & ((1 << 8 * size) - 1)):
            assert isinstance(effect, MapBar)
            if effect.address is None:
                del shown[effect.bar]
            else:
                assert effect.bar not in shown, "shown twice without being hidden"
                shown[effect.bar] = effect.address
        assert shown == device.mapped
        check_bars(device)
        assert device.read_config(offset, size) < 1 << 8 * size
    free = 0x4C if vectors else 0x40  # plain storage behind the capabilities survives (QEMU 7.2)
    before = device.config_bytes()
    device.reset()
    assert device.mapped == {}
    assert device.config_bytes() == Ivshmem(MIB, vectors=vectors).config_bytes()[:free] + before[free:]


@pytest.mark.parametrize(
    ("memory_bytes", "address"),
    [(MIB, 0x1_FFF0_0000), (1 << 31, 0x1_8000_0000), (1 << 31, 0x5_8000_0000), (1 << 32, 0x1_0000_0000)],
)
def test_a_64_bit_bar_may_end_at_a_multiple_of_4_gib(memory_bytes: int, address: int) -> None:
    device = plain(memory_bytes)
    device.write_config(COMMAND, 2, 2)
    device.write_config(0x1C, 4, address >> 32)
    device.write_config(0x18, 4, address & ALL_ONES)
    assert device.mapped == {2: address}


@pytest.mark.parametrize("address", [1 << 46, 1 << 52, 1 << 63])
def test_an_address_beyond_what_cpus_reach_decodes_nothing(address: int) -> None:
    device = plain()
    device.write_config(0x18, 4, address & ALL_ONES)
    device.write_config(0x1C, 4, address >> 32)
    device.write_config(COMMAND, 2, 2)
    assert device.mapped == {}
