"""A running lab as values: its topology and how its parts stand, and its table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..peer.peer import Peer
from ..topology.model import HostPeer, Link, Memory, Server, Topology
from ..topology.plan import Standing
from ..units import format_size
from ..vm.state import VmState
from .home import Row
from .members import LabVm
from .servers import LabMemory, LabServer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..topology.model import Vm

Member = LabServer | LabMemory | LabVm | Peer
"""What a lab holds under a name."""

_ENDED = frozenset({VmState.STOPPED, VmState.FAILED})


def describe(members: Mapping[str, Member], peer_servers: Mapping[str, LabServer]) -> tuple[Topology, Standing]:
    """Write a lab down, with what was plugged in, and tell how its parts stand."""
    servers: list[Server] = []
    memories: list[Memory] = []
    vms: list[Vm] = []
    peers: list[HostPeer] = []
    idle: set[str] = set()
    ended: set[str] = set()
    fixed: list[tuple[str, Link]] = []
    broken: set[tuple[str, Link | HostPeer]] = set()
    for name, member in members.items():
        match member:
            case LabServer():
                servers.append(
                    Server(name, member.size_bytes, member.vectors, member.peers_per_uid, member.observer_uid)
                )
            case LabMemory():
                memories.append(Memory(name, member.size_bytes))
            case LabVm():
                attached = [(each, each.link) for each in member.attached]
                links = [link for _, link in attached if link is not None]
                vms.append(replace(member.definition, devices=tuple(links)))
                fixed += [(name, link) for each, link in attached if link is not None and each.fixed]
                broken |= {
                    (name, link)
                    for each, link in attached
                    if link is not None and members.get(link.target) is not each.source
                }
                if member.state is VmState.DEFINED:
                    idle.add(name)
                elif member.state in _ENDED:
                    ended.add(name)
            case Peer():
                server = peer_servers[name]
                peers.append(HostPeer(name, server.name))
                if members.get(server.name) is not server or not member.connected:
                    broken.add((name, peers[-1]))
    topology = Topology(tuple(servers), tuple(memories), tuple(vms), tuple(peers))
    return topology, Standing(frozenset(idle), frozenset(ended), tuple(fixed), frozenset(broken))


async def rows(members: Mapping[str, Member], peer_servers: Mapping[str, LabServer]) -> list[Row]:
    """Return the lines of a lab's table: servers with those of their peers that are no members, then the rest."""
    found: list[Row] = []
    known: set[tuple[str, int]] = set()
    for name, member in members.items():
        match member:
            case LabVm():
                found += member.rows()
                known |= member.identities()
            case Peer():
                server = peer_servers[name]
                state = "connected" if member.connected else "server gone"
                size = format_size(member.size_bytes)
                found.append(Row(name, "host peer", state, str(member.peer_id), str(member.vectors), size, server.name))
                known.add((server.name, member.peer_id))
            case LabMemory():
                found.append(member.row())
    return [row for member in members.values() if isinstance(member, LabServer) for row in member.rows(known)] + found
