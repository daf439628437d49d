"""The command ``ivshmem-lab vm``: machines of a lab that ``ivshmem-lab up`` runs, from another shell."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import socket
import sys
import termios
import time
import tty
from typing import TYPE_CHECKING, Any, Self

from .errors import LabError, UsageError
from .lab.control import control_paths

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROGRAM = "ivshmem-lab vm"
ESCAPE = b"\x1d"
"""Ctrl-], as for telnet and virsh console."""
_CONNECT_TIME_LIMIT_S = 5.0
_EXAMPLES = """\
examples, with `ivshmem-lab up lab.yaml` in another shell:
  ivshmem-lab vm ps
  ivshmem-lab vm start carol --guest probe --args watch=1
  ivshmem-lab vm plug carol board
  ivshmem-lab vm console carol          Ctrl-] leaves it
  ivshmem-lab vm unplug carol board
  ivshmem-lab vm migrate carol --to dave --peers replug
  ivshmem-lab vm stop dave

Exit status: 0 done, 1 failed, 2 wrong call."""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises
    ------
    UsageError
        When the call is wrong.
    LabError
        The lab refused, or is gone.
    """
    options = _parser().parse_args(argv)
    with Connection.open(options.lab) as lab:
        if options.command == "console":
            return _console(lab, options)
        return _order(lab, options)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="See and change the virtual machines of a lab that `ivshmem-lab up` runs.",
        epilog=_EXAMPLES,
        formatter_class=raw,
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--lab", metavar="NAME", help="which lab, where several run: its file's name, or up's --name")
    common.add_argument("--json", action="store_true", help="print one JSON object")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, what: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"example: {PROGRAM} {example}",
            parents=[common],
            allow_abbrev=False,
        )

    add("ps", "every machine: how it stands, its devices and peer ids", "ps --json")
    start = add("start", "start a new machine, or one that has ended", "start carol --guest probe --connect board")
    start.add_argument("vm", metavar="VM", help="its name")
    start.add_argument("--guest", metavar="G", help="a guest of the package, the path of an ELF, or linux (pingpong)")
    start.add_argument("--args", metavar="WORDS", help="the guest's command line")
    start.add_argument("--emulator", choices=("unicorn", "qemu"), help="(unicorn)")
    start.add_argument("--machine", choices=("pc", "q35"), help="(pc)")
    start.add_argument("--memory", metavar="SIZE", help="the guest's RAM")
    start.add_argument("--connect", metavar="SERVER", action="append", help="a server to join; may be repeated")
    start.add_argument("--root-ports", dest="root_ports", type=int, metavar="N", help="on q35: places for devices (4)")
    start.add_argument("--cpu", type=int, metavar="N", help="the one host CPU to run on")
    start.add_argument("--accel", choices=("tcg", "kvm", "auto"), help="what runs QEMU's guest (tcg)")
    stop = add("stop", "end a machine; its console stays readable", "stop carol --remove")
    stop.add_argument("vm", metavar="VM")
    stop.add_argument("--remove", action="store_true", default=None, help="take it out of the lab, too")
    plug = add("plug", "plug a server or a memory into a running machine", "plug carol board --vectors 4")
    plug.add_argument("vm", metavar="VM")
    plug.add_argument(
        "source", metavar="SOURCE", help="a server or memory of the lab, or the path of a server's socket"
    )
    plug.add_argument("--vectors", type=int, metavar="N", help="interrupt vectors of a doorbell device")
    plug.add_argument("--id", metavar="ID", help="its id in the machine (hot0, hot1, …)")
    plug.add_argument("--bus", metavar="PLACE", help="a root port's name or a slot number; the first that is free")
    plug.add_argument(
        "--property", metavar="K=V", action="append", default=[], help="such as master=on; may be repeated"
    )
    plug.add_argument("--no-wait", action="store_true", help="do not wait until the guest has seen it")
    unplug = add("unplug", "ask the guest to let a device go", "unplug carol board --force")
    unplug.add_argument("vm", metavar="VM")
    unplug.add_argument("source", metavar="SOURCE", nargs="?", help="what the device shows, or instead:")
    unplug.add_argument("--id", metavar="ID", help="its id in the machine")
    unplug.add_argument("--timeout", dest="timeout_s", type=float, metavar="S", help="how long the guest may take (10)")
    silent = unplug.add_mutually_exclusive_group()
    silent.add_argument(
        "--force", action="store_true", default=None, help="where the guest is silent: reset it, it starts anew"
    )
    silent.add_argument("--give-up", dest="give_up", action="store_true", default=None, help="… or leave it asked")
    console = add("console", "a machine's serial port; Ctrl-] leaves it", "console carol --read")
    console.add_argument("vm", metavar="VM")
    console.add_argument("--read", action="store_true", help="print what it has written so far, and end")
    console.add_argument("--wait", metavar="TEXT", help="end with status 0 when the guest has written this")
    console.add_argument(
        "--timeout", dest="timeout_s", type=float, metavar="S", help="with --wait: status 1 after S seconds"
    )
    migrate = add("migrate", "move a machine into another process", "migrate carol --to dave --source frame=other")
    migrate.add_argument("vm", metavar="VM")
    migrate.add_argument("--to", metavar="NAME", required=True, help="its new name, or an address: tcp:HOST:PORT")
    migrate.add_argument("--peers", choices=("refuse", "replug"), help="devices with master=off (refuse)")
    migrate.add_argument(
        "--source",
        metavar="A=B",
        action="append",
        default=[],
        help="devices that show A here show B there; may be repeated",
    )
    migrate.add_argument("--timeout", dest="timeout_s", type=float, metavar="S", help="how long it may take (120)")
    return parser


