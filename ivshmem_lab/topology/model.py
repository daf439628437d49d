"""A lab written down as a value: servers, plain memories, virtual machines and host peers, and who is linked to what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Server:
    """An ivshmem server with `size_bytes` of shared memory and so many interrupt vectors for each peer.

    Its policy: `peers_per_uid` is how many peers one user may have at a time, None for any number; processes of the user
    `observer_uid` join as observers, who have the memory read-only and can ring nobody. (In a lab, only its own user and root
    reach the socket.)
    """

    name: str
    size_bytes: int = 4 << 20
    vectors: int = 2
    peers_per_uid: int | None = None
    observer_uid: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Shared memory without a server."""

    name: str
    size_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """A device of a machine: to a server (ivshmem-doorbell) or to a memory (ivshmem-plain), one of the two.

    `vectors` are those of a doorbell device; None for as many as its server gives. `master` (on, off, auto: whether
    the memory moves with the machine) and `ioeventfd` are QEMU's properties; None leaves them out.
    """

    server: str | None = None
    memory: str | None = None
    vectors: int | None = None
    master: str | None = None
    ioeventfd: bool | None = None

    @property
    def target(self) -> str:
        """Name of what it leads to."""
        return self.server or self.memory or ""


@dataclass(frozen=True, slots=True)
class Vm:
    """A virtual machine.

    `memory_bytes` None is the lab's own choice, `cpu` None any host CPU, `root_ports` None four on q35. Linux guests
    are always q35. `accel` is what runs QEMU's guest: tcg, kvm, or auto for KVM where it works.
    """

    name: str
    emulator: str = "unicorn"
    guest: str | None = "pingpong"
    args: str | None = None
    memory_bytes: int | None = None
    machine: str = "pc"
    cpu: int | None = None
    root_ports: int | None = None
    accel: str = "tcg"
    devices: tuple[Link, ...] = ()


@dataclass(frozen=True, slots=True)
class HostPeer:
    """A peer of a server in the process that holds the lab."""

    name: str
    server: str


@dataclass(frozen=True, slots=True)
class Topology:
    """All of it; names are unique across the four kinds."""

    servers: tuple[Server, ...] = ()
    memories: tuple[Memory, ...] = ()
    vms: tuple[Vm, ...] = ()
    peers: tuple[HostPeer, ...] = ()
