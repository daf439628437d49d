"""Domain XML of libvirt, with ``<shmem>``: one ``<domain>``, or several in a ``<domains>``.

Ref: libvirt 9.0, ``schemas/domaincommon.rng`` ("shmem") and its QEMU driver: the size of a server's memory is not said, memory
without a server has 1 MiB or more and lies in ``/dev/shm``, a server's socket is ``/var/lib/libvirt/shmem-NAME-sock`` where none is given.

An XML document type is refused, so that no entity is ever expanded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from ...errors import UsageError
from ...units import MIB, format_size
from ..model import Memory, Server, Topology, Vm
from .argv import read_number
from .commands import PROGRAMS
from .gather import Gather, Raw, device_vectors, socket_path
from .lost import Lost, Parsed, Rendered, difference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..model import Link

_ROLES = {"master": "on", "peer": "off"}
_ACCELERATORS = {"qemu": "tcg", "kvm": "kvm"}
_UNITS = {
    **dict.fromkeys(("b", "byte", "bytes"), 1),
    **{
        f"{unit}{end}": 1 << shift for shift, unit in ((10, "k"), (20, "m"), (30, "g"), (40, "t")) for end in ("", "ib")
    },
    **{f"{unit}b": 1000**power for power, unit in ((1, "k"), (2, "m"), (3, "g"), (4, "t"))},
}
"""Units of libvirt's sizes, in small letters; KB is 1000 bytes."""
_NO_PLACE = "a topology has no place for it"
_LEAST_BYTES = MIB
_REASONS = {
    r"peers\.[^.]*": "a host peer is the lab's own process; start ivshmem-client, or a program with Peer.connect",
    r"servers\.[^.]*": "a server that no machine has joined is in no domain",
    r"servers\.[^.]*\.\w+": "libvirt starts no server and knows only its socket; say it to ivshmem-server",
    r"memories\.[^.]*": "a memory that no machine has is in no domain",
    r"\.guest": "the image of a Linux guest has no name for libvirt; give its kernel and initrd, see ivshmem-lab linux build",
    r"\.memory": "a domain states its memory; this is what a lab would choose",
    r"\.accel": "libvirt has only the types qemu and kvm",
    r"\.master": "libvirt has only the roles master and peer",
    r"devices\[\d+\]\.\w+": "a domain's devices are there at the start, with these values",
    "": "domain XML cannot say it",
}


