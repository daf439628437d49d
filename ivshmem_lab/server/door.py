"""Where clients come in: accepts them, refuses some by name, and waits when the kernel is short of something."""

from __future__ import annotations

import contextlib
import resource
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LocalProtocolError
from ..wire.messages import encode
from .connection import FIRST_DELAY_S, LAST_DELAY_S, SHORTAGES, why_gone
from .events import ClientRefused, ServerStrained
from .policy import Credentials, NotAdmittedError, is_qemu

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from .events import ServerEvent
    from .listener import Listener
    from .roster import Roster

_ACCEPT_TURN = 64  # newcomers before the peers get a turn
_NO_VERSION = -1
"""Said to a real QEMU that is refused: it answers with an error. On an end of file, even behind this, it reads for ever (measured, 7.2)."""
_MOST_REFUSED_QEMUS = 64  # whose connections stay open until they close them; beyond that the oldest is closed


class Door:
    """Accepts the clients of a listening socket."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, listener: Listener, roster: Roster, tell: Callable[[ServerEvent], None]
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._roster = roster
        self._tell = tell
        self._waiting: socket.socket | None = None  # accepted, but no descriptors for its vectors yet
        self._resume: asyncio.TimerHandle | None = None
        self._delay_s = FIRST_DELAY_S
        self._open = True
        self._refused: dict[int, socket.socket] = {}
        loop.add_reader(listener.sock, self._accept)

    def close(self, *, admit_waiting: bool = False) -> None:
        """Let nobody in any more; those who have connected already can be admitted first. May be called twice."""
        if not self._open:
            return
        if admit_waiting:
            while self._accept_turn():
                pass
        self._open = False
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._listener.sock)
        self._listener.close()
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        for fileno in list(self._refused):
            self._let_go(fileno)

    def _accept(self) -> None:
        self._accept_turn()

    def _accept_turn(self) -> bool:
        """Accept some; False when nobody waits any more, or newcomers must wait."""
        try:
            return all(self._open and self._accept_one() for _ in range(_ACCEPT_TURN))
        finally:
            self._roster.introduce()

    def _accept_one(self) -> bool:
        sock, self._waiting = self._waiting, None
        try:
            if sock is None:
                sock, _ = self._listener.sock.accept()
                sock.setblocking(False)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in SHORTAGES:
                self._pause(f"no newcomer can be accepted: {error.strerror}")
                return False
            return True  # that client is gone (accept(2), ECONNABORTED)
        return self._admit(sock)

    def _admit(self, sock: socket.socket) -> bool:
        """Make a peer of a connected socket; False when newcomers must wait."""
        who = Credentials.of(sock)
        gone = why_gone(sock, socket.MSG_PEEK)
        if gone is not None:
            self._refuse(sock, who, gone[1])
            return True
        try:
            self._roster.admit(sock, who)
        except OSError as error:
            self._waiting = sock
            self._pause(f"no eventfds for a newcomer: {error.strerror}")
            return False
        except (NotAdmittedError, LocalProtocolError) as error:
            self._refuse(sock, who, str(error))
            return True
        self._delay_s = FIRST_DELAY_S
        return True

    def _refuse(self, sock: socket.socket, who: Credentials, reason: str) -> None:
        if not is_qemu(who.pid):
            sock.close()
        else:
            self._say_no(sock)
        self._roster.counters.refusals += 1
        self._tell(ClientRefused(who.pid, who.uid, reason))

    def _say_no(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.send(encode(_NO_VERSION))
        if len(self._refused) >= _MOST_REFUSED_QEMUS:
            self._let_go(next(iter(self._refused)))
        self._refused[sock.fileno()] = sock
        self._loop.add_reader(sock.fileno(), self._let_go, sock.fileno())

    def _let_go(self, fileno: int) -> None:
        self._loop.remove_reader(fileno)
        self._refused.pop(fileno).close()

    def _pause(self, reason: str) -> None:
        """Let newcomers wait: 10 ms, doubled up to 100 ms."""
        if self._delay_s == FIRST_DELAY_S:
            self._tell(ServerStrained(reason))
        self._loop.remove_reader(self._listener.sock)
        self._resume = self._loop.call_later(self._delay_s, self._go_on)
        self._delay_s = min(2 * self._delay_s, LAST_DELAY_S)

    def _go_on(self) -> None:
        if self._open:
            self._loop.add_reader(self._listener.sock, self._accept)
            self._accept()


def allow_many_files() -> int:
    """Raise the soft limit of open files to the hard one (getrlimit(2), RLIMIT_NOFILE); return what holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def peers_that_fit(open_files: int, vectors: int) -> int:
    """Return how many more peers the open files allow: each takes one, and one per vector."""
    used = len(list(Path("/proc/self/fd").iterdir()))
    return max(0, open_files - used) // (vectors + 1)
