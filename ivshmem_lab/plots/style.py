"""How a series looks: by colour, line and marker at once, so that a figure is read without colours, too.

The colours are those of Okabe and Ito, "Color Universal Design" (2008), without the yellow, which is too light on white.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Look:
    """How one series is drawn."""

    color: str
    line: Any
    marker: str
    hatch: str


_LOOKS = (
    Look("#0072B2", "-", "o", ""),
    Look("#D55E00", (0, (5, 2)), "s", "//"),
    Look("#009E73", (0, (1, 1.2)), "^", ".."),
    Look("#CC79A7", (0, (5, 2, 1, 2)), "D", "xx"),
    Look("#000000", (0, (8, 3)), "v", "\\\\"),
    Look("#56B4E9", (0, (3, 1, 1, 1, 1, 1)), "P", "++"),
)


def look(index: int) -> Look:
    """Return how the series with this number is drawn; they repeat after six."""
    return _LOOKS[index % len(_LOOKS)]
