"""The server's end of the ivshmem protocol, version 0, as a state machine without sockets.

Source: QEMU docs/specs/ivshmem-spec, "Client-Server protocol"; the order is that of QEMU's contrib
server, and what real QEMU cannot bear was measured with 7.2.

1. A newcomer hears: the version; its id; -1 with the memory. Then the others hear of the newcomer:
   its id once per vector, each with a descriptor. Then the newcomer hears of every peer that was
   there, in the order they joined, in the same way; its own vectors come last.
2. When a peer leaves, every other hears its id without a descriptor: once, and only those that
   were told of it. A peer without vectors was never announced, so nobody hears that it left.
   (A second or unfounded goodbye makes QEMU free memory twice.)
3. Ids count up from 0 and start again after 65535, then passing over those in use. (QEMU confuses
   an id that comes back with its former holder, so ids stay unused as long as possible.)
4. A shielded peer (real QEMU, which crashes at hot-unplug after any goodbye) hears no goodbye at
   all. It remembers every id that it was told of as long as it is connected, and no such id is
   given to anybody else meanwhile. It remembers at most :data:`MOST_REMEMBERED`; beyond that it is
   not told of newcomers.
5. An absent peer is one that is expected back: nobody hears that it went or came back, and
   newcomers are told of it. Its id comes back with the same descriptors, or not at all.
6. An observer hears version, id and memory only, and nobody hears of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Generic, TypeVar

from ..errors import LocalProtocolError
from .messages import MAX_PEER_ID, MAX_VECTORS, MEMORY, PROTOCOL_VERSION, F

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

M = TypeVar("M")
"""A message as the caller makes it, for example :class:`~ivshmem_lab.wire.messages.Message`."""

MOST_REMEMBERED = 4096
"""Ids that a shielded peer is told of before newcomers are kept from it."""


@dataclass(frozen=True, slots=True)
class Posting(Generic[M]):
    """The same messages, in this order, for each of the recipients. Postings are to be sent in order."""

    recipients: Sequence[int]
    messages: Sequence[M]


@dataclass(frozen=True, slots=True)
class Step(Generic[M]):
    """What follows from one thing that happened.

    Attributes
    ----------
    postings
        What to send.
    withheld
        The shielded peers that are not told of it.
    void
        Announcements of somebody who is gone. A receiver to whom none of them went yet need hear neither
        them nor the goodbye.
    """

    postings: list[Posting[M]] = field(default_factory=list)
    withheld: list[int] = field(default_factory=list)
    void: list[M] = field(default_factory=list)


class ServerProtocol(Generic[F, M]):
    """Who is connected, and what must be said to whom.

    Parameters
    ----------
    message
        Makes a message of a number and a descriptor (or None). Called once per peer and vector, not
        once per receiver.
    memory
        The message that announces the shared memory; see :data:`~ivshmem_lab.wire.messages.MEMORY`.
    first_id
        The id that the first peer gets.
    """

    def __init__(self, message: Callable[[int, F | None], M], memory: F, first_id: int = 0) -> None:
        if not 0 <= first_id <= MAX_PEER_ID:
            raise LocalProtocolError(f"first peer id {first_id} is not allowed; 0 to {MAX_PEER_ID}")
        self._message = message
        self._version = message(PROTOCOL_VERSION, None)
        self._memory = message(MEMORY, memory)
        self._next_id = first_id
        self._introductions: dict[int, list[M]] = {}  # of each peer, in the order they joined; the absent too
        self._absent: set[int] = set()
        self._observers: set[int] = set()
        self._remembered: dict[int, set[int]] = {}  # by each shielded peer that is connected

    @property
    def peers(self) -> dict[int, int]:
        """Connected peers in the order they joined: id and number of vectors. Observers have none."""
        present = {
            peer_id: len(messages) for peer_id, messages in self._introductions.items() if peer_id not in self._absent
        }
        return present | dict.fromkeys(self._observers, 0)

    @property
    def next_id(self) -> int:
        """Where the search for the next newcomer's id begins."""
        return self._next_id

    def join(self, fds: Sequence[F], *, peer_id: int | None = None, shielded: bool = False) -> tuple[int, Step[M]]:
        """Let a peer in.

        Parameters
        ----------
        fds
            The descriptors of its vectors, from vector 0 up; may be empty.
        peer_id
            The id that it is to have; None for the next one.
        shielded
            Whether rule 4 holds for it.

        Returns
        -------
        tuple
            Its id, and what to send.

        Raises
        ------
        LocalProtocolError
            When there is no free id, the id asked for is not free, or it has more vectors than the
            doorbell can name.
        """
        if len(fds) > MAX_VECTORS:
            raise LocalProtocolError(f"{len(fds)} vectors for one peer are too many; the doorbell knows {MAX_VECTORS}")
        peer_id = self._unused_id() if peer_id is None else self._free(peer_id)
        own = [self._message(peer_id, fd) for fd in fds]
        told, withheld = self._who_is_told(peer_id) if own else ([], [])
        step = Step(self._introduce(peer_id, own, told), withheld)
        if shielded:
            self._remembered[peer_id] = {each for each, messages in self._introductions.items() if messages}
        return peer_id, step

    def observe(self, memory: F) -> tuple[int, Step[M]]:
        """Let an observer in (rule 6); `memory` is the descriptor that it gets.

        Raises
        ------
        LocalProtocolError
            When there is no free id.
        """
        peer_id = self._unused_id()
        self._observers.add(peer_id)
        hello = [self._version, self._message(peer_id, None), self._message(MEMORY, memory)]
        return peer_id, Step([Posting((peer_id,), hello)])

    def leave(self, peer_id: int) -> Step[M]:
        """Let a peer, an absent one or an observer go; say what to send to the others.

        Raises
        ------
        LocalProtocolError
            When there is no such peer.
        """
        if peer_id in self._observers:
            self._observers.discard(peer_id)
            return Step()
        introduction = self._introductions.pop(peer_id, None)
        if introduction is None:
            raise LocalProtocolError(f"peer {peer_id} is not connected; connected are {sorted(self._introductions)}")
        self._absent.discard(peer_id)
        self._remembered.pop(peer_id, None)
        if not introduction:
            return Step()
        others = self._connected_but(self._remembered)
        withheld = [each for each, known in self._remembered.items() if peer_id in known]
        goodbye = [Posting(others, [self._message(peer_id, None)])] if others else []
        return Step(goodbye, withheld, introduction)

    def expect_back(self, peer_id: int) -> None:
        """Note that a peer's connection is gone and that it may come back (rule 5)."""
        if peer_id not in self._introductions:
            raise LocalProtocolError(f"peer {peer_id} is not connected; connected are {sorted(self._introductions)}")
        self._absent.add(peer_id)
        self._remembered.pop(peer_id, None)

    def restore(self, peer_id: int, fds: Sequence[F]) -> None:
        """Take over an absent peer of an earlier server, with its descriptors."""
        self._introductions[self._free(peer_id)] = [self._message(peer_id, fd) for fd in fds]
        self._absent.add(peer_id)

    def come_back(self, peer_id: int, *, shielded: bool = False) -> Step[M]:
        """Introduce an absent peer that is there again to everybody who is there; they hear nothing.

        Raises
        ------
        LocalProtocolError
            When no such peer is absent.
        """
        if peer_id not in self._absent:
            raise LocalProtocolError(f"peer {peer_id} is not absent; absent are {sorted(self._absent)}")
        self._absent.discard(peer_id)
        if shielded:
            self._remembered[peer_id] = {each for each, messages in self._introductions.items() if messages}
        return Step(self._introduce(peer_id, self._introductions[peer_id], []))

    def _introduce(self, peer_id: int, own: list[M], told: Sequence[int]) -> list[Posting[M]]:
        newcomer = (peer_id,)
        postings = [Posting(newcomer, [self._version, self._message(peer_id, None), self._memory])]
        if told:
            postings.append(Posting(told, own))
        known = self._introductions
        if peer_id in known:  # it comes back
            known = {each: messages for each, messages in known.items() if each != peer_id}
        postings.append(Posting(newcomer, [*chain.from_iterable(known.values()), *own]))
        self._introductions.setdefault(peer_id, own)
        return postings

    def _who_is_told(self, peer_id: int) -> tuple[list[int], list[int]]:
        """Who hears of a newcomer, and who is shielded and would have to remember too many."""
        withheld = [each for each, known in self._remembered.items() if len(known) >= MOST_REMEMBERED]
        for each, known in self._remembered.items():
            if each not in withheld:
                known.add(peer_id)
        return self._connected_but(withheld), withheld

    def _connected_but(self, others: Collection[int]) -> list[int]:
        if not self._absent and not others:
            return list(self._introductions)  # a crowd's joining comes here once for each
        return [each for each in self._introductions if each not in self._absent and each not in others]

    def _free(self, peer_id: int) -> int:
        if not 0 <= peer_id <= MAX_PEER_ID:
            raise LocalProtocolError(f"peer id {peer_id} is not allowed; 0 to {MAX_PEER_ID}")
        if self._is_taken(peer_id):
            raise LocalProtocolError(f"peer id {peer_id} is taken, or somebody remembers its last holder")
        return peer_id

    def _is_taken(self, peer_id: int) -> bool:
        return (
            peer_id in self._introductions
            or peer_id in self._observers
            or any(peer_id in known for known in self._remembered.values())
        )

    def _unused_id(self) -> int:
        ids: Iterable[int] = chain(range(self._next_id, MAX_PEER_ID + 1), range(self._next_id))
        for peer_id in ids:
            if not self._is_taken(peer_id):
                self._next_id = (peer_id + 1) & MAX_PEER_ID
                return peer_id
        raise LocalProtocolError(f"all {MAX_PEER_ID + 1} peer ids are taken; a peer must leave before another can join")
