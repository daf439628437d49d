"""What every widget of the package has: a lab, one thread that keeps it up to date, intents with answers, errors shown.

Which thread a callback runs on depends on ipykernel's version (6.29: the main one; 7.2: one of its own), and calls of a lab
wait. So an intent of the front end is carried out on a thread of its own, and answered with its number.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import anywidget
import traitlets

from ..errors import IvshmemLabError, UsageError
from .picture import text_svg

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..lab.lab import Lab

REFRESH_EVERY_S = 0.1
UNSEEN_ONE_IN = 10
"""A widget that no window shows any more is brought up to date at one in so many turns."""
_COUNTS = {"shown": 1, "hidden": -1}
STATIC = Path(__file__).parent / "static"

_log = logging.getLogger(__name__)
_IMPORT = re.compile(r'^import .* from "\./(\w+)\.mjs";\n', re.MULTILINE)


def load_module(name: str, *before: str) -> str:
    """Return a front-end module with what it imports in front: anywidget loads one file, and nothing beside it.

    Of the modules in front only their functions are taken, not their default exports.
    """
    parts = [(STATIC / f"{each}.mjs").read_text("utf-8") for each in ("common", *before)]
    parts = [part.split("export default", 1)[0] for part in parts]
    return "\n".join(_IMPORT.sub("", part) for part in (*parts, (STATIC / f"{name}.mjs").read_text("utf-8")))


def load_style() -> str:
    """Return the style that all widgets share."""
    return (STATIC / "lab.css").read_text("utf-8")


class Refresher:
    """The thread of one lab that keeps its widgets up to date; it ends with the lab, or with the last of them."""

    _of: ClassVar[weakref.WeakKeyDictionary[Lab, Refresher]] = weakref.WeakKeyDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        self._widgets: list[LabWidget] = []
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    @classmethod
    def of(cls, lab: Lab) -> Refresher:
        """Return the one of a lab."""
        with cls._lock:
            return cls._of.setdefault(lab, cls())

    def add(self, widget: LabWidget) -> None:
        """Keep a widget up to date."""
        with self._lock:
            self._widgets.append(widget)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, args=(widget.lab,), name="ivshmem widgets", daemon=True
                )
                self._thread.start()

    def remove(self, widget: LabWidget) -> None:
        """Leave a widget as it is."""
        with self._lock:
            if widget in self._widgets:
                self._widgets.remove(widget)
        self._wake.set()

    def wake(self) -> None:
        """Let the next turn come at once."""
        self._wake.set()

    def _run(self, lab: Lab) -> None:
        for turn in itertools.count():
            self._wake.wait(REFRESH_EVERY_S)
            self._wake.clear()
            last = lab.closed
            with self._lock:
                widgets = tuple(self._widgets)
                if not widgets or last:
                    self._thread = None
                    self._widgets.clear()
            for widget in widgets:
                if last or widget.watched or turn % UNSEEN_ONE_IN == 0:
                    widget.refresh_safely()
            if not widgets or last:
                return


class LabWidget(anywidget.AnyWidget):
    """A widget that shows a lab.

    Attributes
    ----------
    lab : Lab
    python : str
        The Python line that does what was done last.
    status : str
        How things stand, in one sentence.
    problem : str
        What went wrong last, for people; empty when nothing did.
    """

    python = traitlets.Unicode("").tag(sync=True)
    status = traitlets.Unicode("").tag(sync=True)
    problem = traitlets.Unicode("").tag(sync=True)

    intents: ClassVar[dict[str, str]] = {}
    """What the front end may ask for: its name, and the method that does it."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self._windows: int | None = None
        self._counting = threading.Lock()
        self.lab = lab
        self.on_msg(self._hear)
        self.refresh_safely()
        if not lab.closed:
            Refresher.of(lab).add(self)

    # -- for those who inherit ------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring what is shown up to date; called ten times a second while it is, on a thread of its own, also when the lab has closed."""

    def picture_lines(self) -> list[str]:
        """Return what a saved notebook and a terminal show."""
        return []

    @property
    def watched(self) -> bool:
        """Whether a window shows it, or it was not shown yet: a cell that is run again leaves a widget behind that nobody sees."""
        return self._windows != 0

    # -- for everybody --------------------------------------------------------------------------------

    def refresh_safely(self) -> None:
        """Refresh, and show what goes wrong."""
        try:
            self.refresh()
        except IvshmemLabError as error:
            if not self.lab.closed:
                self.problem = str(error)
        except Exception as error:  # noqa: BLE001 - it would be lost on this thread
            _log.warning("%s could not be brought up to date", type(self).__name__, exc_info=error)
            self.problem = f"{type(error).__name__}: {error}"

    def to_svg(self) -> str:
        """Return a picture of what it shows now, without scripts or anything from elsewhere."""
        return text_svg(type(self).__name__, self.picture_lines())

    def close(self) -> None:
        """Take it away; the lab stays."""
        if "lab" in self.__dict__:
            Refresher.of(self.lab).remove(self)
        super().close()

    def __repr__(self) -> str:
        return "\n".join(self.picture_lines()) if "lab" in self.__dict__ else object.__repr__(self)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": repr(self), "image/svg+xml": self.to_svg()}, metadata

    def _count(self, change: int) -> None:
        with self._counting:
            self._windows = max(0, (self._windows or 0) + change)
        Refresher.of(self.lab).wake()

    # -- intents --------------------------------------------------------------------------------------

    def _hear(self, _: object, content: object, __: object = None) -> None:
        """Take what the front end asks for, on whatever thread that is."""
        if not isinstance(content, dict):
            return
        if content.get("op") in _COUNTS:
            self._count(_COUNTS[content["op"]])
            return
        threading.Thread(target=self.answer, args=(content,), name="ivshmem widget intent", daemon=True).start()

    def answer(self, content: dict[str, Any]) -> dict[str, Any]:
        """Carry an intent out, and answer it.

        Parameters
        ----------
        content
            ``op``, one of `intents`; ``req``, its number; what else the method takes. What it returns goes back as
            ``result``.
        """
        words = dict(content)
        op, number = words.pop("op", None), words.pop("req", None)
        reply: dict[str, Any] = {"type": "answer", "req": number, "ok": True, "error": ""}
        try:
            method: Callable[..., Any] | None = getattr(self, self.intents.get(str(op), ""), None)
            if method is None:
                raise UsageError(f"{op!r} is nothing that {type(self).__name__} can do")
            reply["result"] = method(**words)
            self.problem = ""
        except IvshmemLabError as error:
            reply |= {"ok": False, "error": str(error)}
        except Exception as error:  # noqa: BLE001 - told to who asked
            _log.warning("%s: %s failed", type(self).__name__, op, exc_info=error)
            reply |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
        if not reply["ok"]:
            self.problem = reply["error"]
        self.refresh_safely()
        self.send(reply)
        return reply
