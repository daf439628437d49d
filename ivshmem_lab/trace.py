"""Traces of a server: read, drawn as a swim-lane, and replayed against any client.

A trace is what ``ivshmem-server --trace FILE`` wrote; :mod:`ivshmem_lab.server.recorder` says how.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .errors import IvshmemLabError, ServerError, UsageError
from .ipc.eventfd import EventFd, poll_timeout_ms
from .ipc.fdpass import send_message
from .ipc.memory import SharedMemory
from .server.listener import Listener
from .server.recorder import FORMAT
from .wire.messages import MAX_PEER_ID, MEMORY, PROTOCOL_VERSION, encode

if TYPE_CHECKING:
    import os
    import socket
    from collections.abc import Collection, Iterator, Sequence

_LANE = 10  # characters per column
_TIME = 12

_BEGINS = frozenset({"PeerJoined", "LeaseReturned"})  # events after which a peer is introduced from the start


@dataclass(frozen=True, slots=True)
class Sent:
    """A message from the server to a peer. `time_ns` counts from the start of the trace."""

    time_ns: int
    peer_id: int
    value: int
    has_fd: bool


@dataclass(frozen=True, slots=True)
class Happened:
    """An event of the server: name of its class, and what it said; `peer_id` is -1 where it is about none."""

    time_ns: int
    name: str
    peer_id: int
    details: dict[str, Any]


Record: TypeAlias = Sent | Happened


@dataclass(frozen=True)
class Trace:
    """A whole trace.

    Attributes
    ----------
    vectors, memory_bytes
        Those of the server.
    records
        All that was recorded, in order.
    truncated
        The last line was not whole: the server was killed, or the disk was full.
    """

    vectors: int
    memory_bytes: int
    records: list[Record] = field(repr=False)
    truncated: bool = False

    @property
    def peers(self) -> list[int]:
        """All peer ids in it, in the order in which they came."""
        return list(dict.fromkeys(record.peer_id for record in self.records if record.peer_id >= 0))

    def conversation(self, peer_id: int) -> list[Sent]:
        """All messages to one peer; to the first of several that had this id.

        Raises
        ------
        UsageError
            When there are none; names the peers there are.
        """
        said = []
        for record in self.records:
            if record.peer_id != peer_id:
                continue
            if isinstance(record, Sent):
                said.append(record)
            elif said and record.name in _BEGINS:
                break
        if not said:
            raise UsageError(f"nothing was said to peer {peer_id} in this trace; its peers are {self.peers}")
        return said


def read_trace(path: str | os.PathLike[str]) -> Trace:
    """Read a trace file.

    Raises
    ------
    UsageError
        When it cannot be read, or is no trace; names the line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"the trace {str(path)!r} cannot be read: {error.strerror}") from error
    truncated = bool(lines.pop())  # what follows the last newline
    where = str(path)
    header = _read_line(lines[0], where, 1) if lines else {}
    if header.get("ivshmem_trace") != FORMAT:
        raise UsageError(f"{where!r} is no trace that `ivshmem-server --trace` wrote (format {FORMAT})")
    records = []
    for number, line in enumerate(lines[1:], start=2):
        said = _read_line(line, where, number)
        try:
            records.append(_read_record(said))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{where!r}, line {number}: {line.decode(errors='replace')!r} is no record") from error
    vectors, memory_bytes = header.get("vectors"), header.get("memory_bytes")
    if not isinstance(vectors, int) or not isinstance(memory_bytes, int) or memory_bytes < 1:
        raise UsageError(f"{where!r}, line 1: it does not say what the server was (vectors, memory_bytes)")
    return Trace(vectors, memory_bytes, records, truncated)


def _read_line(line: bytes, where: str, number: int) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where!r}, line {number} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise UsageError(f"{where!r}, line {number} is not a JSON object")
    return said


def _read_record(said: dict[str, Any]) -> Record:
    time_ns = int(said.pop("time_ns"))
    if "event" in said:
        name = str(said.pop("event"))
        return Happened(time_ns, name, _id(said.pop("peer_id", -1)), said)
    value, has_fd = said["value"], said["has_fd"]
    if not isinstance(value, int) or not -(2**63) <= value < 2**63 or not isinstance(has_fd, bool):
        raise ValueError(value, has_fd)
    return Sent(time_ns, _id(said["peer"]), value, has_fd)


