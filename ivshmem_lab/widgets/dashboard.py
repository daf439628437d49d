"""The bench: the lab as a drawing, hot-plug and consoles in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import traitlets
from ipywidgets import widget_serialization

from ..lab.members import LabVm
from ..lab.servers import LabServer
from ..peer.peer import Peer
from ..topology.model import Topology
from ..topology.python_line import variable
from ..vm.device import LIVE
from ..vm.state import VmState
from .base import LabWidget, load_module, load_style
from .console import Console
from .hotplug import HotplugPanel
from .topology_picture import Standing, draw, drawing_svg

if TYPE_CHECKING:
    from ..lab.lab import Lab


class LabDashboard(LabWidget):
    """A lab at a glance: its topology as it stands, the hot-plug panel, the consoles.

    Parameters
    ----------
    lab
        What is shown.

    Attributes
    ----------
    hotplug : HotplugPanel
    console : Console
    """

    _esm = load_module("dashboard", "hotplug", "console")
    _css = load_style()
    hotplug = traitlets.Instance(HotplugPanel).tag(sync=True, **widget_serialization)
    console = traitlets.Instance(Console).tag(sync=True, **widget_serialization)
    drawing: traitlets.Dict[str, Any] = traitlets.Dict({}).tag(sync=True)
    """Nodes and links, as `topology_picture.Drawing.view` tells them."""
    summary = traitlets.Unicode("").tag(sync=True)
    """Such as ``"2 of 4 VMs running"``."""
    question = traitlets.Unicode("").tag(sync=True)
    """What stopping all would cost."""

    intents: ClassVar[dict[str, str]] = {"start": "_start", "stop": "_stop"}

    def __init__(self, lab: Lab) -> None:
        self._last = draw(Topology(), {})
        self.hotplug = HotplugPanel(lab)
        self.console = Console(lab)
        super().__init__(lab)
        for part in (self.hotplug, self.console):
            part.observe(self._take_over, names=["python", "status"])

    def refresh(self) -> None:
        """Draw the lab as it stands."""
        if self.lab.closed:
            self.summary = "the lab is closed"
            return
        members = self.lab.members
        machines = [each for each in members.values() if isinstance(each, LabVm)]
        self._last = draw(self.lab.topology(), {name: self._standing(name, each) for name, each in members.items()})
        self.drawing = self._last.view()
        running = [each.name for each in machines if each.state is VmState.RUNNING]
        live = [each.name for each in machines if each.state in LIVE]
        self.summary = f"{len(running)} of {len(machines)} VMs running" if machines else "no VM yet"
        self.question = (
            f"Stop {', '.join(live)}? What their guests hold in memory is lost. Servers and shared memory stay."
            if live
            else ""
        )

    def picture_lines(self) -> list[str]:
        """Return the lab's table, and the lines of the panels."""
        table = [] if self.lab.closed else repr(self.lab).splitlines()
        return [*table, "", *self.hotplug.picture_lines(), "", *self.console.picture_lines()]

    def to_svg(self) -> str:
        """Return the drawing as SVG."""
        return drawing_svg(self._last)

    def close(self) -> None:
        """Take it and its parts away; the lab stays."""
        if self.hotplug is not None:
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

    def _standing(self, name: str, member: object) -> Standing:
        if isinstance(member, LabVm):
            ids = tuple(
                (each.source.name, each.peer_id) for each in member.attached if isinstance(each.source, LabServer)
            )
            live = member.state in LIVE
            return Standing(str(member.state), member.reason, ids if live else ())
        if isinstance(member, Peer):
            server = self.lab.server_of(name)
            return Standing("present", "", ((server.name, member.peer_id),) if server else ())
        return Standing("running")
