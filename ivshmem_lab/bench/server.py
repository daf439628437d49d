"""How fast a server lets peers in, and whether it loses anything on the way.

N clients in one process connect as fast as the server accepts them, and read until each has its whole
introduction and has heard of all that came after it: ``N * (3 + N * V)`` messages. Every one is
checked: its number, and that its descriptor came.

* ``seconds`` runs from the first connect until the last message.
* ``server_cpu_seconds`` is what the server used in that time (/proc/PID/schedstat, else stat): not its start,
  not its end. The clients share the machine with it, so ``seconds`` is mostly theirs.
* Two programs are measured in turns, each in a new process, because the speed of a machine drifts.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import IvshmemLabError, ServerError, UsageError
from ..server.policy import Credentials
from ..wire.messages import MAX_PEER_ID, MEMORY, MESSAGE_BYTES
from .process import cpu_seconds, rss_mb

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_S = 10.0
"""Longest wait for a server to listen."""

STALL_S = 3.0
"""Nobody heard anything for so long: what has not come by now is lost."""

OURS = [sys.executable, "-m", "ivshmem_lab.server.cli"]
"""Our server."""

_TURN_MESSAGES = 512  # read from one client before the others get a turn
_OWN_FILES = 64  # what this process has open besides the clients
_FD_SPACE = socket.CMSG_SPACE(array("i").itemsize)
_NOT_NOW = {errno.EAGAIN, errno.ECONNREFUSED, errno.ENOENT}  # the backlog is full; nobody listens; no socket yet


class Client:
    """One client: counts what it hears; descriptors are closed at once."""

    __slots__ = ("heard", "own_id", "sock", "vectors", "wrong")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.heard = 0
        self.own_id = -1
        self.vectors: Counter[int] = Counter()
        self.wrong = 0

    def read(self) -> int:
        """Read what is there, in one turn; return how many messages, -1 at the end."""
        receive = self.sock.recvmsg
        before = self.heard
        for _ in range(_TURN_MESSAGES):
            try:
                # the kernel never reads past bytes that carry a descriptor, but joins those that carry none
                data, ancillary, _, _ = receive(4096, _FD_SPACE, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                break
            except ConnectionResetError:
                return -1
            if not data:
                return -1
            fds = 0
            for _, _, payload in ancillary:
                for fd in array("i", payload):
                    os.close(fd)
                    fds += 1
            self._count(data, fds)
        return self.heard - before

    def _count(self, data: bytes, fds: int) -> None:
        last = len(data) - MESSAGE_BYTES
        for at in range(0, len(data), MESSAGE_BYTES):
            number = int.from_bytes(data[at : at + MESSAGE_BYTES], "little", signed=True)
            has_fd = fds == 1 and at == last
            self.heard += 1
            if self.heard == 1:
                self.wrong += number != 0 or has_fd
            elif self.heard == 2:
                self.own_id = number
                self.wrong += has_fd
            elif not has_fd or not MEMORY <= number <= MAX_PEER_ID:
                self.wrong += 1
            else:
                self.vectors[number] += 1


class _Crowd:
    """All clients of one run."""

    def __init__(self, path: str, peers: int, vectors: int) -> None:
        self._path = path
        self._peers = peers
        self._vectors = vectors
        self._epoll = select.epoll()
        self.clients: dict[int, Client] = {}
        self.expected = peers * (3 + peers * vectors)
        self.heard = 0
        self.ended = 0

    @property
    def missing(self) -> int:
        """How many have not connected yet."""
        return self._peers - len(self.clients) - self.ended

    @property
    def complete(self) -> int:
        """How many clients know the memory and all vectors of all."""
        ids = {client.own_id for client in self.clients.values()}
        everybody = dict.fromkeys(ids, self._vectors) if self._vectors else {}
        whole = {MEMORY: 1, **everybody}
        if len(ids) != self._peers:
            return 0
        return sum(client.vectors == whole and not client.wrong for client in self.clients.values())

    def join(self, most: int | None = None) -> int:
        """Connect as many as the server's backlog takes now, or at most so many; return how many."""
        joined = 0
        while self.missing and joined != most:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                sock.connect(self._path)
            except OSError as error:
                sock.close()
                if error.errno not in _NOT_NOW:
                    raise
                break
            self.clients[sock.fileno()] = Client(sock)
            self._epoll.register(sock, select.EPOLLIN)
            joined += 1
        return joined

    def run(self) -> float:
        """Join all, and read until everything came, nothing comes any more, or the server ended; return the seconds."""
        began = heard_at = time.monotonic()
        while self.heard < self.expected and self.ended < self._peers:
            joining = self.missing > 0 and self.join() > 0
            before = self.heard
            for fd, _ in self._epoll.poll(0.001 if self.missing else 0.1):
                self._read(fd)
            now = time.monotonic()
            if self.heard > before or joining:
                heard_at = now
            elif now - heard_at > STALL_S:
                break
        return heard_at - began

    def _read(self, fd: int) -> None:
        client = self.clients[fd]
        before = client.heard
        at_end = client.read() < 0
        self.heard += client.heard - before
        if at_end:
            self._epoll.unregister(fd)
            client.sock.close()
            del self.clients[fd]
            self.ended += 1

    def close(self) -> None:
        """Leave."""
        for client in self.clients.values():
            client.sock.close()
        self._epoll.close()


