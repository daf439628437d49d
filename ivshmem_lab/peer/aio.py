"""Interrupts as they come: callbacks, and ``async for`` on any running event loop; no threads.

Only while something waits are our descriptors in the loop, by an epoll(7) of its own, so any number of tasks may wait.
"""

from __future__ import annotations

import asyncio
import select
import time
from functools import partial
from typing import TYPE_CHECKING

from .core import Core
from .events import Interrupt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from .events import Reconnected, ServerGone


class AsyncPeer(Core):
    """The part of :class:`~ivshmem_lab.peer.peer.Peer` that calls back."""

    def __init__(self, path: str, timeout_s: float, *, reconnect: bool, lease: str | None) -> None:
        self._on_interrupt: dict[int, list[Callable[[int], object]]] = {}
        super().__init__(path, timeout_s, reconnect=reconnect, lease=lease)

    def on_interrupt(self, vector: int, function: Callable[[int], object]) -> None:
        """Have a function called with the count of interrupts on one of our vectors.

        :meth:`dispatch` or :meth:`serve` calls it, in whatever thread that runs. The count is taken for it, so do
        not :meth:`wait` for the same vector.

        Raises
        ------
        UnknownPeerError
            When we have no such vector.
        """
        with self._lock:
            self._line(self.peer_id, vector)
            self._on_interrupt.setdefault(vector, []).append(function)
            self._wake_all()

    def on_join(self, function: Callable[[int], object]) -> None:
        """Have a function called with the id of each peer that comes; its vectors follow at once."""
        with self._lock:
            self._on_join.append(function)
            self._hear()

    def on_leave(self, function: Callable[[int], object]) -> None:
        """Have a function called with the id of each peer that leaves."""
        with self._lock:
            self._on_leave.append(function)
            self._hear()

    def on_server(self, function: Callable[[ServerGone | Reconnected], object]) -> None:
        """Have a function called when the server is gone, and when we have reconnected."""
        with self._lock:
            self._on_server.append(function)
            self._hear()

    def dispatch(self, timeout_s: float | None = None) -> int:
        """Wait until there is something for a callback, and call it. What a callback raises comes out here.

        Returns
        -------
        int
            How many calls were made; 0 when the time is over (None: no limit).

        Raises
        ------
        PeerClosedError
            After :meth:`close`, also by another thread.
        RemoteProtocolError
            When the server breaks the protocol; once.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                self._fresh()
                self._take_for_callbacks()
            calls = 0
            while self._calls:
                call = self._calls.popleft()
                calls += 1
                call()
            if calls:
                return calls
            with self._lock:
                poller = self._poller_of(self._on_interrupt)
            with poller:
                if not self._sleep(poller, deadline):
                    return 0

    async def serve(self) -> None:
        """Call callbacks on the running loop until :meth:`close`; what one raises ends it and comes out here.

        Make it a task: ``task = asyncio.create_task(peer.serve())``. Cancel it to stop.
        """
        while not self._closed:
            if not self.dispatch(0):
                await self._changed(lambda: self._on_interrupt)

    async def interrupts(self, vector: int | None = None) -> AsyncIterator[Interrupt]:
        """Interrupts of one of our vectors, or of all, without end: ``async for interrupt in peer.interrupts()``.

        Those that came before count too. Each is given once, to whoever takes it first.

        Raises
        ------
        UnknownPeerError
            When we have no such vector.
        PeerClosedError
            After :meth:`close`, also by another thread.
        RemoteProtocolError
            When the server breaks the protocol; once.
        """
        following = 0  # no vector makes the others wait for ever

        def wanted() -> Iterable[int]:
            return range(len(self._link.own)) if vector is None else (vector,)

        while True:
            found = None
            with self._lock:
                self._fresh()
                vectors = list(wanted())
                for each in (*vectors[following:], *vectors[:following]):
                    if count := self._line(self.peer_id, each).take():
                        found = Interrupt(each, count)
                        following = vectors.index(each) + 1
                        break
            if found is None:
                await self._changed(wanted)
            else:
                yield found

    def _take_for_callbacks(self) -> None:
        for vector, functions in self._on_interrupt.items():
            lines = self._link.own  # after reconnecting there may be fewer
            if vector < len(lines) and (count := lines[vector].take()):
                self._calls.extend(partial(function, count) for function in functions)

    def _poller_of(self, vectors: Iterable[int]) -> select.epoll:
        """Return a new epoll of several vectors and the news. Under the lock."""
        poller = select.epoll()
        poller.register(self._news, select.EPOLLIN)
        for vector in vectors:
            if vector < len(self._link.own):
                poller.register(self._poller(vector), select.EPOLLIN)
        return poller

    def _wake_all(self) -> None:
        for wake in self._sleepers:
            wake()

    async def _changed(self, vectors: Callable[[], Iterable[int]]) -> None:
        """Wait on the running loop for an interrupt, for news or for :meth:`close`."""
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def wake() -> None:
            if not done.done():
                done.set_result(None)

        wake_from_anywhere = partial(loop.call_soon_threadsafe, wake)
        with self._lock:
            self._check_open()
            poller = self._poller_of(vectors())
            due_s = self._left_s(None)
            self._sleepers.add(wake_from_anywhere)
        fd = poller.fileno()
        loop.add_reader(fd, wake)
        timer = loop.call_later(due_s, wake) if due_s >= 0 else None
        try:
            await done
        finally:
            if timer is not None:
                timer.cancel()
            loop.remove_reader(fd)
            poller.close()
            with self._lock:
                self._sleepers.discard(wake_from_anywhere)
