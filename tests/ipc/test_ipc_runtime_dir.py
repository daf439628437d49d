"""Directories and paths for sockets."""

from __future__ import annotations

import stat
import tempfile
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import UsageError
from ivshmem_lab.ipc.runtime_dir import check_socket_path, runtime_dir

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_xdg_directory_is_used_when_it_works(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(temporary))
    path = runtime_dir()
    assert path == temporary / "ivshmem-lab"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert runtime_dir() == path


@pytest.mark.parametrize("value", ["relative/dir", "/no/such/directory", ""])
def test_useless_xdg_directory_is_passed_over(value: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    path = runtime_dir()
    assert path.parent == temporary
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_directory_open_to_others_is_refused(temporary: Path) -> None:
    path = runtime_dir()
    path.chmod(0o755)
    with pytest.raises(UsageError, match="mode 0755"):
        runtime_dir()


def test_link_in_the_directorys_place_is_refused(temporary: Path) -> None:
    path = runtime_dir()
    path.rmdir()
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="not a private directory"):
        runtime_dir()


def test_longest_path_passes_and_one_more_byte_does_not() -> None:
    assert check_socket_path("/" + "a" * 106) == "/" + "a" * 106
    for bad in ("/" + "a" * 107, "", "a\0b", "/" + "é" * 54):
        with pytest.raises(UsageError, match="1 to 107"):
            check_socket_path(bad)
