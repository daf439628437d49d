"""Faults to inject into what a server says, for teaching and tests. Without them nothing here runs.

:data:`CATALOGUE` says of each what it does and what is to be expected; ``ivshmem-server --faults`` prints
it. Several can be joined in :class:`Faults`. Some of them crash real QEMU or hang it for ever (measured
with 7.2): the catalogue says which, and those are for our own peers only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from ..wire.messages import MAX_PEER_ID, MESSAGE_BYTES
from .events import Delivery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .events import FaultPlan

VERSION, OWN_ID, MEMORY, FIRST_VECTOR = range(4)
"""Indices of a peer's first messages."""

_AS_IT_IS = Delivery()


@dataclass(frozen=True, slots=True)
class _Chosen(ABC):
    """Which messages a fault is about.

    Parameters
    ----------
    peer_id
        Messages to this peer; None: to every peer.
    index
        The index-th message to it, from 0; None: every message.
    """

    peer_id: int | None = None
    index: int | None = None

    def deliver(self, peer_id: int, index: int, value: int, has_fd: bool) -> Delivery:
        """Spoil the chosen messages, and leave the others as they are."""
        chosen = self.peer_id in {None, peer_id} and self.index in {None, index}
        return self._spoilt() if chosen else _AS_IT_IS

    @abstractmethod
    def _spoilt(self) -> Delivery: ...


@dataclass(frozen=True, slots=True)
class Delay(_Chosen):
    """Every chosen message waits for `seconds`, and what follows it too."""

    seconds: float = 0.1

    def _spoilt(self) -> Delivery:
        return Delivery(delay_s=self.seconds)


@dataclass(frozen=True, slots=True)
class SlowAttach(_Chosen):
    """The peer id comes `seconds` late: until then a device that is there already has none (IVPosition -1)."""

    index: int | None = OWN_ID
    seconds: float = 1.0

    def _spoilt(self) -> Delivery:
        return Delivery(delay_s=self.seconds)


@dataclass(frozen=True, slots=True)
class Drop(_Chosen):
    """The chosen message is never sent."""

    index: int | None = FIRST_VECTOR

    def _spoilt(self) -> Delivery:
        return Delivery(copies=0)


@dataclass(frozen=True, slots=True)
class Duplicate(_Chosen):
    """The chosen message is sent `copies` times."""

    index: int | None = FIRST_VECTOR
    copies: int = 2

    def _spoilt(self) -> Delivery:
        return Delivery(copies=self.copies)


@dataclass(frozen=True, slots=True)
class Cut(_Chosen):
    """The connection ends after `after_bytes` of the chosen message's 8."""

    index: int | None = MEMORY
    after_bytes: int = 4

    def _spoilt(self) -> Delivery:
        return Delivery(cut_after_bytes=self.after_bytes)


@dataclass(frozen=True, slots=True)
class LeaveOutFd(_Chosen):
    """The chosen message comes without its descriptor."""

    index: int | None = MEMORY

    def _spoilt(self) -> Delivery:
        return Delivery(leave_out_fd=True)


@dataclass(frozen=True, slots=True)
class WrongVersion(_Chosen):
    """The server says that it speaks another `version` of the protocol."""

    index: int | None = VERSION
    version: int = 1

    def _spoilt(self) -> Delivery:
        return Delivery(value=self.version)


@dataclass(frozen=True, slots=True)
class IdCollision(_Chosen):
    """The peer is told that its id is `taken`, which is that of another."""

    index: int | None = OWN_ID
    taken: int = 0

    def _spoilt(self) -> Delivery:
        return Delivery(value=self.taken)


