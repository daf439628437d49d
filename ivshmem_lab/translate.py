"""The command ``ivshmem-lab translate``: a topology, or one command line, from one format into another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .guests import available, guest_path
from .topology.formats import FORMATS, translate
from .topology.formats.argv import split_shell
from .topology.formats.whole import WHOLE_FORMATS, guess
from .topology.validate import validate

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "ivshmem-lab translate"

_ABOUT = """\
Turn a topology from one format into another. What the other format cannot say, and what was read and has no place in
a topology, is told on standard error, with what to do about it.

From legacy to qemu or back, one command line is turned into the other form of its ivshmem devices, and everything else in
it passes through."""

_EXAMPLES = """\
examples:
  ivshmem-lab translate -- qemu-system-x86_64 -m 1G -device ivshmem,shm=board,size=4,role=master
  ivshmem-lab translate old-start.sh > new-start.sh
  ivshmem-lab translate --from legacy --to yaml old-start.sh > lab.yaml && ivshmem-lab up lab.yaml
  virsh dumpxml alice | ivshmem-lab translate --from libvirt --to python -
  echo 'qemu-kvm -chardev socket,path=/tmp/s,id=c -device ivshmem,chardev=c,vectors=2' | ivshmem-lab translate --json -

Exit status: 0 done (also with remarks on standard error), 1 failed, 2 wrong call or something described wrongly."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises
    ------
    UsageError
        When the call or what is to be translated is wrong.
    """
    own, words = list(argv), None
    if "--" in own:
        at = own.index("--")
        own, words = own[:at], own[at + 1 :]
    options = _parser().parse_args(own)
    if (words is None) == (options.file is None):
        raise UsageError("give what to translate in a FILE (- for standard input), or a command line's words after --")
    if {options.origin, options.target} <= FORMATS.keys():
        _one_command(options, split_shell(_read(options.file)) if words is None else words)
    else:
        _whole(options, _read(options.file) if words is None else shlex.join(words))
    return 0


def _one_command(options: argparse.Namespace, words: Sequence[str]) -> None:
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
        return
    print(shlex.join(written.argv))
    sys.stdout.flush()
    for note in written.notes:
        print(f"{PROGRAM}: {'lost' if note.lost else 'note'}: {note}", file=sys.stderr)


def _whole(options: argparse.Namespace, text: str) -> None:
    origin = guess(text) if options.origin == "guess" else options.origin
    source = "standard input" if options.file == "-" else options.file or "the command line"
    guests = {name: str(guest_path(name)) for name in available()}
    parsed = WHOLE_FORMATS[origin].parse(text, source, guests)
    if problems := validate(parsed.topology):
        raise UsageError("\n".join(f"{source}: {problem}" for problem in problems))
    rendered = WHOLE_FORMATS[options.target].write(parsed.topology, parsed.positions, guests)
    lost = [*parsed.lost, *rendered.lost]
    if options.json:
        told = {"from": origin, "to": options.target, "text": rendered.text}
        print(json.dumps({**told, "lost": [dataclasses.asdict(each) for each in lost]}))
        return
    sys.stdout.write(rendered.text)
    sys.stdout.flush()
    for each in lost:
        print(f"{PROGRAM}: lost: {each}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [--from FORMAT] [--to FORMAT] [--json] (FILE | -- WORD ...)",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    about = {name: form.what for name, form in FORMATS.items()}
    about |= {name: form.what for name, form in WHOLE_FORMATS.items() if name not in about}
    formats = "; ".join(f"{name}: {what}" for name, what in about.items())
    add = parser.add_argument
    add("file", metavar="FILE", nargs="?", help="what to translate; - for standard input")
    what = f"format to read, or guess ({formats}; default %(default)s)"
    add("--from", dest="origin", choices=[*about, "guess"], default="legacy", help=what)
    add("--to", dest="target", choices=list(about), default="qemu", help="format to write (%(default)s)")
    add("--json", action="store_true", help="print one JSON object: argv, command, notes; or text and lost")
    return parser


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"{name!r} cannot be read: {reason}") from error
