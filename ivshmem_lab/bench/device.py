"""What a register access costs: through the pure device, and from a guest on our emulator.

``pure_accesses_per_s`` counts reads of IVPosition and writes of IntrMask in turns, without a CPU. ``guest_mmio_us`` is
one 4-byte read of IVPosition by a guest in a loop: the loop with reads minus the same loop without, per turn.
Both are medians over rounds, pure and guest interleaved, since the speed of a machine drifts.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import struct
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

from ..device.ivshmem import Ivshmem
from ..emulator.cpu import UnicornCpu
from ..emulator.link import MemoryLink
from ..errors import IvshmemLabError, UsageError
from ..pc.machine import Machine
from ..units import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

CODE, REGISTERS, SLOT = 0x100000, 0xE0000000, 4
IV_POSITION, INT_MASK = 8, 0
PROGRAM = "ivshmem-lab bench device"


def _pure_seconds(device: Ivshmem, accesses: int) -> float:
    read, write = device.read_bar, device.write_bar
    began = time.perf_counter()
    for value in range(accesses // 2):
        write(0, INT_MASK, 4, value)
        read(0, IV_POSITION, 4)
    return time.perf_counter() - began


def _loop(turns: int, *, reads: bool) -> bytes:
    """Return a program: ``mov ecx, turns``, then ``mov eax, [IVPosition]`` (or a move of the same length), loop, halt."""
    access = (b"\xa1" if reads else b"\xb8") + struct.pack("<I", REGISTERS + IV_POSITION)
    body = access + b"\x49\x75" + struct.pack("b", -len(access) - 3)
    return b"\xb9" + struct.pack("<I", turns) + body + b"\xf4"


class _Guest:
    """A PC with one device, that runs a loop when it is told to."""

    def __init__(self) -> None:
        self._ram = mmap.mmap(-1, 2 * MIB)
        self._view = memoryview(self._ram)
        self._cpu = UnicornCpu()
        machine = Machine(self._cpu, self._view)
        self._cpu.attach(machine, whole_machine=True)
        device = Ivshmem(MIB, vectors=1, peer_id=5)
        machine.add_device("iv", device, MemoryLink(bytearray(MIB)), SLOT, hotplugged=False)
        machine.act(device, device.write_config(0x10, 4, REGISTERS))
        machine.act(device, device.write_config(4, 2, 2))

    def seconds(self, turns: int, *, reads: bool) -> float:
        """Run the loop once; each kind lies at its own address, so that nothing translated is stale."""
        at = CODE if reads else CODE + 0x1000
        program = _loop(turns, reads=reads)
        self._view[at : at + len(program)] = program
        self._cpu.flag.kick = 0
        began = time.perf_counter()
        code = self._cpu.run(at)
        seconds = time.perf_counter() - began
        left = self._cpu.engine.read_register("ECX")
        if code or left:
            raise IvshmemLabError(
                f"the guest of the measurement ended early: Unicorn's error {code}, {left} turns left"
            )
        return seconds

    def close(self) -> None:
        """Give everything back."""
        self._cpu.close()
        self._view.release()
        self._ram.close()


def bench_device(accesses: int = 100_000, rounds: int = 5) -> dict[str, Any]:
    """Measure register accesses.

    Parameters
    ----------
    accesses
        How many per round.
    rounds
        How often.

    Returns
    -------
    dict
        Keys ``accesses, rounds, pure_accesses_per_s, guest_mmio_us``.

    Raises
    ------
    UsageError
        When a number is not allowed.
    """
    if not 1000 <= accesses <= 100_000_000 or not 1 <= rounds <= 1000:
        raise UsageError(f"{accesses} accesses in {rounds} rounds are not allowed; 1000 to 100000000, 1 to 1000")
    device = Ivshmem(MIB, vectors=1, peer_id=5)
    guest = _Guest()
    pure, mmio = [], []
    try:
        # The engine keeps what it translated: the same program from the first run on.
        guest.seconds(accesses, reads=True)
        for _ in range(rounds):
            pure.append(accesses / _pure_seconds(device, accesses))
            empty = guest.seconds(accesses, reads=False)
            mmio.append((guest.seconds(accesses, reads=True) - empty) / accesses * 1e6)
    finally:
        guest.close()
    return {
        "accesses": accesses,
        "rounds": rounds,
        "pure_accesses_per_s": round(statistics.median(pure)),
        "guest_mmio_us": round(statistics.median(mmio), 3),
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a call in one line."""
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _Parser(prog=PROGRAM, description=__doc__, epilog=f"example: {PROGRAM} --json")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--accesses", type=int, default=100_000, help="per round (default: 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    try:
        options = parser.parse_args(argv)
        result = bench_device(options.accesses, options.rounds)
    except IvshmemLabError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if options.json:
        print(json.dumps(result))
    else:
        print(f"pure device   {result['pure_accesses_per_s']:>12,} accesses/s")
        print(f"from a guest  {result['guest_mmio_us']:>12} us per read")
    return 0
