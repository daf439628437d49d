"""The command ``ivshmem-lab up``: a lab from a file."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .lab.check import problems_here
from .lab.from_topology import lab_from_topology
from .topology.formats.yaml_file import parse
from .topology.model import Topology
from .topology.plan import plan

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXAMPLES = """\
examples:
  ivshmem-lab up lab.yaml
  ivshmem-lab up lab.yaml --json --exit-after 5

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
    with lab_from_topology(file.topology) as lab:
        try:
            table = repr(lab)
            print(
                json.dumps({"plan": steps, "table": table.splitlines()}) if options.json else f"\n{table}", flush=True
            )
            threading.Event().wait(options.exit_after)
        except KeyboardInterrupt:
            print("ivshmem-lab up: interrupted; everything is ended", file=sys.stderr)
    return 0
