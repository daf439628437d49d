"""The demonstration itself."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ..bench import latency, throughput
from ..bench.clock import measure_tsc
from ..bench.host import HostFacts, Pinning
from ..errors import EmulatorNotFoundError
from ..lab.lab import Lab
from ..vm.qemu import QEMU_PROGRAM, find_emulator
from .report import DemoPath, DemoPeer, DemoReport, draw_figure

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from ..bench.latency import LatencyResult
    from ..bench.throughput import ThroughputResult
    from ..lab.members import LabVm
    from ..lab.servers import LabServer
    from ..peer.peer import Peer
    from .options import DemoOptions

_MEMORY = "4M"
_VECTORS = 2
_ME = "me"


def run_demo(
    options: DemoOptions,
    say: Callable[[str], None] = lambda _: None,
    hold: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
) -> DemoReport:
    """Do the demonstration.

    Parameters
    ----------
    options
        What is to be done.
    say
        Is told what is being done.
    hold
        Makes contexts in which no KeyboardInterrupt comes: for short work that must not stop in the middle.

    Returns
    -------
    DemoReport
        Also when a count or a checksum is wrong; see `DemoReport.failures`.

    Raises
    ------
    UsageError
        An option is not allowed; nothing was started.
    IvshmemLabError
        Something did not start, or a measurement did not come to its end; nothing is left of it.
    """
    options.check()
    start_s = time.monotonic()
    qemu, note = _find_qemu(wanted=options.qemu)
    host = HostFacts.look(qemu)
    with hold():
        lab = Lab()
    try:
        demo = _Demo(lab, options, qemu is not None, say)
        demo.exchange_interrupts()
        demo.move_bytes()
    finally:
        with hold():
            lab.close()
    report = DemoReport(
        demo.peers(), demo.paths(), host, demo.pinning, demo.clock, options.size_bytes, note, time.monotonic() - start_s
    )
    say("drawing the figure")
    with hold():
        picture = draw_figure(report, options.figure.suffix[1:].lower())
    report.save(picture, options.figure)
    report.elapsed_s = time.monotonic() - start_s
    return report


class _Demo:
    """The demonstration while it runs."""

    def __init__(self, lab: Lab, options: DemoOptions, with_qemu: bool, say: Callable[[str], None]) -> None:
        self._lab = lab
        self._options = options
        self._say = say
        self._pairs = {"unicorn": ("alice", "bob"), **({"qemu": ("carol", "dave")} if with_qemu else {})}
        self._peers: list[DemoPeer] = []
        self._latencies: list[LatencyResult] = []
        self._throughputs: list[ThroughputResult] = []
        self.pinning = Pinning.choose()
        say("measuring the guests' clock")
        self.clock = measure_tsc()
        self._board: LabServer = lab.server("board", size=_MEMORY, vectors=_VECTORS)
        self._me: Peer = lab.peer(_ME, connect=self._board)

    def exchange_interrupts(self) -> None:
        """Start the machines with the guest ``pingpong`` and measure all paths, in turns."""
        vms: dict[str, LabVm] = {
            name: self._lab.vm(name, "pingpong", emulator=emulator, connect=self._board, cpu=self.pinning.measured)
            for emulator, pair in self._pairs.items()
            for name in pair
        }
        self._say(f"starting {', '.join(vms)}")
        self._lab.start()
        for vm in vms.values():
            assert isinstance(vm.peer_id, int)
            self._add_peer(vm.name, vm.emulator, vm.peer_id, "pingpong")
        self._add_peer(_ME, "host", self._me.peer_id, None)
        paths: list[latency.Path] = [
            latency.GuestPath(self._me, vms[first], vms[second], self.clock, self.pinning)
            for first, second in self._ends()
            if first != _ME
        ]
        paths.insert(self._ends().index((_ME, "alice")), latency.HostPath(self._me, vms["alice"], _ME, self.pinning))

        def tell(turn: int, path: latency.Path) -> None:
            self._say(f"interrupts, turn {turn + 1} of {latency.BLOCKS}: {' and '.join(path.between)}")

        self._latencies = latency.measure(paths, self._options.rounds, on_block=tell)
        for vm in vms.values():
            vm.close()

    def move_bytes(self) -> None:
        """Move bytes along all paths, in turns; the names are free for machines with the guest ``stream``."""
        emulators = {name: emulator for emulator, pair in self._pairs.items() for name in pair}
        streams: list[throughput.Stream] = []
        for first, second in self._ends():
            consumer = (second, emulators[second])
            if first == _ME:
                streams.append(
                    throughput.HostStream(self._lab, self._board, self._me, consumer, self.clock, self.pinning, _ME)
                )
            else:
                producer = (first, emulators[first])
                streams.append(
                    throughput.GuestStream(self._lab, self._board, producer, consumer, self.clock, self.pinning)
                )

        def tell(turn: int, stream: throughput.Stream) -> None:
            self._say(f"bytes, turn {turn + 1} of {throughput.TURNS}: {' to '.join(stream.between)}")

        self._throughputs = throughput.measure(streams, self._options.size_bytes, on_run=tell)

    def peers(self) -> list[DemoPeer]:
        """Return who took part, with all their ids."""
        ids: dict[str, set[int]] = {peer.name: set() for peer in self._peers}
        for result in self._throughputs:
            for run in result.runs:
                for name, peer_id in zip(result.between, run.peer_ids, strict=True):
                    ids[name].add(peer_id)
        return [replace(peer, stream_peer_ids=tuple(sorted(ids[peer.name]))) for peer in self._peers]

    def paths(self) -> list[DemoPath]:
        """Return what was measured."""
        kinds = {("alice", "bob"): "Unicorn", ("carol", "dave"): "QEMU", (_ME, "alice"): "host and Unicorn"}
        return [
            DemoPath(kinds.get(times.between, "Unicorn and QEMU"), times, moved, times.summary())
            for times, moved in zip(self._latencies, self._throughputs, strict=True)
        ]

    def _ends(self) -> list[tuple[str, str]]:
        ends = [*self._pairs.values(), (_ME, "alice")]
        return [*ends, ("alice", "carol")] if "qemu" in self._pairs else ends

    def _add_peer(self, name: str, emulator: str, peer_id: int, guest: str | None) -> None:
        self._peers.append(DemoPeer(name, emulator, peer_id, guest, self._board.vectors, self._board.size_bytes))


def _find_qemu(*, wanted: bool) -> tuple[str | None, str | None]:
    """Return QEMU's version and, when it takes no part, one line that says why."""
    if not wanted:
        return None, "Real QEMU was left out, as asked."
    if shutil.which(QEMU_PROGRAM) is None:
        return (
            None,
            f"Real QEMU took no part: {QEMU_PROGRAM} is not on PATH (Debian, Ubuntu: apt install qemu-system-x86).",
        )
    try:
        return find_emulator("qemu").version, None
    except EmulatorNotFoundError as error:
        return None, f"Real QEMU took no part: {error}"
