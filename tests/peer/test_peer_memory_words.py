"""A peer's memory as arrays of any type and as single words; an observer's is read-only."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from peer_tools import LIMIT_S, scripted, served

from ivshmem_lab.errors import PeerClosedError, SharedMemoryError, UsageError
from ivshmem_lab.ipc.memory import SharedMemory
from ivshmem_lab.peer.peer import Peer

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 16


def test_arrays_of_any_type_show_the_same_memory(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        words = peer.array("<u4", 64, 4)
        words[:] = [1, 2, 3, 0xDEADBEEF]
        assert peer.memory[64:80].tobytes() == words.tobytes()
        assert np.shares_memory(words, peer.memory)
        assert peer.array(np.float64).shape == (SIZE // 8,)
        assert peer.array("<u4", SIZE - 7).shape == (1,)
        assert peer.array("u1", SIZE).shape == (0,)
        assert peer.array(np.dtype([("a", "<u2"), ("b", "<u8")]), 3, 2).dtype.itemsize == 10


@pytest.mark.parametrize(
    ("dtype", "offset", "count"),
    [("u1", -1, 1), ("u1", SIZE + 1, None), ("<u4", SIZE - 3, 1), ("u1", 0, -1), ("V0", 0, 1)],
)
def test_an_array_outside_the_memory_is_refused(tmp_path: Path, dtype: str, offset: int, count: int | None) -> None:
    with (
        served(tmp_path / "s"),
        Peer.connect(tmp_path / "s") as peer,
        pytest.raises(UsageError, match=f"offset {offset} is not inside the memory of {SIZE}"),
    ):
        peer.array(dtype, offset, count)


def test_words_are_loaded_and_stored_whole(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as alice, Peer.connect(tmp_path / "s") as bob:
        alice.store32(SIZE - 4, 0xFFFFFFFE)
        alice.store64(8, 1 << 63 | 5)
        assert (bob.load32(SIZE - 4), bob.load64(8)) == (0xFFFFFFFE, 1 << 63 | 5)
        assert (bob.load32(8), bob.load32(12)) == (5, 1 << 31)


def test_words_that_are_unaligned_outside_or_too_large_are_refused_by_name(tmp_path: Path) -> None:
    with served(tmp_path / "s"), Peer.connect(tmp_path / "s") as peer:
        for load, size in ((peer.load32, 4), (peer.load64, 8)):
            with pytest.raises(UsageError, match=f"offset {size // 2} is not aligned"):
                load(size // 2)
            for offset in (-size, SIZE):
                with pytest.raises(UsageError, match=f"offset {offset} is out of range"):
                    load(offset)
        for store, size in ((peer.store32, 4), (peer.store64, 8)):
            with pytest.raises(UsageError, match="offset 1 is not aligned"):
                store(1, 0)
            for value in (-1, 1 << 8 * size):
                with pytest.raises(UsageError, match=f"value {value} does not fit {size} bytes"):
                    store(0, value)
        assert not peer.memory.any()


def test_a_closed_peer_has_no_words(tmp_path: Path) -> None:
    with served(tmp_path / "s"):
        peer = Peer.connect(tmp_path / "s")
        peer.close()
        for call in (lambda: peer.load32(0), lambda: peer.store64(0, 0), lambda: peer.array("<u4")):
            with pytest.raises(PeerClosedError, match="is closed"):
                call()


def test_an_observer_reads_and_cannot_write(tmp_path: Path) -> None:
    with scripted(tmp_path / "s") as script:
        script.memory.array()[5] = 7
        read_only = os.open(f"/proc/self/fd/{script.memory.fd}", os.O_RDONLY | os.O_CLOEXEC)
        script.introduce((0, None), (1, None), (-1, read_only), (1, script.line(1)))
        with Peer.connect(tmp_path / "s", LIMIT_S) as observer:
            assert (observer.memory[5], observer.load32(4), observer.writable) == (7, 7 << 8, False)
            assert "memory 64K, read-only" in repr(observer)
            for array in (observer.memory, observer.array("<u4", 8, 2)):
                with pytest.raises(ValueError, match="read-only"):
                    array[0] = 1
                with pytest.raises(ValueError, match="WRITEABLE"):
                    array.flags.writeable = True
            for store in (observer.store32, observer.store64):
                with pytest.raises(SharedMemoryError, match="read-only"):
                    store(0, 1)
        os.close(read_only)


def test_a_read_only_descriptor_is_refused_where_nobody_expects_one() -> None:
    with SharedMemory.create_memfd(4096) as memory:
        fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY | os.O_CLOEXEC)
        with SharedMemory.from_fd(fd) as strict:
            assert strict.writable
            with pytest.raises(SharedMemoryError, match="reading and writing"):
                strict.array()
