"""Where a device can be plugged: slots of bus 0 on ``pc``, root ports on ``q35``.

QEMU 7.2 does not notice when a second device goes into an occupied root port, so who sits where is kept here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, VmError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from .command import Machine

PC_SLOTS = range(2, 32)
"""Slots of the i440FX's bus that are not the chipset's (0 and 1)."""


@dataclass(frozen=True, slots=True)
class Place:
    """One place for one device.

    Attributes
    ----------
    bus
        Id of the bus, for ``device_add``.
    slot
        Slot on that bus.
    """

    bus: str
    slot: int

    def properties(self) -> dict[str, str]:
        """Return the properties of ``device_add`` that mean this place."""
        return {"bus": self.bus, "addr": f"0x{self.slot:02x}"}

    def __str__(self) -> str:
        return f"{self.bus} slot {self.slot:#04x}"


class Slots:
    """The places of one machine.

    Parameters
    ----------
    machine
        What it is made of.
    """

    def __init__(self, machine: Machine) -> None:
        self._name = machine.name
        if machine.machine == "q35":
            self.places = tuple(Place(port, 0) for port in machine.port_names())
        else:
            self.places = tuple(Place("pci.0", slot) for slot in PC_SLOTS)
        self._taken: set[Place] = set()

    def take(self, pci: list[Any], wanted: str | int | None = None) -> Place:
        """Take a free place; :meth:`free` gives it back.

        Parameters
        ----------
        pci
            The machine's answer to ``query-pci``.
        wanted
            A root port's name or a slot number; None for the first free one.

        Raises
        ------
        UsageError
            There is no such place, or it is taken.
        VmError
            All are taken.
        """
        occupied = self._taken | set(_occupied(pci))
        if wanted is not None:
            place = next((each for each in self.places if wanted in {each.bus, each.slot}), None)
            shown = ", ".join(map(str, self.places)) or "none"
            if place is None:
                raise UsageError(f"{self._name} has no place {wanted!r} for a device; it has {shown}")
            if place in occupied:
                raise UsageError(f"{place} of {self._name} is taken; leave the choice to the lab, or unplug first")
        else:
            place = next((each for each in self.places if each not in occupied), None)
            if place is None:
                remedy = "unplug a device first" if self.places else "define a q35 VM with root_ports=4, for example"
                raise VmError(
                    f"{self._name} has no free place for a device ({len(self.places)} are there, all taken); {remedy}"
                )
        self._taken.add(place)
        return place

    def find(self, pci: list[Any], device_id: str) -> Place:
        """Return the place of a device that can be unplugged, by its id.

        Raises
        ------
        VmError
            There is no such device, or it does not sit in one of the places.
        """
        slot = next((device["slot"] for device in pci[0]["devices"] if device.get("qdev_id") == device_id), None)
        if slot is None:
            raise VmError(f"{self._name} has no device {device_id!r} on its first bus")
        place = next((each for each in self.places if (each.bus, each.slot) == ("pci.0", slot)), None)
        if place is None:
            raise VmError(
                f"{device_id} of {self._name} was there at its start, and a q35 lets go only of what was plugged into "
                "a root port; close the machine and define it anew without the device"
            )
        self._taken.add(place)
        return place

    def table(self, pci: list[Any]) -> list[tuple[Place, str]]:
        """Return every place with what sits there: a device's id, ``"taken"`` for one without, empty when it is free."""
        ids = {Place("pci.0", device["slot"]): device.get("qdev_id") or "taken" for device in pci[0]["devices"]}
        for device in pci[0]["devices"]:
            for behind in device.get("pci_bridge", {}).get("devices", []):
                ids[Place(device.get("qdev_id", ""), behind["slot"])] = behind.get("qdev_id") or "taken"
        return [(place, ids.get(place, "taken" if place in self._taken else "")) for place in self.places]

    def free(self, place: Place) -> None:
        """Give a place back."""
        self._taken.discard(place)


def pci_devices(pci: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """Give every device of an answer to ``query-pci``, those behind bridges too."""
    for bus in pci:
        for device in bus["devices"]:
            yield device
            yield from pci_devices([bridge] if "devices" in (bridge := device.get("pci_bridge", {})) else [])


def _occupied(pci: list[Any]) -> Iterator[Place]:
    for device in pci[0]["devices"]:
        yield Place("pci.0", device["slot"])
        if device.get("pci_bridge", {}).get("devices"):
            yield Place(device.get("qdev_id", ""), 0)
