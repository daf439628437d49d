"""Whole topologies as command lines: ``ivshmem-server`` for each server, an emulator for each machine.

Either dialect of QEMU's ivshmem devices; what the text says besides is passed over with a word about it. Ref: QEMU 7.2
manual, "Invocation", and what `qemu_argv` and `legacy_argv` name.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NoReturn

from ...errors import UsageError
from ...keyval import join_pairs
from ...units import MIB, format_size, parse_size
from ..ivshmem import IvshmemDevice
from ..model import Link, Memory, Server, Topology, Vm
from . import legacy_argv, qemu_argv
from .argv import Option, cut, read_number, split_commands
from .gather import DEFAULT_SIZE_BYTES, Gather, Raw, device_vectors, socket_path
from .lost import Parsed, Rendered, difference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .argv import CommandLine

PROGRAMS = {"qemu": "qemu-system-x86_64", "unicorn": "unicorn-system-x86_64"}
_SERVER = "ivshmem-server"
_QUIET = {
    ("-nodefaults",),
    ("-no-user-config",),
    ("-display", "none"),
    ("-nographic",),
    ("-S",),
    ("-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"),
}
"""Options that say what a lab does anyway."""
_ROOT_PORT = "pcie-root-port"
_ACCELERATORS = {"tcg": (), "kvm": ("kvm",), "auto": ("kvm", "tcg")}
"""QEMU tries several in their order."""
_STARTERS = frozenset({"exec", "sudo", "nohup", "command"})
_WAITING = (["wait"], ["do", "sleep", "0.1"], ["done"])
_LISTENS = "00010000"
_NO_PLACE = "a topology has no place for it"
_REASONS = {
    r"peers\.[^.]*": "a host peer is the lab's own process; start ivshmem-client, or a program with Peer.connect",
    r"memories\.[^.]*": "a memory that no machine has is nowhere on a command line",
    r"\.guest": "the image of a Linux guest has no name for QEMU; give -kernel and -initrd, see ivshmem-lab linux build",
    r"devices\[\d+\]\.\w+": "on a command line every device is there at the start, with these values",
    "": "a command line cannot say it",
}


@dataclass(frozen=True, slots=True)
class Dialect:
    """What one QEMU calls an ivshmem device."""

    drivers: tuple[str, ...]
    parse: Callable[[Sequence[str]], CommandLine]
    master: Mapping[str, str]
    device: Callable[[Link, Server | Memory, str], list[tuple[str, str]]]


def _modern(link: Link, end: Server | Memory, number: str) -> list[tuple[str, str]]:
    if isinstance(end, Memory):
        return [("driver", qemu_argv.PLAIN), ("memdev", f"mem{number}"), *_stated(link, "master", {})]
    pairs = [("driver", qemu_argv.DOORBELL), ("chardev", f"ivs{number}")]
    return [*pairs, ("vectors", str(device_vectors(link, end))), *_stated(link, "master", {})]


def _legacy(link: Link, end: Server | Memory, number: str) -> list[tuple[str, str]]:
    pairs = [("driver", legacy_argv.DRIVER), ("size", format_size(end.size_bytes))]
    role = _stated(link, "role", {"on": "master", "off": "peer"})
    if isinstance(end, Memory):
        return [*pairs, ("shm", end.name), *role]
    return [*pairs, ("chardev", f"ivs{number}"), ("vectors", str(device_vectors(link, end))), *role]


def _stated(link: Link, key: str, words: Mapping[str, str]) -> list[tuple[str, str]]:
    pairs = []
    if link.ioeventfd is not None and link.server:
        pairs.append(("ioeventfd", "on" if link.ioeventfd else "off"))
    if link.master is not None and (not words or link.master in words):
        pairs.append((key, words.get(link.master, link.master)))
    return pairs


DIALECTS = {
    "qemu": Dialect((qemu_argv.PLAIN, qemu_argv.DOORBELL), qemu_argv.parse, {}, _modern),
    "legacy": Dialect((legacy_argv.DRIVER,), legacy_argv.parse, {"master": "on", "peer": "off"}, _legacy),
}


# -- reading ----------------------------------------------------------------------------------------------


def parse(text: str, dialect: str = "qemu", guests: Mapping[str, str] | None = None) -> Parsed:
    """Read the command lines of a script, or of a paste.

    Parameters
    ----------
    text
        As a shell reads it.
    dialect
        ``"qemu"`` for today's devices, ``"legacy"`` for those of QEMU up to 3.1.
    guests
        Names of guests and the paths of their files.

    Raises
    ------
    UsageError
        A command line or a device in it is wrong, or there is none.
    """
    gather = Gather()
    machines = 0
    found = split_commands(text)
    for words in found:
        cpu, command = _program(words)
        name = PurePosixPath(command[0]).name if command else ""
        if name.endswith(_SERVER):
            _read_server(command[1:], gather)
        elif name.startswith("qemu") or "-system-" in name or name == "kvm" or "-device" in command:
            machines += 1
            _Machine(command, DIALECTS[dialect], gather, guests or {}).read(f"vm{machines}", cpu)
        elif command and words not in _WAITING and words[:1] != ["until"]:
            gather.lose("file", shlex.join(words), "it starts no QEMU and no ivshmem-server")
    if gather.empty and (gather.lost or not found):
        raise UsageError("there is no QEMU command line; give one as a shell reads it: qemu-system-x86_64 -device …")
    return gather.build()


def _program(words: list[str]) -> tuple[int | None, list[str]]:
    """Return the CPU and what is left, without the words that start another program."""
    cpu = None
    while words and (words[0] in _STARTERS or words[0] == "taskset"):
        if words[:2] == ["taskset", "-c"] and len(words) > 2:
            cpu, words = read_number(words[2], "taskset -c"), words[3:]
        else:
            words = words[1:]
    return cpu, words


class _ServerOptions(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{_SERVER}: {message}")


def _read_server(words: list[str], gather: Gather) -> None:
    options = _ServerOptions(add_help=False, allow_abbrev=False)
    for switch in ("-F", "-v", "--memfd"):
        options.add_argument(switch, action="store_true")
    options.add_argument("-S", "--socket", default=socket_path("ivshmem_socket").removesuffix(".sock"))
    options.add_argument("-M", "--shm-name")
    options.add_argument("-l", "--size", default=format_size(DEFAULT_SIZE_BYTES))
    options.add_argument("-n", "--vectors", default="1")
    options.add_argument("--max-peers-per-uid")
    options.add_argument("--observer-uid")
    known, rest = options.parse_known_args(words)
    policy = {"peers_per_uid": known.max_peers_per_uid, "observer_uid": known.observer_uid}
    numbers = {key: None if text is None else read_number(text, key) for key, text in policy.items()}
    gather.server(known.socket, parse_size(known.size), read_number(known.vectors, "-n"), **numbers)
    if rest:
        gather.lose(f"servers.{PurePosixPath(known.socket).stem}", shlex.join(rest), _NO_PLACE)


class _Machine:
    """Reads one command line of an emulator."""

    def __init__(self, words: list[str], dialect: Dialect, gather: Gather, guests: Mapping[str, str]) -> None:
        self.dialect = dialect
        self.gather = gather
        self.guests = guests
        has_program = not words[0].startswith("-")
        self.program = PurePosixPath(words[0]).name if has_program else PROGRAMS["qemu"]
        self.words = words[1:] if has_program else words
        self.path = ""
        # Distributions' programs of these names are QEMU with -enable-kvm.
        self.accelerators = ["kvm"] if self.program in ("kvm", "qemu-kvm") else []

    def read(self, name: str, cpu: int | None) -> None:
        items = self.dialect.parse(self.words).items
        options = [item for item in items if isinstance(item, Option)]
        named = next((option for option in options if option.name == "name"), None)
        if named is not None:
            pairs = named.pairs("guest")
            name = pairs.pop("guest", name)
            self.path = f"vms.{name}"
            self._rest(pairs, "-name")
        self.path = f"vms.{name}"
        emulator = "unicorn" if self.program.startswith("unicorn") else "qemu"
        if not self.program.endswith("x86_64") and self.program not in ("kvm", "qemu-kvm", "qemu"):
            self.lose(self.program, "a lab's machines are x86_64")
        chardevs = {o.pairs("backend").get("id", ""): o for o in options if o.name == "chardev"}
        backends = {o.pairs("qom-type").get("id", ""): o for o in options if o.name == "object"}
        used: set[int] = {id(named)}
        devices = []
        given = [pairs for option in cut(self.words) if (pairs := self._stated(option))]
        for device, stated in zip((x for x in items if isinstance(x, IvshmemDevice)), given, strict=True):
            devices.append(self._device(device, stated, chardevs, backends, used))
        machine, memory_bytes, guest, args, ports = "pc", None, None, None, 0
        for option in options:
            if id(option) in used or option.words in _QUIET or _log(option):
                continue
            if option.name in ("machine", "M"):
                machine = self._machine(option)
            elif option.name == "accel":
                pairs = option.pairs("accel")
                self.accelerators.append(pairs.pop("accel", ""))
                self._rest(pairs, "-accel")
            elif option.name == "enable-kvm":
                self.accelerators.append("kvm")
            elif option.name == "m":
                pairs = option.pairs("size")
                memory_bytes = parse_size(pairs.pop("size", "128"), "-m", default_suffix="m")
                self._rest(pairs, "-m")
            elif option.name == "kernel":
                guest = self._guest(option.value)
            elif option.name == "append":
                args = option.value
            elif option.name == "device" and option.pairs("driver").get("driver") == _ROOT_PORT:
                ports += 1
            else:
                self.lose(shlex.join(option.words), _NO_PLACE)
        vm = Vm(name, emulator, guest, args, memory_bytes, machine, cpu, root_ports=ports or None)
        self.gather.vm(replace(vm, accel=self._accelerator()), devices)

    def _accelerator(self) -> str:
        """Read what QEMU tries in this order; it takes TCG where nothing is said."""
        known = [name for name in self.accelerators if name in ("tcg", "kvm")]
        for name in self.accelerators:
            if name not in known:
                self.lose(f"-accel {name}", "a lab's machines run by TCG or KVM")
        return "tcg" if not known or known[0] == "tcg" else "auto" if "tcg" in known else "kvm"

    def lose(self, what: str, why: str) -> None:
        self.gather.lose(self.path, what, why)

    def _rest(self, pairs: Mapping[str, str], option: str) -> None:
        for key, value in pairs.items():
            self.lose(f"{option} {key}={value}", _NO_PLACE)

    def _stated(self, option: Option) -> dict[str, str]:
        pairs = option.pairs("driver") if option.name == "device" else {}
        return pairs if pairs.get("driver") in self.dialect.drivers and not {"help", "?"} & pairs.keys() else {}

    def _device(
        self,
        device: IvshmemDevice,
        stated: Mapping[str, str],
        chardevs: Mapping[str, Option],
        backends: Mapping[str, Option],
        used: set[int],
    ) -> Raw:
        for key, value in (("id", device.device_id), *device.others):
            if value is not None:
                self.lose(f"{device.label}: {key}={value}", "the lab gives names and places itself")
        if not device.msix:
            self.lose(f"{device.label}: msi=off", "a lab's devices have MSI-X only")
        if not device.bar_64bit:
            self.lose(f"{device.label}: use64=0", "the memory's BAR always has 64 bits")
        master = stated.get("master") or self.dialect.master.get(stated.get("role", ""))
        ioeventfd = device.ioeventfd if "ioeventfd" in stated else None
        if device.chardev is not None:
            option = chardevs.get(device.chardev)
            pairs = option.pairs("backend") if option else {}
            if option is None or pairs.get("backend") != "socket" or "path" not in pairs:
                raise UsageError(
                    f"{device.label}: there is no -chardev socket,id={device.chardev},path=… that leads to a server"
                )
            used.add(id(option))
            self._rest({k: v for k, v in pairs.items() if k not in ("backend", "id", "path")}, "-chardev")
            return Raw(pairs["path"], None, device.size_bytes, device.vectors, master, ioeventfd)
        if device.shm is not None:
            return Raw(None, device.shm, device.size_bytes, None, master)
        option = backends.get(device.memdev or "")
        if option is None:
            raise UsageError(f"{device.label}: there is no -object with id={device.memdev}")
        used.add(id(option))
        pairs = option.pairs("qom-type")
        name = PurePosixPath(pairs.get("mem-path", device.memdev or "")).name
        self.lose(f"{device.label}: -object {option.value}", f"memory of the lab's own instead, named {name}")
        size = pairs.get("size")
        return Raw(None, name, None if size is None else parse_size(size), None, master)

    def _machine(self, option: Option) -> str:
        pairs = option.pairs("type")
        kind = pairs.pop("type", "pc")
        # Colons stand between what is tried (QEMU manual, "-machine").
        self.accelerators += [name for name in pairs.pop("accel", "").split(":") if name]
        self._rest(pairs, "-machine")
        machine = "q35" if "q35" in kind else "pc"
        if kind != machine:
            self.lose(f"-machine {kind}", f"a lab has pc and q35 without versions; {machine} instead")
        return machine

    def _guest(self, kernel: str) -> str:
        for name, path in self.guests.items():
            if kernel == path:
                return name
        return f"./{kernel}" if self.guests and "/" not in kernel else kernel


def _log(option: Option) -> bool:
    """Whether an option only says where the guest's console goes."""
    return option.name == "serial" and option.value.partition(":")[0] in ("stdio", "file", "mon")


