"""The topology builder: a lab as a drawing that is changed by hand, applied when it is asked for, with its life on top."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

import traitlets

from ..errors import IvshmemLabError, UsageError
from ..guests import available, guest_path
from ..lab.lab import Lab
from ..lab.members import LabVm
from ..topology import edit
from ..topology.python_line import python_line, variable
from ..vm.state import VmState
from .base import LabWidget, load_module, load_style
from .builder_model import PALETTE, Draft, formats, view
from .rates import Rates, in_words
from .topology_picture import draw, drawing_svg, standing_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..topology.formats.lost import Lost
    from ..topology.model import Topology
    from ..topology.plan import Action

_LOG_CHARACTERS = 20_000


class TopologyBuilder(LabWidget):
    """Draws a topology and makes the lab what is drawn.

    Everything is a draft until `apply`; what it does is `plan`, line by line, and nothing else.

    Parameters
    ----------
    lab
        The lab; None for a new one, which `lab` then is.
    """

    _esm = load_module("builder", "canvas")
    _css = load_style()
    drawing: traitlets.Dict[str, Any] = traitlets.Dict({}).tag(sync=True)
    """Nodes and links as they are drawn, with what the lab adds: state, peer ids."""
    rates: traitlets.Dict[str, Any] = traitlets.Dict({}).tag(sync=True)
    """By link: interrupts per second that its machine has sent, and that have come, and both in words; idle ones are left out."""
    changes: traitlets.List[str] = traitlets.List([]).tag(sync=True)
    """The plan, one line for each step."""
    problems: traitlets.List[dict[str, str]] = traitlets.List([]).tag(sync=True)
    """What is wrong with the draft: name of the node, text."""
    history: traitlets.Dict[str, Any] = traitlets.Dict({}).tag(sync=True)
    """What undo and redo would do, in words; empty for nothing."""
    applying: traitlets.Dict[str, Any] = traitlets.Dict({}).tag(sync=True)
    """While it is applied: number of the step, of how many, its words."""
    palette: traitlets.List[Any] = traitlets.List(
        [[key, what, words] for key, (_, what, words) in PALETTE.items()]
    ).tag(sync=True)
    formats: traitlets.List[Any] = traitlets.List([list(each) for each in formats()]).tag(sync=True)

    intents: ClassVar[dict[str, str]] = {
        "add": "_add",
        "remove": "_remove",
        "connect": "_connect",
        "disconnect": "_disconnect",
        "change": "_change",
        "move": "_move",
        "arrange": "_arrange",
        "undo": "undo",
        "redo": "redo",
        "discard": "discard",
        "apply": "apply",
        "load": "_load",
        "export": "_export",
        "targets": "_targets",
        "toggle": "_toggle",
        "log": "_log",
    }

    def __init__(self, lab: Lab | None = None) -> None:
        self._turn = threading.RLock()
        self._applies = threading.Lock()
        lab = Lab() if lab is None else lab
        self._draft = Draft(lab.topology())
        self._rates = Rates(lab)
        self._planned: object = None
        super().__init__(lab)

    # -- what a program uses --------------------------------------------------------------------------

    @property
    def draft(self) -> Topology:
        """What is drawn; set it to draw something else."""
        with self._turn:
            return self._draft.topology

    @draft.setter
    def draft(self, topology: Topology) -> None:
        with self._turn:
            self._draft.replace(topology)
        self.refresh_safely()

    @property
    def plan(self) -> tuple[Action, ...]:
        """What `apply` would do.

        Raises
        ------
        UsageError
            The draft has problems.
        """
        return self.lab.plan(self.draft)

    def apply(self) -> None:
        """Make the lab what is drawn.

        Raises
        ------
        UsageError
            The draft has problems, or is being applied; nothing was done.
        ApplyError
            A step failed; what was done before stays.
        """
        if not self._applies.acquire(blocking=False):
            raise UsageError("it is being applied; wait for the end of it")
        try:
            wanted = self.draft
            steps = self.lab.plan(wanted)
            done: list[str] = []

            def note(action: Action, status: str, error: BaseException | None) -> None:
                del error
                if status == "done":
                    done.append(python_line(action))
                    self.python = "\n".join(done)
                self.applying = {"done": len(done), "of": len(steps), "step": str(action)}

            self.lab.apply(wanted, note)
            with self._turn:
                self._draft.base = wanted  # our own doing: undo leads back from it
            self.status = f"{len(steps)} change{'' if len(steps) == 1 else 's'} applied"
        except IvshmemLabError as error:
            self.status = f"not applied: {error}"
            with self._turn:
                self._draft.base = self.lab.topology()  # what was done is done; the rest stays drawn
            raise
        finally:
            self.applying = {}
            self._applies.release()
            self.refresh_safely()

    def undo(self) -> None:
        """Take the last change of the draft back; the lab does not hear of it."""
        self._step("undone", self._draft.history.undoable, self._draft.history.undo)

    def redo(self) -> None:
        """Change again what was taken back."""
        self._step("done again", self._draft.history.redoable, self._draft.history.redo)

    def discard(self) -> None:
        """Draw what the lab is; `undo` brings the draft back."""
        with self._turn:
            self._draft.discard()
        self.status = "the draft is what the lab is"
        self.refresh_safely()

    def load(self, text: str, form: str = "") -> tuple[Lost, ...]:
        """Draw what a text describes: a topology file, QEMU command lines of today or then, libvirt XML, Python.

        Parameters
        ----------
        text
            What was written, or pasted.
        form
            The format's name, as for ``ivshmem-lab translate``; empty to tell by the text.

        Returns
        -------
        tuple of Lost
            What was read and has no place in a topology.

        Raises
        ------
        UsageError
            It cannot be read.
        """
        with self._turn:
            name, lost = self._draft.load(text, form, _guests())
        self.status = f"read as {name}" + (f", {len(lost)} things have no place in a topology" if lost else "")
        self.refresh_safely()
        return lost

    # -- what the base asks for -----------------------------------------------------------------------

    def refresh(self) -> None:
        """Draw the draft, and the lab on top."""
        if self.lab.closed:
            self.status = "the lab is closed"
            return
        current = self.lab.topology()
        with self._turn:
            if not self.applying:
                self._draft.follow(current)
            topology, places = self._draft.topology, self._draft.places
            self.history = {"undo": self._draft.history.undoable or "", "redo": self._draft.history.redoable or ""}
        standing = {name: standing_of(self.lab, name) for name in self.lab.members}
        self.drawing = view(topology, current, places, standing)
        self.rates = {
            key: {"sent": sent, "come": come, "words": f"{in_words(sent + come)} irq/s"}
            for key, (sent, come) in self._rates.look().items()
        }
        # Checked and planned again only when something is different: that takes most of the time.
        stamp = (topology, current, [(id(each), str(getattr(each, "state", ""))) for each in self.lab.members.values()])
        if stamp != self._planned:
            found = self.lab.problems(topology)
            self.problems = [{"name": _owner(each.path), "text": str(each)} for each in found]
            self.changes = [] if found else [str(action) for action in self.lab.plan(topology)]
            self._planned = stamp

    def picture_lines(self) -> list[str]:
        """Return the lab's table, and the plan."""
        table = [] if self.lab.closed else repr(self.lab).splitlines()
        plan = [f"  {line}" for line in self.changes] or ["  nothing: the lab is what is drawn"]
        wrong = [f"  {each['text']}" for each in self.problems]
        return [*table, "", "plan:", *(wrong or plan)]

    def to_svg(self) -> str:
        """Return the drawing as SVG."""
        if self.lab.closed:
            return super().to_svg()
        with self._turn:
            topology, places = self._draft.topology, self._draft.places
        standing = {name: standing_of(self.lab, name) for name in self.lab.members}
        return drawing_svg(draw(topology, standing, places))

    # -- intents --------------------------------------------------------------------------------------

    def _add(self, kind: str, x: float | None = None, y: float | None = None) -> str:
        with self._turn:
            name = self._draft.add(kind, x, y)
        self.status = f"{name} added to the draft"
        return name

    def _remove(self, names: Sequence[str]) -> None:
        with self._turn:
            self._draft.remove(list(names))
        self.status = f"{', '.join(names)} removed from the draft"

    def _connect(self, source: str, target: str) -> None:
        with self._turn:
            words = edit.what_happens(self.draft, source, target)
            self._draft.connect(source, target)
        self.status = words

    def _disconnect(self, name: str, device: int | None = None) -> None:
        with self._turn:
            self._draft.disconnect(name, device)
        self.status = f"a link of {name} removed from the draft"

    def _change(self, name: str, key: str, value: str, device: int | None = None) -> str:
        with self._turn:
            return self._draft.change(name, key, str(value), device)

    def _move(self, places: dict[str, Sequence[float]]) -> None:
        with self._turn:
            self._draft.move(places)

    def _arrange(self) -> None:
        with self._turn:
            self._draft.arrange()

    def _load(self, text: str, form: str = "") -> list[str]:
        return [str(each) for each in self.load(text, form)]

    def _export(self, form: str) -> dict[str, Any]:
        with self._turn:
            rendered = self._draft.export(form, _guests())
        return {"text": rendered.text, "lost": [str(each) for each in rendered.lost]}

    def _targets(self, source: str) -> dict[str, dict[str, str]]:
        """Tell of every other node what connecting with it means, or why it cannot be."""
        draft = self.draft
        return {
            name: {"reason": reason or "", "what": "" if reason else edit.what_happens(draft, source, name)}
            for name, reason in edit.targets(draft, source).items()
        }

    def _toggle(self, name: str) -> None:
        machine = self.lab.members.get(name)
        if not isinstance(machine, LabVm):
            raise UsageError(f"{name} is no machine of the lab yet; apply the draft first")
        if machine.state is VmState.RUNNING:
            self.python = f"{variable(name)}.pause()"
            machine.pause()
        elif machine.state is VmState.PAUSED:
            self.python = f"{variable(name)}.resume()"
            machine.resume()
        elif machine.state is VmState.DEFINED:
            self.python = f"{variable(name)}.start()"
            machine.start()
        else:
            raise UsageError(f"{name} is {machine.state}; Apply defines it anew")

    def _log(self, name: str) -> str:
        machine = self.lab.members.get(name)
        if not isinstance(machine, LabVm):
            raise UsageError(f"{name} has no log")
        said = machine.log[-_LOG_CHARACTERS:] or "nothing"
        return f"{machine.name} is {machine.state}: {machine.reason}\nits command: {' '.join(machine.argv)}\nit said:\n{said}"

    # -- inside ---------------------------------------------------------------------------------------

    def _step(self, word: str, what: str | None, go: Any) -> None:
        with self._turn:
            go()
        self.status = f"{word}: {what}" if what else f"nothing is {word}"
        self.refresh_safely()


def _owner(path: str) -> str:
    """Return the name of the node that a problem's path is in: ``vms.alice.devices[0]``."""
    return path.split(".", 2)[1].split("[", maxsplit=1)[0] if "." in path else ""


def _guests() -> dict[str, str]:
    """Return the package's guests and their files, for formats that name files."""
    return {name: str(guest_path(name)) for name in available()}
