"""Today's devices: ``-device ivshmem-plain,memdev=…`` with its ``-object``, ``-device ivshmem-doorbell,chardev=…``.

Ref: QEMU 7.2, ``docs/specs/ivshmem-spec.txt`` and ``-device ivshmem-plain,help``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...keyval import join_pairs, parse_switch
from ...units import format_size, parse_size
from ..ivshmem import IvshmemDevice, Master, Note
from .argv import CommandLine, Option, Written, cut, ids, read_number, write_all

if TYPE_CHECKING:
    from collections.abc import Sequence

PLAIN, DOORBELL = "ivshmem-plain", "ivshmem-doorbell"
SHM_FOLDER = "/dev/shm/"
_BACKEND_KEYS = {"qom-type", "id", "mem-path", "size", "share"}


def parse(argv: Sequence[str]) -> CommandLine:
    """Read a command line; other devices and options pass through.

    A memory backend that is nothing but a shared memory object, and belongs to one device, becomes part of it.

    Raises
    ------
    UsageError
        When a property of an ivshmem device is wrong.
    """
    options = cut(argv)
    wanted = Counter(_device_pairs(option).get("memdev", "") for option in options)
    shared: dict[str, tuple[str, int]] = {}
    rest = []
    for option in options:
        pairs = option.pairs("qom-type") if option.name == "object" else {}
        if wanted[pairs.get("id", "")] == 1 and _is_shared_memory(pairs):
            shared[pairs["id"]] = (pairs["mem-path"].removeprefix(SHM_FOLDER), parse_size(pairs["size"], "size"))
        else:
            rest.append(option)
    return CommandLine(tuple(_item(option, shared) for option in rest))


def _device_pairs(option: Option) -> dict[str, str]:
    pairs = option.pairs("driver") if option.name == "device" else {}
    return pairs if pairs.get("driver") in (PLAIN, DOORBELL) and not {"help", "?"} & pairs.keys() else {}


def _is_shared_memory(pairs: dict[str, str]) -> bool:
    name = pairs.get("mem-path", "").removeprefix(SHM_FOLDER)
    return (
        pairs.keys() == _BACKEND_KEYS
        and pairs["qom-type"] == "memory-backend-file"
        and pairs["mem-path"] == SHM_FOLDER + name
        and bool(name)
        and "/" not in name
        and parse_switch(pairs["share"], "share")
    )


def _item(option: Option, shared: dict[str, tuple[str, int]]) -> Option | IvshmemDevice:
    pairs = _device_pairs(option)
    if not pairs:
        return option
    try:
        return _device(pairs, shared)
    except UsageError as error:
        raise UsageError(f"-device {option.value}: {error}") from error


def _device(pairs: dict[str, str], shared: dict[str, tuple[str, int]]) -> IvshmemDevice:
    driver = pairs.pop("driver")
    source = "memdev" if driver == PLAIN else "chardev"
    name = pairs.pop(source, "")
    if not name:
        raise UsageError(f"You must specify a '{source}'")
    master = pairs.pop("master", "off")
    if master not in [known.value for known in Master]:
        raise UsageError(f"Parameter 'master' does not accept value '{master}'; there are on, off and auto")
    has_server = driver == DOORBELL
    for key in ("vectors", "ioeventfd") if not has_server else ():
        if key in pairs:
            raise UsageError(f"Property '{driver}.{key}' not found")
    shm, size_bytes = shared.get(name, (None, None)) if not has_server else (None, None)
    return IvshmemDevice(
        shm=shm,
        memdev=name if not has_server and shm is None else None,
        chardev=name if has_server else None,
        size_bytes=size_bytes,
        vectors=read_number(pairs.pop("vectors", "1"), "vectors"),
        ioeventfd=parse_switch(pairs.pop("ioeventfd", "on"), "ioeventfd"),
        master=Master(master),
        device_id=pairs.pop("id", None),
        others=tuple(pairs.items()),
    )


def write(line: CommandLine) -> Written:
    """Write a command line for today's QEMU.

    Returns
    -------
    Written
        With a note for each thing that has no modern form.
    """
    used = ids(line.items)
    return write_all(line, lambda device, written: _write(device, used, written))


def _write(device: IvshmemDevice, used: set[str], written: Written) -> None:
    written.notes += _notes(device)
    pairs = [("driver", PLAIN if device.chardev is None else DOORBELL)]
    if device.device_id is not None:
        pairs.append(("id", device.device_id))
    if device.chardev is not None:
        pairs += [("chardev", device.chardev), ("vectors", str(device.vectors))]
        pairs.append(("ioeventfd", "on" if device.ioeventfd else "off"))
    elif device.memdev is not None:
        pairs.append(("memdev", device.memdev))
    else:
        assert device.shm is not None
        assert device.size_bytes is not None
        memdev = _new_id(f"{device.device_id or 'ivshmem'}-mem", used)
        backend = [("qom-type", "memory-backend-file"), ("id", memdev), ("mem-path", SHM_FOLDER + device.shm)]
        # A bare number is bytes here, and MiB to the legacy device.
        backend += [("size", format_size(device.size_bytes)), ("share", "on")]
        written.argv += ["-object", join_pairs(backend, "qom-type")]
        pairs.append(("memdev", memdev))
    # The default is off here, and auto to the legacy device.
    pairs.append(("master", device.master.value))
    written.argv += ["-device", join_pairs([*pairs, *device.others], "driver")]


def _notes(device: IvshmemDevice) -> list[Note]:
    notes = []
    if not device.msix:
        notes.append(
            Note(
                "intx",
                device.label,
                f"msi=off has no modern form: INTx is gone, and {DOORBELL} has MSI-X only (and revision 1)",
                "the guest's driver has to take MSI-X vectors and leave IntrMask and IntrStatus alone",
            )
        )
    if not device.bar_64bit:
        notes.append(
            Note(
                "use64",
                device.label,
                "use64=0 has no modern form: BAR 2 always has 64 bits",
                "the guest's firmware and driver have to take a 64-bit BAR",
            )
        )
    if device.chardev is not None and device.size_bytes is not None:
        size = format_size(device.size_bytes)
        notes.append(
            Note(
                "size",
                device.label,
                f"size={size} has no modern form: the guest sees all of the server's memory, not its first {size}",
                f"start the server with -l {size}",
            )
        )
    if device.memdev is not None:
        notes.append(
            Note(
                "memdev",
                device.label,
                f"the size is that of the memory backend {device.memdev!r}",
                "it needs share=on for others to see what the guest writes",
                lost=False,
            )
        )
    return notes


def _new_id(wanted: str, used: set[str]) -> str:
    name, number = wanted, 1
    while name in used:
        number += 1
        name = f"{wanted}{number}"
    used.add(name)
    return name
