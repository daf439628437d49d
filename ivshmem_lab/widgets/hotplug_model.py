"""A hot-plug or an unplug as it goes, step by step, and what the other peers see of it: values without I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from ..server.events import MessageWithheld, PeerDeparted, PeerJoined
from ..vm.device import DeviceState

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from ..server.events import PeerInfo, ServerEvent
    from ..vm.device import Step


class Way(StrEnum):
    """Into a machine, or out of it."""

    PLUG = "plug"
    UNPLUG = "unplug"


class Phase(StrEnum):
    """How far it is as a whole."""

    WORKING = "working"
    WAITING = "waiting"  # for the guest, within the time limit
    SILENT = "silent"  # the time is over, and the guest may still answer
    DONE = "done"
    GIVEN_UP = "given up"
    FAILED = "failed"


class Mark(StrEnum):
    """How a stage is drawn."""

    DONE = "done"
    NOW = "now"
    TODO = "todo"
    FAILED = "failed"


ENDED = frozenset({Phase.DONE, Phase.GIVEN_UP, Phase.FAILED})
WAITING = frozenset({Phase.WAITING, Phase.SILENT})

_LAST = {Way.PLUG: DeviceState.SEEN, Way.UNPLUG: DeviceState.ABSENT}
_BY_STATE = {
    Way.PLUG: {
        DeviceState.READY: "ready",
        DeviceState.CONNECTED: "open",
        DeviceState.PLUGGED: "plugged",
        DeviceState.SEEN: "guest",
    },
    Way.UNPLUG: {
        DeviceState.DELETED: "guest",
        DeviceState.GUARDED: "guarded",
        DeviceState.ABSENT: "closed",
    },
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is plugged where.

    Attributes
    ----------
    vm, source
        Names in the lab; the source is the path of a server outside of it.
    device_id
        Its id in the machine; empty before it has one.
    peers
        Whether a server stands behind it, and so others hear of it.
    guards
        Whether the machine needs its descriptors drained and guarded (real QEMU).
    """

    vm: str
    source: str
    device_id: str = ""
    peers: bool = True
    guards: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """One line of the list of steps."""

    key: str
    label: str


def stages(way: Way, subject: Subject, peer_id: int | None = None) -> tuple[Stage, ...]:
    """Return the steps that lie ahead, in order."""
    peer = "the peer" if peer_id is None else f"peer {peer_id}"
    if way is Way.PLUG:
        return (
            Stage("ready", f"{'Server' if subject.peers else 'Memory'} ready"),
            Stage("open", f"Chardev open, {peer} joins" if subject.peers else "Memory object added"),
            Stage("plugged", "device_add accepted"),
            Stage("guest", "Seen by the guest"),
        )
    settled = (Stage("settled", "All notices read"),) if subject.peers else ()
    guarded = (Stage("guarded", "Drained and guarded"),) if subject.guards else ()
    return (
        *settled,
        Stage("asked", "device_del accepted"),
        Stage("guest", "DEVICE_DELETED"),
        *guarded,
        Stage("closed", f"Chardev closed, {peer} leaves" if subject.peers else "Memory object removed"),
    )


def stage_of(way: Way, step: Step) -> str | None:
    """Name the stage that a step ends; None for one that is no stage of its own."""
    command = "" if step.command is None else step.command.get("execute", "")
    if command == "device_del":
        return "asked"
    if command == "system_reset":
        return None
    if way is Way.UNPLUG and not command and step.state in {DeviceState.PLUGGED, DeviceState.SEEN}:
        return None if "given up" in step.what else "settled"
    return _BY_STATE[way].get(step.state)


