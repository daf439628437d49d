"""Taking interrupts where the kernel knows no RWF_NOWAIT for eventfds."""

from __future__ import annotations

import errno
import os

import pytest

from ivshmem_lab.ipc.eventfd import take


@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK], ids=["blocking", "non-blocking"])
@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_take_neither_waits_nor_fails_without_nowait(monkeypatch: pytest.MonkeyPatch, refusal: int, flags: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "preadv", refuse)
    fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
    try:
        assert take(fd) == 0
        os.eventfd_write(fd, 3)
        assert take(fd) == 3
        assert take(fd) == 0
    finally:
        os.close(fd)


def test_take_reports_other_errors() -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        take(fd)