# -- writing ----------------------------------------------------------------------------------------------


def write(topology: Topology, dialect: str = "qemu", guests: Mapping[str, str] | None = None) -> Rendered:
    """Write a script that starts servers and machines; `parse` reads it back.

    Parameters
    ----------
    topology
        A valid topology.
    dialect, guests
        As for `parse`.
    """
    lines = ["#!/bin/sh", "# A topology of ivshmem_lab: its servers, then its machines."]
    for server in topology.servers:
        words = [_SERVER, "-F", "-S", socket_path(server.name), "-M", server.name, "-l", format_size(server.size_bytes)]
        words += ["-n", str(server.vectors)]
        if server.peers_per_uid is not None:
            words += ["--max-peers-per-uid", str(server.peers_per_uid)]
        if server.observer_uid is not None:
            words += ["--observer-uid", str(server.observer_uid)]
        lines.append(shlex.join(words) + " &")
    shared: list[Server | Memory] = [*topology.servers, *topology.memories]
    ends = {end.name: end for end in shared}
    for server in topology.servers:
        # A socket is there a moment before anybody listens on it; the flag says that somebody does (proc(5), net/unix).
        listens = shlex.quote(f" {_LISTENS} .* {socket_path(server.name)}$")
        lines.append(f"until grep -qs {listens} /proc/net/unix; do sleep 0.1; done")
    lines += [_vm_line(vm, ends, DIALECTS[dialect], guests or {}) + " &" for vm in topology.vms]
    text = "\n".join([*lines, "wait", ""])
    read = parse(text, dialect, guests).topology if topology.vms or topology.servers else Topology()
    return Rendered(text, tuple(difference(topology, read, _REASONS)))


