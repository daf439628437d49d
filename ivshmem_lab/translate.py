"""The command ``ivshmem-lab translate``: a command line of one QEMU for another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .topology.formats import FORMATS, translate
from .topology.formats.argv import split_shell

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "ivshmem-lab translate"

_ABOUT = """\
Turn a QEMU command line with the ivshmem device of QEMU up to 3.1 into one for today's QEMU, or back. Everything else
in it passes through. What the other form cannot say is told on standard error, with what to do about it."""

_EXAMPLES = """\
examples:
  ivshmem-lab translate -- qemu-system-x86_64 -m 1G -device ivshmem,shm=board,size=4,role=master
  ivshmem-lab translate old-start.sh > new-start.sh
  echo 'qemu-kvm -chardev socket,path=/tmp/s,id=c -device ivshmem,chardev=c,vectors=2' | ivshmem-lab translate --json -

Exit status: 0 done (also with remarks on standard error), 1 failed, 2 wrong call or a device described wrongly."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises
    ------
    UsageError
        When the call or the command line to translate is wrong.
    """
    own, words = list(argv), None
    if "--" in own:
        at = own.index("--")
        own, words = own[:at], own[at + 1 :]
    options = _parser().parse_args(own)
    if (words is None) == (options.file is None):
        raise UsageError("give the command line in a FILE (- for standard input), or its words after --")
    if words is None:
        words = split_shell(_read(options.file))
    written = translate(words, options.origin, options.target)
    if options.json:
        told = {
            "from": options.origin,
            "to": options.target,
            "argv": written.argv,
            "command": shlex.join(written.argv),
            "notes": [dataclasses.asdict(note) for note in written.notes],
        }
        print(json.dumps(told))
    else:
        print(shlex.join(written.argv))
        sys.stdout.flush()
        for note in written.notes:
            print(f"{PROGRAM}: {'lost' if note.lost else 'note'}: {note}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--from FORMAT] [--to FORMAT] [--json] (FILE | -- WORD ...)",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    formats = "; ".join(f"{name}: {form.what}" for name, form in FORMATS.items())
    add = parser.add_argument
    add("file", metavar="FILE", nargs="?", help="a command line as a shell reads it; - for standard input")
    add("--from", dest="origin", choices=FORMATS, default="legacy", help=f"format to read ({formats})")
    add("--to", dest="target", choices=FORMATS, default="qemu", help="format to write (%(default)s)")
    add("--json", action="store_true", help="print one JSON object: argv, command, notes")
    return parser


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"{name!r} cannot be read: {reason}") from error
