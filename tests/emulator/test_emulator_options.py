"""The command line: what is taken, and what is refused in one line with the value and what is allowed."""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.emulator.cli import main
from ivshmem_lab.emulator.options import parse_arguments
from ivshmem_lab.guests import guest_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
PROBE = str(guest_path("probe"))
PLAIN = "-device ivshmem-plain,memdev=m"


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_everything_at_once() -> None:
    words = f"-m 64 -kernel {PROBE} -append exit=1 -name alice -S -no-reboot -nodefaults -no-user-config -display none"
    words += " -machine pc,accel=tcg -accel tcg -cpu qemu64 -smp 1 -vga none -net none -nic none -parallel none -monitor none"
    words += " -object memory-backend-ram,id=m,size=1M -device ivshmem-plain,memdev=m,addr=4 -block-hook python"
    words += " -chardev socket,path=/tmp/s,id=c -qmp unix:/tmp/q,server=on,wait=off -serial stdio -mon chardev=c,mode=control"
    options = parse_arguments(words.split())
    assert (options.memory_bytes, options.kernel, options.append, options.name) == (64 * MIB, PROBE, "exit=1", "alice")
    assert (options.paused, options.reboot, options.native_hook) == (True, False, False)
    assert options.objects == [{"qom-type": "memory-backend-ram", "id": "m", "size": "1M"}]
    assert options.devices == [{"driver": "ivshmem-plain", "memdev": "m", "addr": "4"}]
    assert options.monitors == [options.chardevs[1]["id"], "c"]
    assert options.chardevs == [
        {"backend": "socket", "path": "/tmp/s", "id": "c"},
        {"backend": "socket", "path": "/tmp/q", "server": "on", "wait": "off", "id": options.monitors[0]},
        {"backend": "stdio", "id": options.serial},
    ]


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("64", 64 * MIB),
        ("64M", 64 * MIB),
        ("size=64", 64 * MIB),
        ("0.5G", 512 * MIB),
        ("2048k", 2 * MIB),
        ("3G", 3 << 30),
    ],
)
def test_memory_sizes(text: str, size_bytes: int) -> None:
    assert parse_arguments(["-m", text]).memory_bytes == size_bytes
    assert parse_arguments(["--m", text]).memory_bytes == size_bytes


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("-h", "--help", "-help"):
        assert main([word]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert re.search(r"example\n(.*\n)*\s+unicorn-system-x86_64 .*-kernel", out)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"unicorn-system-x86_64 \(ivshmem_lab [\d.]+\)\n", capsys.readouterr().out)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named", "allowed"),
    [
        ("-nope", "-nope", "-kernel"),
        ("disk.img", "disk.img", "-kernel FILE"),
        ("-", "'-'", "-kernel FILE"),
        ("-m", "-m", "argument"),
        ("-m x", "'x'", "such as 4M"),
        ("-m 0", "-m 0", "2M to 3G"),
        ("-m 1", "-m 1", "2M to 3G"),
        ("-m 4G", "-m 4G", "2M to 3G"),
        ("-m 2049k", "-m 2049k", "whole megabytes"),
        ("-m -5", "-5", "such as 4M"),
        ("-kernel /nope/k", "/nope/k", "multiboot ELF"),
        ("-kernel /tmp", "/tmp", "multiboot ELF"),
        ("-append x", "-append", "-kernel"),
        ("-machine microvm", "microvm", "pc"),
        ("-machine pc,usb=on", "'usb'", "accel"),
        ("-machine pc,accel=kvm", "kvm", "tcg"),
        ("-accel kvm", "kvm", "tcg"),
        ("-smp 2", "2", "1"),
        ("-cpu host", "host", "qemu64"),
        ("-display gtk", "gtk", "none"),
        ("-net user", "user", "none"),
        ("-block-hook c", "-block-hook c", "native"),
        ("-serial tcp:1", "tcp:1", "stdio"),
        ("-serial unix:", "unix:", "unix:PATH"),
        ("-serial stdio -serial null", "-serial null", "one serial port"),
        ("-serial chardev:nope", "nope", "none"),
        ("-mon chardev=c,mode=readline", "chardev=c", "mode=control"),
        ("-mon mode=control", "mode=control", "chardev=ID"),
        ("-mon chardev=c,mode=control,pretty=on", "pretty", "mode"),
        ("-qmp tcp::1", "tcp::1", "unix:PATH"),
        ("-mon chardev=nope,mode=control", "nope", "none"),
        ("-object nope,id=m,size=1M", "nope", "memory-backend-memfd"),
        ("-object memory-backend-ram,id=m", "size", "-object"),
        ("-object memory-backend-ram,size=1M", "id", "-object"),
        ("-object memory-backend-ram,id=1m,size=1M", "1m", "a letter"),
        ("-object memory-backend-ram,id=m,size=x", "'x'", "such as 4M"),
        ("-object memory-backend-ram,id=m,size=5000", "0x1388", "0x2000"),
        ("-object memory-backend-ram,id=m,size=0", "'0'", "size"),
        ("-object memory-backend-ram,id=m,size=1M,share=maybe", "maybe", "on nor off"),
        ("-object memory-backend-ram,id=m,size=1M,mem-path=/x", "mem-path", "memory-backend-ram"),
        ("-object memory-backend-ram,id=m,size=99999999T", "99999999T", "memory"),
        ("-object memory-backend-file,id=m,size=1M", "mem-path", "missing"),
        ("-object memory-backend-file,id=m,size=1M,mem-path=/nope/f", "/nope/f", "No such file"),
        (f"-object memory-backend-ram,id=m,size=3M {PLAIN}", "3M", "2M and 4M"),
        ("-object memory-backend-ram,id=m,size=1M -object memory-backend-ram,id=m,size=1M", "'m'", "duplicate"),
        (PLAIN, "'m'", "not found"),
        ("-device nope", "'nope'", "ivshmem-doorbell"),
        ("-device ivshmem-plain", "ivshmem-plain", "'memdev'"),
        ("-device ivshmem-plain,vectors=2", "vectors", "memdev"),
        ("-device ivshmem-doorbell", "ivshmem-doorbell", "'chardev'"),
        ("-device ivshmem-doorbell,chardev=nope", "nope", "find value"),
        ("-chardev null,id=n -device ivshmem-doorbell,chardev=n", "'n'", "path=SERVER"),
        ("-chardev null,id=n -device ivshmem-doorbell,chardev=n,vectors=0", "vectors", "1 to 2048"),
        ("-chardev null,id=n -device ivshmem-doorbell,chardev=n,vectors=2049", "vectors", "1 to 2048"),
        ("-chardev null,id=n -device ivshmem-doorbell,chardev=n,vectors=x", "'x'", "integer"),
        ("-chardev null,id=n -device ivshmem-doorbell,chardev=n,ioeventfd=x", "'x'", "on nor off"),
        ("-device isa-debug-exit,iobase=0x3f8", "0x3f8", "0xf4"),
        ("-device isa-debug-exit,iobase=0", "0x0", "0xf4"),
        ("-device isa-debug-exit,iobase=x", "'x'", "integer"),
        ("-device isa-debug-exit,iobase=0xfffe,iosize=4", "0xfffe", "0xf4"),
        ("-chardev nope,id=c", "nope", "socket"),
        ("-chardev socket,path=/tmp/s", "id=NAME", "-chardev"),
        ("-chardev socket,id=c", "chardev c", "path=SOCKET"),
        ("-chardev socket,id=c,path=/a,fd=3", "chardev c", "fd=NUMBER"),
        ("-chardev socket,id=c,fd=x", "fd=x", "number"),
        ("-chardev socket,id=c,fd=999", "fd=999", "not passed"),
        ("-chardev socket,id=c,fd=0", "fd=0", "not a socket"),
        ("-chardev socket,id=c,path=/nope/s", "/nope/s", "No such file"),
        ("-chardev socket,id=c,path=/nope/s,server=on,wait=off", "/nope/s", "No such file"),
        (f"-chardev socket,id=c,path=/tmp/{'x' * 108}", "x" * 108, "107"),
        ("-chardev socket,id=c,path=/tmp/s,server=maybe", "maybe", "on nor off"),
        ("-chardev socket,id=c,path=/nope/s,reconnect=1", "/nope/s", "No such file"),
        ("-chardev null,id=c,mux=on", "mux", "null"),
        ("-chardev null,id=c -chardev null,id=c", "'c'", "already exists"),
        ("-chardev file,id=c", "chardev c", "path=FILE"),
        ("-chardev file,id=c,path=/nope/f", "/nope/f", "No such file"),
        ("-serial chardev:c -chardev stdio,id=c -mon chardev=c,mode=control", "'c'", "in use by -serial"),
    ],
)
def test_a_wrong_call_gets_one_line_that_names_it(
    words: str, named: str, allowed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    status = main(["-display", "none", *words.split()])
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("unicorn-system-x86_64: ")
    assert named in err
    assert allowed in err
    running = "No such file" in err or "nope" in err or "in use by" in err
    assert status == 2 or (status == 1 and running)


BAD_KERNELS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda elf: b"",
    "text": lambda elf: b"#!/bin/sh\n",
    "64-bit": lambda elf: elf[:4] + b"\x02" + elf[5:],
    "cut": lambda elf: elf[:2000],
    "no header": lambda elf: elf.replace((0x1BADB002).to_bytes(4, "little"), bytes(4)),
}


