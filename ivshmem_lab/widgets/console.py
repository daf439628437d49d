"""The consoles of a lab's machines: a tab for each, to read, to search, to save and to type into."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, cast

import traitlets

from ..errors import UsageError
from ..lab.members import LabVm
from ..topology.python_line import variable
from ..vm.state import VmState
from .base import LabWidget, load_module, load_style
from .console_model import KEPT_LINES, Scrollback, clock

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from ..lab.lab import Lab
    from .console_model import Found, Line

MOST_WAITING_CHARACTERS = 1 << 20
MOST_LINES_AT_ONCE = 1000
_ENDED = frozenset({VmState.STOPPED, VmState.FAILED})


class Channel:
    """One machine's console between the lab's thread, which must not wait, and those who read."""

    def __init__(self, vm: LabVm) -> None:
        self.vm = vm
        self.seen = Scrollback()
        self.sent_revision = 0
        self.sent_line = -1
        self.lost_characters = 0
        self._waiting: deque[tuple[str, float]] = deque()
        self._size = 0
        self._lock = threading.RLock()
        self.stop: Callable[[], None] = vm.console.subscribe(self._take)

    def _take(self, text: str) -> None:
        self._waiting.append((text, time.time()))
        self._size += len(text)
        while self._size > MOST_WAITING_CHARACTERS and len(self._waiting) > 1:
            try:
                lost = len(self._waiting.popleft()[0])
            except IndexError:  # it is being read at this moment
                break
            self._size -= lost
            self.lost_characters += lost

    def read(self) -> Scrollback:
        """Take in what has come; hold `lock` while reading the result."""
        while self._waiting:
            text, time_s = self._waiting.popleft()
            self._size -= len(text)
            if self.lost_characters:
                self.seen.feed(f"\n[{self.lost_characters} characters came too fast and are left out]\n", time_s)
                self.lost_characters = 0
            self.seen.feed(text, time_s)
        return self.seen

    @property
    def lock(self) -> threading.RLock:
        """To be held while `seen` is used."""
        return self._lock

    def news(self) -> dict[str, Any] | None:
        """Return what has changed since the last time, for the front end."""
        with self._lock:
            seen = self.read()
            if seen.revision == self.sent_revision:
                return None
            message = self.message(self.sent_line - 1)
            self.sent_revision = seen.revision
            return message

    def message(self, after: int, most: int = MOST_LINES_AT_ONCE) -> dict[str, Any]:
        """Return lines for the front end; a line that was told before is told again when it was not whole."""
        with self._lock:
            seen = self.read()
            lines = seen.lines(after)[-most:]
            if lines:
                self.sent_line = max(self.sent_line, lines[-1].number)
            return {
                "type": "lines",
                "vm": self.vm.name,
                "first": seen.first,
                "lines": [_packed(line) for line in lines],
            }


class Console(LabWidget):
    """The serial consoles of a lab's machines, or of one machine.

    The last 10 000 lines of each are kept here; the lines before them are gone. What a guest writes is shown as text, with
    colours; it is never taken for markup.

    Parameters
    ----------
    of
        A lab, or a machine of one.

    Raises
    ------
    UsageError
        It is neither.
    """

    _esm = load_module("console")
    _css = load_style()
    tabs: traitlets.List[dict[str, Any]] = traitlets.List([]).tag(sync=True)
    """One dict for each machine: name, state, word, note."""

    intents: ClassVar[dict[str, str]] = {"since": "_since", "write": "write", "clear": "clear", "fetch": "_fetch"}

    def __init__(self, of: Lab | LabVm) -> None:
        from ..lab.lab import Lab

        if not isinstance(of, Lab | LabVm):
            raise UsageError(f"Console({of!r}): give a lab, or a machine of one")
        self._only = of if isinstance(of, LabVm) else None
        self._channels: dict[str, Channel] = {}
        self._making = threading.Lock()
        super().__init__(of if isinstance(of, Lab) else cast("Lab", of.home))

    # -- from Python ----------------------------------------------------------------------------------

    def text(self, vm: str | None = None, *, timestamps: bool = False) -> str:
        """Return the lines of a machine's console as they are shown; `vm` may be left out where there is one.

        Raises
        ------
        UsageError
            There is no such machine.
        """
        with self._channel(vm) as channel:
            return channel.read().text(timestamps=timestamps)

    def search(self, wanted: str, vm: str | None = None, *, match_case: bool = False) -> list[Found]:
        """Return where a text (no pattern) stands in a machine's console; errors as `text`'s."""
        with self._channel(vm) as channel:
            return channel.read().search(wanted, match_case=match_case)

    def save(self, path: str | os.PathLike[str], vm: str | None = None, *, timestamps: bool = False) -> Path:
        """Write a machine's console to a file (UTF-8), and return its path; errors as `text`'s, and OSError."""
        with self._channel(vm) as channel:
            return channel.read().save(path, timestamps=timestamps)

    def clear(self, vm: str | None = None) -> None:
        """Forget the lines of a machine here; ``lab[vm].console.text()`` keeps its own. Errors as `text`'s."""
        with self._channel(vm) as channel:
            channel.read().clear()
            self.python = f"console.clear({json.dumps(channel.vm.name)})"

    def write(self, vm: str, text: str, end: str = "\n") -> None:
        """Type a line to a machine's serial port.

        Raises
        ------
        UsageError, VmError
            As `text`, and as `Console.write` of a lab's machine.
        """
        if not isinstance(text, str):
            raise UsageError(f"{text!r} cannot be typed; give a text")
        with self._channel(vm) as channel:
            machine = channel.vm
        machine.console.write(text + end)
        self.python = f"{variable(vm)}.console.write({json.dumps(text + end)})"
        self.status = f"{vm}: {len(text)} characters typed"

    # -- what the base asks for -----------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the tabs up to date and send what has come."""
        for channel in self._all():
            if (news := channel.news()) is not None:
                self.send(news)
        self.tabs = [_tab(channel) for channel in self._channels.values()]

    def picture_lines(self) -> list[str]:
        """Return the last lines of every console."""
        lines = []
        for channel in self._all():
            with channel.lock:
                tail = channel.read().text(timestamps=True).splitlines()[-12:]
            tab = _tab(channel)
            lines += [f"{tab['name']}: {tab['word']}", *(f"  {line}" for line in tail or ["no output yet"]), ""]
        return lines or ["no machine in this lab yet"]

    def close(self) -> None:
        """Take it away; machines and their consoles stay."""
        for channel in self.__dict__.get("_channels", {}).values():  # it may not have got so far
            channel.stop()
        super().close()

    # -- inside ---------------------------------------------------------------------------------------

    def _all(self) -> list[Channel]:
        """Open a channel to every machine that is there, and return them."""
        with self._making:
            if not self.lab.closed:
                there = (
                    [self._only] if self._only else [vm for vm in self.lab.members.values() if isinstance(vm, LabVm)]
                )
                for gone in [name for name, each in self._channels.items() if each.vm not in there]:
                    self._channels.pop(gone).stop()
                for vm in there:
                    if vm.name not in self._channels:
                        self._channels[vm.name] = Channel(vm)
            return list(self._channels.values())

    def _channel(self, vm: str | None) -> _Held:
        channels = {channel.vm.name: channel for channel in self._all()}
        name = next(iter(channels)) if vm is None and len(channels) == 1 else vm
        if name not in channels:
            raise UsageError(f"no console of {name!r}; there is {', '.join(channels) or 'no machine'}")
        return _Held(channels[name])

    def _since(self, vm: str, after: int) -> None:
        """Send what a window that was just opened does not have; the others have it and show nothing twice."""
        with self._channel(vm) as channel:
            self.send(channel.message(int(after), KEPT_LINES))

    def _fetch(self, vm: str, timestamps: bool) -> str:
        """Return all lines, for the browser to save."""
        name = json.dumps(vm)
        self.python = f"console.save({json.dumps(f'{vm}.txt')}, {name}{', timestamps=True' if timestamps else ''})"
        return self.text(vm, timestamps=bool(timestamps))


class _Held:
    """A channel, held while a ``with`` lasts."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __enter__(self) -> Channel:
        self._channel.lock.acquire()
        return self._channel

    def __exit__(self, *exc_info: object) -> None:
        self._channel.lock.release()


def _packed(line: Line) -> list[Any]:
    spans = [[span.text, f"{span.style.colour} {'bold' if span.style.bold else ''}".strip()] for span in line.spans]
    return [line.number, clock(line.time_s), spans]


def _tab(channel: Channel) -> dict[str, Any]:
    vm = channel.vm
    word = str(vm.state)
    note = ""
    if vm.state in _ENDED:
        status = "" if vm.exit_status is None else f", exit status {vm.exit_status}"
        note = f"{vm.name} is {vm.state}{status}{f': {vm.reason}' if vm.reason else ''}"
    return {"name": vm.name, "state": word, "word": word, "note": note, "can_type": word == "running"}
