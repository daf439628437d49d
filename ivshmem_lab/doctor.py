"""The command ``ivshmem-lab doctor``: what of this machine works for the lab, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .errors import IvshmemLabError
from .guests.linux import tool_path
from .ipc.runtime_dir import runtime_dir
from .units import MIB, format_size
from .vm.accel import probe
from .vm.linux.image import find_image
from .vm.qemu import qemu_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

OK, WARN, FAIL = "ok", "warn", "fail"
_SIGNS = {OK: "✓", WARN: "!", FAIL: "✕"}
_NEEDED = ("numpy", "posix_ipc", "pyyaml", "qemu.qmp", "unicorn", "matplotlib")
_NOTEBOOK = ("jupyterlab", "ipywidgets", "anywidget")
_LEAST_FILES = 4096
_SMALL_SHM_BYTES = 64 * MIB
_UNSHARE_TIME_LIMIT_S = 10.0
_DESCRIPTION = """\
Look at what the lab needs and what it can use: Python packages, memory for sharing, real QEMU, KVM, network namespaces,
the image of Linux guests. Nothing is changed, and nothing is left behind."""
_EXAMPLES = """\
examples:
  ivshmem-lab doctor
  ivshmem-lab doctor --json

Exit status: 0 all that is needed works (what is only wished for may be missing), 1 something needed does not, 2 wrong call."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: ``"ok"``, ``"warn"`` (something cannot be used) or ``"fail"`` (the lab does not work)."""

    what: str
    status: str
    found: str
    remedy: str = ""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "ivshmem-lab doctor",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    findings = []
    for look in LOOKS:
        if sys.stderr.isatty():
            print(f"\rlooking at {look.__name__.strip('_').replace('_', ' ')} ...".ljust(60), end="\r", file=sys.stderr)
        findings += list(look())
    if sys.stderr.isatty():
        print(" " * 60, end="\r", file=sys.stderr)
    failed = any(each.status == FAIL for each in findings)
    if options.json:
        print(json.dumps({"works": not failed, "findings": [asdict(each) for each in findings]}, indent=2))
    else:
        print("\n".join(map(_line, findings)))
    return int(failed)


def _line(finding: Finding) -> str:
    line = f"{_SIGNS[finding.status]} {finding.what:<18} {finding.found}"
    return f"{line}\n  {'':<18} → {finding.remedy}" if finding.remedy else line


def _python() -> Iterator[Finding]:
    enough = sys.version_info >= (3, 11)
    yield Finding(
        "Python", OK if enough else FAIL, platform.python_version(), "" if enough else "use Python 3.11 or newer"
    )


def _packages() -> Iterator[Finding]:
    for names, missing, remedy in (
        (_NEEDED, FAIL, "pip install ivshmem-lab"),
        (_NOTEBOOK, WARN, 'for notebooks and widgets: pip install "ivshmem-lab[lab]"'),
    ):
        for name in names:
            try:
                yield Finding(name, OK, importlib.metadata.version(name))
            except importlib.metadata.PackageNotFoundError:
                yield Finding(name, missing, "not installed", remedy)


def _shared_memory() -> Iterator[Finding]:
    try:
        size_bytes = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        yield Finding("/dev/shm", WARN, str(error), "named memories need it; memories of a lab do not")
        return
    small = size_bytes <= _SMALL_SHM_BYTES
    remedy = "named memories beyond that fail; a container gets more with --shm-size=1g" if small else ""
    yield Finding("/dev/shm", WARN if small else OK, format_size(size_bytes), remedy)


def _sockets() -> Iterator[Finding]:
    try:
        yield Finding("runtime directory", OK, str(runtime_dir()))
    except IvshmemLabError as error:
        yield Finding(
            "runtime directory", FAIL, str(error), "set XDG_RUNTIME_DIR to a directory of yours with mode 0700"
        )


def _open_files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < _LEAST_FILES
    remedy = "many peers with many vectors need more: raise the hard limit (ulimit -Hn, or limits.conf)" if few else ""
    yield Finding("open files", WARN if few else OK, f"{soft}, may be raised to {hard}", remedy)


def _real_qemu() -> Iterator[Finding]:
    try:
        facts = qemu_facts()
    except IvshmemLabError as error:
        remedy = "everything else works without it; Debian and Ubuntu: apt install qemu-system-x86"
        yield Finding("real QEMU", WARN, str(error).split(";", maxsplit=1)[0], remedy)
        return
    devices = ", ".join(facts.ivshmem_devices)
    yield Finding("real QEMU", OK, f"{facts.version} ({facts.program}), accelerators: {', '.join(facts.accelerators)}")
    whole = {"ivshmem-plain", "ivshmem-doorbell"} <= set(facts.ivshmem_devices) and {"pc", "q35"} <= set(facts.machines)
    remedy = "" if whole else "this build lacks what the lab needs; take the distribution's package"
    yield Finding("  its devices", OK if whole else WARN, devices or "no ivshmem device", remedy)
    if "kvm" in facts.accelerators:
        found = probe("kvm", "bare-metal")
        said = "works for bare-metal guests" if found.works else found.reason
        remedy = "" if found.works else "nothing to do: TCG is used, which works everywhere"
        yield Finding("  KVM", OK if found.works else WARN, said, remedy)


def _linux_guests() -> Iterator[Finding]:
    image = find_image(tool_path())
    remedy = "" if image else "ivshmem-lab linux build fetches the distribution's kernel (20 MB), without root"
    yield Finding("Linux guests", OK if image else WARN, f"image of {image.name}" if image else "no image yet", remedy)


def _namespaces() -> Iterator[Finding]:
    try:
        done = subprocess.run(
            ["unshare", "-Urn", "true"], capture_output=True, text=True, timeout=_UNSHARE_TIME_LIMIT_S, check=False
        )
        reason = done.stderr.strip() or f"status {done.returncode}"
        works = done.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        works, reason = False, str(error)
    remedy = "" if works else "only tests of migration between hosts need them"
    yield Finding("namespaces", OK if works else WARN, "this user can make them" if works else reason, remedy)


def _processors() -> Iterator[Finding]:
    count = len(os.sched_getaffinity(0))
    remedy = "" if count > 1 else "measurements between two machines need two"
    yield Finding("CPUs", OK if count > 1 else WARN, f"{count} that this process may use", remedy)


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _processors,
    _shared_memory,
    _sockets,
    _open_files,
    _real_qemu,
    _linux_guests,
    _namespaces,
)
