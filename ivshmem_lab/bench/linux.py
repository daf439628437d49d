"""Two unmodified Linux guests and this process on one server: interrupts and memory, with TCP between the guests beside.

All of it in one run, in turns. In the guests ordinary applications do the work: interrupts by VFIO, an eventfd for each
vector; memory through a channel in BAR 2. TCP goes over virtio-net cards that a socket connects. Every interrupt is
counted at both ends, and every stream is summed up at both ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import IvshmemLabError, UsageError, VmError
from ..lab.lab import Lab
from ..lab.linux import LinuxVm
from ..stats.summary import Summary, summarize, text_table
from ..units import MIB, format_size, parse_size
from ..vm.linux.guest import Cable, LinuxGuest
from ..vm.qemu import find_emulator
from .host import HostFacts, MeasurementError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..peer.peer import Peer

_TOOL = "ivshmem-tool"
_MESSAGE_BYTES = 64 * 1024
_RING_BYTES = 4 * MIB
_MEMORY = "16M"
_WARMUP = 50
_STEP_LIMIT_S = 120.0
_WAIT_S = 10.0

TRIPS = {
    "interrupts": "guest ↔ guest, interrupts",
    "host_interrupts": "this process ↔ guest, interrupts",
    "tcp": "guest ↔ guest, TCP, 1 byte",
}
STREAMS = {
    "memory": "guest → guest, memory, both looking",
    "memory_interrupts": "guest → guest, memory, woken by interrupts",
    "tcp": "guest → guest, TCP",
}


class Pair:
    """Two Linux guests with a server, a host peer and a cable between them."""

    def __init__(self, alice: LinuxVm, bob: LinuxVm, me: Peer, cable: Cable) -> None:
        self.alice, self.bob, self.me, self.cable = alice, bob, me, cable

    def both(self, first: Sequence[str], second: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run the tool in bob until it is ready, then in alice; return what alice's and bob's said.

        Raises
        ------
        MeasurementError
            One of them failed.
        """
        other = self.bob.begin_command([_TOOL, *first])
        try:
            other.wait_text("ready", _WAIT_S)
            mine = self.alice.run([_TOOL, *second], timeout_s=_STEP_LIMIT_S, check=True).json()
            theirs = other.wait(_WAIT_S)
            if theirs.exit_code:
                raise MeasurementError(
                    f"{' '.join(first)} in {self.bob.name} ended with {theirs.status}: {theirs.stderr}"
                )
            return mine, theirs.json()
        except VmError as error:
            raise MeasurementError(f"{' '.join(second)}: {error}") from error
        finally:
            other.kill()

    def interrupts(self, rounds: int) -> tuple[list[int], int, int]:
        """Let the guests ring each other; return each round's ns, and how many interrupts came to alice and to bob."""
        words = ["--rounds", str(rounds), "--warmup", str(_WARMUP)]
        mine, theirs = self.both(
            ["pingpong", "pong", str(self.alice.peer_id), *words],
            ["pingpong", "ping", str(self.bob.peer_id), *words, "--samples"],
        )
        return mine["samples_ns"], mine["interrupts"] - _WARMUP, theirs["interrupts"] - _WARMUP

    def host_interrupts(self, rounds: int) -> list[int]:
        """Ring bob from this process and wait for his answer; return each round's ns."""
        bob = self.bob.peer_id
        assert isinstance(bob, int)
        words = ["--rounds", str(rounds), "--warmup", str(_WARMUP)]
        pong = self.bob.begin_command([_TOOL, "pingpong", "pong", str(self.me.peer_id), *words])
        try:
            pong.wait_text("ready", _WAIT_S)
            samples = []
            for _ in range(_WARMUP + rounds):
                start_ns = time.perf_counter_ns()
                self.me.ring(bob, vector=0)
                if self.me.wait(vector=0, timeout_s=_WAIT_S) != 1:
                    raise MeasurementError(
                        f"an interrupt of {self.bob.name} did not come in {_WAIT_S:g} s, or came twice"
                    )
                samples.append(time.perf_counter_ns() - start_ns)
            done = pong.wait(_WAIT_S)
            if done.exit_code or done.json()["interrupts"] != _WARMUP + rounds:
                raise MeasurementError(
                    f"{self.bob.name} did not get every interrupt of the host: {done.stdout}{done.stderr}"
                )
            return samples[_WARMUP:]
        finally:
            pong.kill()

    def tcp_trips(self, rounds: int) -> list[int]:
        """Send a byte there and back over TCP; return each round's ns."""
        words = ["--rounds", str(rounds), "--warmup", str(_WARMUP)]
        mine, _ = self.both(
            ["tcp-pingpong", "serve", *words],
            ["tcp-pingpong", "connect", self.cable.addresses[1], *words, "--samples"],
        )
        samples: list[int] = mine["samples_ns"]
        return samples

    def memory_stream(self, size_bytes: int, *, by_interrupts: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send bytes through the shared memory; return what both ends say."""
        words = ["--ring", str(_RING_BYTES), *([] if by_interrupts else ["--poll"])]
        sizes = ["--bytes", str(size_bytes), "--message", str(_MESSAGE_BYTES)]
        return self.both(["stream", "receive", *words], ["stream", "send", *words, *sizes])

    def tcp_stream(self, size_bytes: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Send bytes over TCP; return what both ends say."""
        words = ["--bytes", str(size_bytes), "--message", str(_MESSAGE_BYTES)]
        return self.both(["tcp-stream", "serve", *words], ["tcp-stream", "connect", self.cable.addresses[1], *words])


def bench_linux(
    *,
    rounds: int = 10_000,
    size_bytes: int = 256 * MIB,
    tcp_rounds: int = 2_000,
    tcp_bytes: int = 32 * MIB,
    turns: int = 4,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Boot two guests, measure, and return what :func:`main` prints.

    Parameters
    ----------
    rounds
        Interrupts each way between the guests, all turns together; the host takes a quarter as many.
    size_bytes
        Bytes through the shared memory, and again with interrupts, all turns together.
    tcp_rounds, tcp_bytes
        The same for TCP, which is slower.
    turns
        How often the paths take turns.
    say
        Called with what is being done.

    Raises
    ------
    UsageError
        A number is not allowed.
    MeasurementError
        An interrupt was lost, or a guest gave up.
    IvshmemLabError
        The guests could not be started.
    """
    unit = turns * _MESSAGE_BYTES
    if turns < 1 or rounds < 4 * turns or tcp_rounds < turns or min(size_bytes, tcp_bytes) < 2 * unit:
        raise UsageError(
            f"at least 1 turn, {4 * turns} rounds, {turns} TCP rounds and {format_size(2 * unit)} for {turns} turns; "
            f"given are {rounds}, {tcp_rounds}, {size_bytes} and {tcp_bytes} bytes"
        )
    say("starting the guests")
    host = HostFacts.look(find_emulator("qemu").version)
    with Lab() as lab, Cable() as cable:
        board = lab.server("board", size=_MEMORY, vectors=2)
        alice, bob = (
            lab.vm(name, guest=LinuxGuest(cable=cable), emulator="qemu", connect=board) for name in ("alice", "bob")
        )
        assert isinstance(alice, LinuxVm)
        assert isinstance(bob, LinuxVm)
        me = lab.peer("me", connect=board)
        start_s = time.perf_counter()
        lab.start()
        alice.wait_ready()
        bob.wait_ready()
        boot_s = time.perf_counter() - start_s
        uname = alice.run(["uname", "-r"], check=True).stdout.strip()
        pair = Pair(alice, bob, me, cable)
        result = measure(pair, rounds, size_bytes, tcp_rounds, tcp_bytes, turns, say)
    return {
        "host": host.as_dict(),
        "guest_kernel": uname,
        "boot_both_s": round(boot_s, 2),
        "turns": turns,
        **result,
    }


def measure(
    pair: Pair,
    rounds: int,
    size_bytes: int,
    tcp_rounds: int,
    tcp_bytes: int,
    turns: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a pair that runs; arguments, errors and result as :func:`bench_linux`'s."""
    trips: dict[str, list[list[int]]] = {name: [] for name in TRIPS}
    streams: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {name: [] for name in STREAMS}
    arrived = [0, 0]
    for turn in range(turns):
        share = [(amount * (turn + 1)) // turns - (amount * turn) // turns for amount in (rounds, tcp_rounds)]
        blocks, tcp_blocks = (
            (amount // _MESSAGE_BYTES * (turn + 1)) // turns - (amount // _MESSAGE_BYTES * turn) // turns
            for amount in (size_bytes, tcp_bytes)
        )
        say(f"turn {turn + 1} of {turns}: interrupts")
        samples, to_alice, to_bob = pair.interrupts(share[0])
        trips["interrupts"].append(samples)
        arrived = [arrived[0] + to_alice, arrived[1] + to_bob]
        trips["host_interrupts"].append(pair.host_interrupts(share[0] // 4))
        say(f"turn {turn + 1} of {turns}: memory")
        streams["memory"].append(pair.memory_stream(blocks * _MESSAGE_BYTES))
        streams["memory_interrupts"].append(pair.memory_stream(blocks * _MESSAGE_BYTES, by_interrupts=True))
        say(f"turn {turn + 1} of {turns}: TCP")
        trips["tcp"].append(pair.tcp_trips(share[1]))
        streams["tcp"].append(pair.tcp_stream(tcp_blocks * _MESSAGE_BYTES))
    summaries = {name: summarize(*[[ns / 1000 for ns in block] for block in blocks]) for name, blocks in trips.items()}
    told = {name: _stream(parts) for name, parts in streams.items()}
    return {
        "interrupts": {"wanted_each_way": rounds, "to_alice": arrived[0], "to_bob": arrived[1]},
        "round_trip_us": {name: _rounded(summary) for name, summary in summaries.items()},
        "stream": told,
        "tcp_to_ivshmem_trip": round(summaries["tcp"].p50 / summaries["interrupts"].p50, 2),
        "ivshmem_to_tcp_throughput": round(told["memory"]["gb_per_s"] / told["tcp"]["gb_per_s"], 1),
    }


def find_failures(result: dict[str, Any]) -> list[str]:
    """Name what must not be: interrupts that were lost, checksums that differ."""
    counts = result["interrupts"]
    lost = [
        f"{counts[name]} interrupts came {name.replace('_', ' ')}, not {counts['wanted_each_way']}"
        for name in ("to_alice", "to_bob")
        if counts[name] != counts["wanted_each_way"]
    ]
    return lost + [
        f"{STREAMS[name]}: the checksums or sizes of sender and receiver differ"
        for name, stream in result["stream"].items()
        if not stream["same"]
    ]


def _stream(parts: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    rates = [sent["timed_bytes"] / sent["total_ns"] for sent, _ in parts]  # bytes per ns are GB per s
    phases = {
        name: round(sum(side[index][name] for side in parts) / 1e6, 3)
        for index, names in enumerate((("write_ns",), ("read_ns", "verify_ns")))
        for name in names
        if name in parts[0][index]
    }
    return {
        "bytes": sum(sent["bytes"] for sent, _ in parts),
        "same": all(sent["checksum"] == got["checksum"] and sent["bytes"] == got["bytes"] for sent, got in parts),
        "gb_per_s": round(
            sum(sent["timed_bytes"] for sent, _ in parts) / sum(sent["total_ns"] for sent, _ in parts), 4
        ),
        "gb_per_s_each": [round(rate, 4) for rate in rates],
        "phases_ms": {name.replace("_ns", ""): value for name, value in phases.items()},
    }


def _rounded(summary: Summary) -> dict[str, Any]:
    return {name: round(value, 2) for name, value in asdict(summary).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures; returns 0, 1 when it failed or something was lost, 2 for a wrong call."""
    parser = argparse.ArgumentParser(
        prog="ivshmem-lab bench linux",
        description="Two unmodified Linux guests and this process on one server; TCP between the same guests beside.",
        epilog="example: ivshmem-lab bench linux --rounds 10000 --bytes 256M --json",
    )
    add = parser.add_argument
    add("--rounds", type=int, default=10_000, metavar="N", help="interrupts each way between the guests (%(default)s)")
    add("--bytes", default="256M", metavar="SIZE", help="bytes through shared memory (%(default)s)")
    add("--tcp-rounds", type=int, default=2_000, metavar="N", help="round trips over TCP (%(default)s)")
    add("--tcp-bytes", default="32M", metavar="SIZE", help="bytes over TCP (%(default)s)")
    add("--turns", type=int, default=4, metavar="N", help="how often the paths take turns (%(default)s)")
    add("--json", action="store_true", help="print one JSON object")
    try:
        given = parser.parse_args(argv)
    except SystemExit as stop:  # --help, or a wrong call
        return int(stop.code or 0)

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"{parser.prog}: {text} ...", file=sys.stderr, flush=True)

    try:
        result = bench_linux(
            rounds=given.rounds,
            size_bytes=parse_size(given.bytes, "--bytes"),
            tcp_rounds=given.tcp_rounds,
            tcp_bytes=parse_size(given.tcp_bytes, "--tcp-bytes"),
            turns=given.turns,
            say=say,
        )
    except IvshmemLabError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(json.dumps(result, indent=2) if given.json else _table(result))
    failures = find_failures(result)
    for failure in failures:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _table(result: dict[str, Any]) -> str:
    counts = result["interrupts"]
    trips = [
        [
            words,
            *(f"{result['round_trip_us'][name][column]:.1f}" for column in ("minimum", "p50", "p90", "p99", "p999")),
        ]
        for name, words in TRIPS.items()
    ]
    streams = [
        [words, f"{result['stream'][name]['gb_per_s']:.3f}", format_size(result["stream"][name]["bytes"])]
        for name, words in STREAMS.items()
    ]
    return "\n".join(
        [
            f"{HostFacts(**result['host'])}; guests: Linux {result['guest_kernel']}, both booted in {result['boot_both_s']} s",
            f"interrupts between the guests: {counts['to_alice']} and {counts['to_bob']} of {counts['wanted_each_way']} each way",
            "",
            text_table(["round trip, µs", "min", "p50", "p90", "p99", "p99.9"], trips),
            "",
            text_table(["stream", "GB/s", "bytes"], streams),
            "",
            (
                f"TCP's round trip takes {result['tcp_to_ivshmem_trip']} times as long; "
                f"shared memory moves {result['ivshmem_to_tcp_throughput']} times as much"
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
