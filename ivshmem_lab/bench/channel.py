"""How fast two host peers talk: a round trip of interrupts, and messages of a channel.

All of it in one run, in turns, both processes and the server on one CPU:

* **round trip**: ``ring`` and ``wait`` of :class:`~ivshmem_lab.peer.peer.Peer` against a ping-pong on two eventfds with nothing but
  ``os.eventfd_write`` and ``os.eventfd_read`` (blocking), and against the same on non-blocking eventfds with an epoll in
  front, which is the least that one can do with a peer's eventfds: they are non-blocking because QEMU makes them so.
* **messages**: bytes from the sender's memory into the ring and shown to the receiver, against numpy copying the same
  bytes into as much shared memory. The time ends when the receiver has released the last message.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import IvshmemLabError, PeerError, UsageError
from ..peer.channel import Channel, area_bytes
from ..peer.peer import Peer
from ..units import KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

WANTED_TRIP, WANTED_MESSAGES = 1.5, 0.8

_LIMIT_S = 30.0
_LARGEST_RING_BYTES = 64 * MIB
_ANSWERS_BYTES = area_bytes(4096)
_SOURCE_BYTES = 16 * MIB


def bench_channel(
    *,
    rounds: int = 9,
    trips: int = 5000,
    messages: int = 1024,
    message_bytes: int = 64 * KIB,
    ring_bytes: int = 8 * MIB,
    cpu: int | None = None,
) -> dict[str, Any]:
    """Measure, and return what :func:`main` prints.

    Parameters
    ----------
    rounds
        How often each way is measured, in turns; the fastest of each are compared, because other load only slows.
    trips
        Round trips per round.
    messages
        Messages per round.
    message_bytes
        Size of each, at most half the ring.
    ring_bytes
        Room of the channel's ring, and of what numpy copies into: a power of two, 1 MiB to 64 MiB.
    cpu
        The CPU for all; None for the last one that we may use.

    Raises
    ------
    UsageError
        When a number is not allowed.
    IvshmemLabError
        When a process does not come up.
    """
    if min(rounds, trips, messages) < 1 or not 16 <= message_bytes <= 1 * MIB:
        raise UsageError("rounds, trips and messages are 1 or more; a message has 16 bytes to 1M")
    if not 4 * message_bytes <= ring_bytes <= _LARGEST_RING_BYTES or ring_bytes & (ring_bytes - 1):
        raise UsageError(
            f"a ring of {ring_bytes} bytes is not allowed: a power of two, 4 messages to {_LARGEST_RING_BYTES} bytes"
        )
    before = os.sched_getaffinity(0)
    chosen = max(before) if cpu is None else cpu
    if chosen not in before:
        raise UsageError(f"CPU {chosen} is not among those that we may use: {sorted(before)}")
    os.sched_setaffinity(0, {chosen})  # children inherit it
    try:
        with contextlib.ExitStack() as stack:
            times = _measure(stack, rounds, trips, messages, message_bytes, ring_bytes)
    finally:
        os.sched_setaffinity(0, before)
    micros = {name: round(min(values) * 1e6, 3) for name, values in times.items() if name != "copied_bytes"}
    return {
        "cpu": chosen,
        "rounds": rounds,
        "trips": trips,
        "messages": messages,
        "message_bytes": message_bytes,
        "ring_bytes": ring_bytes,
        "micros": micros,
        "trip_ratio": round(micros["trip_peer"] / micros["trip_eventfd"], 3),
        "trip_ratio_epoll": round(micros["trip_peer"] / micros["trip_epoll"], 3),
        "message_ratio": round(micros["numpy_copy"] / micros["send_all"], 3),
        "message_ratio_one_by_one": round(micros["numpy_copy"] / micros["send"], 3),
        "in_place_copied_bytes": int(times["copied_bytes"][0]),
    }


def _measure(
    stack: contextlib.ExitStack, rounds: int, trips: int, messages: int, message_bytes: int, ring_bytes: int
) -> dict[str, list[float]]:
    path = str(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ivlab-"))) / "s")
    server = [
        sys.executable,
        "-m",
        "ivshmem_lab.server.cli",
        "-F",
        "-S",
        path,
        "-l",
        str(4 * ring_bytes),  # the channel, its answers, and room for the copies
        "-n",
        "2",
        "-M",
        Path(path).parent.name,
    ]
    stack.callback(
        Path("/dev/shm", Path(path).parent.name).unlink, missing_ok=True
    )  # a server that dies leaves it there
    stack.enter_context(_running(server))
    me = stack.enter_context(_connect(path))
    fds = [os.eventfd(0, flags) for flags in (0, 0, os.EFD_NONBLOCK, os.EFD_NONBLOCK)]
    for fd in fds:
        stack.callback(os.close, fd)
    arguments = repr((path, fds, rounds, trips, messages, ring_bytes))
    code = f"from ivshmem_lab.bench.channel import answer; answer(*{arguments})"
    stack.enter_context(_running([sys.executable, "-c", code], fds))
    other = me.wait_for_peer(None, _LIMIT_S)
    if not me.wait(0, _LIMIT_S):
        raise PeerError(f"the other process of the measurement said nothing within {_LIMIT_S} s")
    times: dict[str, list[float]] = {}

    def timed(name: str, each: int, run: Callable[[], object]) -> None:
        start_s = time.perf_counter()
        run()
        times.setdefault(name, []).append((time.perf_counter() - start_s) / each)

    sender = Channel.sender(me, 0, area_bytes(ring_bytes), vector=1)
    answers = Channel.receiver(me, 2 * ring_bytes, _ANSWERS_BYTES, vector=1)
    source = np.random.default_rng(1).integers(0, 256, _SOURCE_BYTES, dtype=np.uint8)
    parts = [source[at : at + message_bytes] for at in range(0, _SOURCE_BYTES - message_bytes + 1, message_bytes)]
    data = [parts[index % len(parts)] for index in range(messages)]
    slots = [
        me.array("u1", 3 * ring_bytes + at, message_bytes)
        for at in range(0, ring_bytes - message_bytes + 1, message_bytes)
    ]

    def copy() -> None:
        for index, part in enumerate(data):
            slots[index % len(slots)][:] = part

    def send() -> None:
        for part in data:
            sender.send(part, _LIMIT_S)
        _expect(answers)

    def send_all() -> None:
        sender.send_all(data, _LIMIT_S)
        _expect(answers)

    def in_place() -> None:
        for index in range(messages):
            sender.reserve(message_bytes, _LIMIT_S)[:8] = index & 255
            sender.commit()
        _expect(answers)

    copy()  # touch everything once
    for _ in range(rounds):
        timed("trip_eventfd", trips, lambda: _bare(fds[0], fds[1], trips))
        timed("trip_epoll", trips, lambda: _bare_epoll(fds[2], fds[3], trips))
        timed("trip_peer", trips, lambda: _ping(me, other, trips))
        timed("numpy_copy", messages, copy)
        timed("send", messages, send)
        timed("send_all", messages, send_all)
        copied = sender.copied_bytes
        timed("in_place", messages, in_place)
        times.setdefault("copied_bytes", []).append(sender.copied_bytes - copied)
    return times


def answer(path: str, fds: Sequence[int], rounds: int, trips: int, messages: int, ring_bytes: int) -> None:
    """Be the other process of the measurement: the same steps in the same order."""
    with Peer.connect(path) as me:
        other = me.wait_for_peer(0, _LIMIT_S)
        receiver = Channel.receiver(me, 0, area_bytes(ring_bytes), vector=1)
        answers = Channel.sender(me, 2 * ring_bytes, _ANSWERS_BYTES, vector=1)
        me.ring(other)
        for _ in range(rounds):
            for _ in range(trips):
                os.eventfd_read(fds[0])
                os.eventfd_write(fds[1], 1)
            _pong_epoll(fds[2], fds[3], trips)
            for _ in range(trips):
                me.wait()
                me.ring(other)
            for _ in range(3):
                left = messages
                while left:
                    views = receiver.peek_all(_LIMIT_S)
                    if not views:
                        raise PeerError(f"no message came within {_LIMIT_S} s")
                    left -= len(views)
                    del views
                    receiver.release()
                answers.send(b"all read", _LIMIT_S)


def _expect(answers: Any) -> None:
    if answers.receive(_LIMIT_S) is None:
        raise PeerError(f"the receiver has not read everything within {_LIMIT_S} s")


def _bare(there: int, back: int, trips: int) -> None:
    for _ in range(trips):
        os.eventfd_write(there, 1)
        os.eventfd_read(back)


def _bare_epoll(there: int, back: int, trips: int) -> None:
    with select.epoll() as poller:
        poller.register(back, select.EPOLLIN)
        for _ in range(trips):
            os.eventfd_write(there, 1)
            poller.poll(None, 1)
            os.eventfd_read(back)


def _pong_epoll(there: int, back: int, trips: int) -> None:
    with select.epoll() as poller:
        poller.register(there, select.EPOLLIN)
        for _ in range(trips):
            poller.poll(None, 1)
            os.eventfd_read(there)
            os.eventfd_write(back, 1)


def _ping(me: Peer, other: int, trips: int) -> None:
    for _ in range(trips):
        me.ring(other)
        me.wait()


@contextlib.contextmanager
def _running(command: list[str], fds: Sequence[int] = ()) -> Iterator[None]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=fds, env=environment
    ) as process:
        try:
            yield
        finally:
            process.terminate()


def _connect(path: str) -> Peer:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        try:
            return Peer.connect(path)
        except PeerError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)  # the server is starting


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; returns 0, 1 when it failed, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="ivshmem-lab bench channel",
        description="Measure two host peers on one CPU: round trips, and messages of a channel.",
        epilog="example: ivshmem-lab bench channel --rounds 20 --json",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=9, metavar="N", help="how often each way is measured, in turns (%(default)s)")
    add("--trips", type=int, default=5000, metavar="N", help="round trips per round (%(default)s)")
    add("--messages", type=int, default=1024, metavar="N", help="messages per round (%(default)s)")
    add("--message-bytes", type=int, default=64 * KIB, metavar="N", help="size of a message (%(default)s)")
    add(
        "--ring-bytes",
        type=int,
        default=8 * MIB,
        metavar="N",
        help="room of the ring, and for the copies (%(default)s)",
    )
    add("--cpu", type=int, metavar="N", help="the CPU for both processes and the server (the last one)")
    add("--json", action="store_true", help="print one JSON object")
    try:
        given = parser.parse_args(argv)
    except SystemExit as stop:  # --help, or a wrong call
        return int(stop.code or 0)
    options = {name: value for name, value in vars(given).items() if name != "json"}
    try:
        result = bench_channel(**options)
    except IvshmemLabError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(result) if given.json else _table(result))
    return 0


def _table(result: dict[str, Any]) -> str:
    micros, size = result["micros"], result["message_bytes"]
    lines = [
        f"CPU {result['cpu']}, the fastest of {result['rounds']} rounds in turns",
        "",
        f"{'round trip':<34}{'us':>10}",
    ]
    for name, words in (
        ("trip_eventfd", "bare eventfds, blocking"),
        ("trip_epoll", "bare eventfds, epoll"),
        ("trip_peer", "Peer.ring and Peer.wait"),
    ):
        lines.append(f"  {words:<32}{micros[name]:>10}")
    lines.append(
        f"  ratio {result['trip_ratio']} (wanted: at most {WANTED_TRIP}); to epoll {result['trip_ratio_epoll']}"
    )
    lines += ["", f"{f'message of {size} bytes':<34}{'us':>10}{'MB/s':>10}"]
    for name, words in (
        ("numpy_copy", "numpy copy"),
        ("send", "send, peek_all, release"),
        ("send_all", "send_all, peek_all, release"),
        ("in_place", "reserve, commit, peek_all, release"),
    ):
        lines.append(f"  {words:<32}{micros[name]:>10}{size / micros[name]:>10.0f}")
    lines.append(
        f"  ratio {result['message_ratio']} (wanted: at least {WANTED_MESSAGES}); one by one {result['message_ratio_one_by_one']}"
    )
    lines.append(f"  bytes copied by reserve and commit: {result['in_place_copied_bytes']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
