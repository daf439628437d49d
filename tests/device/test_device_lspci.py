"""``lspci`` (pciutils), which knows nothing of us, reads each personality's configuration space."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from ivshmem_lab.device.ivshmem import Ivshmem
from ivshmem_lab.device.legacy import LegacyIvshmem
from ivshmem_lab.device.pci import COMMAND

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20
NAME = "04:00.0 RAM memory [0500]: Red Hat, Inc. Inter-VM shared memory [1af4:1110]"
REGISTERS = "Region 0: Memory at e0000000 (32-bit, non-prefetchable)"
TABLE = "Region 1: Memory at e0001000 (32-bit, non-prefetchable)"
MSIX = (
    "Capabilities: [40] MSI-X: Enable+ Count=3 Masked-",
    "Vector table: BAR=1 offset=00000000",
    "PBA: BAR=1 offset=00000800",
)


def lspci(device: Ivshmem, path: Path) -> str:
    """Program the BARs, then let it read a dump in the format of ``lspci -x``."""
    device.write_config(0x10, 4, 0xE0000000)
    if device.msix:
        device.write_config(0x14, 4, 0xE0001000)
        device.write_config(0x42, 2, 0x8000)
    device.write_config(0x18, 4, 0)
    device.write_config(0x1C, 4, 1)
    device.write_config(COMMAND, 2, 6)
    config = device.config_bytes()
    rows = [f"{at:02x}: {config[at : at + 16].hex(' ')}" for at in range(0, 256, 16)]
    path.write_text("04:00.0 device\n" + "\n".join(rows) + "\n\n")
    program = shutil.which("lspci")
    assert program is not None, "pciutils is listed in tests/apt.txt"
    done = subprocess.run(
        [program, "-vv", "-nn", "-F", str(path)], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout


@pytest.mark.parametrize(
    ("device", "revision", "lines", "absent"),
    [
        (Ivshmem(MIB), 1, (), ("Region 1", "MSI-X", "Interrupt: pin")),
        (Ivshmem(MIB, vectors=3), 1, (TABLE, *MSIX), ("Interrupt: pin",)),
        (LegacyIvshmem(MIB, server=True, vectors=3), 0, (TABLE, *MSIX, "Interrupt: pin A"), ()),
        (LegacyIvshmem(MIB, server=True, msi=False), 0, ("Interrupt: pin A",), ("Region 1", "MSI-X")),
    ],
    ids=["plain", "doorbell", "legacy", "legacy with INTx"],
)
def test_lspci_names_the_device_and_finds_bars_and_msi_x(
    device: Ivshmem, revision: int, lines: tuple[str, ...], absent: tuple[str, ...], tmp_path: Path
) -> None:
    text = lspci(device, tmp_path / "dump")
    assert text.startswith(NAME)
    assert ("(rev 01)" in text) == bool(revision)
    memory = "Region 2: Memory at 100000000 (64-bit, prefetchable)"
    for line in (REGISTERS, memory, "Control: I/O- Mem+ BusMaster+", *lines):
        assert line in text
    for line in absent:
        assert line not in text
