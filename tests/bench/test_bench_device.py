"""The device's bench gives its two figures and refuses what makes no sense."""

from __future__ import annotations

import json

import pytest

from ivshmem_lab.bench.device import main


def test_it_measures_the_pure_device_and_a_guest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--accesses", "2000", "--rounds", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["accesses"], result["rounds"]) == (2000, 3)
    assert result["pure_accesses_per_s"] > 0
    assert result["guest_mmio_us"] > 0


@pytest.mark.parametrize("wrong", [["--accesses", "0"], ["--rounds", "0"], ["--accesses", "many"], ["--peers", "2"]])
def test_a_wrong_call_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert "ivshmem-lab bench device" in capsys.readouterr().err
