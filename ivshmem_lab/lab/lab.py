"""A lab: what a user holds.

::

    with Lab() as lab:
        board = lab.server("board", size="4M", vectors=2)
        alice = lab.vm("alice", guest="pingpong", connect=board)
        me = lab.peer("me", connect=board)
        lab.start()
        me.ring(alice.peer_id, vector=0)
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..errors import UsageError
from ..ipc.memory import SharedMemory
from ..ipc.runtime_dir import check_socket_path, runtime_dir
from ..peer.peer import Peer
from ..topology.plan import plan
from ..units import check_memory_size, parse_size
from .apply import carry_out
from .arguments import read_name
from .check import problems_here
from .define import define_vm
from .describe import describe, rows
from .guard import Guard
from .home import table
from .loop import LabLoop
from .members import LabVm
from .membership import Membership
from .servers import LabMemory, LabServer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..topology.model import Topology
    from ..topology.plan import Action
    from ..vm.linux.guest import LinuxGuest
    from .apply import OnStep


class Lab(Membership):
    """Servers, virtual machines and host peers that end together.

    Calls may come from any thread and return when the thing is done. A thread of the lab's own
    runs what has to run in the background, so a lab works the same in a script, in a notebook whose
    own event loop is running, and in a test.

    Everything ends with `close`, with the end of ``with``, with the interpreter, and, by a small
    process that waits for it, when this process is killed.

    Raises
    ------
    UsageError
        There is no private directory for sockets.
    LabError
        The lab's helper process could not be started.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self._closing = threading.Lock()
        self._applying = threading.Lock()
        self._finished = False
        self.directory = Path(tempfile.mkdtemp(prefix="lab-", dir=runtime_dir()))
        try:
            self.guard = Guard(self.directory)
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        try:
            self.loop = LabLoop()
        except BaseException:
            self.guard.close()
            raise
        atexit.register(self.close)

    # -- what one puts into it ------------------------------------------------------------------------

    def server(
        self,
        name: str,
        size: str | int = "4M",
        vectors: int = 2,
        *,
        peers_per_uid: int | None = None,
        observer_uid: int | None = None,
    ) -> LabServer:
        """Start an ivshmem server with a shared memory of its own.

        Parameters
        ----------
        name
            Its name in the lab.
        size
            Shared memory in bytes, or as ``"4M"``; a power of two, at least one page.
        vectors
            Interrupt vectors of every peer.
        peers_per_uid
            How many peers one user may have at a time; None for any number.
        observer_uid
            Processes of this user join as observers: the memory is read-only for them, and they can ring nobody.

        Returns
        -------
        LabServer
            It listens already.

        Raises
        ------
        UsageError
            A value is not allowed.
        LabError
            The lab is closed.
        """
        self.require_open(f"lab.server({name!r})")
        size_bytes = check_memory_size(parse_size(size))
        path = check_socket_path(self.directory / f"{read_name(name)}.sock")
        with self._taking(name):
            memory = SharedMemory.create_memfd(size_bytes, name)
            try:
                server = LabServer(self, name, path, memory, vectors, peers_per_uid, observer_uid)
                self.loop.call(server.begin())
            except BaseException:
                memory.close()
                raise
            self._members[name] = server
        return server

    def memory(self, name: str, size: str | int = "4M") -> LabMemory:
        """Make shared memory without a server: what machines see through an ``ivshmem-plain`` (`LabVm.plug`).

        It has no name in ``/dev/shm``, nobody can resize it, and it goes with the last who has it.

        Parameters
        ----------
        name
            Its name in the lab.
        size
            Bytes, or as ``"4M"``; a power of two, at least one page.

        Raises
        ------
        UsageError
            A value is not allowed.
        LabError
            The lab is closed.
        """
        self.require_open(f"lab.memory({name!r})")
        size_bytes = check_memory_size(parse_size(size))
        read_name(name)
        with self._taking(name):
            memory = LabMemory(self, name, SharedMemory.create_memfd(size_bytes, name))
            self._members[name] = memory
        return memory

    def vm(
        self,
        name: str,
        guest: str | os.PathLike[str] | LinuxGuest | None = "pingpong",
        args: Mapping[str, object] | str | None = None,
        *,
        emulator: str = "unicorn",
        connect: LabServer | list[LabServer] | tuple[LabServer, ...] | None = None,
        memory: str | int | None = None,
        machine: str = "pc",
        root_ports: int | None = None,
        cpu: int | None = None,
        accel: str = "tcg",
    ) -> LabVm:
        """Define a virtual machine; `start` starts it.

        Parameters
        ----------
        name
            Its name in the lab.
        guest
            A guest that comes with the package, the path of a multiboot ELF, None for the firmware alone (QEMU);
            ``"linux"`` or a `LinuxGuest` for Linux on QEMU, see `LinuxVm`.
        args
            The guest's command line: a text, or a dict whose items become ``key=value``.
        emulator
            ``"unicorn"`` (ours) or ``"qemu"``.
        connect
            The server to join, or a list of several: one ivshmem-doorbell device for each, in this order.
        memory
            The guest's RAM; None for 32M, or 128M for Linux.
        machine
            ``"pc"`` or ``"q35"``; Linux guests have ``"q35"``, for the IOMMU, where `LinuxGuest` says nothing else.
        root_ports
            On q35: how many devices can be plugged in later, 0 to 24; None for 4.
        cpu
            The one host CPU to run on; None for any.
        accel
            What runs the instructions of a guest on QEMU: ``"tcg"``, which works everywhere; ``"kvm"``; ``"auto"``, KVM where
            a small guest of that kind (bare metal, Linux) was seen to work under it, else TCG.

        Raises
        ------
        UsageError
            A value is not allowed.
        EmulatorNotFoundError
            The emulator is not installed.
        VmError
            KVM was asked for and does not work here.
        LabError
            The lab is closed.
        """
        self.require_open(f"lab.vm({name!r})")
        servers = self._servers(connect)
        made = define_vm(self, servers, name, guest, args, emulator, memory, machine, root_ports, cpu, accel)
        with self._taking(name):
            self._members[name] = made
        return made

    def define_like(self, vm: LabVm, name: str, connect: list[LabServer] | None = None) -> LabVm:
        """Define a machine like another one, with these devices instead of its own; errors are those of `vm`."""
        like = vm.definition
        return self.vm(
            name,
            vm.guest,  # type: ignore[arg-type]
            like.args,
            emulator=like.emulator,
            connect=connect,
            memory=like.memory_bytes,
            machine=like.machine,
            root_ports=like.root_ports,
            cpu=like.cpu,
            accel=like.accel,
        )

    def peer(self, name: str, connect: LabServer) -> Peer:
        """Let this process join a server as a peer.

        Raises
        ------
        UsageError
            A value is not allowed.
        PeerError
            The server did not take it.
        LabError
            The lab is closed.
        """
        self.require_open(f"lab.peer({name!r})")
        read_name(name)
        servers = self._servers(connect)
        if len(servers) != 1:
            raise UsageError(f"a peer joins one server, not connect={connect!r}; make one peer for each")
        with self._taking(name):
            peer = self._members[name] = Peer.connect(servers[0].path)
            self._peer_servers[name] = servers[0]
        return peer

    # -- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every machine that has not been started.

        They are started one after the other and paused, so that peer ids follow the order in which the
        machines were defined; then all of them run.

        Raises
        ------
        VmStartError
            One could not be started; nothing is left of that one.
        LabError
            The lab is closed, or was closed meanwhile.
        """
        self.require_open("lab.start()")
        self.loop.call(self._start())

    def close(self) -> None:
        """End everything and give everything back. May be repeated; Ctrl-C waits for the end of it."""
        if os.getpid() != self._pid:  # a forked child has a copy of this object, but not the lab
            return
        self._closed = True
        with self._closing:
            if self._finished:
                return
            try:
                with self._making:
                    pass  # who is being made now is finished, and ended with the others
                for member in list(self._members.values()):
                    if isinstance(member, Peer):
                        member.close()
                self.loop.call(self._end_members(), finish=True)
            finally:
                try:
                    self.loop.close()
                finally:
                    self.guard.close()
                    shutil.rmtree(self.directory, ignore_errors=True)  # where the reaper itself was killed
                    self._finished = True
                    atexit.unregister(self.close)

    def __enter__(self) -> Self:
        self.require_open("with lab")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- as a value -----------------------------------------------------------------------------------

    def plan(self, wanted: Topology) -> tuple[Action, ...]:
        """Return what `apply` would do, step by step; wanted machines that have ended are defined anew.

        Raises
        ------
        UsageError
            The topology has problems; each is named with its place and a remedy.
        """
        current, standing = describe(self.members, self._peer_servers)
        if problems := problems_here(wanted, current):
            raise UsageError("; ".join(map(str, problems)))
        return plan(current, wanted, standing)

    def apply(self, wanted: Topology, on_step: OnStep | None = None) -> None:
        """Make the running lab what is wanted: carry `plan` out. Threads take turns.

        Parameters
        ----------
        wanted
            All that shall be there, running.
        on_step
            Called on the calling thread with each action, ``"started"``, ``"done"`` or ``"failed"``, and the error.

        Raises
        ------
        UsageError
            The topology has problems; nothing was done.
        ApplyError
            A step failed. What was done before stays, as `topology` tells; the rest was not done.
        """
        self.require_open("lab.apply()")
        with self._applying:
            carry_out(self, self.plan(wanted), on_step)

    def __repr__(self) -> str:
        if self._closed:
            return "<Lab: closed>"
        lines = self.loop.call(rows(self.members, self._peer_servers))
        if not lines:
            return "<Lab: empty; put in lab.server('board'), lab.vm('alice', connect=board), lab.peer('me', connect=board)>"
        return table(lines)

    # -- inside ---------------------------------------------------------------------------------------

    async def _start(self) -> None:
        machines = [member for member in self._members.values() if isinstance(member, LabVm)]
        for machine in machines:
            await machine.begin(run=False)
        for machine in machines:
            await machine.begin(run=True)

    async def _end_members(self) -> None:
        members = list(self._members.values())
        ends = [member.end() for member in members if isinstance(member, LabVm)]
        failures = [failure for failure in await asyncio.gather(*ends, return_exceptions=True) if failure is not None]
        for member in members:
            if isinstance(member, LabServer):
                await member.end()
            elif isinstance(member, LabMemory):
                member.close()
        for failure in failures:
            raise failure
