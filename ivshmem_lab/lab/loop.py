"""The lab's own thread with its own asyncio loop.

Servers, QMP connections and child processes live on it. Everybody else hands work over with
`LabLoop.call` from whatever thread they are on: a notebook's main thread (whose own loop is
running), a widget's callback, a plain script.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import LabError

if TYPE_CHECKING:
    from collections.abc import Coroutine

_T = TypeVar("_T")

_STOP_TIME_LIMIT_S = 10.0


class LabLoop:
    """One daemon thread that runs one event loop, from construction to `close`.

    The thread is a daemon so that a forgotten lab does not keep Python from ending; the children it
    started get their parent-death signal when it ends.
    """

    def __init__(self, name: str = "ivshmem-lab") -> None:
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._lock = threading.Lock()
        self._ended = False
        self._waiting: dict[Future[Any], Coroutine[Any, Any, Any]] = {}
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._started.wait()

    def call(self, work: Coroutine[Any, Any, _T], *, timeout_s: float | None = None, finish: bool = False) -> _T:
        """Run a coroutine on the loop and wait for its result.

        Ctrl-C in the waiting thread cancels the coroutine, waits until it has cleaned up, and then
        raises KeyboardInterrupt; a second Ctrl-C stops waiting.

        Parameters
        ----------
        work
            The coroutine.
        timeout_s
            How long it may take, in seconds; None for no limit beside its own.
        finish
            True for work that has to reach its end: Ctrl-C waits for it instead of cancelling it.

        Raises
        ------
        LabError
            The loop is closed, or the caller is the loop's own thread, or the time is over.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise LabError("the lab's own thread cannot wait for itself; await the work, or ask from another thread")
        result: Future[_T] = Future()
        tasks: list[asyncio.Task[_T]] = []

        def begin() -> None:
            if tasks or result.done():
                return
            tasks.append(asyncio.ensure_future(_limited(work, timeout_s)))
            tasks[0].add_done_callback(lambda done: self._hand_over(done, work, result))

        def cancel() -> None:
            begin()  # it may not have been handed over yet
            tasks[0].cancel()

        try:
            with self._lock:
                if self._ended:
                    work.close()
                    raise LabError("the lab is closed: its thread has ended")
                self._waiting[result] = work
                self._loop.call_soon_threadsafe(begin)
            return result.result()
        except KeyboardInterrupt:
            # It can come at any line above, also before the work was handed over.
            with self._lock:
                if result not in self._waiting and not result.done():
                    work.close()
                    raise
                if not self._ended and not result.done():
                    self._loop.call_soon_threadsafe(begin if finish else cancel)
            result.exception()
            raise

    def close(self) -> None:
        """Cancel what still runs, end the thread and close the loop. May be repeated."""
        with self._lock:
            if not self._ended:
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_STOP_TIME_LIMIT_S)
        if self._thread.is_alive():
            raise LabError(f"the lab's thread did not end in {_STOP_TIME_LIMIT_S:g} s; something blocks it")

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        finally:
            with self._lock:
                self._ended = True
                # What was handed over too late was never begun: nobody shall wait for it.
                for result, work in self._waiting.items():
                    work.close()
                    result.set_exception(_cut_off())
                self._waiting.clear()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._started.set()
        await self._stop.wait()
        with self._lock:
            self._ended = True

    def _hand_over(self, done: asyncio.Task[_T], work: Coroutine[Any, Any, _T], result: Future[_T]) -> None:
        with self._lock:
            del self._waiting[result]
        work.close()  # for the case that it was cancelled before its first step
        if done.cancelled():
            result.set_exception(_cut_off())
        elif (error := done.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(done.result())


async def _limited(work: Coroutine[Any, Any, _T], timeout_s: float | None) -> _T:
    try:
        async with asyncio.timeout(timeout_s) as limit:
            return await work
    except TimeoutError as error:
        if limit.expired():
            raise LabError(f"not done in {timeout_s:g} s, and given up") from error
        raise


def _cut_off() -> LabError:
    return LabError("the lab was closed, or this was interrupted, before it was done")
