"""Writing an initramfs: the "newc" form of a cpio archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

Pure: names and bytes go in, bytes come out, the same for the same input (no times, no owners but root).
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from ...errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TRAILER = "TRAILER!!!"


class Archive:
    r"""An initramfs in the making. Folders above a file are made as needed.

    Examples
    --------
    >>> archive = Archive()
    >>> archive.file("init", b"#!/bin/sh\\n", executable=True)
    >>> archive.symlink("bin/sh", "busybox")
    >>> [name for name, _, _ in archive.entries()]
    ['init', 'bin', 'bin/sh']
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}

    def directory(self, path: str) -> None:
        """Add a folder, and those above it."""
        for parent in _parents(path + "/x"):
            self._entries.setdefault(parent, (stat.S_IFDIR | 0o755, b""))

    def file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """Add a file.

        Raises
        ------
        UsageError
            The path is not relative, or is there already.
        """
        self._add(path, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link; raises as :meth:`file`."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def entries(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield name, mode and content of everything, in order: a folder before what is in it."""
        for name, (mode, content) in self._entries.items():
            yield name, mode, content

    def to_bytes(self) -> bytes:
        """Return the archive, padded to 512 bytes."""
        parts = [_entry(inode, name, mode, content) for inode, (name, mode, content) in enumerate(self.entries(), 1)]
        whole = b"".join([*parts, _entry(0, _TRAILER, 0, b"")])
        return whole + bytes(-len(whole) % 512)

    def _add(self, path: str, mode: int, content: bytes) -> None:
        if not path or path.startswith("/") or ".." in path.split("/") or path in self._entries:
            raise UsageError(f"path {path!r} is not allowed in an archive: relative, without '..', once")
        for parent in _parents(path):
            self._entries.setdefault(parent, (stat.S_IFDIR | 0o755, b""))
        self._entries[path] = (mode, content)


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _entry(inode: int, name: str, mode: int, content: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # magic, then inode, mode, uid, gid, links, time, size, device of it (2), device that it is (2), name's size, checksum
    numbers = (inode, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers) + encoded
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
