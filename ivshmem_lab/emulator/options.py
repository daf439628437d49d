"""QEMU's command line, as far as this machine has it; everything else is refused by name.

Ref: QEMU 7.2 manual, "Invocation" (options), and the syntax ``key=value,key=value`` with ``,,`` for a comma.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..keyval import split_pairs
from ..units import GIB, MIB, format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_MEMORY_BYTES = 128 * MIB
MAX_MEMORY_BYTES = 3 * GIB
"""Below the window in which PCI memory lies on this machine."""

MACHINES = {"pc": "pc-i440fx-7.2", "q35": "pc-q35-7.2", "none": "none"}
"""The machines' short names (``alias`` in ``query-machines``) and their full ones."""
ACCELERATORS = ("tcg", "unicorn", "qtest")
SERIAL_KINDS = "chardev:ID, stdio, file:PATH, unix:PATH[,server=on,wait=off], null, none"


@dataclass(slots=True)
class Options:
    """What the command line asks for."""

    memory_bytes: int = DEFAULT_MEMORY_BYTES
    kernel: str | None = None
    append: str = ""
    name: str = ""
    machine: str = "pc"
    """One of the short names of `MACHINES`."""
    driven: bool = False
    """``-accel qtest``: no guest runs, and no firmware; a qtest client does all accesses."""
    qtest: str | None = None
    """Id of the character device that speaks qtest."""
    qtest_log: str | None = None
    paused: bool = False
    reboot: bool = True
    native_hook: bool | None = None
    objects: list[dict[str, str]] = field(default_factory=list)
    chardevs: list[dict[str, str]] = field(default_factory=list)
    devices: list[dict[str, str]] = field(default_factory=list)
    serial: str | None = None
    monitors: list[str] = field(default_factory=list)
    """Ids of the character devices that speak QMP."""
    incoming: str | None = None
    """Where another process's machine comes from: an address, or ``defer``."""
    only_migratable: bool = False
    help: bool = False
    version: bool = False


