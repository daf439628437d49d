r"""Messages through shared memory: one sender, one receiver, one ring; the C side is ``guests/src/channel.h``.

Layout of a channel's area, from its offset (a multiple of 64); all words are u32, little endian:

====== ==== ============= =========== =====================================================================
offset word name          writer      meaning
====== ==== ============= =========== =====================================================================
0      0    magic         sender      0x48435649, the bytes ``IVCH``
4      1    version       sender      1
8      2    data_bytes    sender      size of the ring: a power of two, 256 to 2^31
12     3    peer          sender      sender's peer id + 1; 0: it is no peer and is not rung
16     4    head          sender      bytes written since the session began, modulo 2^32, a multiple of 16
20     5    closed        sender      1: nothing more will come
24     6    session       sender      number of this run, not 0, other than the last one; written last
64     0    magic         receiver    as the sender's
68     1    peer          receiver    receiver's peer id + 1
72     2    tail          receiver    bytes read since the session began
76     3    closed        receiver    1: nothing more will be read
80     4    session       receiver    the sender's session that this line belongs to; written last
128    \    ring          sender      the records
====== ==== ============= =========== =====================================================================

A record begins at a multiple of 16: the words ``length``, ``position`` (of this record: the head before it), ``session``
and 0, then the bytes of the message, then padding to 16. A message lies in one piece: when it does not fit before the
ring's end, a record of length 0xFFFFFFFF there says that the next is at the ring's start. So that every message finds a
place in an empty ring, the longest has ``data_bytes / 2 - 16`` bytes.

The rules: a word has one writer. First the record is written, then ``head``, then the doorbell is rung; x86 keeps the order
of stores, and no locked instruction or fence is needed (under Unicorn they are none). The receiver rings back when it has
read all that it knew of, and when it passes a quarter of the ring; so a sender that waits for room is always woken.

The other side may be anybody. All that it wrote is read once, checked, and only then used; the geometry comes from our own
arguments. What a view shows can still change while you look at it: copy it (:meth:`Receiver.receive`) before you judge it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .merge import Merged, MergedChannelError, merge
from .receiver import Receiver
from .ring import (
    HEADER_BYTES,
    SMALLEST_RING_BYTES,
    ChannelClosedError,
    ChannelCorruptError,
    ChannelError,
    ChannelFullError,
)
from .sender import Sender

if TYPE_CHECKING:
    from .peer import Peer

__all__ = [
    "Channel",
    "ChannelClosedError",
    "ChannelCorruptError",
    "ChannelError",
    "ChannelFullError",
    "Merged",
    "MergedChannelError",
    "Receiver",
    "Sender",
    "area_bytes",
    "merge",
]


class Channel:
    """Makes the two ends of a channel."""

    @staticmethod
    def sender(peer: Peer, offset: int, size_bytes: int, *, vector: int = 0, doorbell: bool = True) -> Sender:
        """Begin a channel in a peer's memory, as the one who writes.

        Parameters
        ----------
        peer, offset, size_bytes, vector
            As :class:`Channel`'s.
        doorbell
            Ring the other side, and wait to be rung; False: look every :data:`POLL_S`.
        """
        return Sender(peer.memory, offset, size_bytes, peer=peer if doorbell else None, vector=vector)

    @staticmethod
    def receiver(peer: Peer, offset: int, size_bytes: int, *, vector: int = 0, doorbell: bool = True) -> Receiver:
        """Join a channel in a peer's memory, as the one who reads. It may come before the sender or after."""
        return Receiver(peer.memory, offset, size_bytes, peer=peer if doorbell else None, vector=vector)


def area_bytes(ring_bytes: int) -> int:
    """Return the size of a channel whose ring has at least so many bytes.

    >>> area_bytes(1 << 20) - (1 << 20)
    128
    """
    return HEADER_BYTES + max(SMALLEST_RING_BYTES, 1 << (ring_bytes - 1).bit_length())
