"""The command ``ivshmem-lab``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Self

from . import __version__
from .errors import IvshmemLabError, UsageError
from .units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

PROGRAM = "ivshmem-lab"

_DONE, _FAILED, _WRONG_CALL, _INTERRUPTED = 0, 1, 2, 128 + signal.SIGINT

_EXAMPLE = """\
example:
  ivshmem-lab demo

Exit status: 0 done, 1 failed, 2 wrong call, 130 interrupted."""

_OTHERS = {
    "up": "start the lab that a topology file describes, and run it until Ctrl-C",
    "vm": "machines of a lab that `up` runs: ps, start, stop, plug, unplug, console, migrate",
    "doctor": "what of this machine works for the lab, and what to do about the rest",
    "translate": "turn a topology (YAML, JSON, QEMU command lines, libvirt XML, Python) or one legacy command line into another format",
    "trace": "draw what `ivshmem-server --trace FILE` recorded as a swim-lane, or replay it",
    "bench": "measure in one run: `bench server` (joining peers), `bench channel` (messages between two processes), "
    "`bench device` (register accesses), `bench doorbell` (ioeventfd on and off), `bench linux` (two Linux guests, with TCP beside)",
    "linux": "unmodified Linux guests: `linux build` their image, `linux run` a command in one, copy the guest `tool`",
}
_BENCHES = ("server", "channel", "device", "doorbell", "linux")

_DEMO = """\
Start an ivshmem server, two PCs on our emulator, two on real QEMU where it is installed, and join them from this
process. They exchange interrupts and move bytes through shared memory; nothing stays behind but the figure."""

_DEMO_EXAMPLES = """\
examples:
  ivshmem-lab demo
  ivshmem-lab demo --rounds 10000 --bytes 256M --figure slow.svg
  ivshmem-lab demo --json --quiet

Exit status: 0 done, 1 failed (also: an interrupt lost, a checksum wrong), 2 wrong call, 130 interrupted."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a call in one line."""
        raise UsageError(f"{message}; see {self.prog} --help")


class _Interrupts:
    """Ctrl-C: a KeyboardInterrupt at once, but for where it would break something; there it comes a moment later."""

    def __init__(self) -> None:
        self._holds = 0
        self._asked = False
        self._before: object = signal.SIG_IGN

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; and whoever ignores the signal (nohup, `&` in a script) means it.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before != signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._came)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._before != signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]  # what getsignal() gave

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Let nothing be interrupted in here."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if self._asked and not self._holds:
                raise KeyboardInterrupt

    def no_more(self) -> None:
        """Let nothing be interrupted from here on."""
        self._holds += 1

    def _came(self, _number: int, _frame: FrameType | None) -> None:
        if self._holds:
            self._asked = True
        else:
            raise KeyboardInterrupt


