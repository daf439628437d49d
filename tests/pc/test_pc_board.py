"""The board: BARs appear, move and hide; what nobody answers reads zeros and is counted; interrupts find their way."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.device.pci import COMMAND
from ivshmem_lab.errors import DeviceError
from ivshmem_lab.pc import acpi_hotplug, lapic
from ivshmem_lab.pc.board import Board
from ivshmem_lab.pc.machine import IDLE, IDLE_ADDRESS, Hooks, Machine

MIB = 1 << 20
RAM_BYTES = 2 * MIB


class AddressSpace:
    """A CPU's physical memory without a CPU; refuses what a real one could not show."""

    def __init__(self) -> None:
        self.memory: dict[int, tuple[int, object]] = {}
        self.pages: set[int] = set()

    def map_memory(self, address: int, memory: object, size_bytes: int) -> None:
        assert not any(
            address < start + size and start < address + size_bytes for start, (size, _) in self.memory.items()
        )
        assert not any(address <= page < address + size_bytes for page in self.pages)
        self.memory[address] = size_bytes, memory

    def map_mmio_page(self, address: int) -> None:
        assert address not in self.pages
        assert not any(start <= address < start + size for start, (size, _) in self.memory.items())
        self.pages.add(address)

    def unmap(self, address: int, size_bytes: int) -> None:
        if address in self.pages:
            assert size_bytes == 4096
            self.pages.remove(address)
        else:
            assert self.memory.pop(address)[0] == size_bytes


@dataclass
class World:
    """What is behind a device: memory, and who was rung."""

    memory: bytearray
    rung: list[tuple[int, int]] = field(default_factory=list)

    def ring(self, peer_id: int, vector: int) -> None:
        self.rung.append((peer_id, vector))


class Pc:
    """A machine with 2 MiB of RAM and whatever devices are plugged."""

    def __init__(self, **hooks: object) -> None:
        self.cpu = AddressSpace()
        self.ram = bytearray(RAM_BYTES)
        self.machine = Machine(self.cpu, memoryview(self.ram), hooks=Hooks(**hooks))
        self.worlds: dict[str, World] = {}

    def plug(self, name: str, *, memory_bytes: int = MIB, vectors: int = 1, hotplugged: bool = False) -> Ivshmem:
        device = Ivshmem(memory_bytes, vectors=vectors)
        self.worlds[name] = World(bytearray(min(memory_bytes, MIB)))
        self.machine.add_device(name, device, self.worlds[name], hotplugged=hotplugged)
        return device

    def place(self, device: Ivshmem, command: int = 6, **bars: int) -> None:
        """Program BARs (``bar0=0xe0000000``) and the command register, as software does."""
        for name, address in bars.items():
            offset = 0x10 + 4 * int(name[3:])
            self.config(device, offset, 4, address & 0xFFFFFFFF)
            if name == "bar2":
                self.config(device, offset + 4, 4, address >> 32)
        self.config(device, COMMAND, 2, command)

    def config(self, device: Ivshmem, offset: int, size: int, value: int) -> None:
        self.machine.act(device, device.write_config(offset, size, value))

    @property
    def errors(self) -> dict[str, int]:
        return dict(self.machine.guest_errors)


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_a_shown_bar_0_answers_and_rings(pc: Pc) -> None:
    device = pc.plug("a", vectors=2)
    device.peer_vector(7, 1)
    device.peer_vector(7, 0)
    pc.place(device, bar0=0xE0000000)
    assert 0xE0000000 in pc.cpu.pages
    pc.machine.write_mmio(0xE0000000, 4, 0x55)
    assert pc.machine.read_mmio(0xE0000000, 4) == 0x55
    pc.machine.write_mmio(0xE000000C, 4, 7 << 16 | 1)
    assert pc.worlds["a"].rung == [(7, 1)]
    pc.place(device, command=0)
    assert 0xE0000000 not in pc.cpu.pages
    assert pc.errors == {}