def _id(value: object) -> int:
    if not isinstance(value, int) or not -1 <= value <= MAX_PEER_ID:
        raise ValueError(value)
    return value


class _Listener:
    """What one peer makes of the messages to it, in words."""

    def __init__(self) -> None:
        self._heard = 0
        self._own = -1
        self._vectors: Counter[int] = Counter()

    def meaning(self, message: Sent) -> str:
        value, has_fd = message.value, message.has_fd
        self._heard += 1
        if self._heard == 1:
            return f"version {value}" + ("" if value == PROTOCOL_VERSION else " (wrong)")
        if self._heard == 2:
            self._own = value
            return f"you are peer {value}"
        if value == MEMORY:
            return "the memory" if has_fd else "the memory, but without its fd"
        whose = "your" if value == self._own else f"peer {value}'s"
        if has_fd:
            vector = self._vectors[value]
            self._vectors[value] += 1
            return f"{whose} vector {vector}"
        self._vectors.pop(value, None)
        return f"peer {value} left"


def swim_lane(trace: Trace, peers: Collection[int] | None = None) -> str:
    """Draw a trace: one column per peer, time down, an arrow per message.

    Parameters
    ----------
    trace
        The trace.
    peers
        Only these peers; None: all.

    Raises
    ------
    UsageError
        When a peer is not in the trace.
    """
    lanes = trace.peers if peers is None else list(peers)
    for peer_id in lanes:
        if peer_id not in trace.peers:
            raise UsageError(f"peer {peer_id} is not in this trace; its peers are {trace.peers}")
    return "\n".join(_draw(trace, lanes)) + "\n"


def _draw(trace: Trace, lanes: list[int]) -> Iterator[str]:
    heads = "".join(f"peer {peer_id}".center(_LANE) for peer_id in lanes)
    yield f"{'time ms':>{_TIME}}  {'server'.center(_LANE)}{heads}".rstrip()
    listeners = {peer_id: _Listener() for peer_id in trace.peers}
    there: set[int] = set()
    for record in trace.records:
        shown = record.peer_id in lanes
        if isinstance(record, Sent):
            there.add(record.peer_id)
            text = listeners[record.peer_id].meaning(record)
            mark, arrow = ("▶" if record.has_fd else "▷"), True
        else:
            text, arrow = _describe(record), False
            if record.name in _BEGINS:
                listeners[record.peer_id] = _Listener()
                there.add(record.peer_id)
            mark = {"PeerDeparted": "╳", "PeerSettled": "✓"}.get(record.name, "○")
        if shown or record.peer_id < 0:
            yield _row(record, lanes, there, mark, arrow=arrow) + f"  {text}"
        if isinstance(record, Happened) and record.name == "PeerDeparted":
            there.discard(record.peer_id)
    if trace.truncated:
        yield f"{'':{_TIME}}  (the trace ends in the middle of a line)"


