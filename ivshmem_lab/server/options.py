"""The options of ``ivshmem-server``: those of QEMU's contrib server, and ours."""

from __future__ import annotations

import argparse
import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import UsageError
from ..ipc.runtime_dir import check_socket_path
from ..units import check_memory_size, parse_size
from .faults import Churn, Faults, parse_fault
from .policy import Policy, Rule
from .server import MAX_VECTORS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .events import FaultPlan

PID_FILE = "/var/run/ivshmem-server.pid"

_EXAMPLE = """\
example:
  ivshmem-server -F -v -S /tmp/board.sock -M board -l 4M -n 2 --control /tmp/board.control
  qemu-system-x86_64 -chardev socket,path=/tmp/board.sock,id=board -device ivshmem-doorbell,chardev=board,vectors=2
  ivshmem-server --status /tmp/board.control

Without -F the server goes into the background as soon as it listens.
SIGTERM, SIGINT or SIGHUP end it: what waits for the peers is sent, then socket and memory are removed.
Sizes: a PCI BAR holds a power of two, and QEMU aborts on anything else. QEMU's own server rounds 3M up to
4M, so that peers get another size than was asked for, and makes 1 byte of 4G; this one refuses 3M and makes 4G.
Exit status: 0 done, 1 failed, 2 wrong call."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for, checked."""

    foreground: bool
    verbose: bool
    json: bool
    pid_file: str | None
    """None: the default, and only if it can be written."""
    socket: str
    shm_name: str
    shm_dir: str | None
    memfd: bool
    keep_memory: bool
    state_file: str | None
    size_bytes: int
    vectors: int
    policy: Policy
    queue_limit: int
    shield_qemu: bool
    lease_hold_s: float
    control: str | None
    trace: str | None
    faults: FaultPlan | None
    churns: tuple[Churn, ...]
    list_faults: bool
    status: str | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a call in one line."""
        raise UsageError(f"{message}; see {self.prog} --help")


def parse_arguments(argv: Sequence[str] | None) -> Options:
    """Read and check the command line.

    Raises
    ------
    UsageError
        Names the first option that is wrong.
    SystemExit
        After ``--help`` was printed.
    """
    given = _parser().parse_args(argv)
    if given.verbose and not given.foreground:
        raise UsageError("cannot use verbose in daemon mode; add -F or leave out -v")
    if given.json and not (given.foreground or given.status):
        raise UsageError("--json needs something that reports: add -F, or --status SOCK")
    for path in (given.socket, given.control, given.status):
        if path is not None:
            check_socket_path(path)
    if given.keep_memory and (given.memfd or given.shm_dir is not None):
        raise UsageError("only memory with a name can be kept; leave out --keep-memory, or use -M")
    plans = [parse_fault(text) for text in given.fault]
    faults = [plan for plan in plans if not isinstance(plan, Churn)]
    return Options(
        foreground=given.foreground,
        verbose=given.verbose,
        json=given.json,
        pid_file=None if given.pid_file is None else str(Path(given.pid_file).absolute()),
        socket=given.socket,
        shm_name=given.shm_name,
        shm_dir=given.shm_dir,
        memfd=given.memfd,
        keep_memory=given.keep_memory,
        state_file=None if given.state is None else str(Path(given.state).absolute()),
        size_bytes=check_memory_size(parse_size(given.size)),
        vectors=_whole("vectors", given.vectors, 0, MAX_VECTORS),
        policy=_policy(given),
        queue_limit=_whole("queue limit", given.queue_limit, 1, 1 << 31),
        shield_qemu=given.shield_qemu,
        lease_hold_s=_seconds("lease hold", given.lease_hold),
        control=given.control,
        trace=given.trace,
        faults=Faults(faults) if faults else None,
        churns=tuple(plan for plan in plans if isinstance(plan, Churn)),
        list_faults=given.faults,
        status=given.status,
    )


def _parser() -> argparse.ArgumentParser:
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
    add("-p", "--pid-file", metavar="FILE", help=f"where to write the pid, without -F only ({PID_FILE})")
    add("-S", "--socket", default="/tmp/ivshmem_socket", metavar="SOCK", help="Unix socket to listen on (%(default)s)")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument(
        "-M",
        "--shm-name",
        default="ivshmem",
        metavar="NAME",
        help="POSIX shared memory to make, mode 0600 (%(default)s); it cannot be sealed: any peer and any program of this user "
        "can shrink it, which kills the peers that touch it then (SIGBUS)",
    )
    memory.add_argument("-m", "--shm-dir", metavar="DIR", help="nameless memory in this directory (hugetlbfs)")
    memory.add_argument("--memfd", action="store_true", help="nameless memory that nobody can resize")
    add("-l", "--size", default="4M", metavar="SIZE", help="its size, a power of two from 4K up (%(default)s)")
    add("-n", "--vectors", default="1", metavar="N", help=f"vectors per peer, 0 to {MAX_VECTORS} (%(default)s)")
    add("--keep-memory", action="store_true", help="go on with the memory NAME if it exists; leave it at the end")
    add(
        "--state",
        metavar="FILE",
        help="go on with the ids and leases in FILE if it exists, and keep them there (one per server)",
    )
    _add_admission(parser.add_argument_group("who may join").add_argument)
    _add_reports(parser.add_argument_group("seeing it, and spoiling it").add_argument)
    return parser


def _add_admission(add: Callable[..., object]) -> None:
    add("--allow-uid", action="append", default=[], metavar="UID", help="let in this user, and our own; repeatable")
    add("--allow-gid", action="append", default=[], metavar="GID", help="let in this primary group; repeatable")
    add(
        "--observer-uid",
        action="append",
        default=[],
        metavar="UID",
        help="let in this user, with the memory read-only and nothing to ring; repeatable. Safe against other "
        "users; within one user it only prevents accidents. Real QEMU cannot observe",
    )
    add("--max-peers-per-uid", metavar="N", help="most peers of one user at a time (no limit)")
    add("--socket-mode", metavar="MODE", help="mode of the socket, octal (0600; 0666 when somebody is let in by uid)")
    add("--queue-limit", default="1000000", metavar="N", help="disconnect who lets more messages wait (%(default)s)")
    add("--shield-qemu", action="store_true", help="keep from QEMU processes what is known to crash them")
    add("--lease-hold", default="30", metavar="S", help="keep a lease so long for a peer that is gone (%(default)s)")


def _add_reports(add: Callable[..., object]) -> None:
    add("--control", metavar="SOCK", help="answer questions about this server on this socket")
    add("--status", metavar="SOCK", help="ask the server whose --control is SOCK, print its answer, and end")
    add("--json", action="store_true", help="with --status: as JSON; with -F: print events as JSON lines")
    add("--trace", metavar="FILE", help="record every message and event (for: ivshmem-lab trace FILE)")
    add("--fault", action="append", default=[], metavar="FAULT", help="do something wrong on purpose; repeatable")
    add("--faults", action="store_true", help="print the faults there are, with their symptoms, and end")


def _policy(given: argparse.Namespace) -> Policy:
    observers = [_user(name) for name in given.observer_uid]
    uids = {_user(name) for name in given.allow_uid} | set(observers)
    gids = {_whole("gid", text, 0, 2**32 - 2) for text in given.allow_gid}
    listed = bool(uids or gids)
    mode = 0o666 if listed else 0o600
    if given.socket_mode is not None:
        if not re.fullmatch(r"0?[0-7]{3}", given.socket_mode):
            raise UsageError(f"socket mode {given.socket_mode!r} is not allowed; three octal digits, such as 660")
        mode = int(given.socket_mode, 8)
    limit = given.max_peers_per_uid
    return Policy(
        uids=frozenset(uids | {os.getuid()}) if listed else None,
        gids=frozenset(gids) if listed else None,
        peers_per_uid=None if limit is None else _whole("peers per uid", limit, 1, 1 << 16),
        rules=tuple(Rule("observer", uid=uid) for uid in observers),
        socket_mode=mode,
    )


def _user(text: str) -> int:
    """Read a uid or a user's name."""
    if text.isdecimal():
        return _whole("uid", text, 0, 2**32 - 2)
    try:
        return pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError) as error:
        raise UsageError(f"user {text!r} is not known here; give a uid or a name of /etc/passwd") from error


def _whole(what: str, text: str, low: int, high: int) -> int:
    """Read a whole number as C does: 16, 0x10 or 020."""
    try:
        number = int(text, 8) if re.fullmatch("0[0-7]+", text) else int(text, 0)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        raise UsageError(f"{what} {text!r} is not allowed; a whole number from {low} to {high}")
    return number


def _seconds(what: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 86400 * 365:
        raise UsageError(f"{what} {text!r} is not allowed; seconds, 0 or more")
    return number
