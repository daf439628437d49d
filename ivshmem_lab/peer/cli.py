"""The command ``ivshmem-client``: a drop-in for QEMU's contrib client.

Its flags, commands and lines are those of the original, 7.2. What differs: the end of its input ends it
(the original then uses a whole CPU), and a server that talks nonsense is named and left. It never
maps the memory, as the original.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, Self

from ..errors import IvshmemLabError, PeerError, UsageError
from ..ipc.eventfd import poll_timeout_ms
from ..ipc.runtime_dir import check_socket_path
from ..wire.lease import check_lease_name
from .joining import Introduction
from .link import Link

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPT = "cmd> "
RETRY_S = 1.0

_CONNECT_S = 5.0
_STDIN = 0
_READ_BYTES = 4096
_MOST_WAITING = 4096  # commands that wait for the server; beyond, stdin is read no further
_MOST_LINE_BYTES = 65536
_INT = re.compile(r"int\s+(\S+)(?:\s+(\S+))?")

_COMMANDS = """\
commands, one per line (or separated by ';'):
  help, ?       this text
  dump          all peers and their vectors, ours first
  int P V       ring vector V of peer P
  int P all     ring all vectors of peer P
  int all       ring all vectors of all peers but us
  quit          leave; so does the end of the input"""

_EXAMPLE = f"""\
{_COMMANDS}

example:
  ivshmem-server -F -S /tmp/board.sock -M board -n 2 &
  ivshmem-client -S /tmp/board.sock
  echo 'dump; int 0 1' | ivshmem-client -S /tmp/board.sock

