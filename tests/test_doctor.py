"""The command ``ivshmem-lab doctor`` on this machine, and on one without QEMU."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from ivshmem_lab.cli import main
from ivshmem_lab.errors import EmulatorNotFoundError
from ivshmem_lab.vm.qemu import QEMU_PROGRAM, qemu_facts


def findings(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, dict[str, str]]:
    assert main(["doctor", "--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert told["works"] == (status == 0)
    return {each["what"].strip(): each for each in told["findings"]}


@pytest.mark.qemu
def test_what_is_here_is_found(capsys):
    found = findings(capsys)
    for what in ("Python", "unicorn", "numpy", "jupyterlab", "runtime directory", "real QEMU", "its devices"):
        assert found[what]["status"] == "ok", found[what]
    assert re.match(r"\d+\.\d+", found["real QEMU"]["found"])
    assert "ivshmem-doorbell" in found["its devices"]["found"]
    assert all(each["remedy"] for each in found.values() if each["status"] != "ok")


@pytest.mark.qemu
def test_the_facts_of_qemu_are_those_that_it_tells():
    facts = qemu_facts()
    assert {"pc", "q35", "microvm"} <= set(facts.machines)
    assert "Supported" not in facts.machines
    assert set(facts.ivshmem_devices) == {"ivshmem-plain", "ivshmem-doorbell"}
    assert "tcg" in facts.accelerators
    assert qemu_facts() is facts


def test_a_machine_without_qemu_works_and_says_what_to_install(capsys, monkeypatch, tmp_path):
    (tmp_path / "python3").symlink_to(Path(shutil.which("python3") or ""))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulatorNotFoundError):
        qemu_facts()
    found = findings(capsys)
    assert found["real QEMU"]["status"] == "warn"
    assert "apt install qemu-system-x86" in found["real QEMU"]["remedy"]
    assert "KVM" not in found
    assert main(["doctor"]) == 0
    assert re.search(r"^! real QEMU +\S.*\n +→ everything else works", capsys.readouterr().out, re.MULTILINE)


def test_a_qemu_that_does_not_answer_is_told(capsys, monkeypatch, tmp_path):
    broken = tmp_path / QEMU_PROGRAM
    broken.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "ended with status 1 and no version ('broken')" in findings(capsys)["real QEMU"]["found"]


def test_what_is_needed_and_does_not_work_fails(capsys, monkeypatch, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "ivshmem-lab").mkdir()
    (tmp_path / "ivshmem-lab").chmod(0o755)  # open to others
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    found = findings(capsys, 1)
    assert found["runtime directory"]["status"] == "fail"
    assert "XDG_RUNTIME_DIR" in found["runtime directory"]["remedy"]
