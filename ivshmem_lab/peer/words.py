"""Loads and stores of one aligned word of shared memory.

What is whole: a load or store of 4 or 8 bytes at a multiple of its size is one access on x86-64
(Intel SDM volume 3, 9.1.1; AMD64 manual volume 2, 7.3.2) and on aarch64 (Arm ARM, B2.2.1), so another
processor sees all of it or nothing. Python adds: an item of a ``memoryview`` cast to ``"I"`` or ``"Q"`` is
copied by a memcpy of constant size, which compilers turn into one move; that is used here. The same holds for
``ctypes``' ``c_uint32.from_buffer`` and for one item of an aligned numpy array. Copies of more than an item
(``array[a:b] = ...``) are whole in no part, and ``array[i] += 1`` is two accesses, not one: there is no
atomic addition here. Give each word one writer.

What is in order: on x86-64 others see our stores in the order in which we made them. On aarch64 they need not;
ringing an eventfd is a system call that takes a lock, so what was stored before a ring is seen by who is woken by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SharedMemoryError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Words:
    """The memory as words of 4 and of 8 bytes, in the machine's byte order."""

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        view = memory.data
        self._size_bytes = len(view)
        self._writable = not view.readonly
        self._words: dict[int, memoryview[int]] = {}
        if len(view) >= 4:  # nothing cannot be cast
            self._words[4] = view[: len(view) & ~3].cast("I")
        if len(view) >= 8:
            self._words[8] = view[: len(view) & ~7].cast("Q")

    def load(self, offset: int, size: int) -> int:
        """Return the word of 4 or 8 bytes at this offset."""
        return self._words[size][self._index(offset, size)]

    def store(self, offset: int, size: int, value: int) -> None:
        """Write the word of 4 or 8 bytes at this offset."""
        index = self._index(offset, size)
        if not 0 <= value < 1 << 8 * size:
            raise UsageError(f"value {value} does not fit {size} bytes; 0 to {(1 << 8 * size) - 1} do")
        if not self._writable:
            raise SharedMemoryError(f"cannot store at offset {offset}: the server gave us this memory read-only")
        self._words[size][index] = value

    def _index(self, offset: int, size: int) -> int:
        if offset % size:
            raise UsageError(f"offset {offset} is not aligned: a word of {size} bytes lies at a multiple of {size}")
        if not 0 <= offset <= self._size_bytes - size:
            raise UsageError(
                f"offset {offset} is out of range: {size} bytes fit at 0 to {self._size_bytes - size} of this memory"
            )
        return offset // size
