"""What the demonstration found: as text, as one object, as a figure."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..bench import latency, throughput
from ..plots.overview import overview
from ..stats.summary import text_table
from ..units import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..bench.clock import TscClock
    from ..bench.host import HostFacts, Pinning
    from ..bench.latency import LatencyResult
    from ..bench.throughput import ThroughputResult
    from ..stats.summary import Summary

_KINDS = {"unicorn": "PC on Unicorn", "qemu": "PC on QEMU (TCG)", "host": "this Python process"}


@dataclass(frozen=True, slots=True)
class DemoPeer:
    """Who took part.

    Attributes
    ----------
    name, emulator : str
        ``"unicorn"``, ``"qemu"``, or ``"host"`` for this process.
    peer_id : int
        While interrupts were exchanged.
    guest : str or None
        The program it ran then.
    vectors, memory_bytes : int
        What it shared.
    stream_peer_ids : tuple of int
        Its ids while bytes were moved: each run starts machines anew, with the guest ``stream``.
    """

    name: str
    emulator: str
    peer_id: int
    guest: str | None
    vectors: int
    memory_bytes: int
    stream_peer_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DemoPath:
    """What was measured between two of them."""

    kind: str
    latency: LatencyResult
    throughput: ThroughputResult
    times_us: Summary
    """Of `latency`; kept, since its interval takes a while."""

    @property
    def name(self) -> str:
        """Both ends."""
        return self.latency.name

    @property
    def failures(self) -> list[str]:
        """What is not as it has to be."""
        found = []
        if not self.latency.complete:
            asked = self.latency.rounds
            found.append(
                f"{self.name}: {asked} interrupts each way were asked for, {self.latency.interrupts_sent} sent and "
                f"{self.latency.interrupts_received} received, both ways together"
            )
        found += [
            f"{' → '.join(self.throughput.between)}: checksum {run.written:#010x} written, {run.read:#010x} read, "
            f"{run.expected:#010x} expected"
            for run in self.throughput.runs
            if not run.checksum_ok
        ]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints of a path."""
        times, run = self.times_us, self.throughput.middle
        return {
            "between": list(self.latency.between),
            "kind": self.kind,
            "rounds": times.n,
            "p50_us": round(times.p50, 3),
            "p50_95_percent_us": [round(times.p50_low, 3), round(times.p50_high, 3)],
            "p90_us": round(times.p90, 3),
            "p99_us": round(times.p99, 3),
            "p999_us": round(times.p999, 3),
            "min_us": round(times.minimum, 3),
            "max_us": round(times.maximum, 3),
            "interrupts_sent": self.latency.interrupts_sent,
            "interrupts_received": self.latency.interrupts_received,
            "clock": self.latency.clock,
            "gbytes_per_s": round(run.gbytes_per_s, 4),
            "gbytes_per_s_runs": [round(each.gbytes_per_s, 4) for each in self.throughput.runs],
            "bytes_moved": self.throughput.bytes_moved,
            "write_s": run.write_s,
            "read_s": run.read_s,
            "total_s": run.total_s,
            "checksum": f"{run.expected:#010x}",
            "checksum_ok": self.throughput.checksum_ok,
        }

    def as_row(self) -> list[str]:
        """Return its line of the table, made of what `as_dict` holds: rounded anew, the two could differ in the last digit."""
        found = self.as_dict()
        low, high = found["p50_95_percent_us"]
        return [
            self.name,
            found["kind"],
            str(found["rounds"]),
            f"{found['p50_us']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{found['p90_us']:.1f}",
            f"{found['p99_us']:.1f}",
            f"{found['gbytes_per_s']:.2f}",
            "ok" if found["checksum_ok"] else "WRONG",
        ]


