"""When what is sent: newcomers at once and in few system calls, departures after a moment.

Most of what is said goes to everybody: it is prepared once, as *news*, and every peer has a cursor in them, so that a
message costs no work of ours per receiver. What one peer alone is to hear, such as its introduction, stands in a
queue of its own, which comes before the rest of the news.

Newcomers that are accepted in one turn are announced together: first to those who were there, then they hear
of everybody. Departures are gathered for 1 ms (up to 20 ms when sending to all takes
longer), so that a crowd's leaving goes out in batches.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..ipc.parcels import ParcelQueue
from .connection import Pause, Progress
from .watch import Watch

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from .connection import Connection
    from .events import FaultPlan, ServerTap
    from .packet import Packet

_SHORTEST_GATHERING_S = 0.001
_LONGEST_GATHERING_S = 0.020
_MOST_NEWS = 8192  # messages kept for those who are behind
_GATHERING_SHARE = 4  # gather so many times as long as the last sending to all took


class Outbox:
    """Sends what the peers of one server are to hear.

    Parameters
    ----------
    loop
        The server's loop.
    tap, faults
        As in :class:`~ivshmem_lab.server.server.Server`.
    on_settled
        Called once per connection, when all that was queued for it is sent.
    on_broken
        Called soon after a connection broke, with the kind and the sentence why.
    on_readable
        Called when there is something to read from a peer that :attr:`watch` watches.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tap: ServerTap | None,
        faults: FaultPlan | None,
        on_settled: Callable[[Connection], None],
        on_broken: Callable[[Connection, str, str], None],
        on_readable: Callable[[Connection], None],
    ) -> None:
        self.queue_high_water = 0
        self.watch = Watch(loop, on_readable, self._send)
        self._loop = loop
        self._tap = tap
        self._faults = faults
        self._on_settled = on_settled
        self._on_broken = on_broken
        self._news = ParcelQueue()
        self._first = 0  # number of the first message in the news
        self._audience: dict[Connection, None] = {}  # who hears the news
        self._apart: dict[Connection, None] = {}  # observers that have not heard all yet
        self._timer: asyncio.TimerHandle | None = None
        self._next_at = 0.0

    @property
    def _end(self) -> int:
        return self._first + len(self._news)

    def waiting(self, connection: Connection) -> int:
        """Return how many messages wait for a peer."""
        news = self._end - connection.cursor if connection in self._audience else 0
        return len(connection.queue) + len(connection.later) + news

    def admit(self, connection: Connection, introduction: Sequence[Packet]) -> None:
        """Take in a newcomer with what it hears first; from here on it hears the news, unless it observes."""
        connection.cursor = self._end
        if connection.role == "observer":
            self._apart[connection] = None
        else:
            self._audience[connection] = None
        if self._faults is None:
            connection.queue.put(introduction)
        else:
            connection.enqueue(introduction, self._faults)

    def post(self, connections: Sequence[Connection], packets: Sequence[Packet], void: Sequence[Packet] = ()) -> None:
        """Have some hear the same messages; :meth:`send_now` or :meth:`send_soon` follows.

        Parameters
        ----------
        connections
            Who.
        packets
            What: announcements of a newcomer, or a goodbye.
        void
            With a goodbye: what was announced of who left. A peer to which none of it went yet hears neither,
            so that a crowd's coming and going does not pile up, with descriptors, for one that does not read.
        """
        if self._faults is not None:
            for connection in connections:
                connection.enqueue(packets, self._faults)
            return
        others = self._spare(void) if void else set()
        if len(connections) < len(self._audience):
            others |= self._audience.keys() - set(connections)
        for connection in others:
            self._set_apart(connection)
        self._news.put(packets)
        for connection in others:
            connection.cursor = self._end  # it does not hear this

    def send_now(self) -> None:
        """Send all that waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        begun = time.monotonic()
        end = self._end
        for connection in [*self._audience, *self._apart]:
            if connection.cursor != end or connection.queue or connection.later:
                self._weigh(connection)
                if not connection.writing:  # else it is full, and is served when it has room
                    self._send(connection)
        self._forget_old_news()
        ended = time.monotonic()
        gathering_s = _GATHERING_SHARE * (ended - begun)
        self._next_at = ended + min(max(gathering_s, _SHORTEST_GATHERING_S), _LONGEST_GATHERING_S)

    def send_soon(self) -> None:
        """Send what waits for all, now or after a moment."""
        if self._timer is not None:
            return
        delay_s = self._next_at - time.monotonic()
        if delay_s <= 0:
            self.send_now()
        else:
            self._timer = self._loop.call_later(delay_s, self.send_now)

    def forget(self, connection: Connection) -> None:
        """Stop everything about a connection."""
        self._audience.pop(connection, None)
        self._apart.pop(connection, None)
        self._want_room(connection, writing=False)
        if connection.retry is not None:
            connection.retry.cancel()
            connection.retry = None

    def close(self) -> None:
        """Stop."""
        self.watch.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._news = ParcelQueue()
        self._audience.clear()
        self._apart.clear()

    def _set_apart(self, connection: Connection) -> None:
        """Move what a peer has still to hear of the news into its own queue."""
        if connection.cursor < self._end:
            connection.queue.put_rest(self._news, connection.cursor - self._first)
        connection.cursor = self._end

    def _spare(self, void: Sequence[Packet]) -> set[Connection]:
        """Take what is void back from all to whom it did not go yet; return those to whom none of it went."""
        start, stop = self._news.find(void)
        for connection in self._audience:
            if connection.cursor - self._first < stop:
                self._set_apart(connection)
        spared = set()
        for connection in self._audience:
            if connection.queue:
                start, stop = connection.queue.find(void)
                if start < stop:
                    connection.queue.forget(start, stop)
                    if stop - start == len(void):
                        spared.add(connection)
        return spared

    def _forget_old_news(self) -> None:
        """Forget what everybody has heard; peers that are far behind get the rest into queues of their own."""
        heard = min((connection.cursor for connection in self._audience), default=self._end)
        if len(self._news) > _MOST_NEWS:
            heard = self._end - _MOST_NEWS // 2
            for connection in self._audience:
                if connection.cursor < heard:
                    self._set_apart(connection)
        elif heard < self._end and heard - self._first < _MOST_NEWS // 2:
            return  # not worth moving the rest
        self._news.forget(0, heard - self._first)
        self._first = heard

    def _weigh(self, connection: Connection) -> None:
        """Note how much waits for a peer, and break with one for which too much does."""
        waiting = self.waiting(connection)
        if waiting > self.queue_high_water:
            self.queue_high_water = waiting
        if waiting > connection.queue_limit and connection.broken is None:
            self._break(connection, "queue full", f"{waiting} messages wait for it, more than {connection.queue_limit}")

    def _send(self, connection: Connection) -> None:
        if connection.broken is not None or connection.retry is not None:
            return
        try:
            progress = connection.send_turn(self._news, self._first, self._tap)
        except OSError as error:
            self._break(connection, "broken", f"its connection broke: {error.strerror}")
            return
        self._want_room(connection, writing=progress is Progress.MORE)
        if progress is Progress.SHORT:
            connection.retry = self._loop.call_later(connection.next_delay_s(), self._retry, connection)
        elif progress is Progress.PAUSED:
            pause = connection.later[0]
            assert isinstance(pause, Pause)
            connection.retry = self._loop.call_later(pause.delay_s, self._end_pause, connection)
        elif progress is Progress.CUT:
            self._break(connection, "cut", "the fault plan cut its connection")
        elif progress is Progress.DONE:
            self._apart.pop(connection, None)
            if not connection.settled:
                connection.settled = True
                self._on_settled(connection)

    def _retry(self, connection: Connection) -> None:
        connection.retry = None
        self._send(connection)

    def _end_pause(self, connection: Connection) -> None:
        connection.go_on()
        self._retry(connection)

    def _want_room(self, connection: Connection, *, writing: bool) -> None:
        if writing and not connection.writing:
            self.watch.want_room(connection, wanted=True)
        elif connection.writing and not writing:
            self.watch.want_room(connection, wanted=False)
        connection.writing = writing

    def _break(self, connection: Connection, kind: str, reason: str) -> None:
        """Have a peer depart soon, not now: its departure makes us send, and those sends may break others."""
        connection.broken = reason
        self._want_room(connection, writing=False)
        self._loop.call_soon(self._on_broken, connection, kind, reason)
