"""The doorbell's cost on every emulator and accelerator that works; each ring arrives."""

from __future__ import annotations

import json

import pytest

from ivshmem_lab import cli
from ivshmem_lab.vm.accel import probe

pytestmark = pytest.mark.qemu


def test_every_combination_that_works_has_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "doorbell", "--writes", "200", "--runs", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    kvm = probe("kvm", "polling")
    kinds = ["unicorn", "tcg", *(["kvm"] if kvm.works else [])]
    assert [(case["accelerator"], case["ioeventfd"]) for case in result["cases"]] == [
        (kind, ioeventfd) for kind in kinds for ioeventfd in ("on", "off")
    ]
    assert result["kvm"] == ("works" if kvm.works else kvm.reason)
    assert set(result["off_to_on"]) == set(kinds)
    assert result["machine"]["qemu"]


@pytest.mark.parametrize("arguments", [["--writes", "99"], ["--runs", "0"], ["--nope"]])
def test_a_wrong_call_is_refused_in_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "doorbell", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "doorbell", "--help"]) == 0
    assert "example: ivshmem-lab bench doorbell --json" in capsys.readouterr().out
