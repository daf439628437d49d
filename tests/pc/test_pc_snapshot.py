"""A machine as plain values: one that takes them over answers as the first one did."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.errors import DeviceError
from ivshmem_lab.pc.machine import Machine

SLOT = 6
PORTS = [*range(0xCF8, 0xD00), *range(0x3F8, 0x400), *range(0xAE00, 0xAE18, 4), 0x20, 0x21, 0xA0, 0xA1, 0x80]
MESSAGE = 0xFEE00000


class NoCpu:
    """A CPU whose memory nobody looks at."""

    def __init__(self) -> None:
        self.mapped: dict[int, int] = {}

    def map_memory(self, address: int, memory: object, size_bytes: int) -> None:
        self.mapped[address] = size_bytes

    def map_mmio_page(self, address: int) -> None:
        self.mapped[address] = 4096

    def unmap(self, address: int, size_bytes: int) -> None:
        del self.mapped[address]


class Memory:
    """Shared memory without peers."""

    def __init__(self) -> None:
        self.memory = bytearray(1 << 16)

    def ring(self, peer_id: int, vector: int) -> None:
        pass


def machine(vectors: int = 3, peer_id: int = 0) -> tuple[Machine, Ivshmem, NoCpu]:
    cpu = NoCpu()
    device = Ivshmem(1 << 16, vectors=vectors, peer_id=peer_id)
    made = Machine(cpu, memoryview(bytearray(1 << 20)))  # type: ignore[arg-type]
    made.add_device("iv", device, Memory(), SLOT, hotplugged=True)
    made.start()
    return made, device, cpu


accesses = st.lists(
    st.tuples(
        st.sampled_from(["port", "config", "registers", "table", "lapic", "event", "typed"]),
        st.integers(0, 0xFF),
        st.sampled_from([1, 2, 4]),
        st.integers(0, 0xFFFFFFFF),
    ),
    max_size=30,
)


def do(made: Machine, device: Ivshmem, kind: str, where: int, size: int, value: int) -> None:
    value &= (1 << 8 * size) - 1
    if kind == "port":
        made.write_port(PORTS[where % len(PORTS)], size, value)
    elif kind == "config":
        made.act(device, device.write_config(where & -size, size, value))
    elif kind in ("registers", "table"):
        made.act(device, device.write_bar(int(kind == "table"), where & -size, size, value))
    elif kind == "lapic":
        made.lapic.write(where << 4, size, value)
    elif kind == "event":
        made.event(device, where % 4)
    else:
        made.uart.receive(bytes([where]))


@settings(max_examples=150)
@given(accesses)
def test_a_machine_that_takes_over_a_snapshot_is_the_same(steps: list[tuple[str, int, int, int]]) -> None:
    made, device, cpu = machine(peer_id=1)
    for step in steps:
        do(made, device, *step)
    if "iv" not in made.peripherals:
        return  # ejected
    taken = made.snapshot()
    other, other_device, other_cpu = machine(peer_id=7)
    other.restore(taken)
    assert other.snapshot() == taken
    assert other_cpu.mapped == cpu.mapped
    assert other_device.read_bar(0, 8, 4) == 7  # the id is not the machine's to keep
    assert other.uart.read(0, 1) == made.uart.read(0, 1)


def test_a_snapshot_is_of_plain_values() -> None:
    text = json.dumps(machine()[0].snapshot())
    assert "iv" not in json.loads(text)["pci"]


def test_what_pends_on_vectors_that_are_not_masked_is_sent_on_arrival() -> None:
    made, device, _ = machine()
    device.msix.enabled = True
    made.act(device, device.write_config(4, 2, 0x7))
    made.act(device, device.write_config(0x42, 2, 0xC000))  # enabled, the whole function masked
    for vector in (0, 1):
        for offset, value in ((0, MESSAGE), (4, 0), (8, 0x40 + vector), (12, vector)):
            made.act(device, device.write_bar(1, 16 * vector + offset, 4, value))
        made.event(device, vector)
    taken: dict[str, Any] = made.snapshot()
    function = taken["pci"]["functions"][f"{SLOT:x}.0"]
    config = bytearray.fromhex(function["config"])
    config[0x43] = 0x80  # nothing masks the function where it arrives
    function["config"] = config.hex()
    other, other_device, _ = machine()
    other.restore(taken)
    assert other.lapic.requested == 1 << 0x40
    assert other_device.msix.pending == 1 << 1  # its entry is masked


@pytest.mark.parametrize("offset", [0x00, 0x08, 0x18, 0x34, 0x44])
def test_bytes_that_no_guest_can_write_must_be_equal(offset: int) -> None:
    made, _, _ = machine()
    taken = made.snapshot()
    function = taken["pci"]["functions"][f"{SLOT:x}.0"]
    config = bytearray.fromhex(function["config"])
    config[offset] ^= 0x01
    function["config"] = config.hex()
    with pytest.raises(DeviceError, match=rf"ivshmem-doorbell: configuration byte {offset:#x} is "):
        machine()[0].restore(taken)


def test_another_version_is_refused() -> None:
    _, device, _ = machine()
    with pytest.raises(DeviceError, match="version is 2 there and 1 here"):
        device.restore({**device.snapshot(), "version": 2})


@pytest.mark.parametrize("vectors", [2, 4])
def test_another_number_of_vectors_is_refused(vectors: int) -> None:
    with pytest.raises(DeviceError, match=f"vectors is 3 there and {vectors} here"):
        machine(vectors)[0].restore(machine(3)[0].snapshot())
