"""The command ``ivshmem-lab up``: a lab from a file."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .lab.check import problems_here
from .lab.control import LabControl
from .lab.from_topology import lab_from_topology
from .topology.formats.yaml_file import parse
from .topology.model import Topology
from .topology.plan import plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .lab.apply import OnStep
    from .topology.plan import Action

_EXAMPLES = """\
examples:
  ivshmem-lab up lab.yaml
  ivshmem-lab up lab.yaml --json --exit-after 5
  ivshmem-lab up lab.yaml --name bench & ivshmem-lab vm --help

Exit status: 0 done (also by Ctrl-C once it runs), 1 failed, 2 wrong call or a wrong file, 130 interrupted before."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises
    ------
    UsageError
        When the call or the file is wrong; every problem has its line and column.
    """
    parser = argparse.ArgumentParser(
        "ivshmem-lab up",
        description="Start what a topology file describes (YAML or JSON), show it, and run it until Ctrl-C.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the topology; - for standard input")
    parser.add_argument("--json", action="store_true", help="plan and table as one JSON object")
    parser.add_argument("--name", metavar="NAME", help="what `ivshmem-lab vm --lab` calls it (the file's name)")
    parser.add_argument("--exit-after", type=float, metavar="S", help="end after so many seconds instead of by Ctrl-C")
    options = parser.parse_args(argv)
    if options.exit_after is not None and not 0 <= options.exit_after <= threading.TIMEOUT_MAX:
        raise UsageError(f"--exit-after {options.exit_after}: give seconds from 0 on")
    try:
        text = sys.stdin.read() if options.file == "-" else Path(options.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{options.file} cannot be read: {error}") from error
    file = parse(text, options.file)
    problems = problems_here(file.topology, Topology())
    if problems:
        raise UsageError("\n".join("{}:{}:{}: {}".format(options.file, *file.place(p.path), p) for p in problems))
    steps = [str(action) for action in plan(Topology(), file.topology)]
    if not options.json:
        print(*(f"{number}. {step}" for number, step in enumerate(steps, 1)), sep="\n", flush=True)
    with lab_from_topology(file.topology, _progress()) as lab:
        control = LabControl(lab, options.name or _name_of(options.file))
        try:
            table = repr(lab)
            hint = f"lab {control.name!r}: change it with `ivshmem-lab vm` in another shell; Ctrl-C ends it"
            shown = {"lab": control.name, "plan": steps, "table": table.splitlines()}
            text = json.dumps(shown) if options.json else f"\n{table}\n\n{hint}"
            _wait(options.exit_after, lambda: print(text, flush=True))
        except KeyboardInterrupt:
            print("ivshmem-lab up: interrupted; everything is ended", file=sys.stderr)
        finally:
            control.close()
            lab.close()
            control.join()
    return 0


def _wait(timeout_s: float | None, ready: Callable[[], None]) -> None:
    """Say that it runs, and wait for the end of the time, or a signal, whichever thread the kernel gives that to."""
    if threading.current_thread() is not threading.main_thread():
        ready()
        threading.Event().wait(timeout_s)
        return
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        ready()
        select.select([read], [], [], timeout_s)
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, terminated)
        os.close(read)
        os.close(write)


def _name_of(file: str) -> str:
    """Return a lab's name for the file it came from."""
    stem = re.sub(r"[^\w.-]", "-", "lab" if file == "-" else Path(file).stem)
    return stem[:32] or "lab"


def _progress() -> OnStep | None:
    """Say on a terminal what is being done; each step takes a moment, and a Linux guest seconds."""
    if not sys.stderr.isatty():
        return None

    def say(action: Action, status: str, error: BaseException | None) -> None:
        mark = {"started": "…", "done": "✓"}.get(status, "✗")
        print(f"{mark} {action}{f': {error}' if error else ''}", file=sys.stderr, flush=True)

    return say