class _Parser:
    """Walks over the arguments; one method for each option that takes a value."""

    def __init__(self) -> None:
        self.options = Options()
        self._anonymous = 0
        self.with_value: dict[str, Callable[[str], None]] = {
            "m": self._memory,
            "kernel": self._kernel,
            "append": lambda text: setattr(self.options, "append", text),
            "name": lambda text: setattr(self.options, "name", _only("-name", text, "guest")),
            "object": lambda text: self.options.objects.append(split_pairs(text, "qom-type", "-object")),
            "device": lambda text: self.options.devices.append(split_pairs(text, "driver", "-device")),
            "chardev": lambda text: self.options.chardevs.append(split_pairs(text, "backend", "-chardev")),
            "serial": self._serial,
            "qtest": self._qtest,
            "qtest-log": lambda text: setattr(self.options, "qtest_log", text),
            "trace": lambda text: None,  # libqtest passes it on; there are no trace points
            "qmp": self._qmp,
            "mon": self._mon,
            "display": lambda text: _one_of("-display", text, ("none",)),
            "machine": self._machine,
            "M": self._machine,
            "accel": self._accel,
            "cpu": lambda text: _one_of("-cpu", text, ("qemu64", "max")),
            "smp": lambda text: _one_of("-smp", text, ("1", "cpus=1")),
            "monitor": lambda text: _one_of("-monitor", text, ("none",)),
            "vga": lambda text: _one_of("-vga", text, ("none",)),
            "net": lambda text: _one_of("-net", text, ("none",)),
            "nic": lambda text: _one_of("-nic", text, ("none",)),
            "parallel": lambda text: _one_of("-parallel", text, ("none",)),
            "block-hook": self._block_hook,
            "incoming": lambda text: setattr(self.options, "incoming", text),
        }
        self.switches: dict[str, Callable[[], None]] = {
            "S": lambda: setattr(self.options, "paused", True),
            "only-migratable": lambda: setattr(self.options, "only_migratable", True),
            "no-reboot": lambda: setattr(self.options, "reboot", False),
            "nodefaults": lambda: None,
            "no-user-config": lambda: None,
            "nographic": lambda: self._serial("stdio"),
            "h": lambda: setattr(self.options, "help", True),
            "help": lambda: setattr(self.options, "help", True),
            "version": lambda: setattr(self.options, "version", True),
        }

    def parse(self, argv: list[str]) -> Options:
        arguments = iter(argv)
        for word in arguments:
            name = word[2:] if word.startswith("--") else word[1:]
            if not word.startswith("-") or not name:
                raise UsageError(f"{word!r}: this machine has no disks; start a kernel with -kernel FILE")
            if name in self.switches:
                self.switches[name]()
            elif name in self.with_value:
                value = next(arguments, None)
                if value is None:
                    raise UsageError(f"{word}: requires an argument")
                self.with_value[name](value)
            else:
                known = " ".join(f"-{option}" for option in sorted({*self.with_value, *self.switches}))
                raise UsageError(f"{word}: not an option of this machine; it has {known}")
        if self.options.append and self.options.kernel is None:
            raise UsageError("-append only allowed with -kernel option")
        if self.options.machine == "none" and self.options.kernel is not None:
            raise UsageError("-kernel: the machine none has no memory to load it into; use -machine pc")
        if self.options.driven and self.options.qtest is None:
            raise UsageError(
                "-accel qtest runs no guest and needs somebody who drives the machine: add -qtest unix:PATH"
            )
        return self.options

    def _memory(self, text: str) -> None:
        size = _only("-m", text, "size")
        size_bytes = parse_size(size, "-m", default_suffix="m")
        if not 2 * MIB <= size_bytes <= MAX_MEMORY_BYTES or size_bytes % MIB:
            raise UsageError(f"-m {text}: this machine has whole megabytes from 2M to {format_size(MAX_MEMORY_BYTES)}")
        self.options.memory_bytes = size_bytes

    def _kernel(self, text: str) -> None:
        if not Path(text).is_file():
            raise UsageError(f"-kernel {text}: no such file; give a multiboot ELF")
        self.options.kernel = text

    def _machine(self, text: str) -> None:
        pairs = split_pairs(text, "type", "-machine")
        kind = pairs.pop("type", "pc")
        _one_of("-machine", kind, (*MACHINES, *(name for name in MACHINES.values() if name not in MACHINES)))
        self.options.machine = next(alias for alias, name in MACHINES.items() if kind in (alias, name))
        if "accel" in pairs:
            self._set_accelerator("-machine accel", pairs.pop("accel"))
        for key in pairs:
            raise UsageError(f"-machine {text}: no property {key!r}; this machine has type and accel")

    def _accel(self, text: str) -> None:
        pairs = split_pairs(text, "accel", "-accel")
        self._set_accelerator("-accel", pairs.pop("accel", ""))
        _one_of("-accel thread", pairs.pop("thread", "single"), ("single", "multi"))  # one vCPU: the same
        for key in pairs:
            raise UsageError(f"-accel {text}: no property {key!r}; this machine has thread")

    def _set_accelerator(self, option: str, text: str) -> None:
        _one_of(option, text, ACCELERATORS)
        self.options.driven = text == "qtest"

    def _qtest(self, text: str) -> None:
        if self.options.qtest is not None:
            raise UsageError(f"-qtest {text}: there is one qtest connection, and it is {self.options.qtest}")
        self.options.qtest = self._endpoint("-qtest", text, "unix:PATH[,server=on,wait=off], chardev:ID")

    def _block_hook(self, text: str) -> None:
        _one_of("-block-hook", text, ("auto", "native", "python"))
        self.options.native_hook = {"auto": None, "native": True, "python": False}[text]

    def _serial(self, text: str) -> None:
        if self.options.serial is not None:
            raise UsageError(f"-serial {text}: this machine has one serial port, and it is {self.options.serial}")
        self.options.serial = self._endpoint("-serial", text, SERIAL_KINDS)

    def _qmp(self, text: str) -> None:
        endpoint = self._endpoint("-qmp", text, "unix:PATH,server=on,wait=off, stdio, chardev:ID")
        if endpoint != "none":
            self.options.monitors.append(endpoint)

    def _mon(self, text: str) -> None:
        pairs = split_pairs(text, "chardev", "-mon")
        if pairs.pop("mode", "readline") != "control":
            raise UsageError(f"-mon {text}: this machine speaks QMP only; add mode=control")
        if "chardev" not in pairs:
            raise UsageError(f"-mon {text}: chardev=ID is missing")
        self.options.monitors.append(pairs.pop("chardev"))
        for key in pairs:
            raise UsageError(f"-mon {text}: no property {key!r}; there are chardev and mode")

    def _endpoint(self, option: str, text: str, kinds: str) -> str:
        """Turn QEMU's short forms (``unix:PATH,…``) into a character device; returns its id."""
        if text in ("none", "null"):
            return "none"
        kind, _, rest = text.partition(":")
        if kind == "chardev" and rest:
            return rest
        device_id = f"compat-{option[1:]}{self._anonymous}"
        self._anonymous += 1
        if text == "stdio":
            pairs = {"backend": "stdio"}
        elif kind == "file" and rest:
            pairs = {"backend": "file", "path": rest}
        elif kind == "unix" and rest:
            pairs = {"backend": "socket", **split_pairs(rest, "path", option)}
        else:
            raise UsageError(f"{option} {text}: not one of {kinds}")
        self.options.chardevs.append({**pairs, "id": device_id})
        return device_id


def _only(option: str, text: str, key: str) -> str:
    """Return the value of the one property that an option has."""
    pairs = split_pairs(text, key, option)
    value = pairs.pop(key, "")
    for other in pairs:
        raise UsageError(f"{option} {text}: no property {other!r}; this machine has {key}")
    return value


def _one_of(option: str, text: str, allowed: tuple[str, ...]) -> None:
    if text not in allowed:
        raise UsageError(f"{option} {text}: this machine has {', '.join(allowed)}")


def parse_arguments(argv: list[str]) -> Options:
    """Read a command line (without the program's name).

    Raises
    ------
    UsageError
        Names the option and what is allowed.
    """
    return _Parser().parse(argv)
