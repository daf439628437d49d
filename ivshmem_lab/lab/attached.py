"""Which devices a machine of a lab has: those of its start and those that were plugged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..topology.model import Link
from .servers import LabMemory, LabServer

if TYPE_CHECKING:
    from .plugged import LabDevice, Source


@dataclass(slots=True)
class BootDevice:
    """A device that a machine is started with; `device` when it is, or was, being unplugged."""

    device_id: str
    server: LabServer
    peer_id: int | None = None
    device: LabDevice | None = None

    @property
    def gone(self) -> bool:
        """Whether it was unplugged."""
        return self.device is not None and self.device.gone


@dataclass(frozen=True, slots=True)
class Attached:
    """A device of a machine of the lab.

    Attributes
    ----------
    link
        What it is in a topology; None for a server outside of the lab, which a topology cannot say.
    source
        What it shows.
    device_id
        Its id in the machine.
    peer_id
        The machine's peer id on a server of the lab; None where there is none or it is not known.
    device
        The device with its life cycle; None for one that was there at the machine's start and was not asked to leave.
    fixed
        Whether the running machine cannot let it go.
    """

    link: Link | None
    source: Source
    device_id: str
    peer_id: int | None
    device: LabDevice | None
    fixed: bool


def link_of(source: Source, vectors: int | None, properties: dict[str, Any]) -> Link | None:
    """Write a device down; None for what a topology cannot say."""
    own = {"master": properties.get("master"), "ioeventfd": properties.get("ioeventfd")}
    if isinstance(source, LabServer):
        return Link(server=source.name, vectors=vectors, **own)
    return Link(memory=source.name, **own) if isinstance(source, LabMemory) else None


def choose(there: list[Attached], source: Source, vectors: int | None, properties: dict[str, Any]) -> Attached | None:
    """Find the device that is meant: the last that was plugged in exactly so, else the last of that source."""
    same = [each for each in there if each.source is source or (isinstance(source, str) and each.source == source)]
    exact = [each for each in same if each.link == link_of(source, vectors, properties)]
    if vectors is None and not properties:
        exact = exact or same
    loose = [each for each in exact if not each.fixed]
    best = loose or exact
    return best[-1] if best else None