@dataclass(slots=True)
class Operation:
    """One plugging in or out; times are `time.monotonic`, in seconds.

    Attributes
    ----------
    way, subject
        What is done to what.
    begun_s
        When it was asked for.
    begun_at_s
        The same moment as `time.time`.
    limit_s
        How long the guest may take.
    phase : Phase
    error : str
        Why it failed, in QEMU's words where they are QEMU's.
    """

    way: Way
    subject: Subject
    begun_s: float
    begun_at_s: float
    limit_s: float
    phase: Phase = Phase.WORKING
    error: str = ""
    peer_id: int | None = None
    ended_s: float | None = None
    _steps: list[Step] = field(default_factory=list)
    _asked_s: float | None = None
    _earlier: frozenset[str] = frozenset()

    def note(self, step: Step) -> None:
        """Take a step that is done."""
        self._steps.append(step)
        if stage_of(self.way, step) == self._asking_stage and not step.error:
            self.wait(step.done_s)
        elif step.state is DeviceState.DELETED:
            self.phase = Phase.WORKING  # also when it had been given up
            self.error = ""
        elif step.state is _LAST[self.way] and not step.error:
            self._end(Phase.DONE, step.done_s)

    def wait(self, now_s: float) -> None:
        """Begin to wait for the guest, or begin again."""
        self._asked_s = now_s
        self.phase = Phase.WAITING

    def asked_before(self, now_s: float) -> None:
        """Note that the guest was asked by an earlier unplug, and has only to be waited for."""
        self._earlier = frozenset({"settled", "asked"})
        self.wait(now_s)

    def silent(self) -> None:
        """Note that the guest did not answer in time."""
        if self.phase not in ENDED:
            self.phase = Phase.SILENT

    def give_up(self, now_s: float) -> None:
        """Wait for the guest no longer."""
        if self.phase in WAITING:
            self._end(Phase.GIVEN_UP, now_s)

    def fail(self, error: str, now_s: float) -> None:
        """Note that it cannot go on, and why."""
        if self.phase not in ENDED:
            self.error = error
            self._end(Phase.FAILED, now_s)

    @property
    def steps_taken(self) -> int:
        """Steps so far."""
        return len(self._steps)

    @property
    def title(self) -> str:
        """Such as ``"Unplug bob / board"``."""
        return f"{self.way.capitalize()} {self.subject.vm} / {self.subject.source}"

    def sentence(self, now_s: float) -> str:
        """Say in one sentence how it stands."""
        what = f"{self.subject.vm} / {self.subject.source}"
        match self.phase:
            case Phase.WORKING:
                return f"{what}: {'plugging in' if self.way is Way.PLUG else 'unplugging'}"
            case Phase.WAITING:
                return f"{what}: waiting for the guest, {self._waited(now_s):.1f} of {self.limit_s:g} s"
            case Phase.SILENT:
                return f"{what}: no answer from the guest in {self.limit_s:g} s"
            case Phase.DONE:
                return f"{what}: {'plugged in and seen by the guest' if self.way is Way.PLUG else 'unplugged'}"
            case Phase.GIVEN_UP:
                return f"{what}: given up waiting; it stays plugged" + (
                    ", and goes if the guest lets it go later" if self.way is Way.UNPLUG else ""
                )
            case Phase.FAILED:
                return f"{what}: {self.way.value} failed"

    def way_back(self) -> str:
        """Say what can be done now; empty where nothing has to be."""
        match self.phase, self.way:
            case Phase.SILENT, Way.UNPLUG:
                return "Give up keeps it plugged; Force resets the guest."
            case Phase.WAITING, Way.UNPLUG:
                return "No answer yet. Give up keeps it plugged; Force resets the guest."
            case ((Phase.WAITING | Phase.SILENT), Way.PLUG):
                return "It is plugged in; the guest has not looked yet. Give up stops waiting and leaves it plugged."
            case Phase.FAILED, Way.PLUG:
                return (
                    f"Nothing is left of it in {self.subject.vm}. Mend what it says, or choose another source or bus."
                )
            case Phase.FAILED, Way.UNPLUG:
                return "Unplug again when that is mended; if the machine has ended, define it anew."
        return ""

    def question(self) -> str:
        """Say what Force would cost."""
        return (
            f"Reset {self.subject.vm}? Its guest starts anew: what its programs hold in their memory is lost, unsaved "
            f"files too. The shared memory of {self.subject.source} stays, and so do {self.subject.vm}'s other devices."
        )

    def view(self, now_s: float) -> dict[str, Any]:
        """Return all of it for a front end, as JSON values."""
        return {
            "way": self.way.value,
            "vm": self.subject.vm,
            "source": self.subject.source,
            "device_id": self.subject.device_id,
            "has_peers": self.subject.peers,
            "phase": self.phase.value,
            "title": self.title,
            "begun_at_s": self.begun_at_s,
            "stages": self._stages(now_s),
            "waited_s": round(self._waited(now_s), 1) if self.phase in WAITING else None,
            "limit_s": self.limit_s,
            "error": self.error,
            "way_back": self.way_back(),
            "can_give_up": self.phase in WAITING,
            "can_force": self.phase in WAITING and self.way is Way.UNPLUG,
            "can_wait": self.phase is Phase.SILENT,
            "question": self.question() if self.phase in WAITING and self.way is Way.UNPLUG else "",
            "qmp": self.messages(),
            "sentence": self.sentence(now_s),
        }

    def messages(self) -> list[dict[str, str]]:
        """Return the QMP messages in the order they went: direction, name, time and the whole JSON."""
        found = []
        for step in self._steps:
            sent_s = step.done_s - step.took_s
            if step.command is not None:
                name = str(step.command.get("execute", ""))
                found.append(self._message("sent", name, sent_s, step.command))
            if step.error and step.command is not None:
                found.append(self._message("got", "error", step.done_s, {"error": {"desc": step.error}}))
            elif isinstance(step.answer, dict):
                name = str(step.answer.get("event", "return"))
                found.append(self._message("got", name, step.done_s, step.answer))
        return found

    # -- inside ---------------------------------------------------------------------------------------

    @property
    def _asking_stage(self) -> str:
        return "plugged" if self.way is Way.PLUG else "asked"

    def _end(self, phase: Phase, now_s: float) -> None:
        self.phase = phase
        self.ended_s = now_s

    def _waited(self, now_s: float) -> float:
        return 0.0 if self._asked_s is None else min(now_s - self._asked_s, self.limit_s)

    def _message(self, direction: str, name: str, at_s: float, said: Mapping[str, Any]) -> dict[str, str]:
        return {
            "direction": direction,
            "name": name,
            "at": f"{1e3 * (at_s - self.begun_s):.1f} ms",
            "json": json.dumps(said, indent=2, default=str),
        }

    def _stages(self, now_s: float) -> list[dict[str, str]]:
        ended: dict[str, Step] = {}
        for step in self._steps:
            key = stage_of(self.way, step)
            if key is not None and not step.error:
                ended.setdefault(key, step)
        now_is = next(
            (each.key for each in self._ahead() if each.key not in ended and each.key not in self._earlier), None
        )
        rows = []
        for each in self._ahead():
            row = {"key": each.key, "label": each.label, "mark": Mark.TODO.value, "time": ""}
            if each.key in ended:
                row["mark"] = Mark.DONE.value
                row["time"] = f"+{1e3 * (ended[each.key].done_s - self.begun_s):.1f} ms"
            elif each.key in self._earlier:
                row["mark"], row["time"] = Mark.DONE.value, "earlier"
            elif each.key == now_is and self.phase is Phase.FAILED:
                row["mark"] = Mark.FAILED.value
            elif each.key == now_is and self.phase not in ENDED:
                row["mark"] = Mark.NOW.value
                if self.phase in WAITING:
                    row["label"] = "Waiting for the guest"
                    row["time"] = f"{self._waited(now_s):.1f} of {self.limit_s:g} s"
            rows.append(row)
        return rows

    def _ahead(self) -> tuple[Stage, ...]:
        return stages(self.way, self.subject, self.peer_id)


