from __future__ import annotations

import re
import subprocess
import sys

import pytest

from ivshmem_lab.errors import EmulatorNotFoundError, UsageError
from ivshmem_lab.vm.command import Connection, Machine
from ivshmem_lab.vm.qemu import find_emulator


def program(directory, text):
    path = directory / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_unknown_emulator_is_refused_with_those_that_exist():
    with pytest.raises(UsageError, match=r"'bochs'.*'unicorn' and 'qemu'"):
        find_emulator("bochs")


def test_a_missing_qemu_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulatorNotFoundError, match=r"qemu-system-x86_64 is not on PATH; install it.*unicorn"):
        find_emulator("qemu")


def test_a_qemu_that_says_no_version_is_not_taken(monkeypatch, tmp_path):
    program(tmp_path, "echo broken library >&2; exit 127")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulatorNotFoundError, match=r"status 127 and no version \('broken library'\)"):
        find_emulator("qemu")


def test_the_version_is_read_again_when_the_program_changes(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path, "echo 'QEMU emulator version 8.2.1 (a distribution 1:8.2.1)'")
    assert find_emulator("qemu").version == "8.2.1"
    program(tmp_path, "echo 'QEMU emulator version 10.0.0'")
    assert find_emulator("qemu").version == "10.0.0"


@pytest.mark.qemu
def test_the_installed_qemu_is_found_with_its_version():
    qemu = find_emulator("qemu")
    said = subprocess.run([*qemu.argv, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"version {re.escape(qemu.version)}\b", said)
    assert str(qemu) == f"qemu {qemu.version}"


def test_our_emulator_runs_from_any_directory_whatever_lies_there(tmp_path):
    (tmp_path / "ivshmem_lab.py").write_text("raise SystemExit('shadowed')")
    ours = find_emulator("unicorn")
    assert ours.argv[0] == sys.executable
    done = subprocess.run(
        [*ours.argv, "--help"],
        env={**ours.environment, "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "-kernel" in done.stdout


def test_commas_are_doubled_and_each_connection_has_its_own_device():
    connections = (Connection("/run/a,b.sock", 2), Connection("/run/c.sock", 1))
    options = Machine("x,y", kernel="/g.elf", append="role=ping", connections=connections).options(5, 6)
    assert options[:2] == ["-name", "x,,y"]
    assert "socket,id=ivshmem0-chardev,path=/run/a,,b.sock" in options
    assert "ivshmem-doorbell,id=ivshmem0,chardev=ivshmem0-chardev,vectors=2" in options
    assert "ivshmem-doorbell,id=ivshmem1,chardev=ivshmem1-chardev,vectors=1" in options
    assert options[options.index("-append") + 1] == "role=ping"
    assert options[options.index("-accel") + 1] == "tcg"