class _Progress:
    """One line on a terminal that says what is being done, and is gone at the end."""

    def __init__(self, *, on: bool) -> None:
        self._on = on and sys.stderr.isatty()
        self._shown = 0

    def say(self, text: str) -> None:
        """Replace the line."""
        if self._on:
            line = f"{text} ..." if text else ""
            whole = line.ljust(self._shown)
            # Before it is there: Ctrl-C may come in between, and it has to be taken away again.
            self._shown = len(whole)
            print(f"\r{whole}", end="" if line else "\r", file=sys.stderr, flush=True)
            self._shown = len(line)

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            self.say("")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Its arguments; None for those of the process.

    Returns
    -------
    int
        Exit status.
    """
    name = PROGRAM
    with _Interrupts() as interrupts:
        try:
            words = list(sys.argv[1:] if argv is None else argv)
            if words and words[0] in _OTHERS:
                name = f"{PROGRAM} {words[0]}"
                return _other(words)
            options = _parse(words)
            name = f"{PROGRAM} {options.command}"
            return _demo(options, interrupts)
        except SystemExit as stop:  # --help, --version
            return int(stop.code or 0)
        except KeyboardInterrupt:
            interrupts.no_more()
            print(f"{name}: interrupted; nothing is left running", file=sys.stderr)
            return _INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at its end
            print(f"{name}: nobody reads the results", file=sys.stderr)
            return _FAILED
        except IvshmemLabError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return _WRONG_CALL if isinstance(error, UsageError) else _FAILED


def _other(words: Sequence[str]) -> int:
    """Run a command that reads its arguments itself."""
    if words[0] == "up":
        from . import up

        return up.main(words[1:])
    if words[0] == "vm":
        from . import vm_cli

        return vm_cli.main(words[1:])
    if words[0] == "doctor":
        from . import doctor

        return doctor.main(words[1:])
    if words[0] == "translate":
        from . import translate

        return translate.main(words[1:])
    if words[0] == "trace":
        from . import trace

        return trace.main(words[1:])
    if words[0] == "linux":
        from .lab import linux_cli

        return linux_cli.main(words[1:])
    if len(words) < 2 or words[1] not in _BENCHES:
        given = f"{words[1]!r} is none of them" if len(words) > 1 else "none is given"
        if words[1:2] in (["-h"], ["--help"]):
            print(
                f"usage: {PROGRAM} bench {{{','.join(_BENCHES)}}} ...\n\nexample: {PROGRAM} bench server --peers 64 --json"
            )
            return _DONE
        raise UsageError(f"there are the measurements {', '.join(_BENCHES)}; {given}; see {PROGRAM} bench --help")
    from .bench import channel, device, doorbell, linux, server

    mains = {
        "server": server.main,
        "channel": channel.main,
        "device": device.main,
        "doorbell": doorbell.main,
        "linux": linux.main,
    }
    return mains[words[1]](words[2:])


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog=PROGRAM,
        description="Inter-VM shared memory (ivshmem) to see, teach and measure.",
        epilog=_EXAMPLE,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    demo = commands.add_parser(
        "demo",
        help="guests, QEMU and this process interrupt each other: who is who, a table, a figure",
        description=_DEMO,
        epilog=_DEMO_EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    for name, what in _OTHERS.items():
        commands.add_parser(name, help=what)
    add = demo.add_argument
    add("--rounds", default="2000", metavar="N", help="interrupts each way on each path (%(default)s)")
    add("--bytes", default="64M", metavar="SIZE", help="bytes of each stream, in chunks of 64K (%(default)s)")
    add("--figure", default="ivshmem-demo.png", metavar="PATH", help=".png, .svg or .pdf (%(default)s)")
    add("--no-qemu", action="store_true", help="leave real QEMU out")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--quiet", action="store_true", help="no progress on the terminal")
    options = parser.parse_args(argv)
    if options.command is None:
        raise UsageError(f"no command is given; there are {', '.join(['demo', *_OTHERS])}; see {PROGRAM} --help")
    return options


def _demo(options: argparse.Namespace, interrupts: _Interrupts) -> int:
    if not options.rounds.isascii() or not options.rounds.isdigit():
        raise UsageError(f"--rounds {options.rounds!r} is not a whole number")
    size_bytes = parse_size(options.bytes, "--bytes")
    progress = _Progress(on=not options.quiet)
    try:
        progress.say("loading")
        with interrupts.hold():  # an import that is cut off says that a module is broken
            from .demo.options import DemoOptions
            from .demo.run import run_demo
        what = DemoOptions(int(options.rounds), size_bytes, Path(options.figure), not options.no_qemu)
        report = run_demo(what, progress.say, interrupts.hold)
    finally:
        progress.clear()
    if options.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        encoding = sys.stdout.encoding  # a terminal without arrows and micro signs gets question marks
        print(report.as_text().encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
    for failure in report.failures:
        print(f"{PROGRAM} demo: {failure}", file=sys.stderr)
    return _FAILED if report.failures else _DONE
