"""The parts of a Linux guest's image: kernels unpacked, modules in order, the initramfs, the cache, and what is missing."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from ivshmem_lab.errors import UsageError
from ivshmem_lab.guests.linux import tool_path
from ivshmem_lab.vm.linux import kernel
from ivshmem_lab.vm.linux.apt import Apt
from ivshmem_lab.vm.linux.cpio import Archive
from ivshmem_lab.vm.linux.errors import LinuxImageError
from ivshmem_lab.vm.linux.guest import Cable, LinuxGuest, linux_machine
from ivshmem_lab.vm.linux.image import CACHE_VARIABLE, build_image
from ivshmem_lab.vm.linux.kernel import UnpackerMissingError, extract_vmlinux
from ivshmem_lab.vm.linux.modules import load_order, modinfo, module_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VMLINUX = b"\x7fELF" + bytes(range(256)) * 40000  # more than one block of 8 MiB


def lz4_legacy(data: bytes) -> bytes:
    blocks = [lz4.block.compress(data[at : at + (8 << 20)], store_size=False) for at in range(0, len(data), 8 << 20)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


def bz_image(payload: bytes) -> bytes:
    """A kernel image as the boot protocol has it: 2 sectors of setup, the payload 48 bytes into the rest, its size at its end."""
    payload += struct.pack("<I", len(VMLINUX))
    head = bytearray(3 * 512 + 48)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 48, len(payload))
    return bytes(head) + payload + b"what follows"


@pytest.mark.parametrize(
    "compress",
    [
        lambda data: lzma.compress(data, preset=0),
        lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE, preset=0),
        bz2.compress,
        lz4_legacy,
        zstandard.ZstdCompressor().compress,
    ],
    ids=["xz", "lzma", "bzip2", "lz4", "zstd"],
)
def test_a_kernel_comes_out_of_its_image(compress: Callable[[bytes], bytes]) -> None:
    assert extract_vmlinux(bz_image(compress(VMLINUX))) == VMLINUX


def test_an_unpacked_kernel_stays_as_it_is() -> None:
    assert extract_vmlinux(VMLINUX) == VMLINUX


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"MZ" + bytes(5000), "no bzImage"),
        (bz_image(b"")[:600], "is not inside"),
        (bz_image(b"odd stuff"), "unknown here; it begins with 6f6464207374"),
        (bz_image(lzma.compress(b"no ELF")), "is no ELF"),
        (bz_image(lzma.compress(VMLINUX)[:400] + bytes(400)), "cannot be unpacked"),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes, words: str) -> None:
    with pytest.raises(LinuxImageError, match=words):
        extract_vmlinux(image)


def test_a_missing_unpacker_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.block", None)
    with pytest.raises(UnpackerMissingError, match=r"lz4.*pip install 'ivshmem-lab\[linux\]'"):
        kernel.extract_vmlinux(bz_image(lz4_legacy(VMLINUX[:1000])))


# Modules

DEPENDS = {"a": "", "b": "a", "c": "b,a,d-d", "d_d": ""}


def test_modules_come_after_those_that_they_need() -> None:
    assert load_order(["c", "b"], DEPENDS, ["built"], DEPENDS.__getitem__) == ["a", "b", "d_d", "c"]
    assert load_order(["built", "a"], DEPENDS, ["built"], DEPENDS.__getitem__) == ["a"]


def test_a_module_that_is_nowhere_is_named() -> None:
    with pytest.raises(LinuxImageError, match="no module d_d, which c needs; take"):
        load_order(["c"], {"a": 0, "b": 0, "c": 0}, [], DEPENDS.__getitem__)


def test_a_module_is_known_by_one_name() -> None:
    assert [module_name(name) for name in ("vfio-pci.ko", "virtio_net.ko.zst")] == ["vfio_pci", "virtio_net"]


@given(data=st.binary(max_size=400), elf=st.booleans())
def test_what_is_no_module_gives_one_kind_of_error(data: bytes, elf: bool) -> None:
    with pytest.raises(LinuxImageError):
        modinfo(b"\x7fELF\x02\x01" + data if elf else data)


# The initramfs


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Read a newc archive as the kernel does."""
    found, at = {}, 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 109 + numbers[11]].decode()
        at += 110 + numbers[11] + -(110 + numbers[11]) % 4
        content = archive[at : at + numbers[6]]
        at += numbers[6] + -numbers[6] % 4
        if name == "TRAILER!!!":
            return found
        found[name] = (numbers[1], content)


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=8), st.binary(max_size=50), max_size=8))
def test_an_archive_holds_what_went_in_and_folders_come_first(files: dict[str, bytes]) -> None:
    archive, taken = Archive(), {}
    for name, content in files.items():
        if name.startswith("/") or name.endswith("/") or "//" in name:
            continue
        if any(other.startswith(name + "/") or name.startswith(other + "/") for other in taken):
            continue
        archive.file(name, content)
        taken[name] = content
    read = entries(archive.to_bytes())
    assert {name: content for name, (mode, content) in read.items() if stat.S_ISREG(mode)} == taken
    seen: set[str] = set()
    for name in read:
        assert "/" not in name or name.rsplit("/", 1)[0] in seen
        seen.add(name)


