"""Frames between the host and the agent in a guest; the guest's side is ``guests/linux/agent.h``. Pure.

A frame is four u32 (little endian): magic, type, number of the job, size; then so many bytes, at most 32 KiB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from ..errors import VmError

MAGIC = 0x47414956
MOST_BYTES = 32768
_HEAD = struct.Struct("<IIII")


class FrameType(IntEnum):
    """What a frame is."""

    INPUT = 1
    RUN = 2
    KILL = 3
    HELLO = 16
    OUTPUT = 17
    ERROR = 18
    EXIT = 19
    FAILED = 20


FROM_GUEST = frozenset({FrameType.HELLO, FrameType.OUTPUT, FrameType.ERROR, FrameType.EXIT, FrameType.FAILED})


class AgentProtocolError(VmError):
    """The guest sent what no agent of ours sends."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    type: FrameType
    job: int
    data: bytes = b""

    def to_bytes(self) -> bytes:
        """Return it as it goes over the port."""
        return _HEAD.pack(MAGIC, self.type, self.job, len(self.data)) + self.data


class FrameDecoder:
    """Cuts what arrives into frames.

    Parameters
    ----------
    allowed
        The types that the other side may send.
    """

    def __init__(self, allowed: frozenset[FrameType] = FROM_GUEST) -> None:
        self._allowed = allowed
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Take bytes; return the frames that are complete now.

        Raises
        ------
        AgentProtocolError
            A head cannot be right. Nothing after it can be read.
        """
        self._buffer += data
        frames, at = [], 0
        while len(self._buffer) - at >= _HEAD.size:
            magic, kind, job, size = _HEAD.unpack_from(self._buffer, at)
            if magic != MAGIC or kind not in self._allowed or size > MOST_BYTES:
                raise AgentProtocolError(
                    f"the guest's agent sent no frame but {magic:#x}, {kind}, {job}, {size}; allowed are {MAGIC:#x}, "
                    f"types {', '.join(str(int(each)) for each in sorted(self._allowed))} and at most {MOST_BYTES} bytes"
                )
            if len(self._buffer) - at - _HEAD.size < size:
                break
            start = at + _HEAD.size
            at = start + size
            frames.append(Frame(FrameType(kind), job, bytes(self._buffer[start:at])))
        del self._buffer[:at]
        return frames
