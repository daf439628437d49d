"""What is lost between two formats, found by reading back what was written."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ...units import format_size
from ..model import Topology
from ..plan import is_plugged

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..model import Vm

_KINDS = tuple(part.name for part in fields(Topology))


@dataclass(frozen=True, slots=True)
class Lost:
    """One thing that a format cannot say, or that was read and has no place in a topology.

    Attributes
    ----------
    path
        Where, such as ``vms.alice.devices[0].vectors``.
    what
        What is there.
    why
        Why it is lost, and what to do about it where something can be done.
    """

    path: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}: {self.why}"


@dataclass(frozen=True, slots=True)
class Parsed:
    """A topology that was read, where it is drawn as far as that was said, and what was lost."""

    topology: Topology
    lost: tuple[Lost, ...] = ()
    positions: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A topology as text, and what the text does not say."""

    text: str
    lost: tuple[Lost, ...] = ()


def difference(written: Topology, read: Topology, reasons: Mapping[str, str], *, in_order: bool = True) -> list[Lost]:
    """Tell what of a topology another one lacks or has otherwise.

    Parameters
    ----------
    written, read
        The topology, and what came back.
    reasons
        Why: patterns of a path's end, the first that matches; the pattern ``""`` is last.
    in_order
        False when devices of the start may come before the others.
    """
    found = []
    for path, what in _differences(written, read, in_order=in_order):
        why = next(why for pattern, why in reasons.items() if re.search(f"(?:{pattern})$", path))
        found.append(Lost(path, what, why))
    return found


def _differences(written: Topology, read: Topology, *, in_order: bool) -> Iterator[tuple[str, str]]:
    for kind in _KINDS:
        there = {item.name: item for item in getattr(read, kind)}
        for item in getattr(written, kind):
            path = f"{kind}.{item.name}"
            other = there.get(item.name)
            if other is None:
                yield path, "all of it"
                continue
            yield from _fields(path, item, other)
            if kind == "vms":
                yield from _devices(path, item, other, in_order=in_order)


def _fields(path: str, item: Any, other: Any) -> Iterator[tuple[str, str]]:
    for part in fields(item):
        value, instead = getattr(item, part.name), getattr(other, part.name)
        if part.name != "devices" and value != instead:
            yield (
                f"{path}.{part.name.removesuffix('_bytes')}",
                f"{_said(part.name, value)} becomes {_said(part.name, instead)}",
            )


def _devices(path: str, vm: Vm, other_vm: Vm, *, in_order: bool) -> Iterator[tuple[str, str]]:
    ours, theirs = list(enumerate(vm.devices)), list(other_vm.devices)
    if not in_order:
        ours.sort(key=lambda pair: is_plugged(pair[1], vm))
        theirs.sort(key=lambda link: is_plugged(link, other_vm))
    if len(ours) != len(theirs):
        yield f"{path}.devices", f"{len(ours)} devices become {len(theirs)}"
    for (number, link), other in zip(ours, theirs, strict=False):
        yield from _fields(f"{path}.devices[{number}]", link, other)


def _said(name: str, value: object) -> str:
    if value is None:
        return "nothing said"
    return format_size(value) if name.endswith("_bytes") and isinstance(value, int) else repr(value)