@dataclass(slots=True)
class DemoReport:
    """Everything the demonstration found."""

    peers: list[DemoPeer]
    paths: list[DemoPath]
    host: HostFacts
    pinning: Pinning
    clock: TscClock
    size_bytes: int
    note: str | None
    elapsed_s: float
    figure: Path | None = None
    figure_failure: str | None = None

    @property
    def failures(self) -> list[str]:
        """What is not as it has to be; empty when all is well."""
        found = [failure for path in self.paths for failure in path.failures]
        return [*found, self.figure_failure] if self.figure_failure else found

    @property
    def interrupts(self) -> tuple[int, int]:
        """Sent and received, over all paths and both directions."""
        return (
            sum(path.latency.interrupts_sent for path in self.paths),
            sum(path.latency.interrupts_received for path in self.paths),
        )

    @property
    def bytes_moved(self) -> int:
        """Bytes of all streams."""
        return sum(path.throughput.bytes_moved for path in self.paths)

    @property
    def unicorn_to_qemu(self) -> float | None:
        """The Unicorn pair's median round trip, divided by the QEMU pair's; None without QEMU."""
        medians = {path.kind: path.times_us.p50 for path in self.paths}
        return medians["Unicorn"] / medians["QEMU"] if "QEMU" in medians else None

    @property
    def circumstances(self) -> list[str]:
        """Return what no figure may go without, in lines."""
        return [
            str(self.host),
            f"pinning: {self.pinning}",
            f"clock: guests {self.clock}; this process perf_counter_ns",
            f"round trips in {latency.BLOCKS} turns, the first {latency.WARMUP} of each not counted",
            f"streams of {format_size(self.size_bytes)} in {throughput.TURNS} turns, the median shown",
        ]

    def save(self, picture: bytes, path: Path) -> None:
        """Write the figure, in one go: no temporary file. A failure is kept for `failures`; the numbers are there."""
        try:
            path.write_bytes(picture)
            self.figure = path
        except OSError as error:
            self.figure_failure = f"the figure could not be written to {str(path)!r}: {error.strerror}"

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        sent, received = self.interrupts
        ratio = self.unicorn_to_qemu
        return {
            "version": __version__,
            "peers": [asdict(peer) for peer in self.peers],
            "interrupts_sent": sent,
            "interrupts_received": received,
            "bytes_moved": self.bytes_moved,
            "checksum_ok": all(path.throughput.checksum_ok for path in self.paths),
            "paths": [path.as_dict() for path in self.paths],
            "unicorn_to_qemu_p50": None if ratio is None else round(ratio, 3),
            "figure": str(self.figure.resolve()) if self.figure else None,
            "host": {
                **self.host.as_dict(),
                "pinning": str(self.pinning),
                "measured_cpu": self.pinning.measured,
                "clock": str(self.clock),
                "tsc_hz": round(self.clock.hz),
            },
            "turns": {"latency": latency.BLOCKS, "latency_warmup_rounds": latency.WARMUP, "stream": throughput.TURNS},
            "note": self.note,
            "failures": self.failures,
            "elapsed_s": round(self.elapsed_s, 2),
        }

    def as_text(self) -> str:
        """Return what the command prints."""
        sent, received = self.interrupts
        who = [
            [peer.name, _KINDS[peer.emulator], str(peer.peer_id), str(peer.vectors), format_size(peer.memory_bytes)]
            for peer in self.peers
        ]
        heads = ["path", "", "rounds", "p50 µs", "95 % interval", "p90 µs", "p99 µs", "GB/s", "checksum"]
        parts = [
            f"One ivshmem server, one shared memory of {format_size(self.peers[0].memory_bytes)}; who is who:",
            "",
            text_table(["name", "what it is", "peer id", "vectors", "memory"], who),
            "",
            "To move bytes each machine is started anew with another guest, and gets a new peer id:",
            "; ".join(f"{peer.name} {_listed(peer.stream_peer_ids)}" for peer in self.peers if peer.guest),
            "",
            "Interrupt there and back, and bytes through shared memory:",
            "",
            text_table(heads, [path.as_row() for path in self.paths]),
            "",
            f"{sent} interrupts sent, {received} received, {format_size(self.bytes_moved)} moved, in {self.elapsed_s:.1f} s.",
        ]
        if (ratio := self.unicorn_to_qemu) is not None:
            parts.append(f"Median of the Unicorn pair: {ratio:.2f} times that of the QEMU pair.")
        if self.note:
            parts.append(self.note)
        if self.figure:
            parts.append(f"Figure: {self.figure}")
        return "\n".join([*parts, "", *(f"  {line}" for line in self.circumstances)])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def draw_figure(report: DemoReport, kind: str) -> bytes:
    """Return the figure as a file's bytes; `kind` is ``"png"``, ``"svg"`` or ``"pdf"``."""
    samples = {f"{path.name} ({path.kind})": path.latency.latency_us for path in report.paths}
    moved = {f"{path.name}\n{path.kind}": [run.gbytes_per_s for run in path.throughput.runs] for path in report.paths}
    title = "Two guests, one memory: ivshmem on Unicorn, QEMU and the host"
    figure = overview(samples, moved, title, report.circumstances)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=110)
    return picture.getvalue()
