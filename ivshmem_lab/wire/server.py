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
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from ..errors import LocalProtocolError
from .messages import MAX_PEER_ID, MAX_VECTORS, MEMORY, PROTOCOL_VERSION, F, Message

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Outgoing(Generic[F]):
    """A message and who is to get it. Messages for one recipient are to be sent in order."""

    recipient: int
    message: Message[F]


class ServerProtocol(Generic[F]):
    """Who is connected, and what must be said to whom.

    Parameters
    ----------
    memory
        Descriptor of the shared memory.
    first_id
        The id that the first peer gets.
    """

    def __init__(self, memory: F, first_id: int = 0) -> None:
        if not 0 <= first_id <= MAX_PEER_ID:
            raise LocalProtocolError(f"first peer id {first_id} is not allowed; 0 to {MAX_PEER_ID}")
        self._memory = memory
        self._next_id = first_id
        self._introductions: dict[int, list[Message[F]]] = {}  # of each peer, in the order they joined

    @property
    def peers(self) -> dict[int, int]:
        """Connected peers in the order they joined: id and number of vectors."""
        return {peer_id: len(messages) for peer_id, messages in self._introductions.items()}

    def join(self, fds: Sequence[F]) -> tuple[int, list[Outgoing[F]]]:
        """Let a peer in.

        Parameters
        ----------
        fds
            The descriptors of its vectors, from vector 0 up; may be empty.

        Returns
        -------
        tuple
            Its id, and what to send.

        Raises
        ------
        LocalProtocolError
            When all 65536 ids are taken, or it has more vectors than the doorbell can name.
        """
        if len(fds) > MAX_VECTORS:
            raise LocalProtocolError(f"{len(fds)} vectors for one peer are too many; the doorbell knows {MAX_VECTORS}")
        peer_id = self._unused_id()
        own = [Message(peer_id, fd) for fd in fds]
        hello: list[Message[F]] = [Message(PROTOCOL_VERSION), Message(peer_id), Message(MEMORY, self._memory)]
        outgoing = [Outgoing(peer_id, message) for message in hello]
        outgoing += [Outgoing(other, message) for other in self._introductions for message in own]
        outgoing += [Outgoing(peer_id, message) for messages in self._introductions.values() for message in messages]
        outgoing += [Outgoing(peer_id, message) for message in own]
        self._introductions[peer_id] = own
        return peer_id, outgoing

    def leave(self, peer_id: int) -> list[Outgoing[F]]:
        """Let a peer go; say what to send to the others.

        Raises
        ------
        LocalProtocolError
            When no such peer is connected.
        """
        introduction = self._introductions.pop(peer_id, None)
        if introduction is None:
            raise LocalProtocolError(f"peer {peer_id} is not connected; connected are {sorted(self._introductions)}")
        goodbye: Message[F] = Message(peer_id)
        return [Outgoing(other, goodbye) for other in self._introductions] if introduction else []

    def _unused_id(self) -> int:
        if len(self._introductions) > MAX_PEER_ID:
            raise LocalProtocolError(
                f"all {MAX_PEER_ID + 1} peer ids are taken; a peer must leave before another can join"
            )
        peer_id = self._next_id
        while peer_id in self._introductions:
            peer_id = (peer_id + 1) & MAX_PEER_ID
        self._next_id = (peer_id + 1) & MAX_PEER_ID
        return peer_id
