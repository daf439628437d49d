"""Memory backends: the objects that ``-object`` and ``object-add`` make.

Ref: QEMU 7.2 manual, ``-object`` (memory-backend-file, memory-backend-memfd, memory-backend-ram).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from ..errors import SharedMemoryError
from ..ipc.memory import SharedMemory
from ..units import PAGE_BYTES, parse_size
from .options import parse_switch
from .qmp import QmpError

KINDS = ("memory-backend-file", "memory-backend-memfd", "memory-backend-ram")


@dataclass(slots=True)
class MemoryBackend:
    """A piece of memory that one device can use.

    Attributes
    ----------
    qom_type
        Its kind.
    object_id
        Its id.
    share
        Whether others can see what a guest writes.
    map
        The memory.
    used_by
        Id of the device that holds it.
    """

    qom_type: str
    object_id: str
    size_bytes: int
    share: bool
    map: mmap.mmap
    shared: SharedMemory | None
    used_by: str | None = None

    def close(self) -> None:
        """Let go of the memory; a file stays where it is."""
        if self.shared is not None:
            self.shared.close()
        else:
            self.map.close()


def open_backend(properties: dict[str, str]) -> MemoryBackend:
    """Make a memory backend from ``-object`` properties (with ``qom-type`` and ``id``).

    Raises
    ------
    QmpError
        When a property is missing, unknown or wrong. Where QEMU has words for it, they are QEMU's.
    UsageError, SharedMemoryError
        When a size cannot be read, or the memory cannot be had.
    """
    pairs = dict(properties)
    kind, object_id = pairs.pop("qom-type", ""), pairs.pop("id", "")
    if kind not in KINDS:
        raise QmpError(f"Parameter 'qom-type' does not accept value '{kind}'; this machine has {', '.join(KINDS)}")
    if not object_id:
        raise QmpError("Parameter 'id' is missing")
    if "size" not in pairs:
        raise QmpError("can't create backend with size 0")
    size_bytes = parse_size(pairs.pop("size"), f"size of {object_id}")
    share = parse_switch(pairs.pop("share", "on" if kind == "memory-backend-memfd" else "off"), f"share of {object_id}")
    path = pairs.pop("mem-path", "") if kind == "memory-backend-file" else ""
    if kind == "memory-backend-file" and not path:
        raise QmpError("mem-path property not set")
    for name in pairs:
        raise QmpError(f"Property '{kind}.{name}' not found")
    if size_bytes == 0:
        raise QmpError("can't create backend with size 0")
    if size_bytes % PAGE_BYTES:
        rounded = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        raise QmpError(f"backing store size {size_bytes:#x} does not match 'size' option {rounded:#x}")
    if kind == "memory-backend-ram":
        return MemoryBackend(kind, object_id, size_bytes, share, mmap.mmap(-1, size_bytes), None)
    if kind == "memory-backend-memfd":
        shared = SharedMemory.create_memfd(size_bytes, object_id)
    else:
        shared = SharedMemory.open_file(path, size_bytes, create=True)
        present = os.fstat(shared.fd).st_size
        if present != size_bytes:
            shared.close()
            raise SharedMemoryError(f"backing store size {present:#x} does not match 'size' option {size_bytes:#x}")
        if not share:
            private = mmap.mmap(shared.fd, size_bytes, access=mmap.ACCESS_COPY)
            shared.close()
            return MemoryBackend(kind, object_id, size_bytes, share, private, None)
    return MemoryBackend(kind, object_id, size_bytes, share, shared.map, shared)
