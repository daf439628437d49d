"""Buses behind bridges: on the command line, over QMP, over qtest."""

from __future__ import annotations

import pytest
from qtest_client import Qtest

MIB = 1 << 20
MEMORY = ["-object", f"memory-backend-ram,size={MIB},id=m"]
Q35 = ["-machine", "q35", "-device", "pcie-root-port,id=p1", "-device", "pcie-pci-bridge,bus=p1,id=b1"]
BAR0, BAR2 = 0xE0000000, 0xE0100000


def number_buses(machine: Qtest) -> None:
    """Give the buses of `Q35` the numbers 1 and 2, and let 2 MiB through to the second."""
    for bus, slot, numbers in ((0, 1, 0x020100), (1, 0, 0x020201)):
        machine.config(slot, 0x18, value=numbers, bus=bus)
        machine.config(slot, 0x20, value=0xE010E000, bus=bus)
        machine.config(slot, 4, 2, value=6, bus=bus)


def test_a_device_is_plugged_behind_two_bridges_and_ejected() -> None:
    with Qtest("unicorn", *MEMORY, *Q35) as machine:
        qmp = machine.qmp
        qmp.ok("device_add", driver="ivshmem-plain", id="iv1", memdev="m", bus="b1")
        number_buses(machine)
        assert machine.config(0, 0, bus=2) == 0x11101AF4
        for offset, address in {0x10: BAR0, 0x18: BAR2, 0x1C: 0}.items():
            machine.config(0, offset, value=address, bus=2)
        machine.config(0, 4, 2, value=2, bus=2)
        machine.write(BAR0, 0x5A5A)
        machine.write(BAR2, 0x1234)
        assert (machine.read(BAR0), machine.read(BAR2)) == (0x5A5A, 0x1234)
        machine.config(1, 0x22, 2, value=0xE000)  # the root port lets the first MiB through only
        assert (machine.read(BAR0), machine.read(BAR2)) == (0x5A5A, 0)
        machine.config(1, 4, 2, value=0)
        assert (machine.read(BAR0), machine.read(BAR2)) == (0, 0)
        machine.config(1, 4, 2, value=6)
        machine.config(1, 0x22, 2, value=0xE010)
        assert (machine.read(BAR0), machine.read(BAR2)) == (0x5A5A, 0x1234)
        qmp.ok("device_del", id="iv1")
        machine.out(0xCD0, 1)
        assert machine.inp(0xCC4) == 1
        machine.out(0xCC8, 1)
        assert qmp.event("DEVICE_DELETED")["data"]["device"] == "iv1"
        assert (machine.config(0, 0, bus=2), machine.read(BAR0), machine.read(BAR2)) == (0xFFFFFFFF, 0, 0)


def test_a_bus_reset_resets_what_is_behind() -> None:
    with Qtest("unicorn", *MEMORY, *Q35, "-device", "ivshmem-plain,memdev=m,bus=b1") as machine:
        number_buses(machine)
        machine.config(0, 0x10, value=BAR0, bus=2)
        machine.config(0, 4, 2, value=2, bus=2)
        machine.write(BAR0, 7)
        assert machine.read(BAR0) == 7
        machine.config(1, 0x3E, 2, value=0x40)
        machine.config(1, 0x3E, 2, value=0)
        number_buses(machine)
        assert (machine.config(0, 0x10, bus=2), machine.config(0, 4, 2, bus=2), machine.read(BAR0)) == (0, 0, 0)


def test_firmware_numbers_the_buses_and_opens_the_windows() -> None:
    options = [*MEMORY, *Q35, "-device", "ivshmem-plain,memdev=m,bus=b1,id=d"]
    with Qtest("unicorn", *options, accelerator=["-S"]) as machine:
        machine.qmp.ok("cont")
        machine.qmp.ok("stop")
        port = next(device for device in machine.qmp.ok("query-pci")[0]["devices"] if device["qdev_id"] == "p1")
        assert port["pci_bridge"]["bus"]["subordinate"] == 2
        (bridge,) = port["pci_bridge"]["devices"]
        (device,) = bridge["pci_bridge"]["devices"]
        assert (bridge["bus"], device["bus"], device["qdev_id"]) == (1, 2, "d")
        address = next(region["address"] for region in device["regions"] if region["bar"] == 2)
        window = bridge["pci_bridge"]["bus"]["memory_range"]
        assert window["base"] <= address < address + MIB <= window["limit"] + 1
        machine.write(address, 0x77)
        assert machine.read(address) == 0x77


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bus": "pcie.0"}, "Bus 'pcie.0' does not support hotplugging"),
        ({}, "Bus 'pcie.0' does not support hotplugging"),
        ({"bus": "nope"}, "Bus 'nope' not found; there are pcie.0, p1, b1"),
        (
            {"bus": "p1", "addr": "0"},
            "PCI: slot 0 function 0 not available for ivshmem-plain, in use by pcie-pci-bridge,id=b1",
        ),
        ({"driver": "pci-bridge", "bus": "b1", "chassis_nr": 1}, "plugged when the machine starts only"),
    ],
)
def test_plugs_that_cannot_be_are_refused(arguments: dict[str, str], said: str) -> None:
    with Qtest("unicorn", *MEMORY, *Q35) as machine:
        plain = {"driver": "ivshmem-plain", "memdev": "m"} if "driver" not in arguments else {}
        assert said in machine.qmp.execute("device_add", **{**plain, **arguments})["error"]["desc"]


