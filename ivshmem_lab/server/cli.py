"""The command ``ivshmem-server``: a drop-in for QEMU's contrib server, on ours."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import IvshmemLabError, SharedMemoryError, UsageError
from ..ipc.memory import SharedMemory
from ..units import format_size
from .daemon import PidFile, run_in_background, status_of
from .door import allow_many_files
from .events import (
    ClientRefused,
    LeaseEnded,
    LeaseReturned,
    MessageWithheld,
    PeerDeparted,
    PeerJoined,
    PeerSettled,
    ServerEvent,
    ServerStarted,
    ServerStrained,
)
from .faults import describe_faults
from .options import PID_FILE, Options, parse_arguments
from .recorder import Recorder
from .server import Server
from .statefile import StateFile
from .statusview import ask_status, show_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

_DRAIN_S = 2.0


class _Stop:
    """Signals that ask for the end. Nothing is interrupted: the asking is noted, and the loop is woken.

    Python-level handlers rather than asyncio's, because they hold before the loop starts and
    after it ends, when there is something to remove already or still.
    """

    def __init__(self) -> None:
        self._asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._asked = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just ended
                self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Wait for the first signal, also when it came before."""
        self._loop = asyncio.get_running_loop()
        if not self._asked:
            await self._event.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until a signal ends it, or ask one; return the exit status."""
    try:
        options = parse_arguments(argv)
        if options.list_faults:
            print(describe_faults(), end="")
            return 0
        if options.status is not None:
            status = ask_status(options.status)
            print(json.dumps(status) if options.json else show_status(status))
            return 0
        if options.foreground:
            return _serve(options, lambda: None)
        return run_in_background(lambda ready: _serve_with_pid_file(options, ready))
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except IvshmemLabError as error:
        return status_of(error)


def _serve_with_pid_file(options: Options, ready: Callable[[], None]) -> int:
    pid_file: PidFile | None = None
    try:
        pid_file = PidFile.write(options.pid_file or PID_FILE)
    except IvshmemLabError:
        if options.pid_file is not None:  # nobody may have asked for the default
            raise
    try:
        return _serve(options, ready)
    finally:
        if pid_file is not None:
            pid_file.remove()


def _serve(options: Options, ready: Callable[[], None]) -> int:
    """Serve until a signal comes; call `ready` once clients can connect."""
    stop = _Stop()
    with _memory(options) as memory, contextlib.ExitStack() as stack:
        recorder = None
        if options.trace is not None:
            recorder = stack.enter_context(Recorder(options.trace, options.vectors, memory.size_bytes))
        asyncio.run(_listen(options, memory, recorder, stop, ready))
        if recorder is not None and recorder.failure is not None:
            print(f"ivshmem-server: {recorder.failure}", file=sys.stderr)
    return 0


async def _listen(
    options: Options, memory: SharedMemory, recorder: Recorder | None, stop: _Stop, ready: Callable[[], None]
) -> None:
    say = _Printer(options, memory)
    file = None if options.state_file is None else StateFile(options.state_file)
    allow_many_files()  # leases that come back need descriptors

    def on_event(event: ServerEvent) -> None:
        if file is not None and isinstance(event, (PeerJoined, PeerDeparted, LeaseEnded)):
            file.update(server.export_state())
        say.event(event)

    server = Server(
        options.socket,
        memory,
        options.vectors,
        on_event,
        queue_limit=options.queue_limit,
        policy=options.policy,
        shield_qemu=options.shield_qemu,
        lease_hold_s=options.lease_hold_s,
        control_path=options.control,
        state=None if file is None else file.load(),
        tap=recorder,
        faults=options.faults,
    )
    await server.start()
    if file is not None:
        try:
            file.create(server.export_state())
        except BaseException:
            await server.close()
            raise
    churns = [asyncio.create_task(churn.run(options.socket)) for churn in options.churns]
    try:
        ready()
        await stop.wait()
        await server.drain(_DRAIN_S)
        if file is not None:
            file.update(server.export_state(), last=True)
    finally:
        for churn in churns:
            churn.cancel()
        await asyncio.gather(*churns, return_exceptions=True)
        await server.close()
    say.end()


@contextlib.contextmanager
def _memory(options: Options) -> Iterator[SharedMemory]:
    """Make the memory, or find it; take it away at the end, unless it is to be kept."""
    if options.memfd:
        memory = SharedMemory.create_memfd(options.size_bytes)
    elif options.shm_dir is not None:
        memory = _memory_in(options.shm_dir, options.size_bytes)
    else:
        memory = _named_memory(options)
    with memory, _locked(memory):
        try:
            yield memory
        finally:
            if not options.keep_memory:
                memory.unlink()


@contextlib.contextmanager
def _locked(memory: SharedMemory) -> Iterator[None]:
    """Hold a lock on the memory, which says that a server runs on it. Ours alone: what peers get would keep it."""
    lock = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SharedMemoryError(
                f"shared memory {memory.name!r} belongs to a server that is running; choose another name"
            ) from error
        yield
    finally:
        os.close(lock)


def _named_memory(options: Options) -> SharedMemory:
    name, size_bytes = options.shm_name, options.size_bytes
    try:
        return SharedMemory.create_posix(name, size_bytes)
    except SharedMemoryError as error:
        if not Path("/dev/shm", name.removeprefix("/")).exists():  # refused for want of space
            raise
        if not options.keep_memory:
            with SharedMemory.open_posix(name) as memory, _locked(memory):
                raise SharedMemoryError(f"{error}, or go on with it as it is: --keep-memory") from error
    memory = SharedMemory.open_posix(name)
    if memory.size_bytes != size_bytes:
        memory.close()
        raise UsageError(
            f"shared memory {name!r} has {format_size(memory.size_bytes)}, not {format_size(size_bytes)}; "
            f"ask for -l {format_size(memory.size_bytes)}: it may be in use, and is not resized"
        )
    return memory


def _memory_in(directory: str, size_bytes: int) -> SharedMemory:
    """Make a file in a directory and remove its name at once; on hugetlbfs it consists of huge pages."""
    try:
        page_bytes = os.statvfs(directory).f_bsize
        if size_bytes % page_bytes:
            raise UsageError(
                f"size {format_size(size_bytes)} is no multiple of {format_size(page_bytes)}, the page size in {directory!r}"
            )
        fd, path = tempfile.mkstemp(prefix="ivshmem-", dir=directory)
    except OSError as error:
        raise UsageError(
            f"no memory can be made in {directory!r}: {error.strerror}; choose another directory"
        ) from error
    try:
        Path(path).unlink()
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        os.close(fd)
        raise SharedMemoryError(
            f"{format_size(size_bytes)} of memory in {directory!r} cannot be had: {error.strerror}"
        ) from error
    return SharedMemory.from_fd(fd)


class _Printer:
    """Prints what happens, as long as somebody reads it."""

    def __init__(self, options: Options, memory: SharedMemory) -> None:
        self._on = options.foreground
        self._verbose = options.verbose
        self._json = options.json
        name = "" if memory.name is None else f" {memory.name}"
        self._what = f"shared memory{name} of {format_size(memory.size_bytes)}, {options.vectors} vectors per peer"

    def end(self) -> None:
        """Say that the server is gone, with the words of QEMU's server."""
        self._line(json.dumps({"event": "ServerEnded"}) if self._json else "server disconnected")

    def event(self, event: ServerEvent) -> None:
        """Say what happened, if it is wanted."""
        if self._json:
            self._line(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}))
        elif self._verbose:
            self._line(self._words(event))

    def _line(self, text: str) -> None:
        if not self._on:
            return
        try:
            print(text, flush=True)
        except OSError:  # the reader is gone; the peers are not
            self._on = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at its end

    def _words(self, event: ServerEvent) -> str:
        match event:
            case ServerStarted(path, open_files, peers_allowed):
                return f"listening on {path}: {self._what}; {open_files} open files allow {peers_allowed} peers"
            case PeerJoined(peer_id, pid, uid):
                return f"peer {peer_id} joined (pid {pid}, uid {uid})"
            case PeerSettled(peer_id):
                return f"peer {peer_id} has its whole introduction"
            case PeerDeparted(peer_id, reason):
                return f"peer {peer_id} left: {reason}"
            case LeaseReturned(peer_id, lease):
                return f"peer {peer_id} is back under its lease {lease}"
            case LeaseEnded(peer_id, lease, reason):
                return f"lease {lease} of peer {peer_id} ended: {reason}"
            case MessageWithheld(peer_id, about, reason):
                return f"peer {peer_id} was not told about peer {about}: {reason}"
            case ClientRefused(pid, uid, reason):
                return f"client refused (pid {pid}, uid {uid}): {reason}"
            case ServerStrained(reason):
                return f"newcomers wait: {reason}"


if __name__ == "__main__":
    sys.exit(main())
