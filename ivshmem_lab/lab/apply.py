"""A plan carried out on a running lab, step by step."""

from __future__ import annotations

import contextlib
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ApplyError, IvshmemLabError, LabError
from ..peer.peer import Peer
from ..topology.model import HostPeer, Link, Memory, Server, Vm
from ..topology.plan import Action, Verb, is_plugged
from .members import LabVm
from .servers import LabMemory, LabServer

_M = TypeVar("_M")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from .lab import Lab

    OnStep = Callable[[Action, str, BaseException | None], object]


def carry_out(lab: Lab, actions: Sequence[Action], on_step: OnStep | None = None) -> None:
    """Do one action after the other; see `Lab.apply`."""
    _Doer(lab, actions, on_step).run()


class _Doer:
    def __init__(self, lab: Lab, actions: Sequence[Action], on_step: OnStep | None) -> None:
        self._lab = lab
        self._actions = actions
        self._on_step = on_step
        self._done: list[Action] = []
        self._guests: dict[str, tuple[str | None, Any]] = {}

    def run(self) -> None:
        for starts, group in groupby(self._actions, lambda action: action.verb is Verb.START):
            if starts:
                self._start(list(group))
                continue
            for action in group:
                self._tell(action, "started")
                with self._watched(action):
                    self._do(action)
                self._finish(action)

    def _start(self, actions: list[Action]) -> None:
        """Start machines paused, one after the other, so that peer ids follow their order; then let all of them run."""
        launched: list[tuple[Action, LabVm]] = []
        for action in actions:
            self._tell(action, "started")
            with self._watched(action):
                vm = self._vm(action.name)
                try:
                    self._lab.loop.call(vm.begin(run=False))
                except BaseException:
                    self._let_run(launched)
                    raise
            launched.append((action, vm))
        self._let_run(launched)

    def _let_run(self, launched: list[tuple[Action, LabVm]]) -> None:
        for action, vm in launched:
            with self._watched(action):
                vm.start()
            self._finish(action)

    @contextlib.contextmanager
    def _watched(self, action: Action) -> Iterator[None]:
        """Tell of a failure, and name the step in it."""
        try:
            self._lab.require_open("lab.apply()")
            yield
        except IvshmemLabError as error:
            self._tell(action, "failed", error)
            number = self._actions.index(action) + 1
            left = len(self._actions) - len(self._done) - 1
            raise ApplyError(str(action), number, list(map(str, self._done)), error, left) from error
        except BaseException as error:  # Ctrl-C, or our own defect
            self._tell(action, "failed", error)
            raise

    def _tell(self, action: Action, phase: str, error: BaseException | None = None) -> None:
        if self._on_step is not None:
            self._on_step(action, phase, error)

    def _finish(self, action: Action) -> None:
        self._done.append(action)
        self._tell(action, "done")

    def _do(self, action: Action) -> None:
        match action.verb, action.item:
            case Verb.LEAVE, HostPeer():
                peer = self._member(action.name, Peer)
                peer.close()
                self._lab.forget(action.name, peer)
            case Verb.UNPLUG, Link() as link:
                self._vm(action.name).unplug(
                    self._source(link, action.name), vectors=link.vectors, **properties_of(link)
                )
            case Verb.STOP, Vm():
                self._vm(action.name).stop()
            case Verb.REMOVE, Vm() as item:
                vm = self._vm(action.name)
                self._guests[action.name] = item.guest, vm.guest
                vm.close()
            case Verb.REMOVE, _:
                self._remove(action.name)
            case Verb.CREATE, Server() as item:
                policy = {"peers_per_uid": item.peers_per_uid, "observer_uid": item.observer_uid}
                self._lab.server(item.name, item.size_bytes, item.vectors, **policy)
            case Verb.CREATE, Memory() as item:
                self._lab.memory(item.name, item.size_bytes)
            case Verb.DEFINE, Vm() as item:
                self._define(item)
            case Verb.JOIN, HostPeer() as item:
                self._lab.peer(item.name, self._member(item.server, LabServer))
            case Verb.PLUG, Link(server=str() as name) as link:
                source = self._member(name, LabServer)
                self._vm(action.name).plug(source, vectors=link.vectors, **properties_of(link))
            case Verb.PLUG, Link() as link:
                self._vm(action.name).plug(self._member(link.target, LabMemory), **properties_of(link))

    def _define(self, vm: Vm) -> None:
        name, guest = self._guests.get(vm.name, (None, None))
        self._lab.vm(
            vm.name,
            guest if name is not None and name == vm.guest else vm.guest,  # a LinuxGuest says more than its name
            vm.args,
            emulator=vm.emulator,
            connect=[self._member(link.target, LabServer) for link in vm.devices if not is_plugged(link, vm)],
            memory=vm.memory_bytes,
            machine=vm.machine,
            root_ports=vm.root_ports,
            cpu=vm.cpu,
            accel=vm.accel,
        )

    def _remove(self, name: str) -> None:
        member = self._lab[name]
        if not isinstance(member, LabServer | LabMemory):
            raise LabError(f"{name!r} has become something else since the plan was made; plan anew")
        users = list(self._users(member))
        if users:
            raise LabError(f"{name} is in use by {', '.join(users)}; take it from them first")
        member.close()

    def _users(self, source: LabServer | LabMemory) -> Iterable[str]:
        for name, member in self._lab.members.items():
            if (isinstance(member, LabVm) and any(each.source is source for each in member.attached)) or (
                isinstance(member, Peer) and self._lab.server_of(name) is source
            ):
                yield name

    def _source(self, link: Link, vm_name: str) -> LabServer | LabMemory:
        """Find what a device shows, also when that has left the lab; the latter first."""
        members = self._lab.members
        sources = [
            each.source
            for each in self._vm(vm_name).attached
            if each.link == link and isinstance(each.source, LabServer | LabMemory)
        ]
        if not sources:
            raise LabError(f"{vm_name} has no such device any more")
        return min(sources, key=lambda source: members.get(source.name) is source)

    def _vm(self, name: str) -> LabVm:
        return self._member(name, LabVm)

    def _member(self, name: str, kind: type[_M]) -> _M:
        member = self._lab.members.get(name)
        if not isinstance(member, kind):
            raise LabError(f"{name!r} has left the lab, or become something else, since the plan was made; plan anew")
        return member


def properties_of(link: Link) -> dict[str, Any]:
    """Return the properties of ``device_add`` that a link asks for."""
    found = {"master": link.master, "ioeventfd": link.ioeventfd}
    return {name: value for name, value in found.items() if value is not None}
