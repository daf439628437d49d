"""Shared memory: a memfd, a named POSIX object, a file, or a file descriptor that somebody passed.

A region is mapped once per object, readable and writable (an observer's readable only). Arrays handed out keep the mapping
alive after :meth:`SharedMemory.close`, so closing never pulls memory from under a reader.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import posix_ipc

from ..errors import SharedMemoryError, UsageError
from ..units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import DTypeLike, NDArray

_MODE = 0o600
_SHM_DIR = Path("/dev/shm")  # where Linux keeps POSIX objects (shm_overview(7))


class SharedMemory:
    """One region of shared memory. Made by one of the class methods.

    Attributes
    ----------
    fd
        The file descriptor, close-on-exec; -1 after :meth:`close`.
    size_bytes
        Size of the region.
    kind
        ``"memfd"``, ``"posix"``, ``"file"`` or ``"fd"`` (passed by somebody else).
    name
        POSIX name without its slash, path of the file, label of the memfd, or None.
    writable
        Whether the mapping can be written; only :meth:`from_fd` makes one that cannot.
    """

    def __init__(self, fd: int, size_bytes: int, kind: str, name: str | None, *, writable: bool = True) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.kind = kind
        self.name = name
        self.writable = writable
        self._identity = _identity(os.fstat(fd))
        self._map: mmap.mmap | None = None

    @classmethod
    def create_memfd(cls, size_bytes: int, name: str = "ivshmem") -> Self:
        """Make nameless memory that nobody can resize and only this user can reopen.

        Sealed against shrinking and growing (memfd_create(2)), so that no peer can turn another's access
        into SIGBUS, or the size into one that no BAR can show. Not limited by the size of ``/dev/shm``.

        Raises
        ------
        UsageError
            When the size is not positive, or the label is no label.
        SharedMemoryError
            When the kernel refuses.
        """
        _check_size(size_bytes)
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (OSError, ValueError) as error:
            raise SharedMemoryError(f"cannot make a memfd named {name!r}: {error}") from error
        with _closing_on_error(fd):
            try:
                os.ftruncate(fd, size_bytes)
                os.fchmod(fd, _MODE)
                # Neither its size nor its seals change any more: a peer could make it unusable for newcomers.
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            except (OSError, OverflowError) as error:
                raise SharedMemoryError(f"cannot make a memfd of {format_size(size_bytes)}: {error}") from error
            return cls(fd, size_bytes, "memfd", name)

    @classmethod
    def create_posix(cls, name: str, size_bytes: int) -> Self:
        """Make a named POSIX object; one that exists is refused, never resized.

        The space is taken at once: on a full ``/dev/shm`` the failure comes here and not
        as SIGBUS in a guest.

        Raises
        ------
        UsageError
            When the size or the name is not allowed.
        SharedMemoryError
            When the name exists or the space is missing.
        """
        _check_size(size_bytes)
        bare = _check_name(name)
        try:
            fd = posix_ipc.SharedMemory(f"/{bare}", flags=posix_ipc.O_CREX, mode=_MODE).fd
        except posix_ipc.ExistentialError as error:
            raise SharedMemoryError(
                f"shared memory {bare!r} exists already, maybe in use; choose another name, "
                f"or remove it with: rm {_SHM_DIR / bare}"
            ) from error
        except (OSError, posix_ipc.Error) as error:
            raise SharedMemoryError(f"cannot make shared memory {bare!r}: {error}") from error
        try:
            with _closing_on_error(fd):
                os.fchmod(fd, _MODE)
                _reserve(fd, size_bytes, f"shared memory {bare!r}", "use a memfd or a smaller size")
                return cls(fd, size_bytes, "posix", bare)
        except BaseException:
            posix_ipc.unlink_shared_memory(f"/{bare}")
            raise

    @classmethod
    def open_posix(cls, name: str) -> Self:
        """Open a named POSIX object that exists, with the size it has.

        Raises
        ------
        UsageError
            When the name is not allowed.
        SharedMemoryError
            When it does not exist, may not be written or is empty.
        """
        bare = _check_name(name)
        try:
            fd = posix_ipc.SharedMemory(f"/{bare}").fd
        except posix_ipc.ExistentialError as error:
            raise SharedMemoryError(f"there is no shared memory {bare!r}; look into {_SHM_DIR}") from error
        except (OSError, posix_ipc.Error) as error:
            raise SharedMemoryError(f"cannot open shared memory {bare!r}: {error}") from error
        with _closing_on_error(fd):
            return cls(fd, _size_of(fd, f"shared memory {bare!r}"), "posix", bare)

    @classmethod
    def open_file(cls, path: str | os.PathLike[str], size_bytes: int | None = None, *, create: bool = False) -> Self:
        """Open a file as memory.

        Parameters
        ----------
        path
            The file.
        size_bytes
            How much of it; None for all. A file that is smaller is refused.
        create
            Make the file (mode 0600) when it is missing, and give an empty one its size, as
            QEMU's memory-backend-file does; needs `size_bytes`.

        Raises
        ------
        UsageError
            When the size is not positive, or missing with `create`.
        SharedMemoryError
            When the file cannot be opened or is too small, or the space is missing.
        """
        shown = os.fspath(path)
        if size_bytes is not None:
            _check_size(size_bytes)
        elif create:
            raise UsageError(f"no size for the file {shown!r} that is to be made; say how large it shall be")
        fd, made = _open_file(shown, create=create)
        try:
            with _closing_on_error(fd):
                if create and size_bytes is not None and os.fstat(fd).st_size == 0:
                    _reserve(fd, size_bytes, f"file {shown!r}", "use a memfd, another place or a smaller size")
                wanted = _part_of(fd, size_bytes, f"file {shown!r}")
                return cls(fd, wanted, "file", str(Path(shown).absolute()))
        except BaseException:
            if made:
                Path(shown).unlink(missing_ok=True)
            raise

    @classmethod
    def from_fd(cls, fd: int, *, read_only_too: bool = False) -> Self:
        """Take a file descriptor that somebody passed; its size comes from fstat(2).

        The descriptor belongs to the new object, and is closed when it cannot be used.

        Parameters
        ----------
        fd
            The descriptor.
        read_only_too
            Map one that is open for reading only (an observer's) read-only, instead of failing to map it.

        Raises
        ------
        SharedMemoryError
            When it is not memory of at least one byte.
        """
        with _closing_on_error(fd):
            size_bytes = _size_of(fd, f"file descriptor {fd}")
            observes = read_only_too and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            return cls(fd, size_bytes, "fd", None, writable=not observes)

    @property
    def map(self) -> mmap.mmap:
        """The mapping, made when it is first asked for.

        Raises
        ------
        SharedMemoryError
            When the region is closed or the kernel refuses (read-only descriptor, no address space).
        """
        if self._map is None:
            if self.fd < 0:
                raise SharedMemoryError("this shared memory is closed; map it before close()")
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
            try:
                self._map = mmap.mmap(self.fd, self.size_bytes, mmap.MAP_SHARED, protection)
            except (OSError, ValueError, OverflowError) as error:
                raise SharedMemoryError(
                    f"cannot map {format_size(self.size_bytes)} of {self.kind} memory for reading{' and writing' * self.writable}: {error}"
                ) from error
        return self._map

    @overload
    def array(self) -> NDArray[np.uint8]: ...
    @overload
    def array(self, dtype: DTypeLike) -> NDArray[Any]: ...
    def array(self, dtype: DTypeLike = "u1") -> NDArray[Any]:
        """Return the whole region as a one-dimensional array that shares the memory.

        Parameters
        ----------
        dtype
            Type of one element; the shape is ``(size_bytes // itemsize,)``.
        """
        import numpy as np  # a server needs no arrays, and starts faster without

        element = np.dtype(dtype)
        return np.frombuffer(self.map, dtype=element, count=self.size_bytes // element.itemsize)

    def close(self) -> None:
        """Close the descriptor, and the mapping unless an array still shows it. May be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # arrays hold it: it goes with the last of them
                mapping.close()

    def unlink(self) -> None:
        """Remove the name of a POSIX object or file, if it still means this region. Others have no name."""
        if self.name is None or self.kind not in {"posix", "file"}:
            return
        path = _SHM_DIR / self.name if self.kind == "posix" else Path(self.name)
        with contextlib.suppress(FileNotFoundError, posix_ipc.ExistentialError):
            if _identity(path.stat()) != self._identity:
                return
            if self.kind == "posix":
                posix_ipc.unlink_shared_memory(f"/{self.name}")
            else:
                path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"fd {self.fd}" if self.fd >= 0 else "closed"
        name = f" {self.name!r}" if self.name else ""
        return f"<SharedMemory {self.kind}{name}: {format_size(self.size_bytes)}, {state}>"


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _closing_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def _check_size(size_bytes: int) -> None:
    if size_bytes <= 0:
        raise UsageError(f"size {size_bytes} is not allowed for shared memory; at least 1 byte")


def _check_name(name: str) -> str:
    """Return the name of a POSIX object without its leading slash (shm_open(3))."""
    bare = name.removeprefix("/")
    if not bare or bare in {".", ".."} or "/" in bare or "\0" in bare or len(os.fsencode(bare)) > 255:
        raise UsageError(
            f"shared memory name {name!r} is not allowed; 1 to 255 bytes without a slash after the first, such as 'ivshmem'"
        )
    return bare


def _size_of(fd: int, what: str) -> int:
    try:
        size_bytes = os.fstat(fd).st_size
    except OSError as error:
        raise SharedMemoryError(f"cannot tell the size of {what}: {error}") from error
    if size_bytes <= 0:
        raise SharedMemoryError(f"{what} has size {size_bytes}; shared memory has at least 1 byte")
    return size_bytes


def _part_of(fd: int, size_bytes: int | None, what: str) -> int:
    """Return how much is to be used; None means all of it."""
    present = _size_of(fd, what)
    if size_bytes is not None and size_bytes > present:
        raise SharedMemoryError(
            f"{what} holds {format_size(present)}, less than the {format_size(size_bytes)} asked for; "
            "ask for less or use another file"
        )
    return present if size_bytes is None else size_bytes


def _open_file(path: str, *, create: bool) -> tuple[int, bool]:
    """Open for reading and writing; the flag says whether the file was made here."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                return os.open(path, flags | os.O_CREAT | os.O_EXCL, _MODE), True
        return os.open(path, flags), False
    except (OSError, ValueError) as error:
        raise SharedMemoryError(f"cannot open the file {path!r} as memory: {error}") from error


def _reserve(fd: int, size_bytes: int, what: str, remedy: str) -> None:
    """Give an empty object its size and its space."""
    status = os.fstatvfs(fd)
    free_bytes = status.f_bavail * status.f_frsize
    short = f"{what} of {format_size(size_bytes)} does not fit: {format_size(free_bytes)} free; {remedy}"
    if status.f_blocks and size_bytes > free_bytes:  # f_blocks 0: a tmpfs without a limit
        raise SharedMemoryError(short)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise SharedMemoryError(short) from error
        raise SharedMemoryError(f"cannot give {what} its {format_size(size_bytes)}: {error}") from error
