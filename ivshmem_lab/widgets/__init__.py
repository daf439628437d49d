"""Widgets for notebooks: the lab to look at and to work with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builder import TopologyBuilder
    from .console import Console
    from .dashboard import LabDashboard
    from .hotplug import HotplugPanel

__all__ = ["Console", "HotplugPanel", "LabDashboard", "TopologyBuilder"]

_HOMES = {"Console": "console", "HotplugPanel": "hotplug", "LabDashboard": "dashboard", "TopologyBuilder": "builder"}


def __getattr__(name: str) -> Any:
    """Load a widget when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