def _row(record: Record, lanes: list[int], there: set[int], mark: str, *, arrow: bool) -> str:
    place = lanes.index(record.peer_id) if record.peer_id in lanes else -1
    cells = []
    for column in range(-1, len(lanes)):  # the server's is -1
        before = "─" if arrow and 0 <= column <= place else " "
        after = "─" if arrow and column < place else " "
        if column < 0:
            middle = "├" if arrow else ("○" if place < 0 else "│")
        elif column == place:
            middle = mark
        else:
            line = "│" if lanes[column] in there else " "
            middle = line if not (arrow and column < place) else ("┼" if line == "│" else "─")
        cells.append(before * (_LANE // 2) + middle + after * (_LANE - _LANE // 2 - 1))
    return f"{record.time_ns / 1e6:{_TIME}.3f}  {''.join(cells)}"


def _describe(event: Happened) -> str:
    details = ", ".join(f"{name} {value}" for name, value in event.details.items() if value is not None)
    words = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in event.name).strip()
    return f"[{words}{': ' if details else ''}{details}]"


def replay(trace: Trace, sock: socket.socket, peer_id: int, speed: float = 0.0, timeout_s: float = 5.0) -> int:
    """Say to a client what the trace's server said to one of its peers, with new memory and new eventfds.

    Parameters
    ----------
    trace
        The trace.
    sock
        Connected to the client; it stays open.
    peer_id
        The peer whose place the client takes.
    speed
        1 for the recorded pace, 2 for twice as fast; 0: without pauses.
    timeout_s
        Longest wait for a client that does not read.

    Returns
    -------
    int
        How many messages went out; fewer than the conversation has when the client left before its end.

    Raises
    ------
    UsageError
        When the trace has no such peer.
    ServerError
        When the client does not read.
    """
    said = trace.conversation(peer_id)
    sock.settimeout(timeout_s)
    start_s = time.monotonic()
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(SharedMemory.create_memfd(trace.memory_bytes))
        for count, message in enumerate(said):
            due_s = start_s + ((message.time_ns - said[0].time_ns) / 1e9 / speed if speed > 0 else 0.0)
            if _has_left(sock, due_s):
                return count
            fds = []
            if message.has_fd:
                fds = [memory.fd if message.value == MEMORY else stack.enter_context(EventFd.create()).fileno()]
            try:
                send_message(sock, encode(message.value), fds)
            except TimeoutError as error:
                raise ServerError(f"the client has read nothing for {timeout_s} s; {count} messages are out") from error
            except OSError:  # it left
                return count
    return len(said)


def replay_at(trace: Trace, path: str | os.PathLike[str], peer_id: int, speed: float = 0.0) -> int:
    """Listen on a socket, :func:`replay` for the first client that comes, and wait until it leaves.

    Raises
    ------
    UsageError, ServerError
        As :func:`replay`; when no socket can be made at the path, or another program listens there.
    """
    trace.conversation(peer_id)
    listener = Listener.open(path)
    try:
        listener.sock.setblocking(True)
        sock, _ = listener.sock.accept()
    finally:
        listener.close()
    with sock:
        count = replay(trace, sock, peer_id, speed)
        _has_left(sock, None)
    return count


def _has_left(sock: socket.socket, until_s: float | None) -> bool:
    """Wait until then (None: for ever), or until the client says something: it only does so when it leaves."""
    poller = select.poll()
    poller.register(sock, select.POLLIN | select.POLLRDHUP)
    return bool(poller.poll(poll_timeout_ms(until_s)))


_EXAMPLE = """\
example:
  ivshmem-server -F -S /tmp/board.sock -M board --trace board.jsonl
  ivshmem-lab trace board.jsonl
  ivshmem-lab trace board.jsonl --replay /tmp/again.sock --peer 1 --speed 1"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``ivshmem-lab trace``: draw a trace, print it, or replay it; return the exit status."""
    try:
        _run(_parse(argv))
    except IvshmemLabError as error:
        print(f"ivshmem-lab trace: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ivshmem-lab trace",
        description="Draw what an ivshmem server said to its peers, or say it again to any client.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="what `ivshmem-server --trace FILE` wrote")
    add("--peer", type=int, action="append", metavar="ID", help="only this peer; may be given several times")
    add("--json", action="store_true", help="print the trace's facts as one JSON object, instead of the drawing")
    add("--replay", metavar="SOCK", help="listen here, and play the part of the server for one client")
    add("--speed", type=float, default=0.0, metavar="X", help="pace of the replay: 1 as recorded; 0 without pauses")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    trace = read_trace(options.file)
    if options.replay is not None:
        peers = options.peer or trace.peers[:1]
        if len(peers) != 1:
            raise UsageError(f"a replay is for one peer; choose one with --peer: {trace.peers}")
        count = replay_at(trace, options.replay, peers[0], options.speed)
        told = {"peer": peers[0], "messages": len(trace.conversation(peers[0])), "replayed": count}
        print(json.dumps(told) if options.json else "{replayed} of {messages} messages to peer {peer}".format(**told))
    elif options.json:
        print(json.dumps(_facts(trace)))
    else:
        print(swim_lane(trace, options.peer), end="")


def _facts(trace: Trace) -> dict[str, Any]:
    sent = Counter(record.peer_id for record in trace.records if isinstance(record, Sent))
    return {
        "vectors": trace.vectors,
        "memory_bytes": trace.memory_bytes,
        "seconds": trace.records[-1].time_ns / 1e9 if trace.records else 0.0,
        "messages": {str(peer_id): sent[peer_id] for peer_id in trace.peers},
        "events": dict(Counter(record.name for record in trace.records if isinstance(record, Happened))),
        "truncated": trace.truncated,
    }
