"""Memory backends: the objects that ``-object`` and ``object-add`` make.

Ref: QEMU 7.2 manual, ``-object`` (memory-backend-file, memory-backend-memfd, memory-backend-ram).
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

from ..errors import SharedMemoryError
from ..ipc.memory import SharedMemory
from ..keyval import parse_switch
from ..units import PAGE_BYTES, format_size, parse_size
from .qmp import DEVICE_NOT_FOUND, QmpError

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
    if not kind:
        raise QmpError("Parameter 'qom-type' is missing")
    if kind not in KINDS:
        raise QmpError(f"Parameter 'qom-type' does not accept value '{kind}'; this machine has {', '.join(KINDS)}")
    for name, value in (("id", object_id), ("size", pairs.get("size"))):
        if not value:
            raise QmpError(f"Parameter '{name}' is missing")
    size_bytes = parse_size(pairs.pop("size"), f"size of {object_id}")
    share = parse_switch(pairs.pop("share", "on" if kind == "memory-backend-memfd" else "off"), f"share of {object_id}")
    path = pairs.pop("mem-path", "") if kind == "memory-backend-file" else ""
    if kind == "memory-backend-file" and not path:
        raise QmpError("Parameter 'mem-path' is missing")
    for name in pairs:
        raise QmpError(f"Parameter '{name}' is unexpected; {kind} has no such property")
    if size_bytes == 0:
        raise QmpError(f"property 'size' of {kind} doesn't take value '0'")
    if size_bytes % PAGE_BYTES:
        rounded = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        raise QmpError(f"backing store size {size_bytes:#x} does not match 'size' option {rounded:#x}")
    if kind == "memory-backend-ram":
        return MemoryBackend(kind, object_id, size_bytes, share, anonymous_memory(size_bytes), None)
    if kind == "memory-backend-memfd":
        shared = SharedMemory.create_memfd(size_bytes, object_id)
    else:
        shared = SharedMemory.open_file(path, size_bytes, create=True)
    try:
        present = os.fstat(shared.fd).st_size
        if present < size_bytes:
            raise SharedMemoryError(f"backing store size {present:#x} does not match 'size' option {size_bytes:#x}")
        if share:
            return MemoryBackend(kind, object_id, size_bytes, share, shared.map, shared)
        private = _mapped(shared.fd, size_bytes, access=mmap.ACCESS_COPY)
    except BaseException:
        shared.close()
        raise
    shared.close()
    return MemoryBackend(kind, object_id, size_bytes, share, private, None)


def find_memdev(backends: dict[str, MemoryBackend], name: str | None) -> MemoryBackend:
    """Find a backend that no device uses yet; the texts are QEMU's."""
    if name is None:
        raise QmpError("You must specify a 'memdev'")
    backend = backends.get(name)
    if backend is None:
        raise QmpError(f"Device '{name}' not found", DEVICE_NOT_FOUND)
    if backend.used_by is not None:
        raise QmpError(f"can't use already busy memdev: {name}")
    return backend


def anonymous_memory(size_bytes: int) -> mmap.mmap:
    """Get memory that nobody else sees; a page that was only read costs nothing.

    Raises
    ------
    SharedMemoryError
        When the kernel refuses.
    """
    return _mapped(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _mapped(fd: int, size_bytes: int, **how: int) -> mmap.mmap:
    try:
        return mmap.mmap(fd, size_bytes, **how)
    except (OSError, OverflowError, ValueError) as error:
        raise SharedMemoryError(f"cannot set up guest memory of {format_size(size_bytes)}: {error}") from error
