"""Bytes through shared memory: a producer writes, rings, and a consumer reads; both compute a checksum.

The phases are kept apart: writing, reading (checksum included in both), and what is left of the whole: doorbells, waiting
and, where both ends share a CPU, changing over. GB/s is bytes (10^9) by the whole time, from the first write until the
producer has seen that the last chunk was consumed.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import PeerError, UsageError, VmError
from ..guests.exchange import produce, stream_checksum
from ..guests.layout import RING_DATA_BYTES, StreamRing
from ..units import KIB, MIB, format_size
from ..vm.text import VmTimeoutError
from .host import MeasurementError, Pinning, on_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..lab.lab import Lab
    from ..lab.members import LabVm
    from ..lab.servers import LabServer
    from ..peer.peer import Peer
    from .clock import TscClock

CHUNK_BYTES = 64 * KIB
TURNS = 3
"""How often each stream runs; an odd number, so that there is a middle one."""

MOST_BYTES = (1 << 32) - CHUNK_BYTES
"""A guest reads the number of bytes from its command line as 32 bits."""

SLOTS = 16
LEAST_MEMORY_BYTES = MIB + RING_DATA_BYTES + SLOTS * CHUNK_BYTES
"""The ring begins at 1 MiB, where the guests expect it."""

_SEED = 1
_LOOK_S = 0.5  # how often it is looked whether both guests still run
_STANDSTILL_S = 30.0
_SLOWEST_BYTES_PER_S = 10e6


@dataclass(frozen=True, slots=True)
class StreamRun:
    """One stream from its first to its last byte.

    Attributes
    ----------
    size_bytes : int
    total_s, write_s, read_s : float
        The phases; the rest of `total_s` is doorbells, waiting and changing over.
    written, read, expected : int
        Checksums: of what the producer wrote, of what the consumer read, of the pattern.
    peer_ids : tuple of int
        Of producer and consumer.
    """

    size_bytes: int
    total_s: float
    write_s: float
    read_s: float
    written: int
    read: int
    expected: int
    peer_ids: tuple[int, int]

    @property
    def checksum_ok(self) -> bool:
        """Whether both ends have the pattern's checksum."""
        return self.written == self.read == self.expected

    @property
    def gbytes_per_s(self) -> float:
        """Throughput, 10^9 bytes per second."""
        return self.size_bytes / self.total_s / 1e9