def bench_server(peers: int, vectors: int, against: str | None = None, rounds: int | None = None) -> dict[str, Any]:
    """Measure our server, and `against`, another program with the flags of QEMU's, in turns with it.

    Parameters
    ----------
    peers, vectors
        How many peers, with how many vectors each.
    against
        The other program; None: ours alone.
    rounds
        How often each is measured; None: 3 times with `against`, once without.

    Returns
    -------
    dict
        Keys ``peers, vectors, complete, messages_expected, messages_received, lost, seconds,
        server_cpu_seconds, server_rss_mb``, and under ``against`` the same of the other. ``complete`` counts
        the peers that got everything. With several rounds: the one that lost most, else the one whose
        server CPU is the median. ``rounds`` says how many there were.

    Raises
    ------
    UsageError
        When a number is not allowed, or the other program is not there.
    ServerError
        When a server does not start.
    """
    if not 1 <= peers <= MAX_PEER_ID + 1 or not 0 <= vectors <= 1 << 16:
        raise UsageError(f"{peers} peers with {vectors} vectors are not allowed; 1 to 65536 peers, 0 to 65536 vectors")
    rounds = (1 if against is None else 3) if rounds is None else rounds
    if rounds < 1:
        raise UsageError(f"{rounds} rounds are not allowed; at least 1")
    program = find_program(against)
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "against": []}
    with many_files(peers):
        for _ in range(rounds):
            results["ours"].append(_measure(OURS, peers, vectors))
            if program is not None:
                results["against"].append(_measure([program], peers, vectors))
    chosen = {"peers": peers, "vectors": vectors, **_typical(results["ours"]), "rounds": rounds}
    if program is not None:
        chosen["against"] = {"program": program, "peers": peers, "vectors": vectors, **_typical(results["against"])}
    return chosen


def find_program(against: str | None) -> str | None:
    """Return the path of the other program, if there is to be one; raise UsageError when it is not there."""
    program = None if against is None else shutil.which(against)
    if against is not None and program is None:
        raise UsageError(f"program {against!r} is not there; give a path, or a name that is on PATH")
    return program