@pytest.mark.parametrize("kind", BAD_KERNELS)
def test_a_file_that_is_no_kernel_is_named(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(BAD_KERNELS[kind](guest_path("probe").read_bytes()))
    assert main(["-kernel", str(path)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert str(path) in err


def test_a_kernel_that_may_not_be_read_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernel"
    path.symlink_to("/proc/self/mem")  # a file, and reading it from its start fails, for root too
    assert main(["-kernel", str(path)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert str(path) in err


def test_a_kernel_larger_than_memory_is_told_how_much_there_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", "2", "-kernel", PROBE]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "-m 2M" in err


def test_a_backing_file_that_is_too_small_is_refused_and_left_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(4096))
    assert main(["-object", f"memory-backend-file,id=m,size=8192,mem-path={path}"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert str(path) in err
    assert path.read_bytes() == bytes(4096)


def test_a_socket_path_in_use_is_refused_and_left_to_its_owner(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        owner.listen()
        assert main(["-qmp", f"unix:{path},server=on,wait=off"]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert str(path) in err
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_what_was_made_before_the_error_is_gone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q"
    words = [
        "-qmp",
        f"unix:{path},server=on,wait=off",
        "-serial",
        "null",
        "-object",
        "memory-backend-memfd,id=m,size=4K",
    ]
    assert main([*words, "-device", "nope"]) == 2
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err.count("\n") == 1


def test_a_file_that_is_no_memory_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    for path in (os.devnull, "/tmp"):
        assert main(["-object", f"memory-backend-file,id=m,size=4096,mem-path={path}"]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        assert path in err
