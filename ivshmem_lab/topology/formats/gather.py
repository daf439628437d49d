"""From machines that name sockets and shared memory objects to a topology that has servers and memories."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from ...units import MIB, format_size
from ..model import Link, Memory, Server, Topology, Vm
from ..plan import is_plugged
from .lost import Lost, Parsed

DEFAULT_SIZE_BYTES = 4 * MIB
SOCKET_FOLDER = "/tmp"
_SUFFIX = ".sock"


@dataclass(frozen=True, slots=True)
class Raw:
    """A device as another program has it; None for what was not said.

    Attributes
    ----------
    socket, shm
        Path of its server's socket, or name of its shared memory: one of the two.
    size_bytes, vectors, master, ioeventfd
        As in `Link`; the size is that of the memory.
    """

    socket: str | None = None
    shm: str | None = None
    size_bytes: int | None = None
    vectors: int | None = None
    master: str | None = None
    ioeventfd: bool | None = None


def socket_path(name: str) -> str:
    """Return the socket of a server that has only a name; `Gather` reads the name back."""
    return f"{SOCKET_FOLDER}/{name}{_SUFFIX}"


def device_vectors(link: Link, server: Server) -> int:
    """Return the vectors of a doorbell device."""
    return max(1, server.vectors) if link.vectors is None else link.vectors


class Gather:
    """Collects what was read; `build` makes a topology of it."""

    def __init__(self) -> None:
        self.lost: list[Lost] = []
        self._servers: dict[str, tuple[int | None, int | None]] = {}
        self._policies: dict[str, dict[str, int | None]] = {}
        self._sizes: dict[str, int | None] = {}
        self._vms: list[tuple[Vm, list[Raw]]] = []
        self._names: set[str] = set()

    @property
    def empty(self) -> bool:
        """Whether nothing was read."""
        return not self._servers and not self._vms

    def lose(self, path: str, what: str, why: str) -> None:
        """Note what has no place."""
        self.lost.append(Lost(path, what, why))

    def server(self, path: str, size_bytes: int, vectors: int, **policy: int | None) -> None:
        """Add a server of which all is known."""
        self._servers[path] = size_bytes, vectors
        self._policies[path] = policy

    def vm(self, vm: Vm, devices: list[Raw]) -> None:
        """Add a machine; its name need not be one, and its devices are those given."""
        self._vms.append((vm, devices))
        for raw in devices:
            if raw.socket is not None:
                self._servers.setdefault(raw.socket, (None, None))
            elif raw.shm is not None:
                before = self._sizes.get(raw.shm)
                self._sizes[raw.shm] = max(before or 0, raw.size_bytes or 0) or None

    def build(self) -> Parsed:
        """Return the topology."""
        names = {path: self._name(PurePosixPath(path).name.removesuffix(_SUFFIX), path) for path in self._servers}
        servers = {path: self._server(path, names[path]) for path in self._servers}
        memories = {shm: self._memory(shm, size) for shm, size in self._sizes.items()}
        vms = [self._vm(vm, raws, servers, memories) for vm, raws in self._vms]
        topology = Topology(tuple(servers.values()), tuple(memories.values()), tuple(vms), ())
        return Parsed(topology, tuple(self.lost))

    def _server(self, path: str, name: str) -> Server:
        size_bytes, vectors = self._servers[path]
        raws = [raw for _, raws in self._vms for raw in raws if raw.socket == path]
        sizes = [raw.size_bytes for raw in raws if raw.size_bytes is not None]
        if size_bytes is None and not sizes:
            why = f"only the server knows it; {format_size(DEFAULT_SIZE_BYTES)} is assumed"
            self.lose(f"servers.{name}.size", "the size", why)
        if vectors is None:
            vectors = max((raw.vectors or 1 for raw in raws), default=1)
        server = Server(
            name, size_bytes or max(sizes, default=DEFAULT_SIZE_BYTES), vectors, **self._policies.get(path, {})
        )
        for size in sorted({size for size in sizes if size != server.size_bytes}):
            why = f"in a lab a device shows all of its server's memory, {format_size(server.size_bytes)} here"
            self.lose(f"servers.{name}.size", f"a device's size of {format_size(size)}", why)
        return server

    def _memory(self, shm: str, size_bytes: int | None) -> Memory:
        name = self._name(shm, shm)
        if size_bytes is None:
            self.lose(
                f"memories.{name}.size", "the size", f"it is not said; {format_size(DEFAULT_SIZE_BYTES)} is assumed"
            )
        memory = Memory(name, size_bytes or DEFAULT_SIZE_BYTES)
        for size in sorted(
            {raw.size_bytes for _, raws in self._vms for raw in raws if raw.shm == shm and raw.size_bytes}
        ):
            if size != memory.size_bytes:
                why = f"in a lab all see all of it, {format_size(memory.size_bytes)} here"
                self.lose(f"memories.{name}.size", f"a device's size of {format_size(size)}", why)
        return memory

    def _vm(self, vm: Vm, raws: list[Raw], servers: dict[str, Server], memories: dict[str, Memory]) -> Vm:
        name = self._name(vm.name, vm.name)
        links = []
        for number, raw in enumerate(raws):
            if raw.socket is None:
                links.append(Link(memory=memories[raw.shm or ""].name, master=raw.master))
                continue
            server = servers[raw.socket]
            link = Link(server.name, None, raw.vectors or 1, raw.master, raw.ioeventfd)
            if raw.vectors == max(1, server.vectors):
                link = replace(link, vectors=None)
            if is_plugged(link, vm):
                why = "one with properties of its own is plugged in right after the start"
                self.lose(f"vms.{name}.devices[{number}]", "a device that is there at the start", why)
            links.append(link)
        return replace(vm, name=name, devices=tuple(links))

    def _name(self, wanted: str, origin: str) -> str:
        """Return a free name that is allowed, as near to the wanted one as can be."""
        base = re.sub(r"[^\w.-]", "-", wanted).lstrip(".-")[:32] or "unnamed"
        name, number = base, 1
        while name in self._names:
            number += 1
            name = f"{base[: 31 - len(str(number))]}-{number}"
        self._names.add(name)
        if name != wanted:
            self.lose(name, f"the name {origin!r}", f"it is no name in a topology, or taken; {name!r} instead")
        return name
