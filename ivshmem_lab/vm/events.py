"""What a machine told over QMP, kept in bounded memory, with waiting that misses nothing."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

KEPT_EVENTS = 1000


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """One event of a machine (QEMU QMP reference manual).

    Attributes
    ----------
    number
        0 for the first event of the machine.
    name
        Such as ``"DEVICE_DELETED"``.
    data
        What came with it.
    time_s
        When it arrived here, `time.monotonic`.
    """

    number: int
    name: str
    data: Mapping[str, object]
    time_s: float


class EventLog:
    """The last 1000 events of a machine, oldest first. Any thread may read; the rest belongs to the loop.

    Attributes
    ----------
    count : int
        Events so far, forgotten ones included: the number that the next one gets.
    """

    def __init__(self, limit: int = KEPT_EVENTS) -> None:
        self.count = 0
        self._kept: deque[QmpEvent] = deque(maxlen=limit)
        self._news = asyncio.Event()
        self._listeners: list[Callable[[QmpEvent], None]] = []

    def __iter__(self) -> Iterator[QmpEvent]:
        return iter(tuple(self._kept))

    def __len__(self) -> int:
        return len(self._kept)

    def note(self, name: str, data: Mapping[str, object]) -> None:
        """Keep an event and wake those who wait."""
        event = QmpEvent(self.count, name, data, time.monotonic())
        self.count += 1
        self._kept.append(event)
        for listener in tuple(self._listeners):
            listener(event)
        self._news.set()
        self._news = asyncio.Event()

    def listen(self, listener: Callable[[QmpEvent], None]) -> Callable[[], None]:
        """Have every further event told, on the loop's thread; return the function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def came(self, name: str, *, after: int) -> bool:
        """Tell whether an event of this name is among those from this number on."""
        return any(event.name == name and event.number >= after for event in self._kept)

    async def wait(self, name: str, timeout_s: float, *, after: int = 0) -> QmpEvent:
        """Wait for an event.

        Parameters
        ----------
        name
            Its name.
        timeout_s
            How long, in seconds.
        after
            Take only events with this number or a later one: note `count` first, then do what causes the
            event, then wait.

        Raises
        ------
        TimeoutError
            It did not come in time.
        """
        async with asyncio.timeout(timeout_s):
            while True:
                for event in self._kept:
                    if event.number >= after and event.name == name:
                        return event
                await self._news.wait()
