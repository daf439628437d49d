"""Many small messages, each with a descriptor of its own, in one system call (sendmmsg(2)).

Two descriptors in one message would save more, but QEMU loses all but the first (measured, 7.2), so
every message keeps a header of its own. A :class:`Parcel` is prepared once and can be sent to
any number of sockets; a :class:`ParcelQueue` keeps many ready. Measured on Linux 6.18, per message and in C: 1.36 us
of CPU in batches, against 1.9 us one by one.
"""

from __future__ import annotations

import array
import ctypes
import os
import socket
import struct
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_IOVEC = struct.Struct("@PN")
_CMSG = struct.Struct("@Niii")  # struct cmsghdr and one descriptor: CMSG_LEN(4) bytes
_MMSGHDR = struct.Struct("@PIPNPNi0PI0P")  # struct msghdr, then how much of it was sent
_CONTROL_BYTES = socket.CMSG_SPACE(4)
_CONTROL_LENGTH = socket.CMSG_LEN(4)
_FIXED_BYTES = _CONTROL_BYTES + _IOVEC.size
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

HEADER_BYTES = _MMSGHDR.size
"""Size of one ``struct mmsghdr``."""

_sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg
_sendmmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int]


_header = attrgetter("header")


class Parcel:
    """One message ready for the kernel: bytes, and at most one descriptor, which must stay open as long as this.

    Attributes
    ----------
    data
        The bytes.
    header
        The ``struct mmsghdr`` that points to them.
    """

    __slots__ = ("_fd", "_memory", "data", "header")

    def __init__(self, data: bytes, fd: int | None = None) -> None:
        self.data = data
        self._fd = fd
        # control first: it needs the strictest alignment, which an allocation has
        self._memory = memory = bytearray(_FIXED_BYTES + len(data))
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))  # stays: it is never resized
        if fd is not None:
            _CMSG.pack_into(memory, 0, _CONTROL_LENGTH, socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)
        _IOVEC.pack_into(memory, _CONTROL_BYTES, base + _FIXED_BYTES, len(data))
        memory[_FIXED_BYTES:] = data
        control_at, control_bytes = (0, 0) if fd is None else (base, _CONTROL_BYTES)
        self.header = _MMSGHDR.pack(0, 0, base + _CONTROL_BYTES, 1, control_at, control_bytes, 0, 0)

    def send(self, sock: socket.socket) -> int:
        """Send it alone; return how many of its bytes went."""
        rights = [] if self._fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self._fd]))]
        return sock.sendmsg([self.data], rights)


class ParcelQueue:
    """Parcels in a row with their headers side by side, so that one system call takes as many as the socket does.

    Nothing is done per parcel in Python: filling, sending and forgetting go in one piece.

    Attributes
    ----------
    parcels
        What is in it, in order.
    """

    __slots__ = ("_headers", "parcels")

    def __init__(self) -> None:
        self.parcels: list[Parcel] = []
        self._headers = bytearray()

    def __len__(self) -> int:
        return len(self.parcels)

    def put(self, parcels: Sequence[Parcel]) -> None:
        """Append parcels."""
        self.parcels += parcels
        self._headers += b"".join(map(_header, parcels))

    def put_rest(self, other: ParcelQueue, start: int) -> None:
        """Append what another one holds from an index on."""
        self.parcels += other.parcels[start:]
        self._headers += memoryview(other._headers)[start * HEADER_BYTES :]

    def find(self, block: Sequence[Parcel]) -> tuple[int, int]:
        """Return where a row of parcels lies that was put in as one: start and stop, equal when it is not there.

        Its first parcels may have been forgotten already.
        """
        try:
            stop = self.parcels.index(block[-1]) + 1
        except ValueError:
            return 0, 0
        return max(0, stop - len(block)), stop

    def forget(self, start: int, stop: int) -> None:
        """Take parcels out."""
        del self.parcels[start:stop]
        del self._headers[start * HEADER_BYTES : stop * HEADER_BYTES]

    def send(self, fileno: int, start: int, most: int) -> int:
        """Send parcels from an index on, at least one; they stay in the queue.

        Parameters
        ----------
        fileno
            A non-blocking stream socket.
        start
            Index of the first.
        most
            How many at most; the kernel takes no more than 1024 at once (sendmmsg(2)).

        Returns
        -------
        int
            How many went, at least 1. The kernel takes small ones (8 bytes) whole or not at all.

        Raises
        ------
        OSError
            What kept the first from going; ``BlockingIOError`` when the socket is full.
        """
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._headers, start * HEADER_BYTES))
        sent: int = _sendmmsg(fileno, first, min(len(self.parcels) - start, most), _SEND_FLAGS)
        if sent < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return sent