# -- the lab ---------------------------------------------------------------------------------------------


class Connection:
    """A connection to the control socket of a lab."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self.sock = sock
        self.name = name
        self._buffer = b""

    @classmethod
    def open(cls, name: str | None) -> Self:
        """Find a lab by its name, or the only one; sockets that nobody listens on are taken away.

        Raises
        ------
        UsageError
            There is no such lab, or none, or it is not clear which.
        """
        found: dict[str, socket.socket] = {}
        for its, path in control_paths().items():
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(_CONNECT_TIME_LIMIT_S)
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:  # its lab was killed
                sock.close()
                with contextlib.suppress(OSError):
                    path.unlink()
            except OSError:
                sock.close()
            else:
                sock.settimeout(None)
                found[its] = sock
        chosen = found.pop(name, None) if name else found.popitem()[1] if len(found) == 1 else None
        there = ", ".join(found)
        for sock in found.values():
            sock.close()
        if chosen is not None:
            return cls(chosen, name or "")
        if not there:
            raise UsageError(f"no lab{f' {name!r}' if name else ''} runs; start one: ivshmem-lab up FILE")
        raise UsageError(
            f"no lab {name!r} runs; there are {there}" if name else f"there are the labs {there}; say --lab NAME"
        )

    def ask(self, order: str, arguments: dict[str, Any]) -> None:
        """Send an order."""
        self.sock.sendall(json.dumps({"execute": order, "arguments": arguments}).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """Give what has come whole; one call of recv at least."""
        data = self.sock.recv(1 << 16)
        if not data:
            raise LabError("the lab has ended")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            yield json.loads(line)

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _failure(error: dict[str, str]) -> LabError | UsageError:
    return UsageError(error["desc"]) if error["type"] == "UsageError" else LabError(error["desc"])


# -- orders ----------------------------------------------------------------------------------------------


def _order(lab: Connection, options: argparse.Namespace) -> int:
    left_out = {"command", "lab", "json", "property", "no_wait", "source"}
    arguments = {key: value for key, value in vars(options).items() if key not in left_out and value is not None}
    if options.command in ("plug", "unplug") and options.source is not None:
        arguments["source"] = options.source
    if options.command == "plug":
        arguments["properties"] = dict(_pair(each, "--property") for each in options.property)
        if options.no_wait:
            arguments["wait_s"] = 0
        if options.bus is not None and options.bus.isdecimal():
            arguments["bus"] = int(options.bus)
    if options.command == "migrate":
        arguments["sources"] = dict(_pair(each, "--source") for each in options.source)
    lab.ask(options.command, arguments)
    answer = _follow(lab, quiet=options.json)
    if options.json:
        print(json.dumps(answer, indent=2))
    elif options.command == "ps":
        print(_table(answer))
    else:
        print(_sentence(options.command, options.vm, answer))
    return 0


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{option} {text!r} is no pair; write {option} name=value")
    return key, value


def _follow(lab: Connection, *, quiet: bool) -> Any:
    """Show steps as they are done; returns the answer."""
    shown = not quiet
    on_terminal = sys.stderr.isatty() and shown
    while True:
        for message in lab.messages():
            if "error" in message:
                raise _failure(message["error"])
            if "return" in message:
                return message["return"]
            event = message["event"]
            if "total_bytes" in event:
                if on_terminal:
                    print(
                        f"\r{event['sent_bytes'] >> 20} of {event['total_bytes'] >> 20} MiB ", end="\r", file=sys.stderr
                    )
            elif shown:
                print(_step(event), flush=True)


def _step(event: dict[str, Any]) -> str:
    if "step" in event:
        return str(event["step"])
    head = f"{1e3 * event['took_s']:8.1f} ms  {event.get('state') or event.get('side', ''):<11} {event['what']}"
    return f"{head}: {event['error']}" if event.get("error") else head


def _sentence(order: str, name: str, answer: dict[str, Any]) -> str:
    if order in ("plug", "unplug"):
        peer = "" if answer["peer_id"] is None else f", peer {answer['peer_id']}"
        return f"{answer['id']} in {name}, {answer['place']}: {answer['state']}{peer}"
    if order == "migrate":
        times = f"in {1e3 * answer['total_s']:.0f} ms, stood still for {1e3 * answer['downtime_s']:.0f} ms"
        lines = [f"{name} has moved to {answer['vm'] or 'the address'} {times}"]
        lines += [f"{device} is peer {peer_id} now" for device, peer_id in answer["peer_ids"].items()]
        lines += [f"{device} was unplugged; plug it in at the destination" for device in answer["left"]]
        return "\n".join(lines)
    return f"{name} is {answer['state']}" + (f": {answer['reason']}" if answer["reason"] else "")


def _table(machines: list[dict[str, Any]]) -> str:
    lines = [("VM", "EMULATOR", "GUEST", "STATE", "PID", "DEVICES")]
    for each in machines:
        devices = ", ".join(map(_device, each["devices"]))
        state = f"{each['state']}: {each['reason']}" if each["reason"] else each["state"]
        lines.append(
            (each["vm"], each["emulator"], each["guest"] or "-", state, str(each["pid"] or "-"), devices or "-")
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _device(device: dict[str, Any]) -> str:
    peer = "" if device["peer_id"] is None else f", peer {device['peer_id']}"
    return f"{device['source']} ({device['id']}{peer})"


# -- the console -----------------------------------------------------------------------------------------


def _console(lab: Connection, options: argparse.Namespace) -> int:
    if options.read:
        lab.ask("text", {"vm": options.vm})
        answer = _follow(lab, quiet=True)
        print(json.dumps(answer) if options.json else answer["text"], end="\n" if options.json else "")
        return 0
    lab.ask("console", {"vm": options.vm})
    if options.wait is not None:
        return _wait(lab, options)
    with _raw_terminal():
        return _talk(lab)


def _wait(lab: Connection, options: argparse.Namespace) -> int:
    """Print what the guest has written and writes, until a text."""
    deadline = None if options.timeout_s is None else time.monotonic() + options.timeout_s
    text = ""
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([lab.sock], [], [], left)[0]:
            raise LabError(f"{options.vm} has not written {options.wait!r} in {options.timeout_s:g} s")
        for message in lab.messages():
            if "error" in message:
                raise _failure(message["error"])
            if "return" in message:
                raise LabError(f"{options.vm} has ended without writing {options.wait!r}")
            piece = message["event"]["text"]
            print(piece, end="", flush=True)
            text += piece
            if options.wait in text:
                return 0


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Let every key through to the guest, and give the terminal back as it was."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    print("connected; Ctrl-] leaves", file=sys.stderr)
    try:
        tty.setraw(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        print(file=sys.stderr)


def _talk(lab: Connection) -> int:
    """Carry bytes both ways, until Ctrl-], the end of the input, or that of the machine."""
    keys = sys.stdin.fileno()
    on_terminal = sys.stdin.isatty()
    while True:
        ready, _, _ = select.select([lab.sock, keys], [], [])
        if keys in ready:
            data = os.read(keys, 4096)
            typed, escape, _ = data.partition(ESCAPE) if on_terminal else (data, b"", b"")
            if typed:
                text = typed.decode("utf-8", "replace").replace("\r", "\n" if on_terminal else "\r")
                lab.sock.sendall(json.dumps({"input": text}).encode() + b"\n")
            if escape or not data:
                return 0
        if lab.sock in ready:
            for message in lab.messages():
                if "error" in message:
                    raise _failure(message["error"])
                if "return" in message:
                    ended = message["return"]
                    raise LabError(f"the machine has ended: {ended['state']}: {ended['reason']}")
                text = message["event"]["text"]
                sys.stdout.buffer.write((text.replace("\n", "\r\n") if on_terminal else text).encode())
                sys.stdout.buffer.flush()
