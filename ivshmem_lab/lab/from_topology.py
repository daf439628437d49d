"""A new lab as it is written down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lab import Lab

if TYPE_CHECKING:
    from ..topology.model import Topology
    from .apply import OnStep


def lab_from_topology(topology: Topology, on_step: OnStep | None = None) -> Lab:
    """Make a lab as written down and start it; when a step fails, nothing of it is left.

    Raises
    ------
    UsageError
        The topology has a problem.
    ApplyError
        A step could not be done.
    """
    lab = Lab()
    try:
        lab.apply(topology, on_step)
    except BaseException:
        lab.close()
        raise
    return lab
