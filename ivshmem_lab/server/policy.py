"""Who may join, and as what.

A client is known by what the kernel says about it when it connects (unix(7), SO_PEERCRED): pid, uid
and primary gid. Nothing that it sends counts.

What each role can do to the others:

* A *peer* has the memory to read and write, rings everybody and is rung.
* An *observer* has the memory read-only, and no eventfd at all: it can ring nobody, and nobody hears
  of it. Its descriptor of the memory was opened anew for reading, so mapping it for writing fails
  (EACCES). Opening it once more for writing through ``/proc/self/fd`` asks the memory's own mode:
  with 0600 it fails for *another uid*. A process of the *same uid* (or root) can always do so: there, the role
  keeps from accidents, not from intent. Real QEMU cannot be an observer; it wants to write.

The socket's mode 0600 lets in nobody but the server's own uid and root. Give it another mode
(`socket_mode`) when the allow list names others.
"""

from __future__ import annotations

import socket
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from ..errors import ServerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Collection

Role: TypeAlias = Literal["peer", "observer"]
ROLES: tuple[Role, ...] = ("peer", "observer")

_UCRED = struct.Struct("3i")


class NotAdmittedError(ServerError):
    """A client may not join; says why."""


class Credentials(NamedTuple):
    """The process at the other end of a socket, at the time when it connected."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Credentials:
        """Ask the kernel (unix(7), SO_PEERCRED)."""
        return cls(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


@dataclass(frozen=True, slots=True)
class Rule:
    """Clients with this uid and this gid (None: any) join as `role`."""

    role: Role
    uid: int | None = None
    gid: int | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UsageError(f"role {self.role!r} is not known; roles are {', '.join(ROLES)}")

    def matches(self, who: Credentials) -> bool:
        """Tell whether the rule is about this client."""
        return self.uid in {None, who.uid} and self.gid in {None, who.gid}


@dataclass(frozen=True, slots=True)
class Admission:
    """How a client joins.

    Attributes
    ----------
    role
        ``"peer"`` or ``"observer"``.
    lease
        Name under which it may come back; None: what it asked for by its socket's name, if anything.
    peer_id
        Id that it is to have; None: the next one.
    shield_qemu
        Whether messages that crash real QEMU are kept from it; None: as the server is set.
    """

    role: Role = "peer"
    lease: str | None = None
    peer_id: int | None = None
    shield_qemu: bool | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one server. The default lets in everybody whom the socket's mode lets in, as a peer.

    Parameters
    ----------
    uids, gids
        The allow list: a client joins when its uid or its gid is listed. None for both: no list.
        The server's own uid must be listed, too.
    peers_per_uid
        Most peers of one uid at a time, those expected back under a lease included; None: no limit.
    rules
        The first one that matches says the role; without one it is ``"peer"``.
    socket_mode
        Mode of the server's socket; connecting needs the right to write.
    """

    uids: Collection[int] | None = None
    gids: Collection[int] | None = None
    peers_per_uid: int | None = None
    rules: tuple[Rule, ...] = field(default=())
    socket_mode: int = 0o600

    def __post_init__(self) -> None:
        if self.peers_per_uid is not None and self.peers_per_uid < 1:
            raise UsageError(f"{self.peers_per_uid} peers per uid are not allowed; at least 1, or None for no limit")

    @property
    def has_observers(self) -> bool:
        """Whether anybody could join as an observer."""
        return any(rule.role == "observer" for rule in self.rules)

    def admit(self, who: Credentials, present: int) -> Role:
        """Decide about a client of whose uid there are `present` peers already; return its role.

        Raises
        ------
        NotAdmittedError
            When it may not join.
        """
        listed = who.uid in (self.uids or ()) or who.gid in (self.gids or ())
        if not listed and (self.uids is not None or self.gids is not None):
            raise NotAdmittedError(
                f"uid {who.uid} (gid {who.gid}, pid {who.pid}) may not join; allowed are {self._allowed()}"
            )
        if self.peers_per_uid is not None and present >= self.peers_per_uid:
            raise NotAdmittedError(f"uid {who.uid} has {present} peers already; {self.peers_per_uid} are allowed")
        return next((rule.role for rule in self.rules if rule.matches(who)), "peer")

    def _allowed(self) -> str:
        lists = {"uids": self.uids, "gids": self.gids}
        return " and ".join(f"{name} {sorted(ids)}" for name, ids in lists.items() if ids is not None)


def check_memory_mode(fd: int) -> None:
    """Refuse memory that an observer could open again for writing.

    Raises
    ------
    UsageError
        When others than its owner may write to it.
    """
    mode = stat.S_IMODE(Path(f"/proc/self/fd/{fd}").stat().st_mode)
    if mode & 0o022:
        raise UsageError(
            f"memory with mode {mode:04o} cannot have observers: they could open it again for writing; "
            "use a memfd of ours, or give it mode 0600"
        )


def is_qemu(pid: int) -> bool:
    """Tell whether a process calls itself QEMU (proc(5), comm)."""
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().startswith(b"qemu")
    except OSError:
        return False
