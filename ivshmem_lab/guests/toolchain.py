"""Builds the guest programs and tells whether a prebuilt ELF belongs to its sources.

``python -m ivshmem_lab.guests.toolchain`` rebuilds all programs and the manifest;
``--check`` only verifies. The flags make the output a function of sources, flags, compiler
and linker alone: no build id, no symbols, no paths, no time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TypedDict

from ..errors import GuestError, IvshmemLabError
from . import linux

SOURCES = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "elf"
MANIFEST = PREBUILT / "manifest.json"

PROGRAMS = ("probe", "pingpong", "stream", "echo", "migrant", "intx", "knock")

FLAGS = (
    *("-m32", "-march=i686", "-msse2", "-O2", "-Wall", "-Wextra"),
    *("-ffreestanding", "-fno-pic", "-fno-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
    *("-nostdlib", "-static", "-s", "-Wl,-m,elf_i386,-T,link.ld,--build-id=none"),
)
"""A libgcc for 32 bits is often not installed: the programs need none."""

PROGRAM_FLAGS: dict[str, tuple[str, ...]] = {"knock": ("-mno-sse", "-DPAGING_LATER")}
"""Further flags of one program. A KVM that interprets its guests (kvm_pvm) knows no SSE, and faults one that
switches paging on: ``knock`` is what finds that out."""

_RUNTIME = ("start.S", "runtime.c", "pci.c", "ivshmem.c")
_READ_TOO = ("link.ld", "runtime.h", "pci.h", "ivshmem.h", "exchange.h", "channel.h")
_BUILD_TIMEOUT_S = 60.0


class Entry(TypedDict):
    """What the manifest records of one ELF."""

    elf_sha256: str
    sources_sha256: str
    compiler: str
    linker: str


def flags(program: str) -> tuple[str, ...]:
    """Return the compiler's flags for a program."""
    return (*FLAGS, *PROGRAM_FLAGS.get(program, ()))


def _check_program(program: str) -> None:
    if program not in PROGRAMS:
        raise GuestError(f"guest program {program!r} does not exist; there are {', '.join(PROGRAMS)}")


def sources_sha256(program: str) -> str:
    """Hash the names and contents of everything that an ELF is made from, and the flags.

    Raises
    ------
    GuestError
        No such program, or a source file is missing.
    """
    _check_program(program)
    digest = hashlib.sha256(" ".join(flags(program)).encode())
    for name in sorted((*_RUNTIME, *_READ_TOO, f"{program}.c")):
        try:
            content = (SOURCES / name).read_bytes()
        except OSError as error:
            raise GuestError(f"source {name} of guest program {program} cannot be read: {error.strerror}") from error
        digest.update(f"\n{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_BUILD_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GuestError(f"the guests' tool {command[0]} does not run: {error}") from error
    return (done.stdout.splitlines() or [""])[0]


def compiler_version(cc: str = "gcc") -> str:
    """Return the first line of ``cc --version``.

    Raises
    ------
    GuestError
        The compiler is not installed.
    """
    return _first_line([cc, "--version"])


def linker_version(cc: str = "gcc") -> str:
    """Return the first line of the version of the linker that ``cc`` uses.

    Raises
    ------
    GuestError
        The compiler or its linker is not installed.
    """
    linker = shutil.which(_first_line([cc, "-print-prog-name=ld"]) or "ld")
    return _first_line([linker or "ld", "--version"])


def build(program: str, out_dir: Path, cc: str = "gcc") -> Path:
    """Compile one guest program.

    Parameters
    ----------
    program
        One of :data:`PROGRAMS`.
    out_dir
        An existing directory; ``<program>.elf`` is written there.
    cc
        GCC, or a compiler that takes its options, with GNU ld.

    Returns
    -------
    Path
        The ELF.

    Raises
    ------
    GuestError
        No such program, no compiler, or the compiler's own words when it fails.
    """
    _check_program(program)
    elf = out_dir.resolve() / f"{program}.elf"
    command = [cc, *flags(program), "-o", str(elf), *_RUNTIME, f"{program}.c"]
    try:
        done = subprocess.run(
            command,
            check=False,
            cwd=SOURCES,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_BUILD_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GuestError(
            f"guest program {program} was not built, {cc} does not run: {error}; install gcc, or name another compiler"
        ) from error
    if done.returncode:
        raise GuestError(f"guest program {program} was not built, {cc} ended with {done.returncode}:\n{done.stderr}")
    sys.stderr.write(done.stderr)  # a newer compiler's warnings
    elf.chmod(0o644)  # data for an emulator, not a program of the host
    return elf


def manifest() -> dict[str, Entry]:
    """Read what the manifest records of each prebuilt program.

    Raises
    ------
    GuestError
        The manifest is missing or is no manifest.
    """
    try:
        programs: dict[str, Entry] = json.loads(MANIFEST.read_text(encoding="utf-8"))["programs"]
    except OSError as error:
        raise GuestError(
            f"the guests' {MANIFEST.name} cannot be read: {error.strerror}; run `make guests` to write it"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise GuestError(f"the guests' {MANIFEST.name} is not a manifest; run `make guests` to write it") from error
    return programs


def check() -> None:
    """Verify that each prebuilt ELF is the recorded one and was made from the present sources and flags.

    Raises
    ------
    GuestError
        Names each program that is missing or does not belong to its sources, and the remedy.
    """
    recorded = manifest()
    wrong = []
    for program in PROGRAMS:
        entry = recorded.get(program)
        elf = PREBUILT / f"{program}.elf"
        if entry is None or not elf.is_file():
            wrong.append(f"{program}.elf is missing or not in the manifest")
        elif hashlib.sha256(elf.read_bytes()).hexdigest() != entry["elf_sha256"]:
            wrong.append(f"{program}.elf is not the recorded file")
        elif sources_sha256(program) != entry["sources_sha256"]:
            wrong.append(f"{program}.elf was made from other sources or flags")
    if wrong:
        raise GuestError(f"{'; '.join(wrong)}; run `make guests` to rebuild")


def rebuild(cc: str = "gcc") -> None:
    """Build all programs and write the manifest; nothing changes unless all of them build.

    Raises
    ------
    GuestError
        As :func:`build`.
    """
    compiler, linker = compiler_version(cc), linker_version(cc)
    programs: dict[str, Entry] = {}
    PREBUILT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PREBUILT) as scratch:
        elves = {program: build(program, Path(scratch), cc) for program in PROGRAMS}
        for program, elf in elves.items():
            programs[program] = {
                "elf_sha256": hashlib.sha256(elf.read_bytes()).hexdigest(),
                "sources_sha256": sources_sha256(program),
                "compiler": compiler,
                "linker": linker,
            }
        for elf in elves.values():
            elf.replace(PREBUILT / elf.name)
    text = json.dumps({"flags": list(FLAGS), "programs": programs}, indent=2)
    MANIFEST.write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 wrong call)."""
    parser = argparse.ArgumentParser(
        prog="python -m ivshmem_lab.guests.toolchain",
        description="Build the guest programs and their manifest.",
        epilog="example: python -m ivshmem_lab.guests.toolchain --check",
    )
    parser.add_argument("--check", action="store_true", help="only verify that ELFs and sources belong together")
    parser.add_argument("--cc", default="gcc", help="compiler to build with (default: gcc)")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            rebuild(options.cc)
            linux.rebuild(options.cc)
        check()
        linux.check()
    except IvshmemLabError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(f"{name}.elf {entry['elf_sha256']}" for name, entry in manifest().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
