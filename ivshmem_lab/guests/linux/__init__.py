"""The guest tool ``ivshmem-tool``: C sources, and the static ELF made from them, which runs on any Linux on x86-64."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from ...errors import GuestError

SOURCES = Path(__file__).parent
TOOL = SOURCES / "ivshmem-tool.elf"
MANIFEST = SOURCES / "manifest.json"

FLAGS = (
    *("-O2", "-Wall", "-Wextra", "-ffreestanding", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-fno-tree-loop-distribute-patterns", "-fno-pic", "-no-pie", "-nostdlib", "-static", "-s"),
    "-Wl,--build-id=none,-z,noseparate-code,-z,noexecstack",
)
"""No C library: 35 KB instead of 700, and the same on every distribution. Needs the kernel's headers (linux-libc-dev)."""

_BUILD_TIMEOUT_S = 60.0


def tool_path() -> Path:
    """Return the prebuilt tool.

    Raises
    ------
    GuestError
        The package is not whole.
    """
    if not TOOL.is_file():
        raise GuestError(f"{TOOL.name} is not in the package; run `make guests` in a checkout, or install again")
    return TOOL


def sources_sha256() -> str:
    """Hash the names and contents of everything that the tool is made from, and the flags."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([*SOURCES.glob("*.[ch]"), SOURCES.parent / "src" / "channel.h"]):
        content = path.read_bytes()
        digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def build(target: Path, cc: str = "gcc") -> None:
    """Compile the tool.

    Raises
    ------
    GuestError
        No compiler, or its own words when it fails.
    """
    files = sorted(path.name for path in SOURCES.glob("*.c"))
    try:
        done = subprocess.run(
            [cc, *FLAGS, "-o", str(target.absolute()), *files],
            check=False,
            cwd=SOURCES,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_BUILD_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GuestError(f"the guest tool was not built, {cc} does not run: {error}; install gcc") from error
    if done.returncode:
        raise GuestError(f"the guest tool was not built, {cc} ended with {done.returncode}:\n{done.stderr}")
    sys.stderr.write(done.stderr)


def rebuild(cc: str = "gcc") -> None:
    """Build the tool that is shipped, and write down what it was made from. Raises as :func:`build`."""
    fresh = TOOL.with_suffix(".new")
    try:
        build(fresh, cc)
        fresh.chmod(0o644)
        fresh.replace(TOOL)
    finally:
        fresh.unlink(missing_ok=True)
    record = {"elf_sha256": hashlib.sha256(TOOL.read_bytes()).hexdigest(), "sources_sha256": sources_sha256()}
    MANIFEST.write_text(json.dumps({"flags": list(FLAGS), **record}, indent=2) + "\n", encoding="utf-8")


def check() -> None:
    """Verify that the shipped tool is the recorded one and was made from the present sources and flags.

    Raises
    ------
    GuestError
        It is not, and what to do.
    """
    try:
        record = json.loads(MANIFEST.read_text(encoding="utf-8"))
        wrong = [
            what
            for what, is_so in (
                ("is not the recorded file", record["elf_sha256"] != hashlib.sha256(TOOL.read_bytes()).hexdigest()),
                ("was made from other sources or flags", record["sources_sha256"] != sources_sha256()),
            )
            if is_so
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GuestError(f"the guest tool's {MANIFEST.name} cannot be used: {error}; run `make guests`") from error
    if wrong:
        raise GuestError(f"{TOOL.name} {' and '.join(wrong)}; run `make guests` to rebuild")
