"""What moves: the CPU, the board and its devices as plain values, and the memory as blocks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ...errors import IvshmemLabError
from ...units import format_size
from .description import MASTER_BLOCKER, Description, DeviceDescription
from .memory import Block
from .stream import MigrationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...device.pci import PciFunction
    from ...pc.machine import Peripheral
    from ..emulator import Emulator

SECTIONS = ("machine", "cpu")
RAM = "pc.ram"
MACHINE = "pc"
INTERRUPT_PIN = 0x3D


def pci_address(slot: int) -> str:
    """Name a slot of bus 0."""
    return f"0000:00:{slot:02x}.0"


def carries_memory(properties: dict[str, str], peer_id: int) -> bool:
    """Tell whether a device's memory moves with the machine (``master``; ``role`` of the legacy device)."""
    if properties["driver"] == "ivshmem":
        return moves({"peer": "off", "master": "on"}.get(properties.get("role", ""), "auto"), peer_id)
    return moves(properties.get("master", "off"), peer_id)


def moves(master: str, peer_id: int) -> bool:
    """Tell what ``master`` comes to: ``auto`` is on for the peer 0, and for memory alone, which reads 0 (QEMU 7.2)."""
    return peer_id == 0 if master == "auto" else master == "on"


def _peers(emulator: Emulator) -> list[str]:
    return [
        device_id
        for device_id, plugged in emulator.machine.peripherals.items()
        if not plugged.device.attached or not carries_memory(emulator.properties[device_id], plugged.device.peer_id)
    ]


def blockers(emulator: Emulator) -> list[str]:
    """Say why the machine cannot move, in QEMU's words: once for each device that stays."""
    if emulator.options.machine != "pc" or emulator.machine.bridges:
        return ["only -machine pc without bridges can be migrated"]
    return [MASTER_BLOCKER for _ in _peers(emulator)]


def peer_devices(emulator: Emulator) -> str | None:
    """Say which devices of a destination cannot take memory, or None."""
    names = [_described(name, emulator.machine.peripherals[name]) for name in _peers(emulator)]
    if not names:
        return None
    return f"'peer' devices are not migratable: {', '.join(map(str, names))}; give master=on at the destination"


def _described(device_id: str, plugged: Peripheral) -> DeviceDescription:
    device = plugged.device
    return DeviceDescription(
        address=pci_address(plugged.slot),
        driver=device.name,
        device_id=device_id,
        memory_bytes=device.memory_bytes,
        vectors=device.msix.vectors if device.msix else 0,
        traits=(*_bars(device), f"interrupt pin {device.read_config(INTERRUPT_PIN, 1)}"),
    )


def _bars(device: PciFunction) -> Iterator[str]:
    for index, bar in sorted(device.bars.items()):
        yield f"BAR {index} of {format_size(bar.size_bytes)} in {64 if bar.is_64bit else 32} bits"


def describe(emulator: Emulator) -> Description:
    """Describe the machine (on the vCPU's thread)."""
    devices = [_described(*item) for item in emulator.machine.peripherals.items()]
    return Description(
        machine=MACHINE,
        memory_bytes=len(emulator.machine.ram),
        debug_exit=emulator.machine.debug_exit_ports,
        devices=tuple(sorted(devices, key=lambda device: device.address)),
        run_state=emulator.state.value,
    )


@contextlib.contextmanager
def memory_blocks(emulator: Emulator, *, fresh: bool = False) -> Iterator[list[Block]]:
    """Return all memory that moves: the machine's own, then that of each device by address."""
    with contextlib.ExitStack() as views:
        blocks = [Block(RAM, views.enter_context(memoryview(emulator.machine.ram)), fresh)]
        plugged = sorted(emulator.machine.peripherals.items(), key=lambda item: item[1].slot)
        for device_id, peripheral in plugged:
            name = emulator.properties[device_id].get("memdev", "ivshmem.bar2")
            memory = views.enter_context(memoryview(emulator.links[device_id].memory))  # type: ignore[arg-type]
            view = views.enter_context(memory.cast("B"))[: peripheral.device.memory_bytes]
            blocks.append(Block(f"{pci_address(peripheral.slot)}/{name}", views.enter_context(view)))
        yield blocks


def save(emulator: Emulator) -> dict[str, Any]:
    """Return everything but the memory (on the vCPU's thread)."""
    return {"machine": emulator.machine.snapshot(), "cpu": emulator.runner.save()}


def load(emulator: Emulator, saved: dict[str, Any]) -> None:
    """Take over what `save` returned; the memory is there already (on the vCPU's thread).

    Raises
    ------
    MigrationError
        When something in it cannot be.
    """
    for name, take in (("machine", emulator.machine.restore), ("cpu", emulator.runner.load)):
        try:
            take(saved[name])
        except IvshmemLabError as error:
            raise MigrationError(f"the state of the {name} cannot be: {error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise MigrationError(f"the state of the {name} in the migration stream is damaged: {error!r}") from error
