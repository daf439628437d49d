"""The command ``ivshmem-server``: QEMU's contrib server's basic flags on our server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from ..errors import IvshmemLabError, UsageError
from ..ipc.memory import SharedMemory
from ..ipc.runtime_dir import check_socket_path
from ..units import check_memory_size, format_size, parse_size
from .events import ClientRefused, PeerDeparted, PeerJoined, PeerSettled, ServerEvent, ServerStrained
from .server import MAX_VECTORS, Server

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

_DONE, _FAILED, _WRONG_CALL = 0, 1, 2

_EXAMPLE = """\
example:
  ivshmem-server -F -v -S /tmp/board.sock -M board -l 4M -n 2
  qemu-system-x86_64 -chardev socket,path=/tmp/board.sock,id=board -device ivshmem-doorbell,chardev=board,vectors=2

Without -F the server goes into the background as soon as it listens.
SIGTERM, SIGINT or SIGHUP end it; socket and shared memory are removed.
Exit status: 0 done, 1 failed, 2 wrong call."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a call in one line."""
        raise UsageError(f"{message}; see {self.prog} --help")


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
    """Run the server until a signal ends it; return the exit status."""
    try:
        options = _parse(argv)
        return _serve(options) if options.foreground else _serve_in_background(options)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except IvshmemLabError as error:
        print(f"ivshmem-server: {error}", file=sys.stderr)
        return _WRONG_CALL if isinstance(error, UsageError) else _FAILED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="ivshmem-server",
        description="Join machines and processes over one shared memory (ivshmem, protocol version 0).",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-F", "--foreground", action="store_true", help="stay in the foreground")
    add("-v", "--verbose", action="store_true", help="print who joins and leaves (with -F)")
    add("-S", "--socket", default="/tmp/ivshmem_socket", metavar="SOCK", help="Unix socket to listen on (%(default)s)")
    add("-M", "--shm-name", default="ivshmem", metavar="NAME", help="POSIX shared memory to make (%(default)s)")
    add("-l", "--size", default="4M", metavar="SIZE", help="its size, a power of two from 4K up (%(default)s)")
    add("-n", "--vectors", default="1", metavar="VECTORS", help=f"vectors per peer, 0 to {MAX_VECTORS} (%(default)s)")
    options = parser.parse_args(argv)
    if options.verbose and not options.foreground:
        raise UsageError("cannot use verbose in daemon mode; add -F or leave out -v")
    check_socket_path(options.socket)
    options.size_bytes = check_memory_size(parse_size(options.size))
    options.vector_count = _parse_vectors(options.vectors)
    return options


def _parse_vectors(text: str) -> int:
    try:
        vectors = int(text, 0)
    except ValueError:
        vectors = -1
    if not 0 <= vectors <= MAX_VECTORS:
        raise UsageError(f"vectors {text!r} is not allowed; a whole number from 0 to {MAX_VECTORS}")
    return vectors


def _serve(options: argparse.Namespace, ready_fd: int = -1) -> int:
    """Serve until a signal comes; close `ready_fd`, if any, once clients can connect."""
    stop = _Stop()
    _allow_many_descriptors()
    with SharedMemory.create_posix(options.shm_name, options.size_bytes) as memory:
        try:
            asyncio.run(_listen(options, memory, stop, ready_fd))
        finally:
            memory.unlink()
    return _DONE


async def _listen(options: argparse.Namespace, memory: SharedMemory, stop: _Stop, ready_fd: int) -> None:
    say = _Printer(on=options.verbose)
    server = Server(options.socket, memory, options.vector_count, say.event)
    await server.start()
    try:
        say.line(
            f"listening on {options.socket}: shared memory {options.shm_name} of {format_size(memory.size_bytes)}, "
            f"{options.vector_count} vectors per peer"
        )
        if ready_fd >= 0:
            _leave_terminal(ready_fd)
        await stop.wait()
    finally:
        await server.close()
    say.line("closed")


def _serve_in_background(options: argparse.Namespace) -> int:
    """Serve in a daemon. The caller waits until it listens, so that errors are seen and the status is right."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_daemon(options, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        status = pipe.read(1)
    os.waitpid(child, 0)
    return status[0] if status else _FAILED


def _run_daemon(options: argparse.Namespace, ready_fd: int) -> NoReturn:
    """Second half of the double fork: a session of its own, whose leader ends, so that no terminal comes back."""
    status = _FAILED
    try:
        os.setsid()
        if os.fork():
            os._exit(_DONE)
        try:
            status = _serve(options, ready_fd)
        except IvshmemLabError as error:
            print(f"ivshmem-server: {error}", file=sys.stderr, flush=True)
            status = _WRONG_CALL if isinstance(error, UsageError) else _FAILED
            os.write(ready_fd, bytes([status]))
        except BaseException:
            traceback.print_exc()
            raise
    finally:
        os._exit(status)


def _leave_terminal(ready_fd: int) -> None:
    """Say "done" to the process that started the daemon, and let go of its terminal and directory."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.write(ready_fd, bytes([_DONE]))
    os.close(ready_fd)


def _allow_many_descriptors() -> None:
    """Raise the soft limit of open files to the hard one: a peer takes one, and one per vector."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Printer:
    """Prints what happens, as long as somebody reads it."""

    def __init__(self, *, on: bool) -> None:
        self._on = on

    def line(self, text: str) -> None:
        if not self._on:
            return
        try:
            print(text, flush=True)
        except OSError:  # the reader is gone; the peers are not
            self._on = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at its end

    def event(self, event: ServerEvent) -> None:
        match event:
            case PeerJoined(peer_id, pid, uid):
                self.line(f"peer {peer_id} joined (pid {pid}, uid {uid})")
            case PeerSettled(peer_id):
                self.line(f"peer {peer_id} has its whole introduction")
            case PeerDeparted(peer_id, reason):
                self.line(f"peer {peer_id} left: {reason}")
            case ClientRefused(pid, uid, reason):
                self.line(f"client refused (pid {pid}, uid {uid}): {reason}")
            case ServerStrained(reason):
                self.line(f"newcomers wait: {reason}")


if __name__ == "__main__":
    sys.exit(main())
