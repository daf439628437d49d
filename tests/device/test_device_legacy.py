"""Revision 0: what a guest reads before and after the memory is attached, and when the line is raised."""

from __future__ import annotations

import json

import pytest

from ivshmem_lab.device.effects import MapBar, RingDoorbell, SendMsi, SetIntx
from ivshmem_lab.device.legacy import LegacyIvshmem
from ivshmem_lab.device.pci import COMMAND
from ivshmem_lab.errors import DeviceError, SnapshotMismatchError

MIB = 1 << 20
MASK, STATUS, POSITION, DOORBELL = 0, 4, 8, 12
INTX_DISABLE = 0x400
UP, DOWN = (SetIntx(True),), (SetIntx(False),)


def intx() -> LegacyIvshmem:
    device = LegacyIvshmem(MIB, server=True, msi=False)
    device.attach(3)
    device.write_bar(0, MASK, 4, 0xFFFFFFFF)
    return device


def test_revision_0_has_a_pin_and_msi_x_only_with_a_server_and_msi() -> None:
    for server, msi, has_msix in (
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (False, False, False),
    ):
        device = LegacyIvshmem(MIB, server=server, msi=msi, vectors=2)
        assert (device.read_config(8, 1), device.read_config(0x3D, 1)) == (0, 1)
        assert (device.msix is not None) == has_msix
        assert bool(device.read_config(0x34, 1)) == has_msix


def test_the_position_is_minus_one_and_bar_2_empty_until_the_memory_is_attached() -> None:
    device = LegacyIvshmem(MIB, server=True)
    device.write_config(0x18, 4, 0xE0000000)
    assert device.write_config(COMMAND, 2, 2) == ()
    assert device.read_bar(0, POSITION, 4) == 0xFFFFFFFF
    assert device.attach(7) == (MapBar(2, 0xE0000000),)
    assert device.read_bar(0, POSITION, 4) == 7
    device.reset()
    assert device.read_bar(0, POSITION, 4) == 7
    assert LegacyIvshmem(MIB, server=False).read_bar(0, POSITION, 4) == 0


def test_the_line_follows_status_and_mask() -> None:
    device = intx()
    assert device.interrupt(5) == UP
    assert device.interrupt(0) == ()
    assert device.read_config(6, 2) & 8
    assert (device.peek(STATUS), device.after_read()) == (1, ())
    assert (device.read_bar(0, STATUS, 4), device.after_read()) == (1, DOWN)
    assert not device.read_config(6, 2) & 8
    device.write_bar(0, MASK, 4, 0)
    assert device.interrupt(0) == ()
    assert device.write_bar(0, MASK, 4, 1) == UP
    assert device.write_bar(0, STATUS, 4, 0) == DOWN


def test_the_disable_bit_holds_the_line_down_and_keeps_the_status() -> None:
    device = intx()
    device.interrupt(0)
    assert device.write_config(COMMAND, 2, INTX_DISABLE) == DOWN
    assert device.read_config(6, 2) & 8
    assert device.write_config(COMMAND, 2, 0) == UP
    assert device.reset() == DOWN


def test_with_msi_there_is_no_intx() -> None:
    device = LegacyIvshmem(MIB, server=True)
    device.write_config(COMMAND, 2, 4)
    device.write_config(0x42, 2, 0x8000)
    device.write_bar(0, MASK, 4, 1)
    assert device.write_bar(0, STATUS, 4, 1) == ()
    device.write_bar(1, 0, 4, 0xFEE00000)
    device.write_bar(1, 8, 4, 0x41)
    device.write_bar(1, 12, 4, 0)
    assert device.interrupt(0) == (SendMsi(0xFEE00000, 0x41),)


def test_the_doorbell_rings_without_msi_x_too() -> None:
    device = intx()
    device.peer_vector(9, 0)
    assert device.write_bar(0, DOORBELL, 4, 9 << 16) == (RingDoorbell(9, 0),)


def test_a_raised_line_arrives_raised() -> None:
    source, target = intx(), intx()
    source.interrupt(0)
    state = json.loads(json.dumps(source.snapshot()))
    assert target.restore(state) == UP
    assert target.snapshot() == source.snapshot()
    with pytest.raises(SnapshotMismatchError, match="msi is False there and True here"):
        LegacyIvshmem(MIB, server=True, msi=True, vectors=1).restore(state)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DeviceError, match="ioeventfd/irqfd requires MSI"):
        LegacyIvshmem(MIB, server=True, msi=False, ioeventfd=True)
    with pytest.raises(DeviceError, match="use64=off"):
        LegacyIvshmem(1 << 32, server=True, use64=False)


def test_its_repr_tells_that_there_is_no_memory_yet() -> None:
    text = repr(LegacyIvshmem(MIB, server=True, msi=False))
    assert "revision 0" in text
    assert "no memory attached yet" in text
    assert "INTx: line low" in text
