"""Assemble the guests of this folder: ``python docs/plug/build.py`` writes the ``.bin`` files and the manifest.

``--check`` assembles into a scratch directory and compares, for the architectures whose tools are installed
(Debian: gcc, gcc-aarch64-linux-gnu, gcc-riscv64-linux-gnu).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / "manifest.json"
LOADED_AT = 0x10000
TOOLS = {
    "x86_32": ("", ("-m32",), ("-m", "elf_i386")),
    "x86_64": ("", ("-m64",), ()),
    "arm64": ("aarch64-linux-gnu-", (), ()),
    "riscv64": ("riscv64-linux-gnu-", ("-march=rv64ima_zicsr", "-mabi=lp64", "-mno-relax"), ("--no-relax",)),
}


def installed(guest: str) -> bool:
    """Tell whether a guest's compiler is here."""
    return shutil.which(f"{TOOLS[guest][0]}gcc") is not None and shutil.which(f"{TOOLS[guest][0]}ld") is not None


def assemble(guest: str, directory: Path) -> bytes:
    """Assemble and link one guest at LOADED_AT; returns its bytes."""
    prefix, compile_flags, link_flags = TOOLS[guest]
    thing, linked = directory / f"{guest}.o", directory / f"{guest}.linked"
    subprocess.run(
        [f"{prefix}gcc", *compile_flags, "-c", "-x", "assembler-with-cpp", f"{guest}.S", "-o", thing],
        cwd=HERE,
        check=True,
    )
    command = [f"{prefix}ld", *link_flags, f"-Ttext={LOADED_AT:#x}", "--build-id=none", "--no-warn-rwx-segments"]
    subprocess.run([*command, "-o", linked, thing], check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", linked, directory / f"{guest}.bin"], check=True)
    return (directory / f"{guest}.bin").read_bytes()


def sources_sha256(guest: str) -> str:
    """Hash what a guest is made from."""
    return hashlib.sha256((HERE / f"{guest}.S").read_bytes() + (HERE / "layout.inc").read_bytes()).hexdigest()


def differences() -> list[str]:
    """Name the guests whose bytes do not belong to their sources."""
    manifest = json.loads(MANIFEST.read_text())
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for guest in TOOLS:
            prebuilt = (HERE / f"{guest}.bin").read_bytes()
            recorded = {"bin_sha256": hashlib.sha256(prebuilt).hexdigest(), "sources_sha256": sources_sha256(guest)}
            if manifest.get(guest) != recorded or (installed(guest) and assemble(guest, Path(scratch)) != prebuilt):
                wrong.append(guest)
    return wrong


def main(arguments: list[str]) -> int:
    """Build, or check."""
    if arguments == ["--check"]:
        wrong = differences()
        print(f"differ: {', '.join(wrong)}; run python docs/plug/build.py" if wrong else "all belong to their sources")
        return 1 if wrong else 0
    manifest = {}
    with tempfile.TemporaryDirectory() as scratch:
        for guest in TOOLS:
            built = assemble(guest, Path(scratch))
            (HERE / f"{guest}.bin").write_bytes(built)
            manifest[guest] = {
                "bin_sha256": hashlib.sha256(built).hexdigest(),
                "sources_sha256": sources_sha256(guest),
            }
    MANIFEST.write_text(json.dumps(manifest, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
