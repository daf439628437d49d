"""What a machine is made of, as far as a destination has to be made of the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...units import format_size
from .stream import MigrationError

MASTER_BLOCKER = "Migration is disabled when using feature 'peer mode' in device 'ivshmem'"
"""QEMU 7.2's words for a device with ``master=off``."""


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """A plugged device.

    Attributes
    ----------
    address
        Its PCI address, such as ``"0000:00:06.0"``.
    driver
        Its model.
    device_id
        Its id, for messages: it may differ.
    memory_bytes
        Size of its memory.
    vectors
        Its MSI-X vectors.
    traits
        Other properties that change what its guest sees.
    """

    address: str
    driver: str
    device_id: str
    memory_bytes: int
    vectors: int
    traits: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Name it."""
        return f"{self.driver} {self.device_id!r} at {self.address}"


@dataclass(frozen=True, slots=True)
class Description:
    """A machine.

    Attributes
    ----------
    machine
        Its type, ``"pc"``.
    memory_bytes
        Size of its memory.
    debug_exit
        First port and number of ports of ``isa-debug-exit``, or nothing.
    devices
        What is plugged, by address.
    run_state
        What the guest was doing, as QMP calls it.
    """

    machine: str
    memory_bytes: int
    debug_exit: tuple[int, ...]
    devices: tuple[DeviceDescription, ...]
    run_state: str

    def plain(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, value: Any) -> Description:
        """Read what `plain` returned.

        Raises
        ------
        MigrationError
            When it is something else.
        """
        try:
            devices = tuple(
                _typed(DeviceDescription, {**device, "traits": tuple(map(str, device["traits"]))})
                for device in value["devices"]
            )
            description: Description = _typed(
                cls, {**value, "devices": devices, "debug_exit": tuple(map(int, value["debug_exit"]))}
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise MigrationError(f"the description of the source's machine is damaged: {error!r}") from error
        return description


def _typed(cls: Any, values: dict[str, Any]) -> Any:
    """Make a dataclass whose members have the types that they shall have."""
    for field in dataclasses.fields(cls):
        kind = {"str": str, "int": int}.get(str(field.type), tuple)
        if type(values[field.name]) is not kind:
            raise TypeError(f"{field.name} is {values[field.name]!r}")
    return cls(**values)


def mismatch(source: Description, here: Description) -> str | None:
    """Say in what the destination differs from the source, by name; None when a guest sees no difference."""
    pairs = [
        ("machine type", source.machine, here.machine),
        ("memory (-m)", format_size(source.memory_bytes), format_size(here.memory_bytes)),
        ("ports of isa-debug-exit", _ports(source.debug_exit), _ports(here.debug_exit)),
    ]
    for what, there, at_home in pairs:
        if there != at_home:
            return _differs(what, there, at_home)
    theirs = {device.address: device for device in source.devices}
    ours = {device.address: device for device in here.devices}
    for address in sorted({*theirs, *ours}):
        there_device, our_device = theirs.get(address), ours.get(address)
        if our_device is None:
            return f"{there_device} is missing at the destination: add it there, with addr={address[8:10]}"
        if there_device is None:
            return f"{our_device} is at the destination only: take it away there"
        difference = _device_mismatch(there_device, our_device)
        if difference is not None:
            return difference
    return None


def _device_mismatch(source: DeviceDescription, here: DeviceDescription) -> str | None:
    pairs = [
        ("model of the device at " + source.address, source.driver, here.driver),
        (f"memory of {source}", format_size(source.memory_bytes), format_size(here.memory_bytes)),
        (f"vectors of {source}", str(source.vectors), str(here.vectors)),
        (f"properties of {source}", ",".join(source.traits), ",".join(here.traits)),
    ]
    return next((_differs(*pair) for pair in pairs if pair[1] != pair[2]), None)


def _ports(ports: tuple[int, ...]) -> str:
    return f"{ports[0]:#x}+{ports[1]}" if len(ports) == 2 else "none"


def _differs(what: str, there: str, here: str) -> str:
    return f"{what}: {there} at the source, {here} at the destination"
