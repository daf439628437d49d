"""The command ``ivshmem-lab linux``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import IvshmemLabError, UsageError
from ..guests.linux import tool_path
from ..vm.linux.guest import LinuxGuest
from .linux import LinuxVm, build_linux_image

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "ivshmem-lab linux"

_DESCRIPTION = """\
Unmodified Linux guests on real QEMU, without root and without KVM: the distribution's kernel, fetched with apt into a
cache of your own, an initramfs with busybox, the guest tool, and an agent that runs commands."""

_EXAMPLES = """\
examples:
  ivshmem-lab linux build
  ivshmem-lab linux run -- ivshmem-tool info
  ivshmem-lab linux run --kernel vmlinuz --initrd my.img -- uname -r
  ivshmem-lab linux tool ./ivshmem-tool        a static program for any Linux with an ivshmem device

The cache lies in ~/.cache/ivshmem-lab, or where IVSHMEM_LAB_CACHE says.
Exit status: 0 done, 1 failed (also: the command in the guest), 2 wrong call."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 when it failed, 2 for a wrong call."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # --help, or a wrong call
        return int(stop.code or 0)
    try:
        if options.command == "build":
            return _build(options)
        return _run(options) if options.command == "run" else _tool(options)
    except IvshmemLabError as error:
        print(f"{PROGRAM} {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    build = commands.add_parser(
        "build",
        help="fetch a kernel, make the image, say where it is",
        epilog="example: ivshmem-lab linux build --refresh --json",
    )
    build.add_argument("--refresh", action="store_true", help="look for newer packages, too")
    build.add_argument("--json", action="store_true", help="print one JSON object")
    run = commands.add_parser(
        "run",
        help="boot a guest with an ivshmem device and run a command in it",
        epilog="example: ivshmem-lab linux run -- sh -c 'ivshmem-tool info; lsmod'",
    )
    run.add_argument("--kernel", metavar="FILE", help="a kernel of your own, with --initrd")
    run.add_argument("--initrd", metavar="FILE", help="its initrd; it has to start `ivshmem-tool agent`")
    run.add_argument("--append", default="", metavar="WORDS", help="more words for the kernel's command line")
    run.add_argument("--memory", default="128M", metavar="SIZE", help="the guest's RAM (%(default)s)")
    run.add_argument("--size", default="4M", metavar="SIZE", help="of the shared memory (%(default)s)")
    run.add_argument("--vectors", default=2, type=int, metavar="N", help="interrupt vectors (%(default)s)")
    run.add_argument(
        "--timeout", default=60.0, type=float, metavar="S", help="time limit of the command (%(default)g s)"
    )
    run.add_argument("words", nargs="+", metavar="WORD", help="the command, best after --")
    tool = commands.add_parser(
        "tool", help="copy the guest tool out", epilog="example: ivshmem-lab linux tool ./ivshmem-tool"
    )
    tool.add_argument("target", metavar="FILE", help="where to")
    return parser


def _build(options: argparse.Namespace) -> int:
    image = build_linux_image(refresh=options.refresh)
    if options.json:
        files = {"kernel": str(image.kernel), "initrd": str(image.initrd)}
        print(json.dumps({"name": image.name, **files, "packages": image.packages}, indent=2))
    else:
        print(f"Linux {image.name}\n  kernel  {image.kernel}\n  initrd  {image.initrd}")
        print('In Python: lab.vm("alice", guest="linux", emulator="qemu", connect=board)')
    return 0


def _run(options: argparse.Namespace) -> int:
    from .lab import Lab

    guest = LinuxGuest(kernel=options.kernel, initrd=options.initrd, append=options.append)
    with Lab() as lab:
        board = lab.server("board", size=options.size, vectors=options.vectors)
        vm = lab.vm("guest", guest=guest, emulator="qemu", connect=board, memory=options.memory)
        assert isinstance(vm, LinuxVm)
        lab.start()
        done = vm.run(options.words, timeout_s=options.timeout)
    sys.stdout.buffer.write(done.stdout_bytes)
    sys.stdout.flush()
    sys.stderr.buffer.write(done.stderr_bytes)
    sys.stderr.flush()
    if done.exit_code:
        print(f"{PROGRAM} run: the command ended with {done.status}", file=sys.stderr)
    return 1 if done.exit_code else 0


def _tool(options: argparse.Namespace) -> int:
    target = Path(options.target)
    try:
        shutil.copyfile(tool_path(), target)
        target.chmod(0o755)
    except OSError as error:
        raise UsageError(f"the tool cannot be written to {options.target!r}: {error.strerror}") from error
    return 0
