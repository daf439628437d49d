"""What a write to the doorbell costs a guest, with ioeventfd on and off, on each emulator and accelerator that works.

With ``ioeventfd=on`` KVM turns the write into a signal of the eventfd inside the kernel; off, QEMU's device model is
asked each time. TCG is in QEMU already, so that the option makes no difference there; our emulator rings directly with
on, and goes through the register with off. A bare-metal guest writes in a loop and takes no interrupt while it does; the
empty loop is subtracted. All combinations run in turns, on one CPU; the figures are medians. The guest's clock is the
host's time stamp counter. Each ring has to arrive at the host's peer, or the measurement fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import IvshmemLabError, UsageError
from ..guests import guest_path
from ..lab.lab import Lab
from ..vm.accel import probe
from ..vm.command import DEBUG_EXIT_PORT
from ..vm.qemu import find_emulator
from .clock import measure_tsc
from .host import HostFacts, MeasurementError, Pinning, on_cpus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..peer.peer import Peer

PROGRAM = "ivshmem-lab bench doorbell"
WARM_UP_WRITES = 16
"""What the guest writes before it times (``guests/src/knock.c``)."""
ROUNDS = 3
"""Timed loops of each guest."""
_LIMIT_S = 120.0
_EXIT_OK = 1
_TICKS = re.compile(r"knock: ticks write=(\d+) read=(\d+) turn=(\d+)")


@dataclass(slots=True)
class _Case:
    emulator: str
    accelerator: str
    ioeventfd: str
    write_us: list[float] = field(default_factory=list)
    read_us: list[float] = field(default_factory=list)

    def run(self, path: str, peer: Peer, writes: int, tsc_hz: float) -> None:
        """Start one guest, and take its figures."""
        emulator = find_emulator(self.emulator)
        command = [*emulator.argv, "-machine", "pc", "-nodefaults", "-no-user-config", "-display", "none", "-m", "32"]
        command += ["-accel", self.accelerator] if self.emulator == "qemu" else []
        command += ["-kernel", str(guest_path("knock")), "-serial", "stdio", "-no-reboot"]
        command += ["-append", f"paging=0 peer={peer.peer_id} writes={writes} rounds={ROUNDS}"]
        command += ["-device", f"isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=0x04"]
        command += ["-chardev", f"socket,path={path},id=c"]
        command += ["-device", f"ivshmem-doorbell,chardev=c,vectors=1,ioeventfd={self.ioeventfd}"]
        environment = {**os.environ, **emulator.environment}
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_S, check=False, env=environment
            )
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"{self}: the guest did not end in {_LIMIT_S:g} s") from error
        ticks = _TICKS.findall(done.stdout.decode(errors="replace"))
        if done.returncode != _EXIT_OK or len(ticks) != ROUNDS:
            said = (done.stderr + done.stdout).decode(errors="replace").strip()[-400:]
            raise MeasurementError(f"{self}: the guest ended with status {done.returncode} and said {said!r}")
        rung, expected = peer.wait(0, timeout_s=0), writes * ROUNDS + WARM_UP_WRITES
        if rung != expected:
            raise MeasurementError(f"{self}: {rung} of {expected} rings arrived")
        for write, read, turn in (map(int, each) for each in ticks):
            self.write_us.append((write - turn) / writes / tsc_hz * 1e6)
            self.read_us.append((read - turn) / writes / tsc_hz * 1e6)

    def __str__(self) -> str:
        return f"{self.emulator} {self.accelerator}, ioeventfd={self.ioeventfd}"

    def figures(self) -> dict[str, Any]:
        """Return the medians."""
        return {
            "emulator": self.emulator,
            "accelerator": self.accelerator,
            "ioeventfd": self.ioeventfd,
            "write_us": round(statistics.median(self.write_us), 3),
            "read_us": round(statistics.median(self.read_us), 3),
        }


def bench_doorbell(writes: int = 20_000, runs: int = 3) -> dict[str, Any]:
    """Measure the doorbell.

    Parameters
    ----------
    writes
        Per timed loop, three of which each guest runs.
    runs
        Guests of each combination, in turns.

    Returns
    -------
    dict
        Keys ``writes, runs, cpu, machine, kvm, cases, off_to_on``: `cases` has ``emulator, accelerator, ioeventfd, write_us,
        read_us``, the latter of a read of IVPosition; `kvm` says whether KVM runs such guests, or why not;
        `off_to_on` is the ratio of the writes' costs, by accelerator.

    Raises
    ------
    UsageError
        When a number is not allowed.
    MeasurementError
        A guest did not come to its end, or a ring was lost.
    EmulatorNotFoundError
        QEMU is not installed.
    """
    if not 100 <= writes <= 200_000 or not 1 <= runs <= 1000:
        raise UsageError(f"{writes} writes in {runs} runs are not allowed; 100 to 200000, 1 to 1000")
    kvm = probe("kvm", "polling")
    kinds = [("unicorn", "unicorn"), ("qemu", "tcg"), *([("qemu", "kvm")] if kvm.works else [])]
    cases = [_Case(*kind, ioeventfd) for kind in kinds for ioeventfd in ("on", "off")]
    pinning = Pinning.choose()
    tsc_hz = measure_tsc().hz
    with Lab() as lab:
        board = lab.server("board", size="64K", vectors=1)
        peer = lab.peer("host", board)
        for run in range(runs):
            for index in range(len(cases)):
                case = cases[(index + run) % len(cases)]
                if sys.stderr.isatty():
                    print(f"\rrun {run + 1} of {runs}: {case}\x1b[K", end="", file=sys.stderr, flush=True)
                with on_cpus(pinning.measured):
                    case.run(board.path, peer, writes, tsc_hz)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    figures = [case.figures() for case in cases]
    cost = {(each["accelerator"], each["ioeventfd"]): each["write_us"] for each in figures}
    return {
        "writes": writes,
        "runs": runs,
        "cpu": pinning.measured,
        "machine": HostFacts.look(find_emulator("qemu").version).as_dict(),
        "kvm": "works" if kvm.works else kvm.reason,
        "cases": figures,
        "off_to_on": {kind: round(cost[kind, "off"] / cost[kind, "on"], 2) for _, kind in kinds},
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a call in one line."""
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _Parser(prog=PROGRAM, description=__doc__, epilog=f"example: {PROGRAM} --json")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--writes", type=int, default=20_000, help="per timed loop (default: 20000)")
    parser.add_argument("--runs", type=int, default=3, help="guests of each combination (default: 3)")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    try:
        options = parser.parse_args(argv)
        result = bench_doorbell(options.writes, options.runs)
    except IvshmemLabError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if options.json:
        print(json.dumps(result))
        return 0
    print(f"{'emulator':<10}{'accelerator':<13}{'ioeventfd':<11}{'write us':>9}{'read us':>9}")
    for case in result["cases"]:
        print("{emulator:<10}{accelerator:<13}{ioeventfd:<11}{write_us:>9.3f}{read_us:>9.3f}".format(**case))
    print("off/on: " + ", ".join(f"{kind} {ratio}" for kind, ratio in result["off_to_on"].items()))
    print(f"KVM for such guests: {result['kvm']}; everything measured on CPU {result['cpu']}")
    return 0
