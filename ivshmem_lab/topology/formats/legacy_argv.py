"""The device of QEMU up to 3.1: ``-device ivshmem,size=…[,shm=…][,chardev=…][,msi=on][,role=peer|master]…``.

Ref: QEMU 2.9 ``docs/specs/ivshmem-spec.txt`` and the manual of QEMU 2.9, "ivshmem"; refusals have its words. The
device is gone since QEMU 4.0. ``x-memdev`` is of QEMU 2.5 alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UsageError
from ...keyval import join_pairs, parse_switch
from ...units import MIB, format_size, is_power_of_two, parse_size
from ..ivshmem import IvshmemDevice, Master, Note
from .argv import CommandLine, Option, Written, cut, read_number, write_all

if TYPE_CHECKING:
    from collections.abc import Sequence

DRIVER = "ivshmem"
DEFAULT_SIZE_BYTES = 4 * MIB
ROLES = {None: Master.AUTO, "peer": Master.OFF, "master": Master.ON}
"""``role`` to ``master``, as QEMU 2.6 reads it."""
_GLOBAL = f"{DRIVER}."


def parse(argv: Sequence[str]) -> CommandLine:
    """Read a command line; other devices and options pass through.

    Raises
    ------
    UsageError
        When a property of an ivshmem device is wrong.
    """
    options = cut(argv)
    defaults: dict[str, str] = {}
    rest = []
    for option in options:
        if option.name == "global" and option.value.startswith(_GLOBAL):
            key, _, value = option.value.removeprefix(_GLOBAL).partition("=")
            defaults[key] = value
        else:
            rest.append(option)
    return CommandLine(tuple(_item(option, defaults) for option in rest))


def _item(option: Option, defaults: dict[str, str]) -> Option | IvshmemDevice:
    pairs = option.pairs("driver") if option.name == "device" else {}
    if pairs.get("driver") != DRIVER or {"help", "?"} & pairs.keys():
        return option
    try:
        return _device({**defaults, **pairs})
    except UsageError as error:
        raise UsageError(f"-device {option.value}: {error}") from error


def _device(pairs: dict[str, str]) -> IvshmemDevice:
    del pairs["driver"]
    given_size, role = pairs.pop("size", None), pairs.pop("role", None)
    sources = {key: pairs.pop(key) for key in ("shm", "chardev", "x-memdev") if pairs.get(key)}
    if len(sources) != 1:
        raise UsageError("You must specify either 'shm' or 'chardev'")
    if role not in ROLES:
        raise UsageError(f"'role' must be 'peer' or 'master', not {role!r}")
    size_bytes = DEFAULT_SIZE_BYTES if given_size is None else parse_size(given_size, "size", default_suffix="m")
    if not is_power_of_two(size_bytes):
        raise UsageError(f"Invalid size {given_size}: it has to be a power of two; a bare number is MiB")
    msix = parse_switch(pairs.pop("msi", "on"), "msi")
    ioeventfd = parse_switch(pairs.pop("ioeventfd", "off"), "ioeventfd")
    if ioeventfd and not msix:
        raise UsageError("ioeventfd/irqfd requires MSI: take ioeventfd=on or msi=off away")
    vectors = read_number(pairs.pop("vectors", "1"), "vectors")
    shm = sources.get("shm")
    if shm is not None:
        shm = shm.removeprefix("/")
        if not shm or "/" in shm:
            raise UsageError(f"shm={sources['shm']}: the name of a POSIX shared memory object has no slash")
    has_server = "chardev" in sources
    use64 = pairs.pop("use64", "1")
    return IvshmemDevice(
        shm=shm,
        memdev=sources.get("x-memdev"),
        chardev=sources.get("chardev"),
        # With x-memdev the backend has the size.
        size_bytes=None if "x-memdev" in sources else size_bytes,
        # Without a server there are no interrupts, whatever else is said.
        vectors=vectors if has_server else 1,
        msix=msix or not has_server,
        ioeventfd=ioeventfd if has_server else True,
        master=ROLES[role],
        bar_64bit=use64 == "1" or (use64 != "0" and parse_switch(use64, "use64")),
        device_id=pairs.pop("id", None),
        others=tuple(pairs.items()),
    )


def write(line: CommandLine) -> Written:
    """Write a command line for QEMU up to 3.1.

    Returns
    -------
    Written
        With a note for a memory backend: only QEMU 2.5 takes one.
    """
    return write_all(line, _write)


def _write(device: IvshmemDevice, written: Written) -> None:
    pairs = [("driver", DRIVER)]
    if device.device_id is not None:
        pairs.append(("id", device.device_id))
    if device.memdev is not None:
        pairs.append(("x-memdev", device.memdev))
        written.notes.append(
            Note("memdev", device.label, "only QEMU 2.5 takes a memory backend (x-memdev)", "give shm=NAME to others")
        )
    elif device.size_bytes is not None:
        pairs.append(("size", format_size(device.size_bytes) + ("B" if device.size_bytes < 1024 else "")))
    else:
        written.notes.append(
            Note(
                "size",
                device.label,
                f"the size is the server's to know, and the default here is {format_size(DEFAULT_SIZE_BYTES)}",
                "add size=SIZE, at most that of the server's memory",
            )
        )
    if device.shm is not None:
        pairs.append(("shm", device.shm))
    if device.chardev is not None:
        pairs += [("chardev", device.chardev), ("vectors", str(device.vectors))]
        pairs += [("msi", "on" if device.msix else "off"), ("ioeventfd", "on" if device.ioeventfd else "off")]
    role = next(role for role, master in ROLES.items() if master is device.master)
    if role is not None:
        pairs.append(("role", role))
    if not device.bar_64bit:
        pairs.append(("use64", "0"))
    written.argv += ["-device", join_pairs([*pairs, *device.others], "driver")]
