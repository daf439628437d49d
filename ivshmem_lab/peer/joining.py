"""How a peer gets in, the first time and again, step by step and without waiting."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..errors import IvshmemLabError, PeerError
from .link import Link

if TYPE_CHECKING:
    import select

QUIET_S = 0.1
"""A server that says nothing for so long has finished the introduction.

The protocol does not say where it ends, nor how many vectors a peer has. Own vectors come last, and
all peers have equally many with QEMU's server (measured, 7.2) and with ours: when another peer is
there, its vectors tell the number and nothing is waited for.
"""

RETRY_S = 0.1
"""How often a server that is gone is looked for."""

_ALONE_QUIET_S = 0.02  # the same, once a first own vector is there: a server sends them in one go
_CONNECT_S = 0.01  # connecting again waits no longer than this for a backlog that is full
_GIVE_UP_S = 5.0  # for a server that accepts and does not introduce us


class Introduction:
    """Watches a new link until it has said all that it will say.

    Attributes
    ----------
    due
        When to look again (:func:`time.monotonic`) if the server says nothing; None while something is missing.
    """

    def __init__(self, link: Link) -> None:
        self.due: float | None = None
        self._link = link
        self._heard = -1

    def complete(self) -> bool:
        """Read what has come; tell whether that was all. Raises as :meth:`Link.read`."""
        link = self._link
        link.read()
        if link.missing:
            return False
        own, others = len(link.own), max(link.others.values(), default=0)
        if link.gone or 0 < own == others:
            return True
        now = time.monotonic()
        if link.heard != self._heard or self.due is None:
            self._heard = link.heard
            self.due = now + (_ALONE_QUIET_S if own and not others else QUIET_S)
        return now >= self.due


class Rejoining:
    """Looks for a server that is gone, and joins it when it is back.

    Attributes
    ----------
    due
        When to look again (:func:`time.monotonic`).
    """

    def __init__(self, path: str, news: select.epoll, lease: str | None) -> None:
        self.due = 0.0
        self._path = path
        self._lease = lease
        self._news = news
        self._link: Link | None = None
        self._introduction: Introduction | None = None
        self._give_up = 0.0

    def advance(self) -> Link | None:
        """Do what can be done now; return the new link once it is introduced. It then belongs to the caller."""
        now = time.monotonic()
        try:
            if self._link is None:
                if now < self.due:
                    return None
                self._link = Link.connect(self._path, _CONNECT_S, self._news, self._lease)
                self._introduction = Introduction(self._link)
                self._give_up = now + _GIVE_UP_S
            assert self._introduction is not None
            if self._introduction.complete():
                if self._link.gone:
                    raise PeerError("it went away again")
                link, self._link = self._link, None
                return link
            if now >= self._give_up:
                raise PeerError("it did not introduce us")
            self.due = self._introduction.due or self._give_up
        except IvshmemLabError:  # not there yet, or no good server: the next may be
            self.close()
            self.due = time.monotonic() + RETRY_S
        return None

    def close(self) -> None:
        """Give up."""
        if self._link is not None:
            self._link.close()
            self._link = None