@dataclass(frozen=True, slots=True)
class Seen:
    """What one peer knows of another: its name, its id, a mark (present, absent, pending, withheld, self) and words."""

    name: str
    peer_id: int
    mark: str
    words: str


def seen_by_others(
    about: int,
    peers: Mapping[int, PeerInfo],
    events: Sequence[tuple[float, ServerEvent]],
    names: Mapping[int, str],
    heard: Mapping[int, Collection[int]],
) -> list[Seen]:
    """Return what every connected peer of a server has been told of one of them.

    Parameters
    ----------
    about
        The peer that came or left.
    peers
        Those who are connected.
    events
        What the server told, oldest first (`LabServer.events`).
    names
        Names of those who have one in the lab.
    heard
        Host peers: the ids that each has heard of, itself.
    """
    there = about in peers
    known = there or any(isinstance(event, PeerJoined | PeerDeparted) and event.peer_id == about for _, event in events)
    if not known:
        return []
    withheld = {event.peer_id for _, event in events if isinstance(event, MessageWithheld) and event.about == about}
    rows = []
    for peer_id, info in sorted(peers.items()):
        name = names.get(peer_id, f"pid {info.pid}")
        if peer_id == about:
            rows.append(Seen(name, peer_id, "self", "itself"))
        elif peer_id in withheld and not there:
            rows.append(Seen(name, peer_id, "withheld", f"“peer {about} left” withheld"))
        elif (peer_id in heard and (about in heard[peer_id]) != there) or info.queued:
            rows.append(Seen(name, peer_id, "pending", f"{info.queued} messages on their way"))
        elif there:
            rows.append(Seen(name, peer_id, "present", f"peer {about} present"))
        else:
            rows.append(Seen(name, peer_id, "absent", f"peer {about} left"))
    return rows
