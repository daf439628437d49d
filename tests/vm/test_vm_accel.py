"""Accelerators that work: seen on real QEMU, whatever /dev/kvm says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.errors import UsageError, VmError
from ivshmem_lab.lab.lab import Lab
from ivshmem_lab.vm import accel

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize("kind", ["polling", "bare-metal"])
def test_tcg_works_for_bare_metal_guests(kind: str) -> None:
    finding = accel.probe("tcg", kind)
    assert (finding.works, finding.reason) == (True, "")
    assert str(finding) == f"tcg for {kind} guests: works"
    assert accel.probe("tcg", kind) is finding, "it is asked once"


def test_kvm_is_used_exactly_where_a_guest_of_the_kind_ran_under_it() -> None:
    finding = accel.probe("kvm", "bare-metal")
    assert accel.choose("auto", "bare-metal") == ("kvm" if finding.works else "tcg")
    with Lab() as lab:
        assert _accelerator(lab, "auto") == ("kvm" if finding.works else "tcg")
        assert _accelerator(lab, "tcg") == "tcg"
        if finding.works:
            assert _accelerator(lab, "kvm") == "kvm"
        else:
            with pytest.raises(VmError) as raised:
                lab.vm("refused", emulator="qemu", accel="kvm")
            assert finding.reason in str(raised.value)
            assert 'use accel="tcg"' in str(raised.value)
            lab.vm("refused", emulator="qemu").close()


def _accelerator(lab: Lab, asked: str) -> str:
    vm = lab.vm("probed", emulator="qemu", accel=asked)
    vm.start()
    words = vm.argv
    vm.close()
    return words[words.index("-accel") + 1]


def test_a_guest_that_ends_early_is_no_accelerator_that_works(tmp_path: Path) -> None:
    """A kernel that is not there: QEMU says so, and that is the reason."""
    finding = accel.probe("tcg", "linux", tmp_path / "vmlinux")
    assert not finding.works
    assert finding.reason.startswith("QEMU ended with status 1")
    assert "could not load kernel" in finding.reason or "could not open kernel" in finding.reason


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(UsageError, match="'hvf' for 'linux' guests cannot be probed; there are tcg, kvm and polling"):
        accel.probe("hvf", "linux")
    with pytest.raises(UsageError, match="a Linux guest is probed with its kernel"):
        accel.probe("tcg", "linux")
    with Lab() as lab:
        with pytest.raises(UsageError, match="accel 'hvf' is unknown; there are 'tcg', 'kvm', 'auto'"):
            lab.vm("alice", accel="hvf")
        with pytest.raises(UsageError, match='accel="kvm" goes with emulator="qemu"'):
            lab.vm("alice", accel="kvm")
