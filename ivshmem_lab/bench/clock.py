"""How fast the guests' clock runs.

A guest times with ``rdtsc``. Under both emulators that is the host's time stamp counter plus a constant
(QEMU 7.2 and Unicorn 2.1.4: ``cpus_get_ticks`` reads it), so one rate serves all guests. Python has no
``rdtsc``, but the emulator can run one.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from dataclasses import dataclass

from ..emulator import engine
from ..errors import UsageError

_PROGRAM = b"\x0f\x31\xf4"  # rdtsc; hlt
_ADDRESS = 0x1000
_PAGE_BYTES = 4096
_TRIES = 50


@dataclass(frozen=True, slots=True)
class TscClock:
    """The rate of the time stamp counter.

    Attributes
    ----------
    hz : float
        Ticks per second of ``CLOCK_MONOTONIC``.
    error_ppm : float
        Largest error, parts per million, from the time that reading both clocks took.
    """

    hz: float
    error_ppm: float

    def __str__(self) -> str:
        return f"TSC {self.hz / 1e6:.1f} MHz, measured to {self.error_ppm:.0f} ppm"


class TscReader:
    """Reads the time stamp counter by a two-instruction program in our emulator."""

    def __init__(self) -> None:
        self._engine = engine.Engine()
        self._registers = engine.Registers("EAX", "EDX")
        self._page = mmap.mmap(-1, _PAGE_BYTES)
        self._page[: len(_PROGRAM)] = _PROGRAM
        self._pointer = (ctypes.c_char * _PAGE_BYTES).from_buffer(self._page)
        rights = engine.READ | engine.EXECUTE
        self._engine.map_memory(_ADDRESS, _PAGE_BYTES, rights, ctypes.addressof(self._pointer))
        self.read()  # translates the program

    def read(self) -> int:
        """Return the counter, in ticks."""
        engine.check(engine.emu_start(self._engine.handle, _ADDRESS, engine.NEVER, 0, 0), "read the TSC")
        low, high = self._registers.read(self._engine.handle)
        return int(high << 32 | low)

    def pair(self) -> tuple[float, int, int]:
        """Return (ns of ``CLOCK_MONOTONIC``, ticks, width in ns of the moment) of the narrowest of some tries."""
        best: tuple[float, int, int] | None = None
        for _ in range(_TRIES):
            before = time.perf_counter_ns()
            ticks = self.read()
            width = time.perf_counter_ns() - before
            if best is None or width < best[2]:
                best = (before + width / 2, ticks, width)
        assert best is not None
        return best


def measure_tsc(over_s: float = 0.05) -> TscClock:
    """Measure the rate of the time stamp counter against ``CLOCK_MONOTONIC``.

    Parameters
    ----------
    over_s
        Time between the two readings; the error shrinks as it grows.

    Raises
    ------
    UsageError
        No time at all.
    """
    if over_s <= 0:
        raise UsageError(f"over_s {over_s} is not a time to measure over; 0.05 is enough")
    reader = TscReader()
    start_ns, start_ticks, start_width = reader.pair()
    time.sleep(over_s)
    end_ns, end_ticks, end_width = reader.pair()
    span_ns = end_ns - start_ns
    return TscClock((end_ticks - start_ticks) * 1e9 / span_ns, (start_width + end_width) / 2 / span_ns * 1e6)
