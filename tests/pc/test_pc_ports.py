"""I/O ports: the bus, configuration mechanism 1, the serial port, ACPI hot-plug."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.device.effects import Effects, MapBar
from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.errors import DeviceError
from ivshmem_lab.pc import acpi_hotplug, uart
from ivshmem_lab.pc.acpi_hotplug import AcpiHotplug
from ivshmem_lab.pc.bus import MmioBus, PortBus, Range
from ivshmem_lab.pc.hostbridge import RootBus, chipset
from ivshmem_lab.pc.uart import Uart

if TYPE_CHECKING:
    from ivshmem_lab.device.pci import PciFunction

# -- buses -------------------------------------------------------------------------------------------------------------


def remembering(start: int, size: int, seen: list[tuple[int, ...]]) -> Range:
    def read(offset: int, width: int) -> int:
        seen.append((start, offset, width))
        return 0x1234567890

    return Range(start, size, read, lambda offset, width, value: seen.append((start, offset, width, value)))


def test_a_port_is_answered_by_its_range_and_values_are_cut_to_the_width() -> None:
    ports, seen = PortBus(), []
    ports.add(remembering(0x100, 4, seen))
    assert ports.read(0x103, 2) == 0x7890
    ports.write(0x100, 1, 0x1FF)
    assert seen == [(0x100, 3, 2), (0x100, 0, 1, 0xFF)]


@pytest.mark.parametrize(("size", "value"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_an_unanswered_port_reads_ones_and_swallows_writes(size: int, value: int) -> None:
    ports = PortBus()
    assert ports.read(0x100, size) == value
    ports.write(0x100, size, 0)


def test_ranges_may_share_a_page_and_pages_come_and_go_once() -> None:
    mmio, seen = MmioBus(), []
    low, high = remembering(0x1F00, 0x100, seen), remembering(0x2000, 0x1100, seen)
    inside = remembering(0x1000, 0x100, seen)
    assert mmio.add(low) == [0x1000]
    assert mmio.add(inside) == []
    assert mmio.add(high) == [0x2000, 0x3000]
    assert (mmio.find(0x1FFF), mmio.find(0x10FF), mmio.find(0x1100), mmio.find(0x30FF)) == (low, inside, None, high)
    assert mmio.find(0x3100) is None
    assert (mmio.any_between(0, 0x1000), mmio.any_between(0x3800, 0x3900), mmio.any_between(0x4000, 0x9000)) == (
        False,
        True,
        False,
    )
    assert mmio.remove(low) == []
    assert mmio.remove(inside) == [0x1000]
    assert mmio.remove(high) == [0x2000, 0x3000]
    assert mmio.find(0x2000) is None


# -- configuration mechanism 1 -----------------------------------------------------------------------------------------


class Bus:
    """A bus with the chipset and one ivshmem device in slot 4, and what the device asked for."""

    def __init__(self) -> None:
        self.effects: list[tuple[PciFunction, Effects]] = []
        self.pci = RootBus(lambda function, effects: self.effects.append((function, effects)))
        for slot, number, function in chipset():
            self.pci.plug(function, slot, number)
        self.device = Ivshmem(1 << 20, vectors=1)
        self.pci.plug(self.device, 4)
        self.ports = self.pci.ports()

    def select(self, slot: int, offset: int = 0, number: int = 0, flags: int = 0x80000000) -> None:
        self.ports.write(0, 4, flags | slot << 11 | number << 8 | offset)

    def read(self, slot: int, offset: int = 0, size: int = 4, number: int = 0) -> int:
        self.select(slot, offset & ~3, number)
        return self.ports.read(4 + (offset & 3), size)


def test_the_bus_shows_the_chipset_and_the_device() -> None:
    bus = Bus()
    found = {
        (slot, number): bus.read(slot, 0, number=number)
        for slot in range(32)
        for number in range(8)
        if bus.read(slot, 0, number=number) != 0xFFFFFFFF
    }
    assert found == {
        (0, 0): 0x12378086,
        (1, 0): 0x70008086,
        (1, 1): 0x70108086,
        (1, 3): 0x71138086,
        (4, 0): 0x11101AF4,
    }


def test_bytes_and_words_are_reached_through_the_data_ports() -> None:
    bus = Bus()
    assert (bus.read(4, 0, 2), bus.read(4, 2, 2), bus.read(4, 1, 1), bus.read(4, 0x0B, 1)) == (0x1AF4, 0x1110, 0x1A, 5)
    bus.select(4, 0x10)
    bus.ports.write(4 + 3, 1, 0xE0)
    bus.select(4, 0x04)
    bus.ports.write(4, 2, 2)
    assert bus.effects[-1] == (bus.device, (MapBar(0, 0xE0000000),))


@pytest.mark.parametrize(
    "flags", [0, 0x80000000 | 1 << 16, 0x80000000 | 0xFF << 16], ids=["disabled", "bus1", "bus255"]
)
def test_nobody_answers_a_disabled_access_or_another_bus(flags: int) -> None:
    bus = Bus()
    bus.select(4, flags=flags)
    assert bus.ports.read(4, 4) == 0xFFFFFFFF
    bus.ports.write(4, 4, 0)
    assert bus.effects == []


def test_the_address_port_is_32_bits_wide_and_nothing_else() -> None:
    bus = Bus()
    bus.select(4, 0x10)
    assert bus.ports.read(0, 4) == 0x80002010
    for size in (1, 2):
        bus.ports.write(0, size, 0)
        assert bus.ports.read(0, size) == 0x80002010 & (1 << 8 * size) - 1
    assert bus.ports.read(0, 4) == 0x80002010


def test_the_low_bits_of_the_address_count_too() -> None:
    # QEMU 7.2 puts both together, and libqos reads the device id so.
    bus = Bus()
    bus.select(4, 0x02)
    assert (bus.ports.read(4, 2), bus.ports.read(5, 1), bus.ports.read(6, 2)) == (0x1110, 0x11, 0x1110)


def test_slots_are_given_from_the_lowest_free_and_never_twice() -> None:
    bus = Bus()
    assert bus.pci.free_slot() == 2
    with pytest.raises(DeviceError, match="slot 4 function 0 is in use by ivshmem-doorbell"):
        bus.pci.plug(Ivshmem(4096), 4)
    for slot in (-1, 32):
        with pytest.raises(DeviceError, match=f"slot {slot} does not exist.*0 to 31"):
            bus.pci.plug(Ivshmem(4096), slot)
    while (slot := bus.pci.free_slot()) is not None:
        bus.pci.plug(Ivshmem(4096), slot)
    assert len({slot for slot, _, _ in bus.pci}) == 32
    assert bus.pci.unplug(4) is bus.device
    assert (bus.pci.free_slot(), bus.read(4)) == (4, 0xFFFFFFFF)


# -- the serial port ---------------------------------------------------------------------------------------------------


def test_what_is_written_leaves_in_order_and_what_is_typed_is_read_in_order() -> None:
    sent = bytearray()
    port = Uart(sent.append)
    for byte in b"hello":
        port.write(uart.DATA, 1, byte)
    assert sent == b"hello"
    assert port.read(uart.LINE_STATUS, 1) == 0x60
    assert port.receive(b"ab") == 2
    assert port.read(uart.LINE_STATUS, 1) == 0x61
    assert [port.read(uart.DATA, 1) for _ in range(3)] == [ord("a"), ord("b"), 0]
    assert port.read(uart.LINE_STATUS, 1) == 0x60


def test_a_reader_that_takes_no_more_makes_the_transmitter_busy() -> None:
    ready = True
    port = Uart(lambda byte: None, lambda: ready)
    assert port.read(uart.LINE_STATUS, 1) & 0x60 == 0x60
    ready = False
    assert port.read(uart.LINE_STATUS, 1) & 0x60 == 0


def test_the_divisor_hides_behind_the_latch_bit() -> None:
    sent = bytearray()
    port = Uart(sent.append)
    port.write(uart.LINE_CONTROL, 1, 0x83)
    port.write(uart.DATA, 1, 0x01)
    port.write(uart.IER, 1, 0x02)
    assert (port.read(uart.DATA, 1), port.read(uart.IER, 1)) == (1, 2)
    port.write(uart.LINE_CONTROL, 1, 0x03)
    assert (port.read(uart.DATA, 1), port.read(uart.IER, 1), port.read(uart.LINE_CONTROL, 1)) == (0, 0, 3)
    assert sent == b""


def test_the_scratch_register_remembers_and_status_registers_do_not() -> None:
    port = Uart(lambda byte: None)
    for offset in (uart.SCRATCH, uart.LINE_STATUS, uart.MODEM_STATUS):
        port.write(offset, 1, 0x5A)
    assert (port.read(uart.SCRATCH, 1), port.read(uart.LINE_STATUS, 1)) == (0x5A, 0x60)


def test_more_than_fits_is_refused_not_dropped() -> None:
    port = Uart(lambda byte: None)
    assert port.receive(b"x" * 5000) == uart.INPUT_LIMIT
    assert port.receive(b"y") == 0
    port.read(uart.DATA, 1)
    assert port.receive(b"yz") == 1


def test_a_reset_forgets_what_was_typed() -> None:
    port = Uart(lambda byte: None)
    port.receive(b"old")
    port.write(uart.LINE_CONTROL, 1, 0x80)
    port.reset()
    assert (port.read(uart.LINE_STATUS, 1), port.read(uart.LINE_CONTROL, 1)) == (0x60, 0)


# -- ACPI hot-plug -----------------------------------------------------------------------------------------------------


class Hotplug:
    """The ports with slots 2 and up removable, and what was ejected."""

    def __init__(self) -> None:
        self.ejected: list[tuple[int, int]] = []
        self.ports = AcpiHotplug(
            lambda *place: self.ejected.append(place), lambda bus: 0xFFFFFFFF if bus else 0xFFFFFFFC
        )

    def read(self, offset: int) -> int:
        return self.ports.read(offset, 4)


def test_a_newcomer_is_told_once() -> None:
    hotplug = Hotplug()
    hotplug.ports.came(5)
    hotplug.ports.came(31)
    assert hotplug.read(acpi_hotplug.UP) == 1 << 5 | 1 << 31
    assert hotplug.read(acpi_hotplug.UP) == 0


def test_a_device_is_asked_until_it_is_ejected() -> None:
    hotplug = Hotplug()
    hotplug.ports.asked_to_go(5)
    assert [hotplug.read(acpi_hotplug.DOWN) for _ in range(2)] == [1 << 5] * 2
    assert hotplug.ports.waiting() == [(0, 5)]
    hotplug.ports.write(acpi_hotplug.EJECT, 4, 1 << 5)
    assert hotplug.ejected == [(0, 5)]
    assert (hotplug.read(acpi_hotplug.DOWN), hotplug.ports.waiting()) == (0, [])


def test_of_several_eject_bits_the_lowest_counts() -> None:
    hotplug = Hotplug()
    for slot in (4, 5):
        hotplug.ports.asked_to_go(slot)
    hotplug.ports.write(acpi_hotplug.EJECT, 4, 0b110000)
    assert (hotplug.ejected, hotplug.read(acpi_hotplug.DOWN)) == ([(0, 4)], 1 << 5)


def test_ejecting_works_unasked_and_not_for_the_chipset() -> None:
    hotplug = Hotplug()
    for value in (1 << 7, 0, 1, 2):
        hotplug.ports.write(acpi_hotplug.EJECT, 4, value)
    assert hotplug.ejected == [(0, 7)]
    assert hotplug.read(acpi_hotplug.REMOVABLE) == 0xFFFFFFFC
    assert hotplug.read(acpi_hotplug.EJECT) == 0


def test_a_selected_bus_has_news_of_its_own() -> None:
    hotplug = Hotplug()
    hotplug.ports.came(5)
    hotplug.ports.came(7, 1)
    hotplug.ports.asked_to_go(6)
    hotplug.ports.write(acpi_hotplug.BUS_SELECT, 4, 1)
    offsets = (acpi_hotplug.UP, acpi_hotplug.DOWN, acpi_hotplug.REMOVABLE, acpi_hotplug.BUS_SELECT)
    assert [hotplug.read(offset) for offset in offsets] == [1 << 7, 0, 0xFFFFFFFF, 1]
    hotplug.ports.asked_to_go(7, 1)
    assert hotplug.ports.waiting() == [(0, 6), (1, 7)]
    hotplug.ports.write(acpi_hotplug.EJECT, 4, 1 << 6)
    hotplug.ports.write(acpi_hotplug.BUS_SELECT, 4, 0)
    assert [hotplug.read(offset) for offset in offsets] == [1 << 5, 1 << 6, 0xFFFFFFFC, 0]
    assert hotplug.ejected == [(1, 6)]
    hotplug.ports.write(acpi_hotplug.BUS_SELECT, 4, 256)
    assert [hotplug.read(offset) for offset in offsets] == [0, 0, 0, 0]


@pytest.mark.parametrize("size", [1, 2])
def test_only_32_bit_accesses_count(size: int) -> None:
    hotplug = Hotplug()
    hotplug.ports.came(5)
    assert hotplug.ports.read(acpi_hotplug.UP, size) == 0
    hotplug.ports.write(acpi_hotplug.EJECT, size, 1 << 5)
    assert (hotplug.ejected, hotplug.read(acpi_hotplug.UP)) == ([], 1 << 5)


def test_a_reset_forgets_the_news() -> None:
    hotplug = Hotplug()
    hotplug.ports.came(5)
    hotplug.ports.asked_to_go(6)
    hotplug.ports.reset()
    assert (hotplug.read(acpi_hotplug.UP), hotplug.read(acpi_hotplug.DOWN)) == (0, 0)


port_accesses = st.tuples(st.booleans(), st.integers(0, 0x17), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1))


@given(st.lists(port_accesses, max_size=50))
def test_no_access_to_any_of_these_ports_raises(accesses: list[tuple[bool, int, int, int]]) -> None:
    hotplug, bus, serial = Hotplug(), Bus(), Uart(lambda byte: None)
    hotplug.ports.came(3)
    hotplug.ports.asked_to_go(4)
    for writing, offset, size, value in accesses:
        if writing:
            cut = value & (1 << 8 * size) - 1
            hotplug.ports.write(offset, size, cut)
            bus.ports.write(offset % 8, size, cut)
            serial.write(offset % 8, size, cut)
        else:
            for found in (hotplug.ports.read(offset, size), bus.ports.read(offset % 8, size)):
                assert 0 <= found <= 0xFFFFFFFF
            assert 0 <= serial.read(offset % 8, size) <= 0xFF
    assert all(bus_number or slot >= 2 for bus_number, slot in hotplug.ejected)
