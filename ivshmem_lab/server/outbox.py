"""When what is sent: newcomers at once and in few system calls, departures after a moment.

Newcomers that are accepted in one turn are announced together: first to those who were there, then they hear
of everybody. Departures are gathered for 1 ms (up to 20 ms when sending to all takes
longer), so that a crowd's leaving goes out in batches.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..ipc.parcels import Batch
from .connection import Pause, Progress

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable, Sequence

    from .connection import Connection
    from .events import FaultPlan, ServerTap
    from .packet import Packet

_SHORTEST_GATHERING_S = 0.001
_LONGEST_GATHERING_S = 0.020
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
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        tap: ServerTap | None,
        faults: FaultPlan | None,
        on_settled: Callable[[Connection], None],
        on_broken: Callable[[Connection, str, str], None],
    ) -> None:
        self.queue_high_water = 0
        self._loop = loop
        self._tap = tap
        self._faults = faults
        self._on_settled = on_settled
        self._on_broken = on_broken
        self._batch = Batch()
        self._gathered: dict[Connection, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next_at = 0.0

    def post(self, connections: Iterable[Connection], packets: Sequence[Packet]) -> None:
        """Queue the same messages for some; :meth:`send_now` or :meth:`send_soon` follows.

        The innermost loop of a crowd's joining: a thousand peers come here half a million times.
        """
        gathered = self._gathered
        if self._faults is None:
            for connection in connections:
                gathered[connection] = None
                connection.queue.extend(packets)
        else:
            for connection in connections:
                gathered[connection] = None
                connection.enqueue(packets, self._faults)

    def send_now(self, last: Iterable[Connection]) -> None:
        """Send all that waits, to some peers after all others."""
        for connection in last:
            self._gathered.pop(connection, None)
            self._gathered[connection] = None
        self._send_gathered()

    def send_soon(self) -> None:
        """Send what waits for all, now or after a moment."""
        if self._timer is not None or not self._gathered:
            return
        delay_s = self._next_at - time.monotonic()
        if delay_s <= 0:
            self._send_gathered()
        else:
            self._timer = self._loop.call_later(delay_s, self._send_gathered)

    def forget(self, connection: Connection) -> None:
        """Stop everything about a connection."""
        self._gathered.pop(connection, None)
        self._watch(connection, writing=False)
        if connection.retry is not None:
            connection.retry.cancel()
            connection.retry = None

    def close(self) -> None:
        """Stop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._gathered.clear()

    def _send_gathered(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        begun = time.monotonic()
        gathered, self._gathered = self._gathered, {}
        for connection in gathered:
            self._weigh(connection)
            if not connection.writing:  # else it is full, and is served when it has room
                self._send(connection)
        ended = time.monotonic()
        gathering_s = _GATHERING_SHARE * (ended - begun)
        self._next_at = ended + min(max(gathering_s, _SHORTEST_GATHERING_S), _LONGEST_GATHERING_S)

    def _weigh(self, connection: Connection) -> None:
        """Note how much waits for a peer, and break with one for which too much does."""
        waiting = len(connection.queue) + len(connection.later)
        if waiting > self.queue_high_water:
            self.queue_high_water = waiting
        if waiting > connection.queue_limit and connection.broken is None:
            self._break(connection, "queue full", f"{waiting} messages wait for it, more than {connection.queue_limit}")

    def _send(self, connection: Connection) -> None:
        if connection.broken is not None or connection.retry is not None:
            return
        try:
            progress = connection.send_turn(self._batch, self._tap)
        except OSError as error:
            self._break(connection, "broken", f"its connection broke: {error.strerror}")
            return
        self._watch(connection, writing=progress is Progress.MORE)
        if progress is Progress.SHORT:
            connection.retry = self._loop.call_later(connection.next_delay_s(), self._retry, connection)
        elif progress is Progress.PAUSED:
            pause = connection.later[0]
            assert isinstance(pause, Pause)
            connection.retry = self._loop.call_later(pause.delay_s, self._end_pause, connection)
        elif progress is Progress.CUT:
            self._break(connection, "cut", "the fault plan cut its connection")
        elif progress is Progress.DONE and not connection.settled:
            connection.settled = True
            self._on_settled(connection)

    def _retry(self, connection: Connection) -> None:
        connection.retry = None
        self._send(connection)

    def _end_pause(self, connection: Connection) -> None:
        connection.go_on()
        self._retry(connection)

    def _watch(self, connection: Connection, *, writing: bool) -> None:
        if writing and not connection.writing:
            self._loop.add_writer(connection.fileno, self._send, connection)
        elif connection.writing and not writing:
            self._loop.remove_writer(connection.fileno)
        connection.writing = writing

    def _break(self, connection: Connection, kind: str, reason: str) -> None:
        """Have a peer depart soon, not now: its departure makes us send, and those sends may break others."""
        connection.broken = reason
        self._watch(connection, writing=False)
        self._loop.call_soon(self._on_broken, connection, kind, reason)
