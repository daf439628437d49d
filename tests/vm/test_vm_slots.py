from __future__ import annotations

import pytest

from ivshmem_lab.errors import UsageError, VmError
from ivshmem_lab.vm.command import Machine
from ivshmem_lab.vm.slots import Place, Slots, pci_devices

CHIPSET = [{"slot": 0, "qdev_id": ""}, {"slot": 1, "qdev_id": ""}]


def pc(*slots):
    return [{"bus": 0, "devices": [*CHIPSET, *({"slot": slot, "qdev_id": f"d{slot}"} for slot in slots)]}]


def q35(**behind):
    """Build a query-pci answer of a q35: root port name to the ids of the devices behind it."""
    ports = [
        {
            "slot": number,
            "qdev_id": port,
            "pci_bridge": {"bus": {}, **({"devices": [{"slot": 0, "qdev_id": each} for each in ids]} if ids else {})},
        }
        for number, (port, ids) in enumerate(behind.items(), 1)
    ]
    return [{"bus": 0, "devices": [{"slot": 31, "qdev_id": ""}, *ports]}]


def test_a_pc_gives_its_thirty_slots_lowest_first_and_then_refuses():
    slots = Slots(Machine("x"))
    given = [slots.take(pc()) for _ in range(30)]
    assert given == [Place("pci.0", slot) for slot in range(2, 32)]
    with pytest.raises(VmError, match=r"x has no free place for a device \(30 are there, all taken\); unplug"):
        slots.take(pc())
    slots.free(given[7])
    assert slots.take(pc()) == given[7]


def test_what_the_machine_has_already_is_not_given():
    assert Slots(Machine("x")).take(pc(2, 3, 5)) == Place("pci.0", 4)


def test_a_wanted_slot_is_given_unless_it_is_taken_or_not_there():
    slots = Slots(Machine("x"))
    assert slots.take(pc(), 9) == Place("pci.0", 9)
    for taken in (9, 5):
        with pytest.raises(UsageError, match=f"pci.0 slot {taken:#04x} of x is taken"):
            slots.take(pc(5), taken)
    for wrong in (1, 32, "rp0"):
        with pytest.raises(UsageError, match=f"x has no place {wrong!r} for a device; it has pci.0 slot 0x02, "):
            slots.take(pc(), wrong)


def test_a_q35_gives_its_root_ports_and_remembers_who_sits_behind_them():
    slots = Slots(Machine("x", machine="q35", root_ports=3))
    answer = q35(rp0=["old"], rp1=[], rp2=[])
    assert slots.take(answer) == Place("rp1", 0)
    with pytest.raises(UsageError, match="rp0 slot 0x00 of x is taken"):
        slots.take(answer, "rp0")
    assert slots.take(answer, "rp2").properties() == {"bus": "rp2", "addr": "0x00"}
    with pytest.raises(VmError, match=r"\(3 are there, all taken\)"):
        slots.take(answer)


def test_a_q35_without_root_ports_says_what_to_define():
    slots = Slots(Machine("x", machine="q35"))
    with pytest.raises(VmError, match=r"\(0 are there, all taken\); define a q35 VM with root_ports=4"):
        slots.take(q35())
    with pytest.raises(UsageError, match="x has no place 'rp0' for a device; it has none"):
        slots.take(q35(), "rp0")


def test_devices_behind_bridges_are_found_too():
    answer = q35(rp0=["a"], rp1=["b", "c"])
    assert [device["qdev_id"] for device in pci_devices(answer)] == ["", "rp0", "a", "rp1", "b", "c"]
