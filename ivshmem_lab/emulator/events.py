"""What wakes a vCPU: file descriptors it waits on while halted, and a watcher that kicks it while it runs.

While the guest is halted, its own thread waits here, so an interrupt costs one wake-up. While it runs, the
watcher thread waits instead; it is armed for one event at a time and sets the block hook's flag.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Events:
    """File descriptors with what to do when they can be read, and calls from other threads.

    Parameters
    ----------
    kick
        Makes a running guest stop soon; called from any thread.
    """

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self._calls: deque[Callable[[], None]] = deque()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._wake, select.EPOLLIN)
        self._armed = select.epoll()
        self._armed.register(self._epoll.fileno(), 0)
        self._end = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._armed.register(self._end, select.EPOLLIN)
        self._watcher = threading.Thread(target=self._watch, name="ivshmem-watcher", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while True:
            ready = self._armed.poll()
            if any(fd == self._end for fd, _ in ready):
                return
            self._kick()

    def arm(self) -> None:
        """Have the guest kicked at the next event."""
        self._armed.modify(self._epoll.fileno(), select.EPOLLIN | select.EPOLLONESHOT)

    def disarm(self) -> None:
        """Stop waiting for one: the guest has stopped by itself."""
        self._armed.modify(self._epoll.fileno(), 0)

    def add(self, fd: int, handler: Callable[[], None]) -> None:
        """Call a handler, on the vCPU's thread, whenever `fd` can be read."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; before it is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def post(self, call: Callable[[], None]) -> None:
        """Have the vCPU's thread call something soon; from any thread."""
        self._calls.append(call)
        self._kick()
        os.eventfd_write(self._wake, 1)

    @property
    def posted(self) -> bool:
        """Tell whether calls wait to be made."""
        return bool(self._calls)

    def dispatch(self, timeout_s: float | None) -> bool:
        """Wait for events (None: as long as it takes) and handle them all; False when there was none."""
        handlers = self._handlers
        ready = self._epoll.poll(timeout_s)
        for fd, _ in ready:
            handler = handlers.get(fd)
            if handler is not None:
                handler()
            elif fd == self._wake:
                os.eventfd_read(fd)
        while self._calls:
            self._calls.popleft()()
        return bool(ready)

    def serve_descriptors(self) -> None:
        """Handle what can be read now, on the vCPU's thread; calls that wait are left."""
        for fd, _ in self._epoll.poll(0):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler()

    def close(self) -> None:
        """End the watcher and give the descriptors back."""
        os.eventfd_write(self._end, 1)
        self._watcher.join()
        self._epoll.close()
        self._armed.close()
        os.close(self._wake)
        os.close(self._end)
