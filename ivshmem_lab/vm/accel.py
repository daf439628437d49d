"""Which accelerators of QEMU *work*: a ``/dev/kvm`` that opens, and a ``query-kvm`` that says yes, are not enough.

A software-nested KVM (measured: kvm_pvm, QEMU 7.2) runs a guest that only polls, faults (#GP) when one switches paging on, and dies at the
``iret`` of its first interrupt. So a guest of each kind is started, and has to come to its end (or, Linux, to its first
output) in time. What was found is kept as long as the process lives.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError, VmError
from ..guests import guest_path
from .command import DEBUG_EXIT_PORT
from .qemu import find_emulator

if TYPE_CHECKING:
    from collections.abc import Sequence

ACCELERATORS = ("tcg", "kvm", "auto")
"""What can be asked for; ``auto`` is KVM where it works for the guest's kind, else TCG."""

GUEST_KINDS = ("polling", "bare-metal", "linux")
"""No paging, no interrupt; paging, and interrupts taken and returned from; a Linux kernel. Each has to do what those before it do."""

BARE_TIME_LIMIT_S = 15.0
LINUX_TIME_LIMIT_S = 40.0
_IRQS = 3
_APPEND = {"polling": "paging=0 irqs=0", "bare-metal": f"paging=1 irqs={_IRQS}"}
_DONE = b"knock: done"
_LINUX_SAYS = b"Linux version"
_BROKEN = (b"KVM internal error", b"failed to initialize", b"Could not access KVM")
_REMEDY = 'use accel="tcg", which works everywhere, or accel="auto"'


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found.

    Attributes
    ----------
    accelerator, kind : str
        What was tried.
    works : bool
        A guest of this kind did what it has to do.
    reason : str
        Why it does not work; empty when it does.
    seconds : float
        How long the probe took.
    """

    accelerator: str
    kind: str
    works: bool
    reason: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.accelerator} for {self.kind} guests: {'works' if self.works else self.reason}"


@functools.cache
def probe(accelerator: str, kind: str, kernel: Path | None = None, initrd: Path | None = None) -> Finding:
    """Start real QEMU with a small guest and tell whether the accelerator works for it.

    Parameters
    ----------
    accelerator
        ``"tcg"`` or ``"kvm"``.
    kind
        One of `GUEST_KINDS`.
    kernel, initrd
        For ``"linux"``: what to boot.

    Raises
    ------
    UsageError
        There is no such accelerator or kind, or no kernel for Linux.
    EmulatorNotFoundError
        QEMU is not installed.
    """
    if accelerator not in ACCELERATORS[:2] or kind not in GUEST_KINDS:
        raise UsageError(
            f"accelerator {accelerator!r} for {kind!r} guests cannot be probed; there are "
            f"{', '.join(ACCELERATORS[:2])} and {', '.join(GUEST_KINDS)}"
        )
    if kind == "linux" and kernel is None:
        raise UsageError("a Linux guest is probed with its kernel: give probe(..., kernel=, initrd=)")
    began = time.monotonic()
    reason = _why_not(accelerator, kind, kernel, initrd)
    return Finding(accelerator, kind, not reason, reason, time.monotonic() - began)


def _why_not(accelerator: str, kind: str, kernel: Path | None, initrd: Path | None) -> str:
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        there = Path("/dev/kvm").exists()
        return "no access to /dev/kvm (add the user to its group, often kvm)" if there else "there is no /dev/kvm"
    if kind != "linux":
        options = ["-kernel", str(guest_path("knock")), "-append", _APPEND[kind]]
        return _run(accelerator, options, _DONE, BARE_TIME_LIMIT_S)
    if not (simpler := probe(accelerator, "bare-metal")).works:
        return f"not even a bare-metal guest runs: {simpler.reason}"
    options = ["-kernel", str(kernel), *(["-initrd", str(initrd)] if initrd else [])]
    return _run(accelerator, [*options, "-append", "console=ttyS0 panic=-1"], _LINUX_SAYS, LINUX_TIME_LIMIT_S)


def _run(accelerator: str, options: Sequence[str], wanted: bytes, limit_s: float) -> str:
    """Run QEMU until it has said what is wanted; returns why it did not, or nothing."""
    command = [*find_emulator("qemu").argv, "-machine", "pc", "-accel", accelerator, "-m", "128M", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", *options]
    command += ["-device", f"isa-debug-exit,iobase={DEBUG_EXIT_PORT:#x},iosize=0x04"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    said, deadline = b"", time.monotonic() + limit_s
    try:
        while wanted not in said:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([process.stdout], [], [], left_s)[0]:
                return f"the guest hangs ({_progress(said)}, {limit_s:g} s)"
            data = os.read(process.stdout.fileno(), 65536)
            said += data
            if broken := next((text for text in _BROKEN if text in said), None):
                return f"{_line_with(said, broken)} ({_progress(said)})"
            if not data:
                return f"QEMU ended with status {process.wait()} ({_progress(said)})"
        return ""
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(OSError):
            process.stdout.close()


def _line_with(said: bytes, text: bytes) -> str:
    return next(line for line in said.splitlines() if text in line).decode(errors="replace").strip()


def _progress(said: bytes) -> str:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.startswith(("knock: ", "fault "))]
    if lines:
        return f"after {lines[-1]!r}"
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    return f"after {last!r}" if last else "before the guest said anything"


def choose(accel: str, kind: str, kernel: Path | None = None, initrd: Path | None = None) -> str:
    """Return the accelerator to use, ``"tcg"`` or ``"kvm"``.

    Parameters
    ----------
    accel
        One of `ACCELERATORS`.
    kind, kernel, initrd
        As for `probe`.

    Raises
    ------
    UsageError
        There is no such accelerator.
    VmError
        KVM was asked for and does not work.
    """
    if accel not in ACCELERATORS:
        raise UsageError(f"accel {accel!r} is unknown; there are {', '.join(map(repr, ACCELERATORS))}")
    if accel == "tcg":
        return "tcg"
    finding = probe("kvm", kind, kernel, initrd)
    if finding.works:
        return "kvm"
    if accel == "auto":
        return "tcg"
    raise VmError(f'accel="kvm" does not work for {kind} guests here: {finding.reason}; {_REMEDY}')
