"""The bench: the topology builder, hot-plug and consoles in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from ipywidgets import widget_serialization

from ..lab.members import LabVm
from ..topology.python_line import variable
from ..vm.device import LIVE
from ..vm.state import VmState
from .base import LabWidget, load_module, load_style
from .builder import TopologyBuilder
from .console import Console
from .hotplug import HotplugPanel

if TYPE_CHECKING:
    from ..lab.lab import Lab


class LabDashboard(LabWidget):
    """A lab at a glance: its topology to see and to change, the hot-plug panel, the consoles.

    Parameters
    ----------
    lab
        What is shown.

    Attributes
    ----------
    builder : TopologyBuilder
    hotplug : HotplugPanel
    console : Console
    """

    _esm = load_module("dashboard", "hotplug", "console", "canvas", "builder")
    _css = load_style()
    builder = traitlets.Instance(TopologyBuilder).tag(sync=True, **widget_serialization)
    hotplug = traitlets.Instance(HotplugPanel).tag(sync=True, **widget_serialization)
    console = traitlets.Instance(Console).tag(sync=True, **widget_serialization)
    summary = traitlets.Unicode("").tag(sync=True)
    """Such as ``"2 of 4 VMs running"``."""
    can_start = traitlets.Bool(False).tag(sync=True)
    """Whether there is a machine that has not been started."""
    question = traitlets.Unicode("").tag(sync=True)
    """What stopping all would cost."""

    intents: ClassVar[dict[str, str]] = {"start": "_start", "stop": "_stop"}

    def __init__(self, lab: Lab) -> None:
        self.builder = TopologyBuilder(lab)
        self.hotplug = HotplugPanel(lab)
        self.console = Console(lab)
        super().__init__(lab)
        for part in (self.builder, self.hotplug, self.console):
            part.observe(self._take_over, names=["python", "status"])

    def refresh(self) -> None:
        """Count what runs."""
        if self.lab.closed:
            self.summary, self.can_start, self.question = "the lab is closed", False, ""
            return
        members = self.lab.members
        machines = [each for each in members.values() if isinstance(each, LabVm)]
        running = [each.name for each in machines if each.state is VmState.RUNNING]
        live = [each.name for each in machines if each.state in LIVE]
        self.summary = f"{len(running)} of {len(machines)} VMs running" if machines else "no VM yet"
        self.can_start = any(each.state is VmState.DEFINED for each in machines)
        self.question = (
            f"Stop {', '.join(live)}? What their guests hold in memory is lost. Servers and shared memory stay."
            if live
            else ""
        )

    def picture_lines(self) -> list[str]:
        """Return the lab's table, and the lines of the panels."""
        return [*self.builder.picture_lines(), "", *self.hotplug.picture_lines(), "", *self.console.picture_lines()]

    def to_svg(self) -> str:
        """Return the drawing as SVG."""
        return self.builder.to_svg()

    def close(self) -> None:
        """Take it and its parts away; the lab stays."""
        if self.hotplug is not None:
            self.builder.close()
            self.hotplug.close()
            self.console.close()
        super().close()

    # -- intents --------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.python = "lab.start()"
        self.lab.start()
        self.status = "all machines have been started"

    def _stop(self) -> None:
        live = [each for each in self.lab.members.values() if isinstance(each, LabVm) and each.state in LIVE]
        self.python = "; ".join(f"{variable(machine.name)}.stop()" for machine in live)
        for machine in live:
            machine.stop()
        self.status = "all machines have been stopped"

    # -- inside ---------------------------------------------------------------------------------------

    def _take_over(self, change: dict[str, Any]) -> None:
        setattr(self, change["name"], change["new"])