def _vm_line(vm: Vm, ends: Mapping[str, Server | Memory], dialect: Dialect, guests: Mapping[str, str]) -> str:
    groups = [["taskset", "-c", str(vm.cpu)] if vm.cpu is not None else []]
    groups[0] += [PROGRAMS[vm.emulator], "-name", join_pairs([("guest", vm.name)], "guest")]
    groups[0] += ["-nodefaults", "-display", "none", "-serial", f"file:{vm.name}.log", "-machine", vm.machine]
    for accelerator in _ACCELERATORS[vm.accel]:
        groups[0] += ["-accel", accelerator]
    if vm.memory_bytes is not None:
        groups[0] += ["-m", f"{vm.memory_bytes // MIB}M"]
    if vm.guest is not None and vm.guest != "linux":
        groups.append(["-kernel", guests.get(vm.guest, vm.guest)])
    if vm.args is not None:
        groups[-1] += ["-append", vm.args]
    groups.append(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
    groups += [
        ["-device", f"{_ROOT_PORT},id=rp{number - 1},bus=pcie.0,chassis={number},slot={number}"]
        for number in range(1, (vm.root_ports or 0) + 1)
    ]
    for number, link in enumerate(vm.devices):
        end = ends[link.target]
        if isinstance(end, Server):
            path = join_pairs(
                [("backend", "socket"), ("id", f"ivs{number}"), ("path", socket_path(end.name))], "backend"
            )
            groups.append(["-chardev", path])
        elif dialect is DIALECTS["qemu"]:
            memory = [("qom-type", "memory-backend-file"), ("id", f"mem{number}")]
            memory += [("mem-path", qemu_argv.SHM_FOLDER + end.name), ("size", format_size(end.size_bytes))]
            groups.append(["-object", join_pairs([*memory, ("share", "on")], "qom-type")])
        groups.append(["-device", join_pairs(dialect.device(link, end, str(number)), "driver")])
    return " \\\n    ".join(shlex.join(group) for group in groups)