def _typical(runs: list[dict[str, Any]]) -> dict[str, Any]:
    worst = max(runs, key=lambda run: int(run["lost"]))
    by_cpu = sorted(runs, key=lambda run: float(run["server_cpu_seconds"]))
    return worst if worst["lost"] else by_cpu[len(by_cpu) // 2]


@contextlib.contextmanager
def many_files(peers: int) -> Iterator[None]:
    """Allow as many open files as the clients need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = peers + _OWN_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UsageError(
            f"{peers} peers need {needed} open files here; the limit is {hard}: raise it with `ulimit -Hn`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def running_server(command: list[str], vectors: int) -> Iterator[tuple[subprocess.Popen[bytes], str, int]]:
    """Run a server with the flags of QEMU's; give its process, its socket, and a file with what it says."""
    with tempfile.TemporaryDirectory(prefix="ivbench-", dir="/tmp") as directory:
        path = f"{directory}/s"
        name = Path(directory).name
        with tempfile.TemporaryFile() as said, contextlib.ExitStack() as stack:
            flags = ["-F", "-S", path, "-M", name, "-l", "1M", "-n", str(vectors)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            server = subprocess.Popen(
                [*command, *flags], stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
            )
            stack.callback(Path("/dev/shm", name).unlink, missing_ok=True)  # a server that dies leaves it there
            stack.callback(_end, server)
            yield server, path, said.fileno()


def _measure(command: list[str], peers: int, vectors: int) -> dict[str, Any]:
    """Start a server, let everybody in, and end it."""
    with (
        running_server(command, vectors) as (server, path, said_fd),
        contextlib.closing(_Crowd(path, peers, vectors)) as crowd,
    ):
        pid, cpu_before = _first_client(crowd, server, said_fd)
        seconds = crowd.run()
        if crowd.ended == peers:  # it is dead, or about to be
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(1)
        alive = server.poll() is None
        cpu = cpu_seconds(pid) - cpu_before if alive else 0.0
        return {
            "complete": crowd.complete,
            "messages_expected": crowd.expected,
            "messages_received": crowd.heard,
            "lost": crowd.expected - crowd.heard,
            "seconds": round(seconds, 4),
            "server_cpu_seconds": round(cpu, 4),
            "server_rss_mb": round(rss_mb(pid), 2) if alive else 0.0,
            "server_survived": alive,
        }


def _first_client(crowd: _Crowd, server: subprocess.Popen[bytes], said_fd: int) -> tuple[int, float]:
    """Connect the first one as soon as the server listens; return its pid, and the CPU time it had used before.

    Where who listens is a child of what was started (a script, say), only this connection tells its pid: the first one is all that
    it may have begun to work on before the time is taken.
    """
    deadline = time.monotonic() + START_S
    pause = select.poll()
    while True:
        before = cpu_seconds(server.pid)
        if crowd.join(1):
            break
        if server.poll() is not None or time.monotonic() > deadline:
            words = os.pread(said_fd, 300, 0).decode(errors="replace").strip()
            raise ServerError(
                f"{server.args!r} does not listen (exit status {server.returncode}): {words or 'it says nothing'}"
            )
        pause.poll(5)
    pid = Credentials.of(next(iter(crowd.clients.values())).sock).pid
    return pid, before if pid == server.pid else cpu_seconds(pid)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


_EXAMPLE = """\
example:
  ivshmem-lab bench server --peers 256 --vectors 1 --against /usr/lib/qemu/ivshmem-server --json
  ivshmem-lab bench server --cycles 100000"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a call in one line."""
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ivshmem-lab bench server``; return the exit status: 1 when our server lost something or grew."""
    parser = _Parser(
        prog="ivshmem-lab bench server",
        description="Measure how fast an ivshmem server lets peers in, and whether it loses messages.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--peers", type=int, default=64, metavar="N", help="how many peers join (%(default)s)")
    add("--vectors", type=int, default=1, metavar="V", help="vectors of each (%(default)s)")
    add("--against", metavar="PROGRAM", help="another server with the flags of QEMU's, measured in turns with ours")
    add("--rounds", type=int, metavar="N", help="how often each is measured (3 with --against, else 1)")
    add("--cycles", type=int, metavar="N", help="instead: N peers join and leave, one by one; does the server grow?")
    add("--json", action="store_true", help="print one JSON object")
    try:
        given = parser.parse_args(argv)
        if given.cycles is not None:
            from .churn import bench_churn  # which is built on this

            result = bench_churn(given.cycles, given.vectors, given.against)
        else:
            result = bench_server(given.peers, given.vectors, given.against, given.rounds)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except IvshmemLabError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(result) if given.json else _table(result))
    return 1 if result["lost"] or result.get("grown") else 0


def _table(result: dict[str, Any]) -> str:
    other = result.get("against")
    keys = [key for key in result if key not in {"against", "rounds"}]
    lines = [f"{'':<20}{'ours':>14}" + (f"{Path(other['program']).name:>20}" if other else "")]
    lines += [f"{key:<20}{result[key]!s:>14}" + (f"{other[key]!s:>20}" if other else "") for key in keys]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