def test_bar_2_is_the_memory_itself(pc: Pc) -> None:
    device = pc.plug("a")
    pc.place(device, bar2=0x1_0000_0000)
    assert pc.cpu.memory[0x1_0000_0000] == (MIB, pc.worlds["a"].memory)
    assert pc.machine.bar_is_visible(device, 2)


def test_small_bars_share_a_page_without_mixing(pc: Pc) -> None:
    first, second = pc.plug("a"), pc.plug("b")
    pc.place(first, bar0=0xE0000000)
    pc.place(second, bar0=0xE0000100)
    pc.machine.write_mmio(0xE0000000, 4, 1)
    pc.machine.write_mmio(0xE0000100, 4, 2)
    assert (first.int_mask, second.int_mask) == (1, 2)
    pc.place(first, command=0)
    assert pc.machine.read_mmio(0xE0000100, 4) == 2
    assert pc.machine.read_mmio(0xE0000000, 4) == 0


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFFFFFF)])
def test_memory_where_nobody_answers_reads_zeros_and_ports_ones_and_both_are_counted_and_logged_once(
    pc: Pc, size: int, ones: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for address in (0x90000000, 0x90001000):
            assert pc.machine.read_mmio(address, size) == 0
            pc.machine.write_mmio(address, size, 0)
        for port in (0x1234, 0x1235):
            assert pc.machine.read_port(port, size) == ones
            pc.machine.write_port(port, min(size, 4), 0)
    assert pc.errors == {"unanswered memory access": 4, "unanswered port": 4}
    assert [record.args[0] for record in caplog.records] == ["unanswered memory access", "unanswered port"]


@pytest.mark.parametrize("bar", [0, 1, 2])
def test_a_bar_over_ram_stays_hidden_and_is_counted(pc: Pc, bar: int) -> None:
    device = pc.plug("a")
    pc.place(device, **{f"bar{bar}": MIB})
    assert not pc.machine.bar_is_visible(device, bar)
    assert pc.errors == {"BAR over other memory": 1}
    assert pc.cpu.memory == {0: (RAM_BYTES, memoryview(pc.ram))}
    pc.place(device, **{f"bar{bar}": 0xE0000000})
    assert pc.machine.bar_is_visible(device, bar)


@pytest.mark.parametrize("bar", [0, 1])
def test_registers_over_the_local_apic_leave_it_in_charge(pc: Pc, bar: int) -> None:
    device = pc.plug("a")
    pc.place(device, **{f"bar{bar}": lapic.BASE})
    assert pc.machine.read_mmio(lapic.BASE + lapic.SVR, 4) == 0xFF
    pc.place(device, command=0)
    assert pc.machine.read_mmio(lapic.BASE + lapic.SVR, 4) == 0xFF


def test_memory_over_the_local_apic_stays_hidden(pc: Pc) -> None:
    device = pc.plug("a", memory_bytes=16 * MIB)
    pc.place(device, bar2=0xFE000000)
    assert not pc.machine.bar_is_visible(device, 2)
    assert pc.machine.read_mmio(lapic.BASE + lapic.SVR, 4) == 0xFF


def test_a_covered_bar_appears_when_what_covers_it_goes(pc: Pc) -> None:
    first, second = pc.plug("a"), pc.plug("b")
    pc.place(first, bar2=0xE0000000)
    pc.place(second, bar2=0xE0000000)
    assert not pc.machine.bar_is_visible(second, 2)
    pc.place(first, bar2=0xE8000000)
    assert pc.cpu.memory[0xE0000000][1] is pc.worlds["b"].memory
    assert pc.cpu.memory[0xE8000000][1] is pc.worlds["a"].memory
    assert pc.errors == {"BAR over other memory": 1}


def test_a_covered_bar_that_is_switched_off_does_not_come_back(pc: Pc) -> None:
    first, second = pc.plug("a"), pc.plug("b")
    pc.place(first, bar2=0xE0000000)
    pc.place(second, bar2=0xE0000000)
    pc.place(second, command=0)
    pc.place(first, command=0)
    assert list(pc.cpu.memory) == [0]


def test_an_unplugged_device_leaves_nothing_at_its_addresses(pc: Pc) -> None:
    device = pc.plug("a")
    pages = set(pc.cpu.pages)
    pc.place(device, bar0=0xE0000000, bar1=0xE0001000, bar2=0xE0100000)
    slot = pc.machine.peripherals["a"].slot
    assert pc.machine.unplug(slot) is device
    assert (set(pc.cpu.memory), pc.cpu.pages) == ({0}, pages)
    assert pc.machine.pci.at(slot) is None


def test_an_interrupt_message_reaches_the_local_apic(pc: Pc) -> None:
    device = pc.plug("a")
    pc.place(device, bar1=0xE0001000)
    pc.machine.write_mmio(lapic.BASE + lapic.SVR, 4, 0x1FF)
    pc.config(device, 0x42, 2, 0x8000)
    for offset, value in ((0, 0xFEE00000), (8, 0x41), (12, 0)):
        pc.machine.write_mmio(0xE0001000 + offset, 4, value)
    pc.machine.event(device, 0)
    assert pc.machine.lapic.pending() == 0x41


def test_an_interrupt_message_elsewhere_is_a_store(pc: Pc) -> None:
    other = pc.plug("b")
    pc.place(other, bar2=0xE0000000)
    pc.machine.message(0x2000, 0x12345678)
    pc.machine.message(0xE00FFFFC, 0x9ABCDEF0)
    assert pc.ram[0x2000:0x2004] == bytes.fromhex("78563412")
    assert pc.worlds["b"].memory[-4:] == bytes.fromhex("f0debc9a")
    for nowhere in (RAM_BYTES - 2, 0xE00FFFFE, 0x90000000, 2**64 - 4):
        pc.machine.message(nowhere, 1)
    pc.machine.message(lapic.BASE | 9 << 12, 0x41)
    assert pc.errors == {"interrupt message for nobody": 5}


def test_the_firmware_gives_every_device_its_place(pc: Pc) -> None:
    devices = [pc.plug("a"), pc.plug("b", vectors=0, memory_bytes=MIB << 12), pc.plug("c", vectors=2048)]
    start = pc.machine.start()
    assert (start.eip, pc.ram[IDLE_ADDRESS : IDLE_ADDRESS + len(IDLE)]) == (IDLE_ADDRESS, IDLE)
    for device in devices:
        assert set(device.mapped) == set(device.bars)
        assert all(pc.machine.bar_is_visible(device, bar) for bar in device.bars)
    assert devices[1].mapped[2] >= 1 << 32
    assert pc.errors == {}


def test_large_memories_lie_side_by_side_above_4_gib(pc: Pc) -> None:
    devices = [pc.plug(f"d{index}", memory_bytes=1 << 31) for index in range(3)]
    pc.machine.start()
    assert sorted(device.mapped[2] for device in devices) == [0x1_0000_0000, 0x1_8000_0000, 0x2_0000_0000]


# -- the machine -------------------------------------------------------------------------------------------------------


def test_plugging_the_same_id_or_slot_twice_is_refused_in_qemus_words(pc: Pc) -> None:
    pc.plug("a")
    with pytest.raises(DeviceError, match="Duplicate device ID 'a'"):
        pc.plug("a")
    with pytest.raises(DeviceError, match="slot 2 function 0 not available for ivshmem-plain, in use by ivshmem-doorb"):
        pc.machine.add_device("b", Ivshmem(4096), World(bytearray(4096)), slot=2, hotplugged=False)
    for index in range(29):
        pc.plug(f"d{index}", memory_bytes=4096)
    with pytest.raises(DeviceError, match="no slot"):
        pc.plug("one more", memory_bytes=4096)


def test_the_guest_ejects_what_it_was_asked_for(pc: Pc) -> None:
    gone: list[str] = []
    pc.machine.hooks.device_deleted = lambda name, device: gone.append(name)
    pc.plug("a", hotplugged=True)
    up = acpi_hotplug.BASE + acpi_hotplug.UP
    assert (pc.machine.read_port(up, 4), pc.machine.read_port(up, 4)) == (1 << 2, 0)
    pc.machine.ask_to_go("a")
    assert pc.machine.read_port(acpi_hotplug.BASE + acpi_hotplug.DOWN, 4) == 1 << 2
    assert gone == []
    pc.machine.write_port(acpi_hotplug.BASE + acpi_hotplug.EJECT, 4, 1 << 2)
    assert gone == ["a"]
    assert pc.machine.peripherals == {}
    pc.machine.write_port(acpi_hotplug.BASE + acpi_hotplug.EJECT, 4, 1 << 2)
    assert gone == ["a"]
    with pytest.raises(DeviceError, match="Device 'a' not found"):
        pc.machine.ask_to_go("a")


def test_a_reset_removes_what_was_asked_to_go_and_keeps_the_rest(pc: Pc) -> None:
    pc.plug("a")
    kept = pc.plug("b")
    pc.place(kept, bar2=0xE0000000)
    pc.machine.ask_to_go("a")
    pc.machine.reset()
    assert list(pc.machine.peripherals) == ["b"]
    assert kept.mapped == {}
    assert list(pc.cpu.memory) == [0]


def test_debug_exit_ends_with_an_odd_status() -> None:
    ended: list[int] = []
    pc = Pc(debug_exit=ended.append)
    pc.machine.add_debug_exit(0xF4, 4)
    for value in (0, 1, 0xFFFFFFFF):
        pc.machine.write_port(0xF4, 4, value)
    assert ended == [1, 3, 0xFF]
    with pytest.raises(DeviceError, match="0x3f8 is in use"):
        pc.machine.add_debug_exit(0x3F8, 1)
    with pytest.raises(DeviceError, match="0xf2 is in use"):
        pc.machine.add_debug_exit(0xF2, 4)


def test_typed_bytes_reach_the_guests_serial_port() -> None:
    sent = bytearray()
    pc = Pc(transmit=sent.append)
    pc.machine.write_port(0x3F8, 1, ord("!"))
    pc.machine.uart.receive(b"?")
    assert (sent, pc.machine.read_port(0x3F8, 1)) == (b"!", ord("?"))


bar_moves = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["bar0", "bar1", "bar2", "command"]),
    st.one_of(
        st.sampled_from([0, MIB, 0xE0000000, 0xE0000100, 0xE0100000, 0xFEE00000, 0xFFFFFFFF, 1 << 32, 2**64 - 1]),
        st.integers(0, 2**64 - 1),
    ),
)


@settings(deadline=None)
@given(st.lists(bar_moves, max_size=40))
def test_wherever_a_guest_puts_its_bars_nothing_overlaps_and_ram_stays(moves: list[tuple[int, str, int]]) -> None:
    pc = Pc()
    devices = [pc.plug(f"d{index}") for index in range(3)]
    for index, what, value in moves:
        device = devices[index]
        if what == "command":
            pc.config(device, COMMAND, 2, value & 0xFFFF)
        else:
            pc.place(device, command=device.command, **{what: value})
        # The address space's own assertions have found no overlap; and everything shown is where the registers say.
        for each in devices:
            for bar in each.bars:
                if pc.machine.bar_is_visible(each, bar):
                    assert each.mapped[bar] == each.bar_address(bar)
        assert pc.cpu.memory[0] == (RAM_BYTES, memoryview(pc.ram))
        assert lapic.BASE in pc.cpu.pages
    for each in devices:
        pc.config(each, COMMAND, 2, 0)
    assert (set(pc.cpu.memory), pc.cpu.pages) == ({0}, {lapic.BASE})


def test_a_board_without_local_apic_leaves_its_page_free() -> None:
    cpu = AddressSpace()
    Board(cpu, has_lapic=False)
    assert cpu.pages == set()
