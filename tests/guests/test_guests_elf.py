"""Prebuilt guest programs belong to their sources, and look as a multiboot loader wants them."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import GuestError
from ivshmem_lab.guests import available, guest_path, toolchain

if TYPE_CHECKING:
    from pathlib import Path

EXECUTABLE, WRITABLE = 1, 2


def segments(elf: bytes) -> list[tuple[int, int, int, int, int]]:
    """(flags, file offset, address, bytes in the file, bytes in memory) of each loaded segment."""
    table, size, count = struct.unpack_from("<I", elf, 28)[0], *struct.unpack_from("<HH", elf, 42)
    found = []
    for i in range(count):
        kind, offset, _, address, in_file, in_memory, flags, _ = struct.unpack_from("<8I", elf, table + i * size)
        if kind == 1:
            found.append((flags, offset, address, in_file, in_memory))
    return found


@pytest.fixture
def copied_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources and ELFs where a test may change them."""
    for name, attribute in (("src", "SOURCES"), ("elf", "PREBUILT")):
        shutil.copytree(getattr(toolchain, attribute), tmp_path / name)
        monkeypatch.setattr(toolchain, attribute, tmp_path / name)
    monkeypatch.setattr(toolchain, "MANIFEST", tmp_path / "elf" / "manifest.json")
    return tmp_path


def test_every_program_is_there_under_its_name() -> None:
    assert (
        set(available())
        == set(toolchain.PROGRAMS)
        == {"echo", "intx", "knock", "migrant", "probe", "pingpong", "stream"}
    )
    for name in available():
        assert guest_path(name).read_bytes()[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", ["nope", "", "../elf/probe", "probe.elf"])
def test_an_unknown_program_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(GuestError, match="echo, intx, knock, migrant, pingpong, probe, stream"):
        guest_path(name)
    with pytest.raises(GuestError, match="probe, pingpong, stream, echo, migrant"):
        toolchain.build(name, guest_path("probe").parent)


def test_prebuilt_elfs_and_sources_belong_together() -> None:
    toolchain.check()


@pytest.mark.parametrize("source", ["runtime.c", "exchange.h", "link.ld", "start.S"])
def test_a_changed_source_is_noticed(copied_room: Path, source: str) -> None:
    with (copied_room / "src" / source).open("a") as file:
        file.write("\n")
    with pytest.raises(GuestError, match=r"stream\.elf was made from other sources or flags; .*run `make guests`"):
        toolchain.check()


def test_changed_flags_are_noticed(copied_room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-Os"))
    with pytest.raises(GuestError, match=r"probe\.elf was made from other sources or flags"):
        toolchain.check()


def test_a_changed_elf_a_missing_elf_and_a_missing_manifest_are_noticed(copied_room: Path) -> None:
    elf = copied_room / "elf"
    elf.joinpath("probe.elf").write_bytes(elf.joinpath("probe.elf").read_bytes() + b"\0")
    with pytest.raises(GuestError, match=r"^probe\.elf is not the recorded file; run"):
        toolchain.check()
    elf.joinpath("stream.elf").unlink()
    with pytest.raises(GuestError, match=r"stream\.elf is missing"):
        toolchain.check()
    elf.joinpath("manifest.json").write_text("{")
    with pytest.raises(GuestError, match="is not a manifest"):
        toolchain.check()
    elf.joinpath("manifest.json").unlink()
    with pytest.raises(GuestError, match="cannot be read"):
        toolchain.check()


@pytest.mark.parametrize("program", toolchain.PROGRAMS)
def test_the_recorded_compiler_builds_the_same_bytes(
    program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    entry = toolchain.manifest()[program]
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    tools = (toolchain.compiler_version(), toolchain.linker_version())
    if tools != (entry["compiler"], entry["linker"]):
        pytest.skip(
            f"the ELF was made by {entry['compiler']} and {entry['linker']}; installed are {' and '.join(tools)}"
        )
    built = toolchain.build(program, tmp_path)
    assert capfd.readouterr().err == "", "the compiler warns"
    assert hashlib.sha256(built.read_bytes()).hexdigest() == entry["elf_sha256"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_rebuilding_writes_elfs_and_manifest_that_pass_the_check(copied_room: Path) -> None:
    source = copied_room / "src" / "probe.c"
    source.write_text(source.read_text().replace("probe: done", "probe: over"))
    toolchain.rebuild()
    toolchain.check()
    assert b"probe: over" in (copied_room / "elf" / "probe.elf").read_bytes()
    assert sorted(path.name for path in (copied_room / "elf").iterdir()) == sorted(
        ["manifest.json", *(f"{program}.elf" for program in toolchain.PROGRAMS)]
    )


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_a_program_that_does_not_compile_changes_nothing(copied_room: Path) -> None:
    before = {path.name: path.read_bytes() for path in (copied_room / "elf").iterdir()}
    with (copied_room / "src" / "stream.c").open("a") as file:
        file.write("this is no C;\n")
    with pytest.raises(GuestError, match=r"(?s)stream was not built.*this is no C"):
        toolchain.rebuild()
    assert {path.name: path.read_bytes() for path in (copied_room / "elf").iterdir()} == before


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="no-such-cc"):
        toolchain.build("probe", tmp_path, cc="no-such-cc")


def test_the_command_checks_without_building() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ivshmem_lab.guests.toolchain", "--check"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "pingpong.elf " + toolchain.manifest()["pingpong"]["elf_sha256"] in done.stdout


def test_the_command_fails_with_one_line_when_the_check_does(
    copied_room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads(toolchain.MANIFEST.read_text())
    manifest["programs"]["stream"]["elf_sha256"] = "0" * 64
    toolchain.MANIFEST.write_text(json.dumps(manifest))
    assert toolchain.main(["--check"]) == 1
    assert capsys.readouterr().err == "stream.elf is not the recorded file; run `make guests` to rebuild\n"


@pytest.mark.parametrize("name", toolchain.PROGRAMS)
class TestElf:
    def test_is_a_static_program_for_a_32_bit_x86(self, name: str) -> None:
        elf = guest_path(name).read_bytes()
        bits, order = elf[4:6]
        kind, machine = struct.unpack_from("<HH", elf, 16)
        assert (bits, order, kind, machine) == (1, 1, 2, 3)

    def test_has_a_multiboot_header_where_a_loader_looks(self, name: str) -> None:
        elf = guest_path(name).read_bytes()
        at = next(offset for offset in range(0, 8192 - 12, 4) if elf[offset : offset + 4] == b"\x02\xb0\xad\x1b")
        assert sum(struct.unpack_from("<III", elf, at)) % 2**32 == 0

    def test_keeps_code_alone_in_the_first_2_mib(self, name: str) -> None:
        code, data = segments(guest_path(name).read_bytes())
        assert code[0] & (EXECUTABLE | WRITABLE) == EXECUTABLE
        assert data[0] & (EXECUTABLE | WRITABLE) == WRITABLE
        assert code[2] >= 1 << 20
        assert code[2] + code[4] <= 2 << 20 <= data[2]

    def test_fits_a_small_machine_and_carries_no_path(self, name: str) -> None:
        elf = guest_path(name).read_bytes()
        assert len(elf) < 32 * 1024
        assert max(address + in_memory for _, _, address, _, in_memory in segments(elf)) < 4 << 20
        for word in (b"/tmp", b"/home", b"/usr", b".c\0", b"GCC"):
            assert word not in elf
