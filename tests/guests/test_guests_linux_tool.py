"""The guest tool for Linux: the shipped ELF belongs to its sources, needs nothing, and can be built again."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ivshmem_lab.errors import GuestError
from ivshmem_lab.guests import linux


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources, ELF and manifest, to be changed."""
    shutil.copytree(linux.SOURCES, tmp_path / "linux")
    shutil.copytree(linux.SOURCES.parent / "src", tmp_path / "src")
    for name, value in {"SOURCES": "", "TOOL": "ivshmem-tool.elf", "MANIFEST": "manifest.json"}.items():
        monkeypatch.setattr(linux, name, tmp_path / "linux" / value)
    return tmp_path


def test_the_shipped_tool_was_made_from_these_sources() -> None:
    linux.check()


@pytest.mark.parametrize("file", ["linux/stream.c", "linux/sys.h", "src/channel.h"])
def test_a_changed_source_is_noticed(copied: Path, file: str) -> None:
    with (copied / file).open("a") as source:
        source.write("/* changed */\n")
    with pytest.raises(GuestError, match="was made from other sources or flags; run `make guests`"):
        linux.check()


def test_a_changed_tool_is_noticed(copied: Path) -> None:
    linux.TOOL.write_bytes(linux.TOOL.read_bytes() + b"\0")
    with pytest.raises(GuestError, match="is not the recorded file"):
        linux.check()


def test_a_tool_that_is_missing_is_told(copied: Path) -> None:
    linux.TOOL.unlink()
    with pytest.raises(GuestError, match="is not in the package"):
        linux.tool_path()


@pytest.mark.skipif(
    shutil.which("gcc") is None or not Path("/usr/include/linux/vfio.h").is_file(),
    reason="needs gcc and the kernel's headers (linux-libc-dev)",
)
def test_it_builds_without_a_warning_and_runs(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linux.rebuild()
    linux.check()
    assert capsys.readouterr().err == ""
    linux.TOOL.chmod(0o755)
    helped = subprocess.run([linux.TOOL, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("usage: ivshmem-tool COMMAND")


def test_without_a_compiler_the_remedy_is_told(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"does not run.*install gcc"):
        linux.build(tmp_path / "tool", cc="no-such-compiler")
