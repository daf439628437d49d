"""Where a virtual machine is in its life."""

from __future__ import annotations

from enum import StrEnum


class VmState(StrEnum):
    """Where a virtual machine is in its life.

    ``defined → starting → paused ⇄ running → stopped``, and ``failed`` from any of the middle ones.
    """

    DEFINED = "defined"
    STARTING = "starting"
    PAUSED = "paused"
    RUNNING = "running"
    STOPPED = "stopped"
    FAILED = "failed"
