"""What the members of a lab ask of it, and the lines that they have in its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .guard import Guard
    from .loop import LabLoop
    from .members import LabVm


class Home(Protocol):
    """What a member asks of its lab."""

    loop: LabLoop
    guard: Guard
    directory: Path

    @property
    def closed(self) -> bool:
        """Whether the lab is closed."""

    def forget(self, name: str, member: object) -> None:
        """Free the name of a member that is gone."""

    def define_like(self, vm: LabVm, name: str) -> LabVm:
        """Define a machine like another, without its devices."""

    def require_open(self, call: str) -> None:
        """Raise LabError when the lab is closed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the lab's table: who is who."""

    name: str
    kind: str
    state: str
    peer_id: str = ""
    vectors: str = ""
    memory: str = ""
    server: str = ""


def table(rows: Sequence[Row]) -> str:
    """Set lines under their heads."""
    heads = Row("name", "what", "state", "peer id", "vectors", "memory", "server")
    lines = [[getattr(row, field) for field in Row.__slots__] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