@dataclass(frozen=True, slots=True)
class Faults:
    """Several faults at once: delays add up, copies multiply, otherwise the last one counts."""

    plans: Sequence[FaultPlan]

    def deliver(self, peer_id: int, index: int, value: int, has_fd: bool) -> Delivery:
        """Ask all of them."""
        delay_s, copies, leave_out_fd = 0.0, 1, False
        cut: int | None = None
        said: int | None = None
        for plan in self.plans:
            each = plan.deliver(peer_id, index, value, has_fd)
            delay_s += each.delay_s
            copies *= each.copies
            leave_out_fd |= each.leave_out_fd
            cut = cut if each.cut_after_bytes is None else each.cut_after_bytes
            said = said if each.value is None else each.value
        return Delivery(delay_s, copies, cut, leave_out_fd, said)


@dataclass(frozen=True, slots=True)
class Churn:
    """Peers that come and go: `rounds` times one joins `path`, reads what is there, and leaves; no fault of the server's."""

    rounds: int = 100
    pause_s: float = 0.0

    async def run(self, path: str) -> None:
        """Do it; ends early when the server is gone."""
        loop = asyncio.get_running_loop()
        for _ in range(self.rounds):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
                try:
                    await loop.sock_connect(sock, path)
                    if not await loop.sock_recv(sock, MESSAGE_BYTES):
                        return
                except ConnectionResetError:
                    continue
                except OSError:
                    return
                with contextlib.suppress(BlockingIOError):  # plain reads: the kernel closes the descriptors
                    while sock.recv(4096):
                        pass
            await asyncio.sleep(self.pause_s)


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the catalogue.

    Attributes
    ----------
    name
        Its name on the command line.
    plan
        The class that does it.
    does
        What is done.
    symptom
        What our own peer (:class:`~ivshmem_lab.peer.peer.Peer`) shows.
    qemu
        What real QEMU 7.2 does, from what was measured with it.
    harms_qemu
        QEMU crashes or hangs: never aim it at a machine that you want to keep.
    """

    name: str
    plan: type[_Chosen | Churn]
    does: str
    symptom: str
    qemu: str
    harms_qemu: bool = False


CATALOGUE: Final = (
    Fault(
        "delay",
        Delay,
        "every message waits 0.1 s, and what follows it too",
        "joining takes as much longer, and vectors may still come after connect() returned; "
        "beyond the time limit: PeerError, not introduced in time",
        "device_add and the start of the machine block meanwhile",
    ),
    Fault(
        "slow-attach",
        SlowAttach,
        "the peer id comes 1 s late",
        "joining takes as much longer: PeerError, the peer id did not come, beyond the time limit. A device "
        "that attaches in the background shows its guest IVPosition -1 until then; ours waits (5 s at most)",
        "device_add and the start of the machine block meanwhile, so no guest sees it",
    ),
    Fault(
        "drop",
        Drop,
        "the first vector that the peer hears of is lost",
        "one vector too few, and the others of that peer count one lower; UnknownPeerError for the last one. "
        "index=1: RemoteProtocolError, peer id; index=2: PeerError, the shared memory did not come",
        "the vector is dead and nothing says so, as with QEMU's own server when a socket is full; "
        "without id or memory it waits for ever",
        harms_qemu=True,
    ),
    Fault(
        "duplicate",
        Duplicate,
        "the first vector that the peer hears of comes twice",
        "one vector too many, and the others of that peer count one higher",
        "`Too many eventfd received, device has N vectors`; a second departure frees memory twice and aborts it",
        harms_qemu=True,
    ),
    Fault(
        "cut",
        Cut,
        "the connection ends after 4 of the 8 bytes that bring the memory",
        "RemoteProtocolError, message: the server closed after 4 of a message's 8 bytes",
        "an endless loop at 100 % CPU inside device_add, its monitor dead",
        harms_qemu=True,
    ),
    Fault(
        "no-fd",
        LeaveOutFd,
        "the memory comes without its descriptor",
        "RemoteProtocolError, shared memory. index=3 or more: that vector becomes a departure; "
        "of the peer itself: RemoteProtocolError, departure",
        "`can't determine size of shared memory sent by server: Bad file descriptor`; a vector that became "
        "a departure frees memory twice when that peer leaves, and aborts it",
        harms_qemu=True,
    ),
    Fault(
        "wrong-version",
        WrongVersion,
        "the server says version 1",
        "RemoteProtocolError, version: the server speaks version 1; this client speaks 0",
        "`server sent version 1, expecting 0`; device_add fails, the machine goes on",
    ),
    Fault(
        "id-collision",
        IdCollision,
        "the peer is told id 0, which another has",
        "it takes the other's vectors for its own and its own for a third peer's: it steals the interrupts of "
        "the other. When that one leaves: RemoteProtocolError, departure",
        "the same theft, one must expect; an id that comes back with other descriptors corrupts its heap",
        harms_qemu=True,
    ),
    Fault(
        "churn",
        Churn,
        "100 peers join and leave, one after the other",
        "`peers` is as before; each came and went, and ids go up by 100",
        "after any departure, unplugging the device crashes it (SIGSEGV), unless the server shields it",
        harms_qemu=True,
    ),
)
"""All faults, with their expected symptoms: from here the documentation is printed."""

_FIELDS = {"peer": "peer_id"}  # names on the command line that differ from the classes'
_LIMITS: dict[str, tuple[float, float]] = {
    "peer_id": (0, MAX_PEER_ID),
    "index": (0, 2**31),
    "seconds": (0, 3600),
    "copies": (0, 1000),
    "after_bytes": (0, MESSAGE_BYTES - 1),
    "version": (-(2**63), 2**63 - 1),
    "taken": (0, MAX_PEER_ID),
    "rounds": (1, 10**9),
    "pause_s": (0, 3600),
}


def parse_fault(text: str) -> FaultPlan | Churn:
    """Read a fault as the command line has it.

    Raises
    ------
    UsageError
        When there is no such fault, or it has no such setting.

    Examples
    --------
    >>> parse_fault("drop:peer=2,index=4")
    Drop(peer_id=2, index=4)
    >>> parse_fault("slow-attach:seconds=2.5")
    SlowAttach(peer_id=None, index=1, seconds=2.5)
    """
    name, _, settings = text.partition(":")
    plan = next((fault.plan for fault in CATALOGUE if fault.name == name), None)
    if plan is None:
        raise UsageError(f"fault {name!r} is not known; there are {', '.join(fault.name for fault in CATALOGUE)}")
    given: dict[str, float] = {}
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        field = _FIELDS.get(key, key)
        known = plan.__dataclass_fields__
        if field not in known:
            shown = ", ".join({v: k for k, v in _FIELDS.items()}.get(each, each) for each in known)
            raise UsageError(f"fault {name!r} has no setting {key!r}; it has {shown}")
        given[field] = _number(name, key, value, whole="float" not in str(known[field].type))
    return plan(**given)  # type: ignore[arg-type]  # the fields were looked up in the class


def _number(name: str, key: str, text: str, *, whole: bool) -> float:
    low, high = _LIMITS[_FIELDS.get(key, key)]
    try:
        number = int(text, 0) if whole else float(text)
    except ValueError:
        number = high + 1
    if not low <= number <= high:
        kind = "a whole number" if whole else "a number"
        raise UsageError(f"fault {name!r}: {key}={text} is not allowed; {kind} from {low:g} to {high:g}")
    return number


def describe_faults() -> str:
    """Print the catalogue: what each fault does, and what is to be expected."""
    parts = ["Faults for --fault NAME[:SETTING=VALUE,...], each off by default:\n"]
    for fault in CATALOGUE:
        settings = (
            {value: key for key, value in _FIELDS.items()}.get(each, each) for each in fault.plan.__dataclass_fields__
        )
        harm = " (harms it)" if fault.harms_qemu else ""
        parts.append(
            f"\n{fault.name}  [{', '.join(settings)}]\n"
            f"  does:      {fault.does}\n  our peer:  {fault.symptom}\n  QEMU 7.2{harm}: {fault.qemu}\n"
        )
    return "".join(parts)
