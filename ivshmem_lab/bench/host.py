"""The circumstances of a measurement: which machine, which CPUs, which programs. A figure never goes without them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LabError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class MeasurementError(LabError):
    """A measurement did not come to its end; what was measured until then is worth nothing."""


@dataclass(frozen=True, slots=True)
class Pinning:
    """Which CPU the measured programs run on, and which the rest.

    Attributes
    ----------
    measured : int
        The one CPU of everything that is measured. Guests on one CPU hand over by the scheduler; on a CPU
        each, waking an idle CPU takes longer than all the rest; left alone they are sometimes this and
        sometimes that.
    others : frozenset of int
        Where everything else runs; the same CPU when there is only one.
    """

    measured: int
    others: frozenset[int]

    @classmethod
    def choose(cls) -> Pinning:
        """Take the last CPU that this thread may use for what is measured."""
        allowed = os.sched_getaffinity(0)
        measured = max(allowed)
        return cls(measured, frozenset(allowed - {measured}) or frozenset({measured}))

    def __str__(self) -> str:
        if self.measured in self.others:
            return f"everything on CPU {self.measured}, the only one"
        return f"both ends on CPU {self.measured}, this process else on CPU {', '.join(map(str, sorted(self.others)))}"


@contextlib.contextmanager
def on_cpus(cpus: Iterable[int] | int | None) -> Iterator[None]:
    """Let the calling thread run on these CPUs only, or on this one, or as it is (None); afterwards all is as before."""
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpus} if isinstance(cpus, int) else cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The machine and the programs of a measurement.

    Attributes
    ----------
    cpu : str
        Model name.
    cores : int
        CPUs that this process may use.
    load : float
        Load average of the last minute at the start: how busy the machine was with other things.
    python, kernel, unicorn : str
        Versions.
    qemu : str or None
        Version of ``qemu-system-x86_64``; None when it took no part.
    """

    cpu: str
    cores: int
    load: float
    kernel: str
    python: str
    unicorn: str
    qemu: str | None

    @classmethod
    def look(cls, qemu: str | None = None) -> HostFacts:
        """Look at this machine."""
        return cls(
            cpu=_cpu_model(),
            cores=len(os.sched_getaffinity(0)),
            load=round(os.getloadavg()[0], 2),
            kernel=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            unicorn=importlib.metadata.version("unicorn"),
            qemu=qemu,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the facts by name."""
        return asdict(self)

    def __str__(self) -> str:
        qemu = f", QEMU {self.qemu} (TCG)" if self.qemu else ""
        cores = f"{self.cores} CPU{'' if self.cores == 1 else 's'}"
        return (
            f"{self.cpu}, {cores}, load {self.load:g}, {self.kernel}, "
            f"Python {self.python}, Unicorn {self.unicorn}{qemu}"
        )


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.machine() or "unknown CPU"
