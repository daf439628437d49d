"""A child process that belongs to an event loop.

It starts in a session of its own (Jupyter interrupts and kills whole process groups), with a
parent-death signal where ``setpriv`` can set one, and is watched through a pidfd: no thread, no
``SIGCHLD`` handler, no signal to a process id that was reused.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any, TypeVar

from .text import TextStream

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

_T = TypeVar("_T")

_LOG_BYTES = 65536


class Process:
    """A running child process; made by `spawn`, on the loop's thread.

    Attributes
    ----------
    pid : int
    argv : tuple of str
        The command, without the launcher in front of it.
    log : TextStream
        The last 64 KiB of its standard output and standard error.
    returncode : int or None
        Exit status; negative for a signal; None while it runs.
    """

    def __init__(self, popen: subprocess.Popen[bytes], pidfd: int, argv: Sequence[str], log: TextStream) -> None:
        self._popen = popen
        self._pidfd = pidfd
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._reap)
        self.pid = popen.pid
        self.argv = tuple(argv)
        self.log = log
        self.returncode: int | None = None

    @classmethod
    def spawn(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
        cpu: int | None = None,
    ) -> Process:
        """Start a process from the running loop's thread; it may open as many files as the hard limit allows.

        The parent-death signal fires when the *thread* that started the process ends, so the
        loop's thread has to live as long as its children shall.

        Parameters
        ----------
        name
            For the log's error messages.
        argv
            The command.
        pass_fds
            File descriptors that it inherits under their numbers.
        environment
            Variables to set beside the inherited ones.
        cpu
            The one CPU that it and all of its threads run on; None for no pinning.

        Raises
        ------
        OSError
            The process could not be made.
        """
        log_read, log_write = os.pipe()
        try:
            with _pinned(cpu):
                popen = subprocess.Popen(
                    [*death_signal_launcher(), *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=log_write,
                    stderr=log_write,
                    pass_fds=pass_fds,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                )
        except BaseException:
            os.close(log_read)
            raise
        finally:
            os.close(log_write)
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError:
            os.close(log_read)
            popen.kill()
            popen.wait()
            raise
        _allow_many_files(popen.pid)
        return cls(popen, pidfd, argv, TextStream(log_read, f"the log of {name}", _LOG_BYTES))

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; tell whether it has come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        return self.returncode is not None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        self.returncode = self._popen.wait()  # the pidfd is readable: it has ended, this does not block
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self.log.drain()
        self.log.close()
        self._ended.set()


def _allow_many_files(pid: int) -> None:
    """Raise a child's soft limit: each peer costs a machine an eventfd per vector, each unplug its guards."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError):  # it has ended already
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))


@functools.cache
def death_signal_launcher() -> tuple[str, ...]:
    """Return the command that makes a process die with its parent, empty where there is none.

    ``setpriv`` of util-linux can (busybox's cannot); it execs, so the process id stays.
    """
    program = shutil.which("setpriv")
    if program is None:
        return ()
    launcher = (program, "--pdeathsig", "KILL", "--")
    try:
        probe = subprocess.run(
            [*launcher, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return launcher if probe.returncode == 0 else ()


@contextlib.contextmanager
def _pinned(cpu: int | None) -> Iterator[None]:
    """Pin the calling thread: a child inherits the affinity of the thread that makes it."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


async def to_the_end(work: Coroutine[Any, Any, _T]) -> _T:
    """Run work that has its own time limits to its end, even when the caller is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


def describe_exit(status: int, started: bool) -> str:
    """Say in a few words how a machine's process ended; `started`: its guest may have ended it."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    if started and status % 2:
        return f"exit status {status} (the guest wrote {status >> 1} to the debug exit port)"
    return f"exit status {status}"
