"""``-device`` for bridges, and ``bus=``.

Ref: QEMU 7.2's ``pcie-root-port``, ``pcie-pci-bridge`` and ``pci-bridge``, and the texts of its refusals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DeviceError
from ..pc.bridges import PciBridge
from .properties import number
from .qmp import QmpError

if TYPE_CHECKING:
    from ..pc.hostbridge import PciBus
    from ..pc.machine import Machine


def find_bus(machine: Machine, name: str | None) -> PciBus:
    """Return the bus of that name; None names bus 0.

    Raises
    ------
    QmpError
        When there is none.
    """
    if name is None or name == machine.pci.name.partition(".")[0]:
        return machine.pci
    if name not in machine.buses:
        raise QmpError(f"Bus '{name}' not found; there are {', '.join(machine.buses)}")
    return machine.buses[name]


def add_bridge(
    machine: Machine,
    bridge_id: str,
    driver: str,
    properties: dict[str, str],
    slot: int | None,
    bus: PciBus,
    *,
    started: bool,
) -> None:
    """Put a bridge into the machine before it starts.

    Raises
    ------
    QmpError
        When a property is wrong, the slot is not free, or the machine has started.
    """
    if started:
        raise QmpError(f"{driver} is plugged when the machine starts only: give it with -device")
    chassis = number(properties.get("chassis_nr", properties.get("chassis", "0")), "chassis")
    place = (chassis, number(properties.get("slot", "0"), "slot"))
    if chassis > 0xFF or place[1] > 0x1FFF:
        raise QmpError(f"chassis {chassis} and slot {place[1]}: a chassis is 0 to 255, its slots are 0 to 8191")
    if driver == "pci-bridge" and not chassis:
        raise QmpError(
            "Bridge chassis not specified. Each bridge is required to be assigned a unique chassis id > 0 (chassis_nr=1)"
        )
    bridge = PciBridge(driver, bridge_id)
    if driver == "pcie-root-port" and any(
        other.name == driver and other.chassis_slot == place for other in machine.bridges.values()
    ):
        raise QmpError(
            f"Can't add chassis slot, error -16 (chassis={chassis},slot={place[1]} is taken: choose another)"
        )
    bridge.chassis_slot = place
    try:
        machine.add_bridge(bridge_id, bridge, slot, bus)
    except DeviceError as error:
        raise QmpError(str(error)) from error
