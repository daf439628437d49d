"""Shared memory: what is shared, what is refused, what is left behind."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ivshmem_lab.errors import SharedMemoryError, UsageError
from ivshmem_lab.ipc.eventfd import EventFd
from ivshmem_lab.ipc.memory import SharedMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python 3.11 has no name for it
SIZE = 1 << 16


@pytest.fixture
def posix_name() -> Iterator[str]:
    name = f"ivshmem-lab-test-{os.getpid()}"
    yield name
    assert not Path("/dev/shm", name).exists()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_memfd_is_private_sealed_and_closed_on_exec() -> None:
    with SharedMemory.create_memfd(SIZE) as memory:
        status = os.fstat(memory.fd)
        assert (memory.kind, memory.size_bytes, status.st_size) == ("memfd", SIZE, SIZE)
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert not os.get_inheritable(memory.fd)
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, SIZE // 2)
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, SIZE * 2)
        with pytest.raises(PermissionError):
            fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)  # would keep newcomers out


def test_two_mappings_of_one_memfd_show_the_same_bytes() -> None:
    with SharedMemory.create_memfd(SIZE) as one, SharedMemory.from_fd(os.dup(one.fd)) as two:
        one.array()[100:104] = [1, 2, 3, 4]
        assert bytes(two.map[100:104]) == b"\x01\x02\x03\x04"
        assert two.array(np.uint32)[25] == 0x04030201
        assert (two.kind, two.size_bytes) == ("fd", SIZE)


def test_array_survives_close_and_releases_everything_afterwards() -> None:
    before = open_fds()
    memory = SharedMemory.create_memfd(SIZE)
    array = memory.array()
    array[0] = 7
    memory.close()
    memory.close()
    assert array[0] == 7
    del array
    assert open_fds() == before
    with pytest.raises(SharedMemoryError, match="closed"):
        memory.array()


def test_memory_written_by_another_process_is_seen_here() -> None:
    with SharedMemory.create_memfd(4096) as memory:
        program = f"import mmap; m = mmap.mmap({memory.fd}, 4096); m[5:8] = b'abc'"
        subprocess.run([sys.executable, "-c", program], pass_fds=[memory.fd], check=True)
        assert memory.array()[5:8].tobytes() == b"abc"


def test_posix_object_is_private_and_goes_with_unlink(posix_name: str) -> None:
    with SharedMemory.create_posix(posix_name, SIZE) as memory:
        path = Path("/dev/shm", posix_name)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_blocks * 512 >= SIZE  # the space is taken, not promised
        with SharedMemory.open_posix("/" + posix_name) as other:
            other.map[0:2] = b"hi"
            assert other.size_bytes == SIZE
        assert memory.map[0:2] == b"hi"
        memory.unlink()
        assert not path.exists()
        memory.unlink()


def test_existing_posix_object_is_refused_and_untouched(posix_name: str) -> None:
    with SharedMemory.create_posix(posix_name, SIZE) as memory:
        memory.map[0:2] = b"hi"
        with pytest.raises(SharedMemoryError, match=rf"{posix_name}.*exists.*rm /dev/shm/{posix_name}"):
            SharedMemory.create_posix(posix_name, 2 * SIZE)
        assert os.fstat(memory.fd).st_size == SIZE
        assert memory.map[0:2] == b"hi"
        memory.unlink()


def test_unlink_spares_an_object_that_took_the_name_later(posix_name: str) -> None:
    with SharedMemory.create_posix(posix_name, SIZE) as first:
        Path("/dev/shm", posix_name).unlink()
        with SharedMemory.create_posix(posix_name, SIZE) as second:
            first.unlink()
            assert Path("/dev/shm", posix_name).exists()
            second.unlink()


def test_missing_space_names_size_and_remedy_and_leaves_nothing(posix_name: str) -> None:
    before = open_fds()
    with pytest.raises(SharedMemoryError, match=r"1024T does not fit: .* free; use a memfd or a smaller size"):
        SharedMemory.create_posix(posix_name, 1 << 50)
    assert open_fds() == before
    assert not Path("/dev/shm", posix_name).exists()


@pytest.mark.parametrize("name", ["", "/", "a/b", "..", "x" * 256, "a\0b"])
def test_bad_posix_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match="1 to 255 bytes"):
        SharedMemory.create_posix(name, SIZE)
    with pytest.raises(UsageError, match="1 to 255 bytes"):
        SharedMemory.open_posix(name)


@pytest.mark.parametrize("size_bytes", [0, -1])
def test_sizes_below_one_byte_are_refused(size_bytes: int, tmp_path: Path) -> None:
    refused = pytest.raises(UsageError, match=f"size {size_bytes} ")
    with refused:
        SharedMemory.create_memfd(size_bytes)
    with refused:
        SharedMemory.create_posix("never", size_bytes)
    with refused:
        SharedMemory.open_file(tmp_path / "f", size_bytes, create=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size_bytes", [1 << 63, 1 << 70])
def test_impossible_memfd_size_is_an_error_of_ours(size_bytes: int) -> None:
    before = open_fds()
    with pytest.raises(SharedMemoryError, match="cannot make a memfd"):
        SharedMemory.create_memfd(size_bytes)
    assert open_fds() == before


def test_missing_posix_object_is_named() -> None:
    with pytest.raises(SharedMemoryError, match="no shared memory 'never-made'"):
        SharedMemory.open_posix("never-made")


def test_file_is_made_sized_shared_and_unlinked(tmp_path: Path) -> None:
    path = tmp_path / "mem"
    with SharedMemory.open_file(path, SIZE, create=True) as memory:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        memory.map[0:3] = b"abc"
        with SharedMemory.open_file(path, 4096) as part:
            assert (part.size_bytes, part.map[0:3]) == (4096, b"abc")
        with SharedMemory.open_file(path) as whole:
            assert whole.size_bytes == SIZE
        memory.unlink()
    assert not path.exists()


def test_empty_file_gets_its_size_and_a_filled_one_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "mem"
    path.touch()
    with SharedMemory.open_file(path, 4096, create=True) as memory:
        assert memory.size_bytes == path.stat().st_size == 4096
    with SharedMemory.open_file(path, 1024, create=True) as memory:
        assert (memory.size_bytes, path.stat().st_size) == (1024, 4096)


def test_file_that_is_too_small_missing_or_no_memory_is_refused(tmp_path: Path) -> None:
    before = open_fds()
    path = tmp_path / "mem"
    with pytest.raises(SharedMemoryError, match=r"cannot open the file '.*mem'"):
        SharedMemory.open_file(path, 4096)
    path.write_bytes(b"x" * 100)
    with pytest.raises(SharedMemoryError, match="holds 100, less than the 4K"):
        SharedMemory.open_file(path, 4096)
    with pytest.raises(UsageError, match="no size for the file"):
        SharedMemory.open_file(path, create=True)
    with pytest.raises(SharedMemoryError, match="size 0"):
        SharedMemory.open_file("/dev/null")
    with pytest.raises(SharedMemoryError, match="does not fit"):
        SharedMemory.open_file(tmp_path / "huge", 1 << 60, create=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mem"]
    assert open_fds() == before


def test_passed_descriptor_that_is_no_memory_is_refused_and_closed() -> None:
    before = open_fds()
    with EventFd.create() as event, pytest.raises(SharedMemoryError, match="size 0"):
        SharedMemory.from_fd(os.dup(event.fileno()))
    assert open_fds() == before


def test_read_only_descriptor_cannot_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "mem"
    path.write_bytes(bytes(4096))
    with (
        SharedMemory.from_fd(os.open(path, os.O_RDONLY)) as memory,
        pytest.raises(SharedMemoryError, match="for reading and writing"),
    ):
        memory.array()
