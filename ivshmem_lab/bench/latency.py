"""Round trips of an interrupt: doorbell there, doorbell back.

A round starts before the doorbell is rung and ends when the answer's interrupt was taken; both ends wait by sleeping
(a guest by ``hlt``). Guests time by ``rdtsc``, this process by `time.perf_counter_ns`.

Paths that shall be compared are measured in turns, in blocks: what happens to the machine meanwhile then happens to all
of them. The rounds at the start of each block, where caches are cold, are played but not counted.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import UnknownPeerError, UsageError
from ..guests.layout import MAILBOX_AREA_BYTES, STATUS_TEXTS, Mailbox
from ..stats.summary import Summary, summarize
from .host import MeasurementError, Pinning, on_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ..lab.members import LabVm
    from ..peer.peer import Peer
    from .clock import TscClock

WARMUP = 50
"""Rounds at the start of a block that are not counted."""

BLOCKS = 8

_LOG_OFFSET = MAILBOX_AREA_BYTES
_LOOK_S = 0.5  # how often it is looked whether the guests still run
_STANDSTILL_S = 30.0


@dataclass(frozen=True, slots=True)
class Block:
    """What one block brought: times in ns, and the interrupts of its timed rounds in both directions."""

    latency_ns: NDArray[np.float64]
    sent: int
    received: int


@dataclass(frozen=True, slots=True, repr=False)
class LatencyResult:
    """Round trips between two peers.

    Attributes
    ----------
    between : tuple of str
        Who rings first, who answers.
    blocks_ns : tuple of numpy.ndarray
        Round trips of each block.
    interrupts_sent, interrupts_received : int
        Both directions together, warm-up not counted, as the ends counted them.
    clock : str
        What the times were taken with.
    """

    between: tuple[str, str]
    blocks_ns: tuple[NDArray[np.float64], ...]
    interrupts_sent: int
    interrupts_received: int
    clock: str

    @property
    def name(self) -> str:
        """Both ends, for a label."""
        return " ↔ ".join(self.between)

    @property
    def latency_us(self) -> NDArray[np.float64]:
        """All round trips in µs, shape ``(rounds,)``."""
        return self.latency_ns / 1000

    @property
    def latency_ns(self) -> NDArray[np.float64]:
        """All round trips in the order they were made, shape ``(rounds,)``."""
        return np.concatenate(self.blocks_ns)

    @property
    def rounds(self) -> int:
        """Timed round trips."""
        return sum(block.size for block in self.blocks_ns)

    @property
    def complete(self) -> bool:
        """Whether every interrupt that was to be sent was sent, and arrived."""
        return self.interrupts_sent == self.interrupts_received == 2 * self.rounds

    def summary(self) -> Summary:
        """Return the percentiles, in µs. Machines started anew may differ by more than the interval of the median says."""
        return summarize(*(block / 1000 for block in self.blocks_ns))

    def __repr__(self) -> str:
        state = "none lost" if self.complete else "NOT complete"
        return (
            f"<LatencyResult {self.name}, in µs:\n"
            f"  {self.summary()}\n"
            f"  {self.interrupts_sent} interrupts sent, {self.interrupts_received} received, {state}>"
        )


class Path(Protocol):
    """Two peers that can exchange interrupts."""

    @property
    def between(self) -> tuple[str, str]:
        """Who rings first, who answers."""

    @property
    def clock(self) -> str:
        """What the times are taken with."""

    def block(self, rounds: int, warmup: int) -> Block:
        """Measure one block."""


class GuestPath:
    """Two guests that run ``pingpong``, and a host peer that gives the word.

    Parameters
    ----------
    controller
        A host peer of the same server; it sleeps while a block runs.
    ping, pong
        Who rings first, who answers.
    clock
        The rate of the guests' clock, from `measure_tsc`.
    pinning
        Keeps the controller off the guests' CPU; they themselves are pinned by ``lab.vm(…, cpu=…)``.
    """

    def __init__(
        self, controller: Peer, ping: LabVm, pong: LabVm, clock: TscClock, pinning: Pinning | None = None
    ) -> None:
        self._controller = controller
        self._guests = (ping, pong)
        self._tsc = clock
        self._pinning = pinning
        self._boxes = tuple(Mailbox(controller.memory, _id_of(guest)) for guest in self._guests)
        self.between = (ping.name, pong.name)
        self.clock = str(clock)
        _wait_until_ready(controller, self._guests)

    def block(self, rounds: int, warmup: int = WARMUP) -> Block:
        """Measure one block.

        Raises
        ------
        UsageError
            More rounds than the log in shared memory has room for.
        MeasurementError
            A guest refused, ended, or stands still.
        """
        ping, pong = self._boxes
        room = (self._controller.size_bytes - _LOG_OFFSET) // 4
        if not 0 < rounds <= room:
            raise UsageError(f"rounds {rounds} of a block do not fit: 1 to {room} in this shared memory")
        before = self._counts()
        ping.target, ping.rounds, ping.warmup, ping.log_offset = pong.peer_id, rounds, warmup, _LOG_OFFSET
        ping.controller = self._controller.peer_id + 1
        self._controller.wait(0, 0.0)  # what came before is not the answer
        with on_cpus(self._pinning.others if self._pinning else None), _nobody_leaves(self.between):
            self._run(rounds + warmup)
        ours = np.array([1, 1])  # the command that started it, and the doorbell that told us
        sent, received = self._counts() - before - ours - 2 * warmup
        return Block(ping.log_cycles().astype(np.float64) * (1e9 / self._tsc.hz), int(sent), int(received))

    def _counts(self) -> NDArray[np.int64]:
        ping, pong = self._boxes
        return np.array([ping.sent + pong.sent, ping.received + pong.received])

    def _run(self, rounds: int) -> None:
        ping = self._boxes[0]
        command = ping.command = (ping.command + 1) % (1 << 32)
        self._controller.ring(ping.peer_id, 0)
        deadline = time.monotonic() + _STANDSTILL_S + rounds * 0.001
        while ping.done != command:
            self._controller.wait(0, _LOOK_S)
            _require_running(self.between, self._guests, deadline)
        if ping.status:
            why = STATUS_TEXTS.get(ping.status, f"status {ping.status}")
            raise MeasurementError(f"{self.between[0]} did not ping {self.between[1]}: {why}")


class HostPath:
    """A guest that runs ``pingpong`` and answers, and the calling thread that rings it.

    Parameters
    ----------
    peer
        The host peer.
    guest
        Who answers.
    name
        What the host peer is called.
    pinning
        Takes this thread to the guest's CPU while it measures.
    """

    def __init__(self, peer: Peer, guest: LabVm, name: str = "me", pinning: Pinning | None = None) -> None:
        self._peer = peer
        self._guest = guest
        self._pinning = pinning
        self._box = Mailbox(peer.memory, _id_of(guest))
        self.between = (name, guest.name)
        self.clock = "perf_counter_ns"
        _wait_until_ready(peer, (guest,))

    def block(self, rounds: int, warmup: int = WARMUP) -> Block:
        """Measure one block.

        Raises
        ------
        MeasurementError
            The guest ended, or stands still.
        """
        sent, received = self._box.sent, self._box.received
        self._peer.wait(0, 0.0)
        self._box.reply_to = self._peer.peer_id + 1
        try:
            with on_cpus(self._pinning.measured if self._pinning else None), _nobody_leaves(self.between):
                times, answers = self._run(rounds, warmup)
        finally:
            self._box.reply_to = 0
        return Block(
            np.array(times[warmup:], dtype=np.float64),
            len(times) - warmup + self._box.sent - sent - warmup,
            answers - warmup + self._box.received - received - warmup,
        )

    def _run(self, rounds: int, warmup: int) -> tuple[list[int], int]:
        ring, wait, now, target = self._peer.ring, self._peer.wait, time.perf_counter_ns, self._box.peer_id
        times: list[int] = []
        answers = 0
        for _ in range(rounds + warmup):
            start = now()
            ring(target, 0)
            came = wait(0, _LOOK_S)
            if not came:
                came = self._wait_on()
            times.append(now() - start)
            answers += came
        return times, answers

    def _wait_on(self) -> int:
        deadline = time.monotonic() + _STANDSTILL_S
        while not (came := self._peer.wait(0, _LOOK_S)):
            _require_running(self.between, (self._guest,), deadline)
        return came


def measure(
    paths: Sequence[Path],
    rounds: int = 2000,
    *,
    warmup: int = WARMUP,
    blocks: int = BLOCKS,
    on_block: Callable[[int, Path], None] | None = None,
) -> list[LatencyResult]:
    """Measure several paths in turns: a block of the first, a block of the second, and so on.

    Parameters
    ----------
    paths
        What to measure; all `GuestPath` and `HostPath` of one server may be given together.
    rounds
        Timed round trips of each path.
    warmup
        Round trips before those, in each block.
    blocks
        How many turns; fewer when there are fewer rounds.
    on_block
        Is told before each block.

    Returns
    -------
    list of LatencyResult
        In the order of `paths`.

    Raises
    ------
    UsageError
        A number that is not allowed.
    MeasurementError
        A path did not come to its end.
    """
    if rounds < 1 or warmup < 0 or blocks < 1:
        raise UsageError(f"rounds {rounds}, warmup {warmup}, blocks {blocks}: at least 1, 0 and 1")
    turns = min(blocks, rounds)
    sizes = [rounds // turns + (turn < rounds % turns) for turn in range(turns)]
    done: list[list[Block]] = [[] for _ in paths]
    for turn, size in enumerate(sizes):
        for path, finished in zip(paths, done, strict=True):
            if on_block is not None:
                on_block(turn, path)
            finished.append(path.block(size, warmup))
    return [
        LatencyResult(
            path.between,
            tuple(block.latency_ns for block in finished),
            sum(block.sent for block in finished),
            sum(block.received for block in finished),
            path.clock,
        )
        for path, finished in zip(paths, done, strict=True)
    ]


def ping(
    controller: Peer,
    ping: LabVm,
    pong: LabVm,
    clock: TscClock,
    rounds: int = 2000,
    pinning: Pinning | None = None,
    **options: Any,
) -> LatencyResult:
    """Measure round trips between two guests; see `GuestPath` and `measure` for the parameters and errors."""
    (result,) = measure([GuestPath(controller, ping, pong, clock, pinning)], rounds, **options)
    return result


def ping_from_here(
    peer: Peer, guest: LabVm, rounds: int = 2000, pinning: Pinning | None = None, **options: Any
) -> LatencyResult:
    """Measure round trips between this thread and a guest; see `HostPath` and `measure`."""
    (result,) = measure([HostPath(peer, guest, pinning=pinning)], rounds, **options)
    return result


def _id_of(guest: LabVm) -> int:
    peer_id = guest.peer_id
    if not isinstance(peer_id, int):
        raise UsageError(f"{guest.name} is connected to {len(peer_id)} servers; pingpong uses the first device only")
    return peer_id


def _wait_until_ready(peer: Peer, guests: Sequence[LabVm]) -> None:
    for guest in guests:
        guest.wait_text("ready")
        if not Mailbox(peer.memory, _id_of(guest)).ready:
            raise UsageError(f"{guest.name} has no mailbox in this memory; does it run pingpong, on the same server?")
        peer.wait_for_peer(_id_of(guest), timeout_s=_STANDSTILL_S)


@contextlib.contextmanager
def _nobody_leaves(between: tuple[str, str]) -> Iterator[None]:
    try:
        yield
    except UnknownPeerError as error:
        raise MeasurementError(f"{' ↔ '.join(between)}: {error}; has the machine ended?") from error


def _require_running(between: tuple[str, str], guests: Sequence[LabVm], deadline: float) -> None:
    for guest in guests:
        if guest.state != "running":
            raise MeasurementError(
                f"{' ↔ '.join(between)}: {guest.name} is {guest.state}, {guest.reason or 'no reason'}"
            )
    if time.monotonic() > deadline:
        raise MeasurementError(f"{' ↔ '.join(between)}: no interrupt for {_STANDSTILL_S:g} s; one was lost")