def test_a_machine_with_bridges_says_that_it_does_not_migrate() -> None:
    with Qtest("unicorn", *Q35) as machine:
        refused = machine.qmp.execute("migrate", uri="unix:/nowhere")["error"]["desc"]
        assert refused == "only -machine pc without bridges can be migrated"


# -- as real QEMU has them ---------------------------------------------------------------------------------------------

DUMPED = {
    "q35": (["-machine", "q35"], [(0, 0, 0), (0, 31, 0), (0, 31, 2), (0, 31, 3)]),
    "express": (Q35, [(0, 1, 0), (1, 0, 0)]),
    "pci": (["-device", "pci-bridge,chassis_nr=1,id=b"], [(0, 2, 0)]),
}


def dump(machine: Qtest, place: tuple[int, int, int]) -> list[str]:
    """Read a function's registers, and what of them can be written (the bits of each dword that differ)."""
    bus, slot, number = place

    def access(offset: int, value: int | None = None) -> int:
        machine.out(0xCF8, 0x80000000 | bus << 16 | slot << 11 | number << 8 | offset)
        return machine.inp(0xCFC) if value is None else machine.out(0xCFC, value) or 0

    rows = []
    for offset in range(0, 256, 4):
        old = access(offset)
        seen = []
        for value in (0xFFFFFFFF, 0):
            access(offset, value)
            seen.append(access(offset))
        access(offset, old)
        rows.append(f"{place} {offset:02x}: {old:08x} mask {seen[0] ^ seen[1]:08x}")
    return rows


@pytest.mark.qemu
@pytest.mark.parametrize("what", DUMPED)
def test_registers_of_chipset_and_bridges_are_those_of_qemu(what: str) -> None:
    options, places = DUMPED[what]
    rows = []
    for kind in ("unicorn", "qemu"):
        with Qtest(kind, *options) as machine:
            if what == "express":
                number_buses(machine)
            rows.append([row for place in places for row in dump(machine, place)])
    assert rows[0] == rows[1]


@pytest.mark.qemu
def test_hot_plug_behind_bridges_has_the_answers_of_qemu() -> None:
    options = [*MEMORY, *Q35, "-device", "pcie-root-port,id=p2,chassis=2"]
    told = []
    for kind in ("unicorn", "qemu"):
        with Qtest(kind, *options) as machine:
            answers: list[object] = []

            def look(machine: Qtest = machine, answers: list[object] = answers) -> None:
                for bus in (0, 1, 2, 3, 256):
                    machine.out(0xCD0, bus)
                    answers.append([hex(machine.inp(0xCC0 + offset)) for offset in (0, 4, 8, 0xC, 0x10)])

            look()
            answers.append(machine.qmp.execute("device_add", driver="ivshmem-plain", id="iv1", memdev="m", bus="b1"))
            look()
            look()
            answers.append(machine.qmp.execute("device_del", id="iv1"))
            look()
            number_buses(machine)
            buses = machine.qmp.ok("query-pci")
            machine.out(0xCD0, 2)
            machine.out(0xCC8, 1)
            answers.append(machine.qmp.event("DEVICE_DELETED")["data"])
            answers += [
                (path, name, machine.qmp.execute("qom-get", path=f"/machine/peripheral/{path}", property=name))
                for path in ("b1", "p1")
                for name in ("type", "addr", "legacy-addr", "parent_bus", "hotplugged", "hotpluggable")
            ]
            told.append((answers, buses))
    for ours, theirs in zip(*(answers for answers, _ in told), strict=True):
        assert ours == theirs
    assert told[0][1] == told[1][1]