@pytest.mark.parametrize("path", ["/bin/sh", "../x", "", "twice"])
def test_a_path_that_does_not_belong_in_an_archive_is_refused(path: str) -> None:
    archive = Archive()
    archive.file("twice", b"")
    with pytest.raises(UsageError, match="not allowed in an archive"):
        archive.file(path, b"")


# What is missing


def test_without_apt_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LinuxImageError, match=r"apt-get is not on PATH.*--kernel and --initrd"):
        Apt(tmp_path / "apt", print)


def test_an_archive_that_cannot_be_reached_is_told_with_apts_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "none.list").write_text("deb [trusted=yes] http://127.0.0.1:9/debian none main\n")
    configuration = tmp_path / "apt.conf"
    configuration.write_text(f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{sources}";\n')
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    said: list[str] = []
    with pytest.raises(LinuxImageError, match=r"is the network there\?.*127\.0\.0\.1"):
        build_image(tool_path(), say=said.append)
    assert said == ["fetching the lists of packages"]


def test_a_cache_that_cannot_be_made_is_told_with_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(LinuxImageError, match=f"name another folder with {CACHE_VARIABLE}"):
        build_image(tool_path())


# What a user hands over


def test_kernel_and_initrd_go_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="go together"):
        LinuxGuest(kernel="vmlinuz").files()
    with pytest.raises(UsageError, match=r"'.*/none' is no file"):
        LinuxGuest(kernel=tmp_path / "none", initrd=tmp_path / "none").files()


def test_a_guest_with_too_little_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"64 MiB of memory is not enough.*96M"):
        linux_machine("a", LinuxGuest(), tmp_path, tmp_path, memory_bytes=64 << 20)


def test_a_cable_has_two_ends() -> None:
    with Cable() as cable:
        assert [cable.take().address for _ in range(2)] == ["10.77.0.1", "10.77.0.2"]
        with pytest.raises(UsageError, match="both are taken"):
            cable.take()
    with pytest.raises(UsageError, match="closed"):
        cable.take()


# The command and the tool


def test_the_tool_runs_here_and_explains_itself(
    tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    target = tmp_path / "ivshmem-tool"
    assert run_cli(["ivshmem-lab", "linux", "tool", str(target)]).returncode == 0
    assert os.access(target, os.X_OK)
    helped = subprocess.run([target, "--help"], capture_output=True, text=True, check=True)
    for command in ("info", "read", "write", "ring", "wait", "pingpong", "stream"):
        assert f"\n  {command} " in helped.stdout
    assert "examples:\n  ivshmem-tool info\n" in helped.stdout
    assert target.stat().st_size < 60_000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no command is given"),
        (["dance"], "command dance is not known"),
        (["read", "x", "1"], "OFFSET x is no number"),
        (["ring", "70000", "0"], "PEER 70000 is too large: at most 65535"),
        (["wait", "--count"], "option --count needs a value"),
        (["pingpong", "ping", "1", "--speed", "2"], "option --speed is not known"),
        (["tcp-stream", "connect", "1.2.3"], "1.2.3, port 7000 is no IPv4 address"),
        (["tcp-stream", "serve", "--bytes", "100"], "a multiple of it"),
    ],
)
def test_a_wrong_call_of_the_tool_ends_with_2_and_says_why(words: list[str], said: str, tmp_path: Path) -> None:
    target = tmp_path / "tool"
    target.write_bytes(tool_path().read_bytes())
    target.chmod(0o755)
    done = subprocess.run([target, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.endswith("; see ivshmem-tool --help\n")


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "required: COMMAND"),
        (["run", "--kernel", "/dev/null", "--", "ls"], 2, "go together"),
        (["tool", "/nowhere/at/all"], 2, "cannot be written"),
    ],
)
def test_a_wrong_call_of_the_command_says_why(
    words: list[str], status: int, said: str, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_cli(["ivshmem-lab", "linux", *words])
    assert done.returncode == status
    assert said in done.stderr


def test_gzip_is_known_too() -> None:
    assert kernel.decompress(gzip.compress(b"data"), "it") == b"data"
