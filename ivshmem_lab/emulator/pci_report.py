"""``query-pci``: buses and functions in QMP's words.

Ref: QEMU 7.2 QMP reference manual, ``PciInfo``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..device.pci import SUBSYSTEM
from ..pc.bridges import SECONDARY, SUBORDINATE, PciBridge

if TYPE_CHECKING:
    from ..device.pci import PciFunction
    from ..pc.hostbridge import PciBus
    from .qmp import Json

CLASS_NAMES = {
    0x0600: "Host bridge",
    0x0601: "ISA bridge",
    0x0101: "IDE controller",
    0x0106: "SATA controller",
    0x0604: "PCI bridge",
    0x0C05: "SMBus",
    0x0680: "Bridge",
    0x0500: "RAM controller",
}


def pci_devices(bus: PciBus, bus_number: int, ids: dict[PciFunction, str]) -> list[Json]:
    """Describe the devices of a bus, and of those behind it whose bridges software has numbered."""
    devices = []
    for slot, number, function in bus:
        device = _pci_device(function, slot, number, ids.get(function, ""))
        device["bus"] = bus_number
        if isinstance(function, PciBridge):
            device["id"] = {name: device["id"][name] for name in ("vendor", "device")}
            device["pci_bridge"] = _behind(function, bus_number, ids)
        devices.append(device)
    return devices


def _behind(bridge: PciBridge, bus_number: int, ids: dict[PciFunction, str]) -> Json:
    secondary, subordinate = bridge.read_config(SECONDARY, 1), bridge.read_config(SUBORDINATE, 1)
    bus: Json = {"number": bus_number, "secondary": secondary, "subordinate": subordinate}
    for name, (first, behind) in bridge.windows.items():
        bus[name] = {"base": first, "limit": behind - 1}
    return {"bus": bus, **({"devices": pci_devices(bridge.bus, secondary, ids)} if secondary else {})}


def _pci_device(function: PciFunction, slot: int, number: int, qdev_id: str) -> Json:
    class_code = function.read_config(0x0A, 2)
    pin = function.read_config(0x3D, 1)
    regions = []
    for index, bar in sorted(function.bars.items()):
        region: Json = {
            "bar": index,
            "size": bar.size_bytes,
            "address": function.mapped.get(index, -1),
            "type": "io" if bar.is_io else "memory",
        }
        if not bar.is_io:
            region |= {"prefetch": bar.prefetchable, "mem_type_64": bar.is_64bit}
        regions.append(region)
    return {
        "bus": 0,
        "slot": slot,
        "function": number,
        "qdev_id": qdev_id,
        "class_info": {"class": class_code, **({"desc": CLASS_NAMES[class_code]} if class_code in CLASS_NAMES else {})},
        "id": {
            "vendor": function.read_config(0, 2),
            "device": function.read_config(2, 2),
            "subsystem-vendor": function.read_config(SUBSYSTEM, 2),
            "subsystem": function.read_config(SUBSYSTEM + 2, 2),
        },
        "irq_pin": pin,
        **({"irq": function.read_config(0x3C, 1)} if pin else {}),
        "regions": regions,
    }