@dataclass(frozen=True, slots=True, repr=False)
class ThroughputResult:
    """The runs of one stream.

    Attributes
    ----------
    between : tuple of str
        Producer and consumer.
    runs : tuple of StreamRun
        In the order they were made.
    """

    between: tuple[str, str]
    runs: tuple[StreamRun, ...]

    @property
    def middle(self) -> StreamRun:
        """The run whose throughput is the median; its phases belong together."""
        return sorted(self.runs, key=lambda run: run.gbytes_per_s)[(len(self.runs) - 1) // 2]

    @property
    def gbytes_per_s(self) -> float:
        """Median throughput of the runs, 10^9 bytes per second."""
        return self.middle.gbytes_per_s

    @property
    def bytes_moved(self) -> int:
        """Bytes of all runs."""
        return sum(run.size_bytes for run in self.runs)

    @property
    def checksum_ok(self) -> bool:
        """Whether all runs arrived as they were sent."""
        return all(run.checksum_ok for run in self.runs)

    def __repr__(self) -> str:
        run = self.middle
        state = "ok" if self.checksum_ok else "WRONG"
        each = ", ".join(f"{run.gbytes_per_s:.2f}" for run in self.runs)
        return (
            f"<ThroughputResult {' → '.join(self.between)}: {run.gbytes_per_s:.2f} GB/s (runs: {each}), "
            f"{run.write_s * 1e3:.1f} ms writing and {run.read_s * 1e3:.1f} ms reading of {run.total_s * 1e3:.1f} ms, checksum {state}>"
        )


class Stream(Protocol):
    """Two peers that can move bytes."""

    @property
    def between(self) -> tuple[str, str]:
        """Producer and consumer."""

    def run(self, size_bytes: int, expected: int) -> StreamRun:
        """Move bytes once."""


class GuestStream:
    """Two guests that run ``stream``; their machines are made for each run, and closed after it.

    Parameters
    ----------
    lab, server
        Where. Machines of the lab that were defined and not started are started, too.
    producer, consumer
        (name, emulator) of both; the names must be free in the lab.
    clock
        The rate of the guests' clock.
    pinning
        Which CPU both run on; None for any.
    """

    def __init__(
        self,
        lab: Lab,
        server: LabServer,
        producer: tuple[str, str],
        consumer: tuple[str, str],
        clock: TscClock,
        pinning: Pinning | None = None,
    ) -> None:
        self._lab = lab
        self._server = _with_room(server)
        self._ends = (producer, consumer)
        self._clock = clock
        self._cpu = pinning.measured if pinning else None
        self.between = (producer[0], consumer[0])

    def run(self, size_bytes: int, expected: int) -> StreamRun:
        """Move bytes once.

        Raises
        ------
        MeasurementError
            A guest failed or stands still.
        """
        ring = StreamRing(self._server.memory)
        session = _new_session(ring)
        roles: tuple[dict[str, Any], ...] = ({"role": "producer", "bytes": size_bytes}, {"role": "consumer"})
        guests: list[LabVm] = []
        try:
            for (name, emulator), role in zip(self._ends, roles, strict=True):
                args = {**role, "session": session}
                guests.append(
                    self._lab.vm(name, "stream", args, emulator=emulator, connect=self._server, cpu=self._cpu)
                )
            self._lab.start()  # both at once: whoever is alone spins on the CPU that the other needs
            producer, consumer = guests
            self._wait_for_end(producer, consumer, size_bytes)
            ids = (_id_of(producer), _id_of(consumer))
        finally:
            for guest in guests:
                guest.close()
        return StreamRun(
            size_bytes,
            ring.producer.total_cycles / self._clock.hz,
            ring.producer.write_cycles / self._clock.hz,
            ring.consumer.read_cycles / self._clock.hz,
            ring.producer.checksum,
            ring.consumer.checksum,
            expected,
            ids,
        )

    def _wait_for_end(self, producer: LabVm, consumer: LabVm, size_bytes: int) -> None:
        limit_s = _STANDSTILL_S + size_bytes / _SLOWEST_BYTES_PER_S
        deadline = time.monotonic() + limit_s
        what = " → ".join(self.between)
        while True:
            try:
                producer.wait_text("stream: role=producer", _LOOK_S)
            except VmTimeoutError:
                pass
            except VmError as error:
                raise MeasurementError(f"{what}: {error}") from error
            else:
                return
            if consumer.state != "running":
                raise MeasurementError(f"{what}: {consumer.name} is {consumer.state}: {_last_words(consumer)}")
            if time.monotonic() > deadline:
                raise MeasurementError(f"{what}: {format_size(size_bytes)} were not there after {limit_s:.0f} s")


class HostStream:
    """A guest that runs ``stream`` and reads what the calling thread writes with numpy.

    Parameters
    ----------
    lab, server
        Where.
    peer
        The host peer.
    consumer
        (name, emulator) of the guest; the name must be free in the lab.
    clock
        The rate of the guest's clock.
    name
        What the host peer is called.
    pinning
        Which CPU the guest, and this thread meanwhile, run on; None for any.
    standstill_s
        How long the guest may take for nothing at all.
    """

    def __init__(
        self,
        lab: Lab,
        server: LabServer,
        peer: Peer,
        consumer: tuple[str, str],
        clock: TscClock,
        pinning: Pinning | None = None,
        name: str = "me",
        standstill_s: float = 10.0,
    ) -> None:
        self._lab = lab
        self._server = _with_room(server)
        self._peer = peer
        self._consumer = consumer
        self._clock = clock
        self._cpu = pinning.measured if pinning else None
        self._standstill_s = standstill_s
        self.between = (name, consumer[0])

    def run(self, size_bytes: int, expected: int) -> StreamRun:
        """Move bytes once.

        Raises
        ------
        MeasurementError
            The guest failed or stands still.
        """
        ring = StreamRing(self._peer.memory)
        session = _new_session(ring)
        name, emulator = self._consumer
        args = {"role": "consumer", "session": session}
        guest = self._lab.vm(name, "stream", args, emulator=emulator, connect=self._server, cpu=self._cpu)
        try:
            guest.start()
            guest.wait_text("ready")
            ids = (self._peer.peer_id, self._peer.wait_for_peer(_id_of(guest), timeout_s=_STANDSTILL_S))
            try:
                with on_cpus(self._cpu):
                    sent = produce(
                        self._peer,
                        ring,
                        size_bytes,
                        session=session,
                        chunk_bytes=CHUNK_BYTES,
                        slots=SLOTS,
                        seed=_SEED,
                        timeout_s=self._standstill_s,
                    )
            except PeerError as error:
                words = f"{name} is {guest.state}: {_last_words(guest)}"
                raise MeasurementError(f"{' → '.join(self.between)}: {error}; {words}") from error
        finally:
            guest.close()
        read_s = ring.consumer.read_cycles / self._clock.hz
        return StreamRun(
            size_bytes, sent.total_s, sent.touch_s, read_s, sent.checksum, ring.consumer.checksum, expected, ids
        )


def check_stream_bytes(size_bytes: int, what: str = "size") -> int:
    """Return a number of bytes that a stream can move; refuse it otherwise.

    Raises
    ------
    UsageError
        Names what is allowed.
    """
    if not 0 < size_bytes <= MOST_BYTES or size_bytes % CHUNK_BYTES:
        raise UsageError(
            f"{what} {format_size(size_bytes)} is not allowed: whole chunks of {format_size(CHUNK_BYTES)}, less than 4G"
        )
    return size_bytes


def measure(
    streams: Sequence[Stream],
    size_bytes: int = 64 * MIB,
    *,
    turns: int = TURNS,
    on_run: Callable[[int, Stream], None] | None = None,
) -> list[ThroughputResult]:
    """Measure several streams in turns: the first once, the second once, and so on.

    Parameters
    ----------
    streams
        What to measure.
    size_bytes
        Of each run, whole chunks of 64 KiB.
    turns
        Runs of each stream.
    on_run
        Is told before each run.

    Returns
    -------
    list of ThroughputResult
        In the order of `streams`.

    Raises
    ------
    UsageError
        A number that is not allowed.
    MeasurementError
        A stream did not come to its end.
    """
    if turns < 1:
        raise UsageError(f"turns {turns} is not allowed; at least 1")
    expected = stream_checksum(_SEED, check_stream_bytes(size_bytes) // CHUNK_BYTES, CHUNK_BYTES)
    runs: list[list[StreamRun]] = [[] for _ in streams]
    for turn in range(turns):
        for stream, done in zip(streams, runs, strict=True):
            if on_run is not None:
                on_run(turn, stream)
            done.append(stream.run(size_bytes, expected))
    return [ThroughputResult(stream.between, tuple(done)) for stream, done in zip(streams, runs, strict=True)]


def _with_room(server: LabServer) -> LabServer:
    if server.size_bytes < LEAST_MEMORY_BYTES:
        raise UsageError(
            f"the memory of {server.name} ({format_size(server.size_bytes)}) is too small for a stream's ring, which ends "
            f"at {format_size(LEAST_MEMORY_BYTES)}; make the server with size='4M'"
        )
    return server


def _new_session(ring: StreamRing) -> int:
    """Return a session that neither line shows: an old one would be taken for the other side."""
    old = {ring.producer.session, ring.consumer.session}
    return next(session for session in itertools.count(1) if session not in old)


def _id_of(guest: LabVm) -> int:
    peer_id = guest.peer_id
    assert isinstance(peer_id, int)  # we connected it to one server
    return peer_id


def _last_words(guest: LabVm) -> str:
    lines = guest.console.text().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "") or guest.reason or "it said nothing"