class _Builder(ET.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise UsageError(
            f"the XML has a document type ({name}), which can make it grow without bound; take <!DOCTYPE …> out"
        )


# -- reading ----------------------------------------------------------------------------------------------


def parse(text: str, guests: Mapping[str, str] | None = None) -> Parsed:
    """Read domains.

    Parameters
    ----------
    text
        A ``<domain>``, or a ``<domains>`` with several.
    guests
        Names of guests and the paths of their files.

    Raises
    ------
    UsageError
        It is no XML, has a document type, or holds no domain, or a device is wrong.
    """
    parser = ET.XMLParser(target=_Builder())
    try:
        parser.feed(text)
        root = parser.close()
    except ET.ParseError as error:
        line, column = error.position
        raise UsageError(f"{line}:{column + 1}: no XML: {error}; give domain XML as virsh dumpxml writes it") from error
    domains = [root] if root.tag == "domain" else list(root) if root.tag == "domains" else []
    if root.tag not in ("domain", "domains") or any(domain.tag != "domain" for domain in domains):
        raise UsageError(f"<{root.tag}> is no domain; give a <domain>, or several in a <domains>")
    gather = Gather()
    for number, domain in enumerate(domains, 1):
        _Domain(domain, gather, guests or {}, f"vm{number}").read()
    return gather.build()


class _Domain:
    def __init__(self, domain: ET.Element, gather: Gather, guests: Mapping[str, str], name: str) -> None:
        self.domain = domain
        self.gather = gather
        self.names = {path: guest for guest, path in guests.items()}
        self.name = domain.findtext("name") or name
        self.path = f"vms.{self.name}"

    def lose(self, what: str, why: str = _NO_PLACE) -> None:
        self.gather.lose(self.path, what, why)

    def read(self) -> None:
        devices: list[Raw] = []
        emulator, machine, guest, args, memory_bytes, cpu, ports = "qemu", "pc", None, None, None, None, 0
        kind = self.domain.get("type", "qemu")
        if kind not in _ACCELERATORS:
            self.lose(f"type={kind!r}", "a lab's machines run by TCG or KVM")
        for part in self.domain:
            match part.tag:
                case "memory":
                    memory_bytes = _size(part, "KiB")
                case "currentMemory" if memory_bytes == _size(part, "KiB"):
                    pass
                case "vcpu":
                    if (part.text or "").strip() != "1":
                        self.lose(f"{part.text} vCPUs", "a lab's machines have one")
                    if (cpus := part.get("cpuset")) is not None:
                        cpu = int(cpus) if cpus.isdecimal() else None
                        if cpu is None:
                            self.lose(f"cpuset={cpus!r}", "a lab pins to one CPU, or to none")
                case "os":
                    machine, guest, args = self.system(part)
                case "devices":
                    for device in part:
                        match device.tag:
                            case "emulator":
                                emulator = self.emulator(device.text or "")
                            case "shmem":
                                devices.append(self.shmem(device))
                            case "controller" if device.get("model") == "pcie-root-port":
                                ports += 1
                            case "controller" if device.get("model") in ("pci-root", "pcie-root"):
                                pass
                            case "memballoon" if device.get("model") == "none":
                                pass
                            case _:
                                self.lose(f"devices: {_tag(device)}")
                case "features" if [feature.tag for feature in part] == ["acpi"]:
                    pass
                case "name":
                    pass
                case _:
                    self.lose(_tag(part))
        vm = Vm(self.name, emulator, guest, args, memory_bytes, machine, cpu, root_ports=ports or None)
        vm = replace(vm, accel=_ACCELERATORS.get(kind, "tcg"))
        self.gather.vm(vm, devices)

    def system(self, part: ET.Element) -> tuple[str, str | None, str | None]:
        machine, guest, args = "pc", None, None
        for each in part:
            text = each.text or ""
            match each.tag:
                case "type":
                    kind = each.get("machine", "pc")
                    machine = "q35" if "q35" in kind else "pc"
                    if kind != machine:
                        self.lose(f"machine={kind!r}", f"a lab has pc and q35 without versions; {machine} instead")
                    if each.get("arch", "x86_64") != "x86_64":
                        self.lose(f"arch={each.get('arch')!r}", "a lab's machines are x86_64")
                case "kernel":
                    guest = self.names.get(text, text)
                case "cmdline":
                    args = text
                case _:
                    self.lose(f"os: {_tag(each)}")
        return machine, guest, args

    def emulator(self, text: str) -> str:
        program = PurePosixPath(text).name
        emulator = "unicorn" if program.startswith("unicorn") else "qemu"
        if program not in (PROGRAMS[emulator], "kvm", "qemu-kvm"):
            self.lose(f"emulator {text}", f"a lab finds its own {emulator}")
        return emulator

    def shmem(self, device: ET.Element) -> Raw:
        name = device.get("name", "")
        model = next((each.get("type", "") for each in device.findall("model")), "ivshmem")
        size = device.find("size")
        size_bytes = None if size is None else _size(size, "bytes")
        role = device.get("role")
        if role not in (None, *_ROLES):
            raise UsageError(f"{self.path}: shmem {name!r} has role={role!r}; there are {' and '.join(_ROLES)}")
        master = _ROLES[role] if role else None
        server, msi = device.find("server"), device.find("msi")
        for each in device:
            if each.tag not in ("model", "size", "server", "msi"):
                self.lose(f"shmem {name}: {_tag(each)}", "the lab gives names and places itself")
        if model == "ivshmem-plain" or (model == "ivshmem" and server is None):
            if msi is not None:
                self.lose(f"shmem {name}: <msi>", "memory without a server has no interrupts")
            return Raw(None, name, 4 * MIB if size_bytes is None else size_bytes, None, master)
        if model not in ("ivshmem", "ivshmem-doorbell") or server is None:
            raise UsageError(f"{self.path}: shmem {name!r} is an {model} without a <server>; give one with a path")
        if model == "ivshmem" and msi is None:
            self.lose(f"shmem {name}: no <msi>", "a lab's devices have MSI-X only")
        path = server.get("path") or f"/var/lib/libvirt/shmem-{name}-sock"
        vectors = 1 if msi is None or msi.get("vectors") is None else read_number(msi.get("vectors", ""), "vectors")
        switch = None if msi is None else msi.get("ioeventfd")
        return Raw(path, None, size_bytes, vectors, master, None if switch is None else switch == "on")


def _size(part: ET.Element, default: str) -> int:
    unit = part.get("unit", default)
    factor = _UNITS.get(unit.lower())
    if factor is None:
        raise UsageError(f"<{part.tag}> has unit={unit!r}; there are b, KB, KiB, MB, MiB and so on up to TiB")
    size_bytes: int = read_number((part.text or "").strip(), f"<{part.tag}>") * factor
    return size_bytes


def _tag(part: ET.Element) -> str:
    said = " ".join(f"{key}={value!r}" for key, value in part.items())
    return f"<{part.tag}{' ' if said else ''}{said}>"


# -- writing ----------------------------------------------------------------------------------------------


def write(topology: Topology, guests: Mapping[str, str] | None = None) -> Rendered:
    """Write domains; `parse` reads them back.

    Parameters
    ----------
    topology
        A valid topology.
    guests
        As for `parse`.
    """
    shared: list[Server | Memory] = [*topology.servers, *topology.memories]
    ends = {end.name: end for end in shared}
    domains = [_domain(vm, ends, guests or {}) for vm in topology.vms]
    root = domains[0] if len(domains) == 1 else ET.Element("domains")
    if len(domains) != 1:
        root.extend(domains)
    ET.indent(root)
    text = ET.tostring(root, encoding="unicode") + "\n"
    lost = difference(topology, parse(text, guests).topology, _REASONS)
    used = {link.target for vm in topology.vms for link in vm.devices}
    lost += [
        Lost(
            f"memories.{memory.name}.size",
            format_size(memory.size_bytes),
            "libvirt refuses less than 1M; make it larger",
        )
        for memory in topology.memories
        if memory.size_bytes < _LEAST_BYTES and memory.name in used
    ]
    return Rendered(text, tuple(lost))


def _domain(vm: Vm, ends: Mapping[str, Server | Memory], guests: Mapping[str, str]) -> ET.Element:
    domain = ET.Element(
        "domain", type=next((kind for kind, accel in _ACCELERATORS.items() if accel == vm.accel), "qemu")
    )
    _add(domain, "name", vm.name)
    linux = vm.guest == "linux"
    memory_bytes = vm.memory_bytes or (128 if linux else 32) * MIB
    _add(domain, "memory", str(memory_bytes // 1024), unit="KiB")
    _add(domain, "vcpu", "1", **({} if vm.cpu is None else {"cpuset": str(vm.cpu)}))
    system = _add(domain, "os")
    _add(system, "type", "hvm", arch="x86_64", machine=vm.machine)
    if vm.guest is not None and not linux:
        _add(system, "kernel", guests.get(vm.guest, vm.guest))
    if vm.args is not None:
        _add(system, "cmdline", vm.args)
    _add(_add(domain, "features"), "acpi")
    devices = _add(domain, "devices")
    _add(devices, "emulator", f"/usr/bin/{PROGRAMS[vm.emulator]}")
    for _ in range(vm.root_ports or 0):
        _add(devices, "controller", type="pci", model="pcie-root-port")
    for link in vm.devices:
        _shmem(devices, link, ends[link.target])
    _add(devices, "memballoon", model="none")
    return domain


def _shmem(devices: ET.Element, link: Link, end: Server | Memory) -> None:
    role = next(({"role": role} for role, master in _ROLES.items() if master == link.master), {})
    shmem = _add(devices, "shmem", name=end.name, **role)
    if isinstance(end, Memory):
        _add(shmem, "model", type="ivshmem-plain")
        _add(shmem, "size", str(end.size_bytes // 1024), unit="KiB")
        return
    _add(shmem, "model", type="ivshmem-doorbell")
    _add(shmem, "server", path=socket_path(end.name))
    switch = {} if link.ioeventfd is None else {"ioeventfd": "on" if link.ioeventfd else "off"}
    _add(shmem, "msi", vectors=str(device_vectors(link, end)), **switch)


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, attributes)
    child.text = None if text is None else "".join(each if _allowed(each) else "\ufffd" for each in text)
    return child


def _allowed(character: str) -> bool:
    """Whether XML 1.0 can have it ("Char")."""
    code = ord(character)
    return code in (9, 10) or 32 <= code <= 0xD7FF or 0xE000 <= code <= 0xFFFD or code >= 0x10000
