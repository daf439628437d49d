"""Finding the emulator programs.

Two programs take the same command line and speak QMP: ``qemu-system-x86_64`` (real QEMU, TCG only)
and ``ivshmem_lab.emulator`` (ours, on Unicorn), which runs as a module of this very Python so that
nothing has to be on ``PATH``.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import ivshmem_lab

from ..errors import EmulatorNotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

EMULATOR_KINDS = ("unicorn", "qemu")
"""The two kinds of emulator, in the order in which they are offered."""

QEMU_PROGRAM = "qemu-system-x86_64"

_VERSION_TIME_LIMIT_S = 10.0
_VERSION = re.compile(r"version (\d+(?:\.\d+)+)")


@dataclass(frozen=True, slots=True)
class Emulator:
    """A program that runs a virtual machine.

    Parameters
    ----------
    kind
        ``"unicorn"`` or ``"qemu"``.
    argv
        The command up to its first option.
    version
        Its version, for example ``"7.2.22"``.
    environment
        Variables that the process needs beside the ones it inherits.
    """

    kind: str
    argv: tuple[str, ...]
    version: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind} {self.version}"


def find_emulator(kind: str) -> Emulator:
    """Find an emulator program on this machine.

    Parameters
    ----------
    kind
        ``"unicorn"`` for ours, ``"qemu"`` for ``qemu-system-x86_64``.

    Returns
    -------
    Emulator
        How to run it.

    Raises
    ------
    UsageError
        There is no such kind.
    EmulatorNotFoundError
        The program is not installed, or does not say its version.
    """
    if kind == "unicorn":
        return _ours()
    if kind == "qemu":
        program = shutil.which(QEMU_PROGRAM)
        if program is None:
            raise EmulatorNotFoundError(
                f"{QEMU_PROGRAM} is not on PATH; install it (Debian and Ubuntu: apt install qemu-system-x86), "
                'or use emulator="unicorn", which needs nothing installed'
            )
        return Emulator("qemu", (program,), _qemu_version(program, Path(program).stat().st_mtime_ns))
    raise UsageError(f"emulator {kind!r} is unknown; there are {' and '.join(map(repr, EMULATOR_KINDS))}")


def _ours() -> Emulator:
    if not sys.executable:
        raise EmulatorNotFoundError(
            "this Python does not know its own program (sys.executable is empty), so it cannot start our emulator; "
            'run a normal python3, or use emulator="qemu"'
        )
    # -P keeps the current directory's files from shadowing modules; the variable finds us in a checkout, too.
    package_parent = str(Path(ivshmem_lab.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    path = package_parent if not inherited else f"{package_parent}{os.pathsep}{inherited}"
    argv = (sys.executable, "-P", "-m", "ivshmem_lab.emulator")
    return Emulator("unicorn", argv, ivshmem_lab.__version__, {"PYTHONPATH": path})


@dataclass(frozen=True, slots=True)
class QemuFacts:
    """What an installed QEMU can do, by its own words.

    Attributes
    ----------
    program, version
        Where it is, and which.
    machines
        Names of machine types, aliases such as ``"q35"`` included.
    devices
        Names of devices.
    accelerators
        Those that are compiled in; which of them *work*, `ivshmem_lab.vm.accel.probe` finds out.
    """

    program: str
    version: str
    machines: tuple[str, ...]
    devices: tuple[str, ...]
    accelerators: tuple[str, ...]

    @property
    def ivshmem_devices(self) -> tuple[str, ...]:
        """The ivshmem devices: ``ivshmem-plain`` and ``ivshmem-doorbell`` since 2.6, ``ivshmem`` until 3.1."""
        return tuple(name for name in self.devices if name.startswith("ivshmem"))


def qemu_facts() -> QemuFacts:
    """Ask the installed QEMU what it can do; it is asked once.

    Raises
    ------
    EmulatorNotFoundError
        It is not installed, or does not answer.
    """
    emulator = find_emulator("qemu")
    program = emulator.argv[0]
    return _facts(program, emulator.version, Path(program).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _facts(program: str, version: str, _modified_ns: int) -> QemuFacts:
    def listed(option: str, pattern: str) -> tuple[str, ...]:
        return tuple(re.findall(pattern, _say(program, option, "help"), re.MULTILINE))

    return QemuFacts(
        program,
        version,
        listed("-machine", r"^(?!Supported )([\w.-]+) +\S"),
        listed("-device", r'^name "([^"]+)"'),
        listed("-accel", r"^(\w+)$"),
    )


def _say(program: str, *options: str) -> str:
    """Return what a program prints for an option that ends it.

    Raises
    ------
    EmulatorNotFoundError
        It cannot be run, or fails.
    """
    command = [program, *options]
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_TIME_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EmulatorNotFoundError(f"{' '.join(command)} could not be run: {error}; is it installed whole?") from error
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip()[:200]
        raise EmulatorNotFoundError(
            f"{' '.join(command)} ended with status {answer.returncode} and no version ({said!r}); is it installed whole?"
        )
    return answer.stdout


@functools.lru_cache(maxsize=8)
def _qemu_version(program: str, _modified_ns: int) -> str:
    said = _say(program, "--version")
    match = _VERSION.search(said)
    if match is None:
        raise EmulatorNotFoundError(
            f"{program} --version ended with status 0 and no version ({said.strip()[:200]!r}); is it installed whole?"
        )
    return match[1]