Exit status: 0 done, 1 failed (no server before the input ended), 2 wrong call."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Refuse a call in one line."""
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the client until its input ends; return the exit status."""
    try:
        options = _parse(argv)
        with Client(options.socket, verbose=options.verbose, as_json=options.json, lease=options.lease) as client:
            return client.run()
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads us any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout again at its end
        return 1
    except IvshmemLabError as error:
        print(f"ivshmem-client: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="ivshmem-client",
        description="Join an ivshmem server by hand: ring the other peers, and see who rings.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-v", "--verbose", action="store_true", help="print which peers and vectors come and go")
    add("-S", "--socket", default="/tmp/ivshmem_socket", metavar="SOCK", help="the server's socket (%(default)s)")
    add("--lease", metavar="NAME", help="have the server keep our id under this name while we are away")
    add("--json", action="store_true", help="print everything as JSON objects, one per line, and no prompt")
    options = parser.parse_args(argv)
    check_socket_path(options.socket)
    if options.lease is not None:
        check_lease_name(options.lease)
    return options


class Client:
    """The client's state: the server, if it is there, and the commands that wait for it."""

    def __init__(self, path: str, *, verbose: bool, as_json: bool, lease: str | None) -> None:
        self._path = path
        self._lease = lease
        self._verbose = verbose
        self._json = as_json
        self._news = select.epoll()
        self._link: Link | None = None
        self._introduction: Introduction | None = None  # while it goes on
        self._retry_at = 0.0
        self._input_ended = False
        self._rest = b""
        self._commands: deque[str] = deque()
        self._quit = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._link is not None:
            self._link.close()
        self._news.close()

    def run(self) -> int:
        """Do what the input says until it ends.

        Raises
        ------
        PeerError
            When the input ended and there is no server.
        """
        while True:
            if self._link is None and time.monotonic() >= self._retry_at:
                self._connect()
            if self._link is not None:
                self._hear(self._link)
            if self._link is not None and self._introduction is None:
                self._obey(self._link)
            if self._quit or (self._input_ended and self._introduction is None and self._link is not None):
                return 0
            if self._input_ended and self._link is None:
                raise PeerError(f"the input ended and no ivshmem server answers on {self._path!r}")
            self._wait()

    # The server

    def _connect(self) -> None:
        try:
            self._link = Link.connect(self._path, _CONNECT_S, self._news, self._lease)
        except PeerError:
            self._retry_at = time.monotonic() + RETRY_S
            self._report("cannot connect to server, retry in 1 second", error=True, event="no server")
            return
        assert self._link.sock is not None
        self._introduction = Introduction(self._link)
        number = self._link.sock.fileno()
        self._report(f"listen on server socket {number}", event="connected", fd=number)
        self._prompt()

    def _hear(self, link: Link) -> None:
        introduced = False
        try:
            if self._introduction is None:
                link.read()
            else:
                introduced = self._introduction.complete()
        except IvshmemLabError as error:
            self._report(f"ivshmem-client: {error}", error=True, event="bad server", reason=str(error))
        for peer_id, came in link.changes:
            text = f"peer_id = {peer_id} {'has come' if came else 'is gone'}" if self._verbose else None
            self._report(text, event="peer came" if came else "peer left", peer_id=peer_id)
        link.changes.clear()
        if introduced:
            self._introduction = None
            self._report(None, event="introduced", peer_id=link.peer_id, vectors=len(link.own))
        self._take_interrupts(link)
        if link.sock is None:
            self._report("disconnected from server", event="disconnected")
            link.close()
            self._link = self._introduction = None
            self._retry_at = time.monotonic() + RETRY_S

    def _take_interrupts(self, link: Link) -> None:
        for vector, line in enumerate(link.own):
            count = line.take()
            if count:
                # the original names the own id here, and programs look for that
                text = f"receive notification from peer_id={link.peer_id} vector={vector}"
                self._report(text, event="interrupt", vector=vector, count=count)

    def _wait(self) -> None:
        poller = select.poll()
        deadline: float | None = None
        if not self._input_ended and len(self._commands) < _MOST_WAITING:
            poller.register(_STDIN, select.POLLIN)
        if self._link is None:
            deadline = self._retry_at
        else:
            poller.register(self._news, select.POLLIN)
            for line in self._link.own:
                poller.register(line, select.POLLIN)
            if self._introduction is not None:
                deadline = self._introduction.due
        if any(fd == _STDIN for fd, _ in poller.poll(poll_timeout_ms(deadline))):
            self._read_input()

    # The input

    def _read_input(self) -> None:
        try:
            data = os.read(_STDIN, _READ_BYTES)
        except OSError:  # closed, or a terminal that is gone
            data = b""
        *tokens, self._rest = re.split(rb"[\n\r;]", self._rest + data)
        if self._rest and (not data or len(self._rest) > _MOST_LINE_BYTES):
            tokens.append(self._rest)
            self._rest = b""
        self._input_ended = not data
        self._commands.extend(token.decode(errors="replace").strip() for token in tokens)

    def _obey(self, link: Link) -> None:
        asked = bool(self._commands)
        while self._commands and not self._quit:
            command = self._commands.popleft()
            if command:
                self._do(link, command)
        self._take_interrupts(link)  # our own rings come at once
        if asked and not self._quit:
            self._prompt()

    def _do(self, link: Link, command: str) -> None:
        if command in {"help", "?"}:
            self._report(_COMMANDS, event="help", text=_COMMANDS)
        elif command == "quit":
            self._quit = True
        elif command == "dump":
            self._dump(link)
        elif (match := _INT.fullmatch(command)) and self._interrupt(link, match[1], match[2]):
            pass
        else:
            self._report("invalid command, type help", event="invalid command", command=command)

    def _dump(self, link: Link) -> None:
        ids = [link.peer_id, *link.others]
        lines = []
        for peer_id in ids:
            lines.append(f"{'our_id' if peer_id == link.peer_id else 'peer_id'} = {peer_id}")
            lines += [
                f"  vector {vector} is enabled (fd={line.fileno()})"
                for vector, line in enumerate(link.lines.get(peer_id, []))
            ]
        peers = {str(peer_id): len(link.lines.get(peer_id, [])) for peer_id in ids}
        self._report("\n".join(lines), event="dump", our_id=link.peer_id, vectors=peers)

    def _interrupt(self, link: Link, who: str, which: str | None) -> bool:
        """Ring; False when that is no command."""
        if which is None:
            if who != "all":
                return False
            for peer_id in link.others:
                self._ring(link, peer_id, None)
            return True
        if not who.isdecimal() or not (which == "all" or which.isdecimal()):
            return False
        self._ring(link, int(who), None if which == "all" else int(which))
        return True

    def _ring(self, link: Link, peer_id: int, vector: int | None) -> None:
        lines = link.lines.get(peer_id)
        if lines is None and peer_id != link.peer_id:
            self._report(f"cannot find peer_id = {peer_id}", event="no such peer", peer_id=peer_id)
            return
        lines = lines or []
        if vector is not None and vector >= len(lines):
            text = f"peer_id = {peer_id} has no vector {vector}; it has {len(lines)}, counted from 0"
            self._report(text, event="no such vector", peer_id=peer_id, vector=vector)
            return
        rung = range(len(lines)) if vector is None else [vector]
        for each in rung:
            lines[each].ring()
        done = f"rang peer_id = {peer_id}, vectors {list(rung)}" if self._verbose else None
        self._report(done, event="rang", peer_id=peer_id, vectors=list(rung))

    # The output

    def _report(self, text: str | None, /, *, error: bool = False, **said: Any) -> None:
        """Say something as text (None: nothing), or as JSON."""
        if self._json:
            print(json.dumps(said), flush=True)
        elif text is not None:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)

    def _prompt(self) -> None:
        if not self._json:
            print(PROMPT, end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
