"""One connected peer: its socket, its vectors and the messages that wait for it."""

from __future__ import annotations

import enum
import errno
import resource
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..ipc.parcels import ParcelQueue
from .packet import Packet

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Sequence

    from .events import FaultPlan, ServerTap
    from .leases import Lease
    from .packet import SharedFd
    from .policy import Credentials, Role

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM})
"""Errors that pass: too few descriptors, too many of them in flight (unix(7)), too little memory."""

FIRST_DELAY_S = 0.010
LAST_DELAY_S = 0.100

_MESSAGE_SPACE_BYTES = 384
"""Send buffer for one message (measured, Linux 6.18: it takes 768 bytes, and the kernel doubles what is asked for)."""

_LEAST_BUFFERED, _MOST_BUFFERED = 64, 256
_SHARE_OF_FLIGHT = 64

TURN_MESSAGES = 256
"""Sent to one peer before the others get a turn."""


class Progress(enum.Enum):
    """How a turn of sending ended."""

    DONE = "everything is sent"
    MORE = "the socket is full, or the turn is over"
    SHORT = "the kernel is short of descriptors or memory"
    PAUSED = "the fault plan delays what follows"
    CUT = "the fault plan ends the connection here"


@dataclass(frozen=True, slots=True)
class Pause:
    """In the queue of a peer: what follows waits."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class Cut:
    """In the queue of a peer: some bytes of a message, and then the end."""

    packet: Packet
    size_bytes: int


class Connection:
    """A peer's end as the server sees it.

    Attributes
    ----------
    queue
        What waits for this peer alone: its introduction, and what had to be kept for it.
    cursor
        Number of the message of the news that comes next for it, behind the queue.
    later
        What waits behind a pause or a cut of the fault plan, which comes first in it.
    settled
        The introduction has been sent whole.
    writing
        The loop watches for room in the socket.
    retry
        Timer of the next try after a shortage or a pause.
    broken
        Why it is about to be disconnected; nothing is sent any more.
    sent
        Messages handed to the kernel.
    """

    def __init__(self, sock: socket.socket, who: Credentials, role: Role, *, shielded: bool) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _send_buffer_bytes())
        self.sock = sock
        self.fileno = sock.fileno()  # for the loop: given a socket it would write out its repr, 25 us each time
        self.peer_id = -1
        self.pid, self.uid, _ = who
        self.role = role
        self.shielded = shielded
        self.lease: Lease | None = None
        self.vectors: list[SharedFd] = []
        self.queue = ParcelQueue()
        self.cursor = 0
        self.later: deque[Packet | Pause | Cut] = deque()
        self.queue_limit = 0
        self.settled = False
        self.writing = False
        self.retry: asyncio.TimerHandle | None = None
        self.delay_s = FIRST_DELAY_S
        self.broken: str | None = None
        self.sent = 0
        self._asked = 0

    def enqueue(self, packets: Sequence[Packet], faults: FaultPlan) -> None:
        """Queue messages as a fault plan wants them; without a plan they go straight into :attr:`queue`."""
        for packet in packets:
            for item in self._distorted(packet, faults):
                if self.later or not isinstance(item, Packet):
                    self.later.append(item)
                else:
                    self.queue.put([item])

    def send_turn(self, news: ParcelQueue, first: int, tap: ServerTap | None) -> Progress:
        """Send what the socket takes: of the queue, then of the news.

        Parameters
        ----------
        news, first
            What all peers hear, and the number of the first message in it.
        tap
            Told of every message that went.

        Raises
        ------
        OSError
            When the connection is broken.
        """
        queue = self.queue
        source, start = (queue, 0) if queue else (news, self.cursor - first)
        if start < len(source):
            try:
                sent = source.send(self.fileno, start, TURN_MESSAGES)
            except BlockingIOError:
                return Progress.MORE
            except OSError as error:
                if error.errno in SHORTAGES:
                    return Progress.SHORT
                raise
            self.sent += sent
            self.delay_s = FIRST_DELAY_S
            if tap is not None:
                now_ns = time.monotonic_ns()
                for packet in cast("list[Packet]", source.parcels[start : start + sent]):
                    tap.message(now_ns, self.peer_id, packet.value, packet.fd is not None)
            if source is queue:
                queue.forget(0, sent)
            else:
                self.cursor += sent
            if queue or self.cursor - first < len(news):
                return Progress.MORE  # full, short of something, which the next turn will tell, or others have a turn
        return self._past_the_queue() if self.later else Progress.DONE

    def go_on(self) -> None:
        """End the pause that comes next."""
        self.later.popleft()
        while self.later and isinstance(self.later[0], Packet):
            self.queue.put([cast("Packet", self.later.popleft())])

    def next_delay_s(self) -> float:
        """Return how long to wait after a shortage: 10 ms, doubled up to 100 ms."""
        delay_s, self.delay_s = self.delay_s, min(2 * self.delay_s, LAST_DELAY_S)
        return delay_s

    def close(self) -> None:
        """Close the socket and let go of all descriptors."""
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None
        self.sock.close()
        self.queue = ParcelQueue()
        self.later.clear()
        self.vectors = []
        self.lease = None

    def _past_the_queue(self) -> Progress:
        item = self.later[0]
        if isinstance(item, Pause):
            return Progress.PAUSED
        assert isinstance(item, Cut)
        if item.size_bytes:
            part = Packet(item.packet.value, item.packet.fd, item.size_bytes)
            part.send(self.sock)
        return Progress.CUT

    def _distorted(self, packet: Packet, faults: FaultPlan) -> Iterable[Packet | Pause | Cut]:
        """Give what becomes of a message under a fault plan."""
        delivery = faults.deliver(self.peer_id, self._asked, packet.value, packet.fd is not None)
        self._asked += 1
        if delivery.value is not None or delivery.leave_out_fd:
            value = packet.value if delivery.value is None else delivery.value
            packet = Packet(value, None if delivery.leave_out_fd else packet.fd)
        if delivery.delay_s > 0:
            yield Pause(delivery.delay_s)
        if delivery.cut_after_bytes is not None:
            yield Cut(packet, delivery.cut_after_bytes)
        else:
            yield from [packet] * delivery.copies


def _send_buffer_bytes() -> int:
    """Return a socket's share of the descriptors in flight.

    What was sent and not read counts against the open-file limit, for all processes of a user together (unix(7),
    ETOOMANYREFS): with the default of 278 messages, four peers that do not read would use up a limit of 1024 and
    keep everybody waiting. A larger buffer saves turns of the loop.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MESSAGE_SPACE_BYTES * max(_LEAST_BUFFERED, min(soft // _SHARE_OF_FLIGHT, _MOST_BUFFERED))


def why_gone(sock: socket.socket, flags: int = 0) -> tuple[str, str] | None:
    """Return why the client counts as gone, as a kind and in a sentence, or None when it does not.

    A client only listens: whatever can be read from it means that it left (QEMU's contrib server
    sees it so too, 7.2). It also left when it no longer reads, which a send of nothing shows.
    """
    try:
        data = sock.recv(1, flags)
    except BlockingIOError:
        try:
            sock.send(b"")
        except OSError as error:
            return "does not read", f"it does not read: {error.strerror}"
        return None
    except OSError as error:
        return "broken", f"its connection broke: {error.strerror}"
    if not data:
        return "closed", "it closed the connection"
    return "sent bytes", f"it sent a byte, 0x{data[0]:02x}; clients only listen"
